import sys
from pathlib import Path

import pytest

from grpo_actors.config import Config, LearnerConfig, RolloutConfig, load_config, read_config
from grpo_actors.config.load import SHIPPED_CONFIGS, find_config
from grpo_actors.config.schema import OWNER
from grpo_actors.errors import ConfigError


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a file into an otherwise empty working folder."""
    monkeypatch.chdir(tmp_path)

    def _write(text, name="mine.toml"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return name

    return _write


def refusal(path, *overrides):
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_without_a_file_everything_is_default():
    loaded = load_config(None)
    assert loaded.config == Config()
    assert set(loaded.origins.values()) == {"default"}
    assert loaded.notes == []


def test_set_beats_the_file_and_the_file_beats_the_default(write):
    loaded = load_config(write("[rollout]\ntop_k = 5\ntop_p = 0.5"), ["top_p=0.9"])
    assert (loaded.config.rollout.top_k, loaded.config.rollout.top_p) == (5, 0.9)
    origins = loaded.origins
    assert [origins[f"rollout.{key}"] for key in ("top_k", "top_p", "min_p")] == [
        "mine.toml",
        "--set",
        "default",
    ]


@pytest.mark.parametrize(("name", "shipped"), [("quickstart", "quickstart.toml"), ("prod.toml", "prod.toml")])
def test_a_shipped_file_needs_no_suffix(name, shipped):
    assert find_config(name).samefile(SHIPPED_CONFIGS / shipped)


@pytest.mark.parametrize(
    ("override", "section", "leaf", "value"),
    [
        ("num_generations=32", "rollout", "num_generations", 32),
        ("rollout.num_generations=32", "rollout", "num_generations", 32),
        ("mlx_grpo.num_generations=32", "rollout", "num_generations", 32),
        (" num_generations = 32 ", "rollout", "num_generations", 32),
        ("learning_rate=1e-5", "learner", "learning_rate", 1e-5),
        ("temperature=1", "rollout", "temperature", 1.0),
        ('stop=["a", "b"]', "rollout", "stop", ("a", "b")),
        ("functions={correct = 2}", "reward", "functions", {"correct": 2.0}),
        ("model_name=foo/bar", "model", "model_name", "foo/bar"),
        ('model_name="foo/bar"', "model", "model_name", "foo/bar"),
        ("workers=auto", "rollout", "workers", "auto"),
        ("workers=2", "rollout", "workers", 2),
        ("run_name=42", "run", "run_name", "42"),
        ("run_name=a=b", "run", "run_name", "a=b"),
        ("run_name=1\nseed = 3", "run", "run_name", "1\nseed = 3"),
        ("system_prompt=", "data", "system_prompt", ""),
        ("use_compile=false", "learner", "use_compile", False),
    ],
)
def test_set_takes_toml_values_and_bare_text(override, section, leaf, value):
    config = load_config(None, [override]).config
    assert getattr(getattr(config, section), leaf) == value


def test_the_last_set_wins():
    assert load_config(None, ["seed=1", "run.seed=2"]).config.run.seed == 2


def test_a_file_is_looked_up_as_given_then_in_configs_then_among_the_shipped(write):
    where = {}
    for name in ("configs/prod.toml", "prod.toml"):
        write("run.seed = 5", name)
        where[name] = load_config("prod.toml").origins["run.seed"]
    assert where == {"configs/prod.toml": "configs/prod.toml", "prod.toml": "prod.toml"}
    shipped = load_config("quickstart.toml").origins["data.task"]
    assert shipped.endswith("configs/quickstart.toml")


def test_a_missing_file_is_answered_with_the_files_that_exist(write):
    write("", "configs/mine.toml")
    text = refusal("qickstart.toml")
    assert text.startswith("qickstart.toml: no such file; did you mean quickstart.toml?")
    assert "mine.toml" in text
    assert "prod.toml" in text


def test_a_byte_order_mark_is_no_error(write):
    assert load_config(write("\ufeffseed = 3")).config.run.seed == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[rollout]\ntop_k = 5\ntop_p = \n", "mine.toml: not TOML: Invalid value (at line 3, column 9)"),
        (b"run_name = '\xff'", "mine.toml: must be UTF-8, got byte 0xff"),
        ("[rollout]\ntop_p = 0", "mine.toml: rollout.top_p must be a finite number > 0 and ≤ 1, got 0"),
        ("top_p = 0", "mine.toml: rollout.top_p must be a finite number > 0 and ≤ 1, got 0"),
        ("min_p = 1.0", "mine.toml: rollout.min_p must be a finite number ≥ 0 and < 1, got 1.0"),
        ("warmup_ratio = 1", "mine.toml: learner.warmup_ratio must be a finite number ≥ 0 and < 1, got 1"),
        ("lora_rank = 0", "mine.toml: model.lora_rank must be a whole number ≥ 1, got 0"),
        ("save_steps = -1", "mine.toml: run.save_steps must be a whole number ≥ 0, got -1"),
        (
            "eval_every_updates = 2.5",
            "mine.toml: evaluator.eval_every_updates must be a whole number ≥ 0, got 2.5",
        ),
        ('top_k = "5"', 'mine.toml: rollout.top_k must be a whole number ≥ 0, got "5"'),
        ("top_k = true", "mine.toml: rollout.top_k must be a whole number ≥ 0, got true"),
        ("workers = 'many'", 'mine.toml: rollout.workers must be a whole number ≥ 0 or "auto", got "many"'),
        ("workers = -1", 'mine.toml: rollout.workers must be a whole number ≥ 0 or "auto", got -1'),
        ("use_compile = 1", "mine.toml: learner.use_compile must be true or false, got 1"),
        ("learning_rate = nan", "mine.toml: learner.learning_rate must be a finite number ≥ 0, got nan"),
        ("model_name = ''", 'mine.toml: model.model_name must be text in quotes, not empty, got ""'),
        (
            "run_name = 2024-01-01",
            "mine.toml: run.run_name must be text in quotes, not empty, got 2024-01-01",
        ),
        ("stop = 'a'", 'mine.toml: rollout.stop must be a list of texts, none empty, got "a"'),
        ("stop = ['a', 1]", "mine.toml: rollout.stop must be a list of texts, none empty, got 1 at [1]"),
        ("gym_settings = 3", "mine.toml: data.gym_settings must be a table of settings, got 3"),
        (
            "[reward.functions]\ncorrect = inf",
            'mine.toml: reward.functions must be a table of name = finite weight, got inf at ["correct"]',
        ),
        (
            "task = 'gsm'",
            'mine.toml: data.task must be one of "gsm8k", "arithmetic", "dataset", "reasoning_gym", got "gsm"; did you mean "gsm8k"?',
        ),
        (
            "temperature = 0.0",
            (
                "mine.toml: rollout.temperature must be a finite number > 0 "
                "(greedy completions of one problem are all the same), got 0.0"
            ),
        ),
        (
            "top_k = -1\nseed = -1",
            "mine.toml: run.seed must be a whole number ≥ 0 and < 9223372036854775808, got -1 (and 1 more)",
        ),
        ("rollout = 3", "mine.toml: rollout must be a table ([rollout]), got 3"),
        ("[rolout]\ntop_k = 5", "mine.toml: [rolout] is not a section; did you mean rollout?"),
        ("[rollout]\ntop_q = 5", "mine.toml: rollout.top_q is not a setting; did you mean top_p?"),
        ("[learner]\ntop_k = 5", "mine.toml: learner.top_k is not a setting; did you mean rollout.top_k?"),
        ("tempreature = 1", "mine.toml: tempreature is not a setting; did you mean temperature?"),
        ("xyz = 1", "mine.toml: xyz is not a setting"),
        (
            "top_k = 5\n[rollout]\ntop_k = 6",
            "mine.toml: top_k and rollout.top_k are one setting, given twice; keep one of them",
        ),
        (
            "top_k = 5\n[mlx_grpo]\ntop_k = 5",
            "mine.toml: top_k and mlx_grpo.top_k are one setting, given twice; keep one of them",
        ),
    ],
)
def test_an_unusable_file_is_refused_with_place_rule_and_value(write, text, expected):
    assert refusal(write(text)) == expected


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("foo", "--set: must be key=value, got foo"),
        (
            'trackers=["mlflow"]',
            '--set: metrics.trackers must be a list of "tensorboard", "wandb", "trackio", got "mlflow" at [0]',
        ),
        ("learner=3", "--set: learner is a section; name one of its settings, as learner.KEY"),
        ("use_compile=yes", '--set: learner.use_compile must be true or false, got "yes"'),
        ("num_generations=lots", '--set: rollout.num_generations must be a whole number ≥ 1, got "lots"'),
    ],
)
def test_an_unusable_set_is_refused(override, expected):
    assert refusal(None, override) == expected


@pytest.mark.skipif(sys.platform != "linux", reason="a file of which every read fails")
def test_a_file_that_cannot_be_read_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("mine.toml", "config.json"):
        Path(name).symlink_to("/proc/self/mem")
        assert refusal(name) == f"{name}: cannot be read: Input/output error"


def test_arguments_of_a_call_beat_all_others():
    loaded = load_config(None, ["top_k=5", "top_p=0.5"], {"top_k": 6, "rollout.min_p": 0.1})
    rollout = loaded.config.rollout
    assert (rollout.top_k, rollout.top_p, rollout.min_p) == (6, 0.5, 0.1)
    assert [loaded.origins[f"rollout.{leaf}"] for leaf in ("top_k", "top_p")] == ["argument", "--set"]


def test_a_long_value_is_cut_in_an_error():
    text = refusal(None, "top_k=" + "x" * 1000)
    assert len(text) < 200


def test_settings_without_effect_are_noted_only_where_the_user_set_them():
    assert load_config(None, ["lora_rank=4", "fine_tune_type=lora"]).notes == []
    assert load_config(None, ["lora_rank=4"]).notes == [
        'model.lora_rank has no effect: fine_tune_type is "full"',
    ]


def test_a_higher_clip_below_the_lower_one_is_allowed_and_noted():
    (note,) = load_config(None, ["clip_eps_high=0.1"]).notes
    assert note.startswith("objective.clip_eps_high = 0.1 lies below clip_eps = 0.2")


def test_the_stored_configuration_is_read_back(tmp_path):
    config = Config(rollout=RolloutConfig(stop=("a",)), learner=LearnerConfig(learning_rate=1))
    stored = tmp_path / "config.json"
    stored.write_text(config.model_dump_json())
    assert read_config(stored) == config


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "not JSON: EOF while parsing an object at line 1 column 1"),
        ('{"rollout": {"top_k": -1}}', "rollout.top_k must be a whole number ≥ 0, got -1"),
        ('{"rollout": {"top_q": 1}}', "rollout.top_q is not a setting"),
        ('{"rollout": 1}', "rollout must be a table, got 1"),
        (
            '{"rollout": {"num_generations": 1}}',
            "rollout.num_generations must be at least 2 (a group of one has no baseline), got 1",
        ),
    ],
)
def test_a_damaged_stored_configuration_is_refused(tmp_path, text, expected):
    stored = tmp_path / "config.json"
    stored.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_config(stored)
    assert str(caught.value) == f"{stored}: {expected}"


def test_a_missing_stored_configuration_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json: cannot be read: No such file"):
        read_config(tmp_path / "config.json")


# --- a run folder's config.json -------------------------------------------------------------------


@pytest.fixture
def save(write):
    """Save a configuration as a run folder keeps it."""
    return lambda *overrides: write(
        load_config(None, overrides).config.model_dump_json(indent=2), "config.json"
    )


def test_a_saved_configuration_loads_back_the_same(save):
    loaded = load_config(save("algorithm=dapo", "stop=['a']", "functions={x=1}", "system_prompt=s"))
    assert loaded.config == read_config(Path("config.json"))
    assert set(loaded.origins.values()) == {"config.json", "default"}


def test_an_algorithm_that_is_set_beats_a_saved_configuration(save):
    objective = load_config(save("algorithm=dapo"), ["algorithm=gspo"]).config.objective
    assert (objective.loss, objective.clip_eps, objective.clip_eps_high) == ("gspo", 3e-4, 4e-4)


def test_of_saved_settings_none_was_written_by_hand(save):
    # Most settings have no effect under some other setting; only settings written by the user get a note.
    assert load_config(save()).notes == []
    (note,) = load_config(save(), ["lora_rank=4"]).notes
    assert note.startswith("model.lora_rank has no effect")


@pytest.mark.parametrize("text", ["[1]", '{"run": 1}', '{"run": {"seed": 1}, "data": 3}', "{", "nonsense"])
def test_json_that_is_no_configuration_is_one_line(write, text):
    assert refusal(write(text, "config.json")).startswith("config.json: ")


def test_a_template_file_is_read_once_and_its_text_is_the_setting(tmp_path):
    file = tmp_path / "chat.jinja"
    file.write_text("{{ messages }}é")
    for given in (str(file), "{{ messages }}é"):
        assert load_config(None, [f"chat_template={given}"]).config.data.chat_template == "{{ messages }}é"
    assert load_config(None, ["chat_template=rag"]).config.data.chat_template == "rag"
    for missing in ("nowhere.jinja", "nowhere.j2", "no/where"):
        assert refusal(None, f"chat_template={missing}").startswith(
            f"--set: data.chat_template: {missing} cannot be read: No such file"
        )
    file.write_bytes(b"\xff")
    assert refusal(None, f"chat_template={file}") == (
        f"--set: data.chat_template: {file} cannot be read: not UTF-8"
    )


# --- single entries of a table, and Python's spellings ---------------------------------------------


def test_one_entry_of_a_table_is_set_and_the_others_of_the_file_stay(write):
    path = write("[reward.functions]\ncorrectness = 1.0\n'my.py:f' = 0.5\n")

    def functions(*overrides):
        return load_config(path, overrides).config.reward.functions

    assert functions("reward.functions.correctness=2") == {"correctness": 2.0, "my.py:f": 0.5}
    # The name of a function has dots of its own, and a shell may leave its quotes.
    two = ("functions.my.py:f=.25", 'reward.functions."other.py:g"=3')
    assert functions(*two) == {"correctness": 1.0, "my.py:f": 0.25, "other.py:g": 3.0}
    assert functions("functions={only=1}", "functions.too=2") == {"only": 1.0, "too": 2.0}
    assert refusal(path, "functions.correctness=much").startswith("--set: reward.functions must be a table")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("temperature=.5", 0.5),
        ("temperature=1.", 1.0),
        ("eval_sampled=True", True),
        ("use_compile=False", False),
    ],
)
def test_a_value_may_be_spelled_as_in_python(override, expected):
    config = load_config(None, [override]).config
    leaf = override.partition("=")[0]
    assert getattr(getattr(config, OWNER[leaf]), leaf) == expected
    assert load_config(None, ["run_name=.5"]).config.run.run_name == ".5"
    assert load_config(None, ["run_name=True"]).config.run.run_name == "True"


def test_the_run_folder_may_be_in_the_home_folder(write, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert load_config(None, ["output_dir=~/x"]).config.run.output_dir == "/home/me/x"
    assert load_config(write("run.output_dir = '~/x'")).config.run.output_dir == "/home/me/x"
