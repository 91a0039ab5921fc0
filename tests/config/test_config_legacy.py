import pytest

from grpo_actors.config import Config, load_config
from grpo_actors.errors import ConfigError

# Every key that MLX-GRPO's files use, each with a value that is not this program's default.
FLAT = {
    "model_name": ("model", '"Qwen/Qwen2.5-1.5B-Instruct"'),
    "output_dir": ("run", '"outputs/flat"'),
    "run_name": ("run", '"flat"'),
    "learning_rate": ("learner", "5e-6"),
    "num_epochs": ("learner", "3"),
    "batch_size": ("learner", "2"),
    "gradient_accumulation_steps": ("learner", "8"),
    "max_train_samples": ("data", "500"),
    "warmup_ratio": ("learner", "0.05"),
    "max_grad_norm": ("learner", "0.1"),
    "num_generations": ("rollout", "64"),
    "max_prompt_length": ("data", "256"),
    "max_new_tokens": ("rollout", "512"),
    "temperature": ("rollout", "0.7"),
    "clip_eps": ("objective", "0.1"),
    "kl_coeff": ("objective", "0.04"),
    "adam_beta1": ("learner", "0.8"),
    "adam_beta2": ("learner", "0.95"),
    "weight_decay": ("learner", "0.01"),
    "lr_scheduler_type": ("learner", '"linear"'),
    "logging_steps": ("metrics", "5"),
    "save_steps": ("run", "50"),
    "eval_every_updates": ("evaluator", "10"),
    "eval_subset_size": ("evaluator", "20"),
    "eval_max_new_tokens": ("evaluator", "64"),
    "seed": ("run", "42"),
    "use_compile": ("learner", "false"),
    "quantize_for_rollouts": ("rollout", "true"),
    "log_jsonl": ("metrics", "false"),
}


@pytest.fixture
def load(tmp_path):
    def _load(text, *overrides):
        path = tmp_path / "flat.toml"
        path.write_text(text)
        loaded = load_config(path, overrides)
        # The first note only says that the file is flat.
        notes = [note.removeprefix(f"{path}: ") for note in loaded.notes if "flat keys" not in note]
        return loaded.config, notes

    return _load


@pytest.mark.parametrize("head", ["", "[mlx_grpo]\n"])
def test_every_flat_key_reaches_the_section_that_owns_it(load, head):
    config, notes = load(head + "\n".join(f"{key} = {value}" for key, (_, value) in FLAT.items()))
    default = Config()
    for key, (section, _) in FLAT.items():
        assert getattr(getattr(config, section), key) != getattr(getattr(default, section), key), key
    assert config.rollout.num_generations == 64
    assert config.model.model_name == "Qwen/Qwen2.5-1.5B-Instruct"
    assert notes == []


def test_a_flat_file_trains_gsm8k_with_the_tasks_own_rewards(load):
    config, _ = load("num_generations = 64")
    assert (config.data.task, config.reward.functions) == ("gsm8k", {})


def test_flat_keys_and_sections_may_share_a_file(load):
    config, _ = load("seed = 3\n[rollout]\ntop_k = 5\n[mlx_grpo]\nclip_eps = 0.1")
    assert (config.run.seed, config.rollout.top_k, config.objective.clip_eps) == (3, 5, 0.1)


def test_a_note_says_that_a_file_is_flat(tmp_path):
    path = tmp_path / "flat.toml"
    path.write_text("seed = 3")
    (note,) = load_config(path).notes
    assert note == f"{path}: flat keys of MLX-GRPO; keys that it leaves out have this program's defaults"


@pytest.mark.parametrize(
    ("text", "limit", "note"),
    [
        (
            "max_completion_length = 1024",
            1024,
            "max_completion_length = 1024 (an older name) is read as max_new_tokens = 1024",
        ),
        (
            "max_completion_length = 1024\nmax_new_tokens = 512",
            512,
            "max_completion_length = 1024 is ignored: max_new_tokens = 512 wins",
        ),
    ],
)
def test_max_new_tokens_wins_over_its_older_name(load, text, limit, note):
    config, notes = load(text)
    assert (config.rollout.max_new_tokens, notes) == (limit, [note])


def test_eval_subset_size_wins_over_its_older_name(load):
    assert load("eval_samples = 50")[0].evaluator.eval_subset_size == 50
    config, notes = load("eval_samples = 50\neval_subset_size = 20")
    assert (config.evaluator.eval_subset_size, notes) == (
        20,
        ["eval_samples = 50 is ignored: eval_subset_size = 20 wins"],
    )


@pytest.mark.parametrize(
    ("text", "overrides", "every", "note"),
    [
        # 50 micro-steps at 4 an update (the default): 12 whole updates
        (
            "eval_steps = 50",
            [],
            12,
            "eval_steps = 50 (micro-steps, 4 in an update) is read as eval_every_updates = 12",
        ),
        # 50 // 8 = 6
        (
            "eval_steps = 50\ngradient_accumulation_steps = 8",
            [],
            6,
            "eval_steps = 50 (micro-steps, 8 in an update) is read as eval_every_updates = 6",
        ),
        # --set decides how many micro-steps an update has: 50 // 2 = 25
        (
            "eval_steps = 50\ngradient_accumulation_steps = 8",
            ["gradient_accumulation_steps=2"],
            25,
            "eval_steps = 50 (micro-steps, 2 in an update) is read as eval_every_updates = 25",
        ),
        (
            "eval_steps = 50\ngradient_accumulation_steps = 1",
            [],
            50,
            "eval_steps = 50 (micro-steps, 1 in an update) is read as eval_every_updates = 50",
        ),
        # 3 // 4 = 0 would mean off: evaluate after every update instead
        (
            "eval_steps = 3",
            [],
            1,
            "eval_steps = 3 (micro-steps, 4 in an update) is read as eval_every_updates = 1",
        ),
        (
            "eval_steps = 0",
            [],
            0,
            "eval_steps = 0 (micro-steps, 4 in an update) is read as eval_every_updates = 0",
        ),
        (
            "eval_steps = 50\neval_every_updates = 7",
            [],
            7,
            "eval_steps = 50 is ignored: eval_every_updates = 7 wins",
        ),
    ],
)
def test_eval_steps_counts_micro_steps(load, text, overrides, every, note):
    config, notes = load(text, *overrides)
    assert (config.evaluator.eval_every_updates, notes) == (every, [note])


def test_an_older_name_on_the_command_line_beats_the_file(load):
    config, _ = load("max_new_tokens = 512", "max_completion_length=64")
    assert config.rollout.max_new_tokens == 64


@pytest.mark.parametrize("value", ["-1", "2.5", "true", '"50"'])
def test_an_unusable_eval_steps_is_refused_under_its_own_name(load, value):
    with pytest.raises(ConfigError, match="eval_steps must be a whole number ≥ 0, got"):
        load(f"eval_steps = {value}")


@pytest.mark.parametrize("value", ["0", "2.5", '"4"'])
def test_an_unusable_number_of_micro_steps_is_refused_where_it_is_given(load, value):
    with pytest.raises(ConfigError, match=r"gradient_accumulation_steps must be a whole number ≥ 1, got"):
        load(f"eval_steps = 50\ngradient_accumulation_steps = {value}")


@pytest.mark.parametrize("key", ["max_completion_length", "rollout.max_completion_length"])
def test_an_older_name_is_understood_in_its_section_too_in_the_file_and_with_set(load, key):
    read = "max_completion_length = 7 (an older name) is read as max_new_tokens = 7"
    for config, notes in (load(f"{key} = 7"), load("", f"{key}=7")):
        assert config.rollout.max_new_tokens == 7
        assert notes[-1].removeprefix("--set: ") == read


def test_an_older_name_in_another_section_gets_the_present_one(load):
    with pytest.raises(ConfigError, match=r"did you mean rollout\.max_new_tokens\?"):
        load("[data]\nmax_completion_length = 7")
