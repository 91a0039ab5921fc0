import pytest
from pydantic import ValidationError

from grpo_actors.config import (
    OWNER,
    SECTIONS,
    Config,
    DataConfig,
    EvaluatorConfig,
    LearnerConfig,
    ObjectiveConfig,
    RewardConfig,
    RolloutConfig,
    SelectionConfig,
)
from grpo_actors.config.data import SourceConfig
from grpo_actors.config.wording import SHOWN_CHARACTERS, brief, rule_of


def every_field():
    return [
        (f"{name}.{leaf}", field)
        for name, section in SECTIONS.items()
        for leaf, field in section.model_fields.items()
    ]


def test_every_leaf_name_belongs_to_one_section():
    assert len(OWNER) == len(every_field())
    assert not OWNER.keys() & SECTIONS.keys()


@pytest.mark.parametrize(("key", "field"), every_field())
def test_every_setting_says_what_it_does_in_one_line(key, field):
    assert field.description, key
    assert "\n" not in field.description
    assert rule_of(field)  # and its rule can be put in words


def test_a_configuration_survives_json():
    config = Config(
        rollout=RolloutConfig(stop=("</answer>",), temperature=0.7, workers="auto"),
        reward=RewardConfig(functions={"my_rewards.py:short": 0.5}),
        objective=ObjectiveConfig(clip_eps_high=0.28),
    )
    assert Config.model_validate_json(config.model_dump_json()) == config


def test_a_configuration_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        Config().run.seed = 1


def test_groups_per_update_is_the_product_of_micro_batches():
    # 3 groups a micro-batch, 5 micro-batches an update
    config = Config(learner=LearnerConfig(batch_size=3, gradient_accumulation_steps=5))
    assert config.groups_per_update == 15


def test_a_micro_batch_has_room_for_its_groups_at_their_longest():
    # 3 groups of 5 completions of 7 tokens and one prompt of 11: 3 · (5 · 7 + 11)
    config = Config(
        learner=LearnerConfig(batch_size=3),
        rollout=RolloutConfig(num_generations=5, max_new_tokens=7),
        data=DataConfig(max_prompt_length=11),
    )
    assert config.micro_batch_tokens == 138


def test_what_follows_from_several_settings():
    def of(kind, name, **settings):
        return getattr(kind(**settings), name)

    assert of(RolloutConfig, "fewer_bits") is False
    assert of(RolloutConfig, "fewer_bits", kv_bits=4) is True
    assert of(RolloutConfig, "fewer_bits", quantize_for_rollouts=True) is True
    assert of(RolloutConfig, "runs_held") == 2
    assert of(RolloutConfig, "runs_held", in_flight_updates=True) == 3
    assert of(SelectionConfig, "replaces_groups") is False
    assert of(SelectionConfig, "replaces_groups", dynamic_sampling=True) is True
    assert of(SelectionConfig, "replaces_groups", min_success=0.5) is True
    assert of(SelectionConfig, "replaces_groups", max_success=0.5) is True
    assert of(LearnerConfig, "model_ranks", ranks=3) == 1
    assert of(LearnerConfig, "model_ranks", ranks=3, divide_model=True) == 3


A, B = SourceConfig(name="a", rewards=["x"]), SourceConfig(name="b", environment="calculator")


def test_the_sources_of_training_and_of_evaluation_have_their_rewards_and_environments():
    def config(sources=(), eval_sources=(), **data):
        sections = {"data": DataConfig(sources=sources, **data), "reward": RewardConfig(functions={"x": 1})}
        return Config(evaluator=EvaluatorConfig(eval_sources=eval_sources), **sections)

    both = config([A], [B])
    assert both.all_sources == (A, B)
    assert both.rewards_of_sources == {"a": ("x",)}
    assert both.environments == {"b": "calculator"}
    assert (both.data.title, config().data.title) == ("a mixture of a", "gsm8k")
    # Problems that come from no source have the environment of [data], and so has a source without its own.
    assert config(environment="e").environments == {"": "e"}
    assert config([A, B], environment="e").environments == {"a": "e", "b": "calculator"}
    assert config([], [B], environment="e").environments == {"": "e", "b": "calculator"}


def test_a_source_takes_from_the_data_what_it_leaves_out_but_no_place_of_another_task():
    data = DataConfig(task="dataset", path="p", revision="r", num_shots=2, sources=[A, B])
    plain = data.of(A)
    assert plain == DataConfig(task="dataset", path="p", revision="r", num_shots=2)
    assert data.of(SourceConfig(name="c", task="dataset", num_shots=0)) == DataConfig(
        task="dataset", path="p", revision="r"
    )
    assert data.of(SourceConfig(name="c", task="gsm8k")) == DataConfig(num_shots=2)
    assert data.of(SourceConfig(name="c", task="gsm8k", path="q")).path == "q"


def test_a_former_name_of_a_task_is_the_present_one():
    assert DataConfig(task="jsonl").task == "dataset"
    for wrong in (3, "csv"):
        with pytest.raises(ValidationError):
            DataConfig(task=wrong)


def test_a_whole_number_is_a_number_and_true_is_neither():
    assert RolloutConfig(temperature=1).temperature == 1.0
    for value in (True, "1"):
        with pytest.raises(ValidationError):
            RolloutConfig(temperature=value)
        with pytest.raises(ValidationError):
            RolloutConfig(top_k=value)


def test_a_value_in_an_error_is_whole_or_cut_where_its_line_would_be_too_long():
    fits = "x" * (SHOWN_CHARACTERS - 2)  # with its quotes
    assert brief(fits) == f'"{fits}"'
    assert brief(f"{fits}y") == f'"{fits}y …'


def test_a_checkpoint_is_due_at_multiples_of_both_periods_and_a_period_of_0_is_none():
    def due(save_steps, eval_every_updates):
        sections = {
            "run": {"save_steps": save_steps},
            "evaluator": {"eval_every_updates": eval_every_updates},
        }
        config = Config.model_validate(sections)
        return [update for update in range(1, 13) if config.saves_after(update)]

    assert due(4, 6) == [4, 6, 8, 12]
    assert due(0, 5) == [5, 10]
    assert due(0, 0) == []


#: A number that is not there for its size.
LITTLE = 1e-6


@pytest.mark.parametrize(
    ("key", "default", "allowed", "refused"),
    [
        ("run.seed", 0, (0, 2**63 - 1), (-1, 2**63)),
        ("run.save_steps", 100, (0,), (-1,)),
        ("run.keep_checkpoints", 3, (1,), (0,)),
        ("run.cuda_mps", True, (), ()),
        ("model.base_bits", 0, (), ()),
        ("model.lora_rank", 8, (1,), (0,)),
        ("model.lora_scale", 20.0, (LITTLE,), (0,)),
        ("model.lora_dropout", 0.0, (0, 1 - LITTLE), (-LITTLE, 1)),
        ("model.lora_layers", -1, (-1,), (-2,)),
        ("model.trust_remote_code", False, (), ()),
        ("data.mathematics", False, (), ()),
        ("data.gym_size", 2000, (1, 2**20), (0, 2**20 + 1)),
        ("data.gym_eval_size", 200, (1, 2**18), (0, 2**18 + 1)),
        ("data.num_shots", 0, (0, 3), (-1, 4)),
        ("data.max_train_samples", 0, (0,), (-1,)),
        ("data.max_prompt_length", 512, (1,), (0,)),
        ("data.eval_fraction", 0.1, (LITTLE, 1 - LITTLE), (0, 1)),
        ("data.shuffle", True, (), ()),
        ("reward.reward_timeout_s", 10.0, (LITTLE,), (0,)),
        ("reward.allow_code_execution", False, (), ()),
        ("reward.code_timeout_s", 4.0, (LITTLE, 60), (0, 60.000001)),
        ("reward.code_memory_gb", 1.0, (LITTLE,), (0,)),
        ("rollout.workers", 1, (0,), (-1,)),
        ("rollout.num_generations", 8, (1,), (0,)),
        ("rollout.max_new_tokens", 256, (1,), (0,)),
        ("rollout.think_tokens", 0, (0,), (-1,)),
        ("rollout.max_turns", 8, (1,), (0,)),
        ("rollout.temperature", 1.0, (LITTLE,), (0,)),
        ("rollout.top_p", 1.0, (LITTLE, 1), (0, 1 + LITTLE)),
        ("rollout.top_k", 0, (0,), (-1,)),
        ("rollout.min_p", 0.0, (0, 1 - LITTLE), (-LITTLE, 1)),
        ("rollout.repetition_penalty", 1.0, (LITTLE,), (0,)),
        ("rollout.batch_groups", 1, (1,), (0,)),
        ("rollout.rollout_ranks", 1, (1,), (0,)),
        ("rollout.max_kv_tokens", 0, (0,), (-1,)),
        ("rollout.max_staleness", 1, (0,), (-1,)),
        ("rollout.in_flight_updates", False, (), ()),
        ("rollout.quantize_for_rollouts", False, (), ()),
        ("rollout.rollout_bits", 4, (), ()),
        ("rollout.kv_bits", 0, (), ()),
        ("rollout.lease_timeout_s", 600.0, (LITTLE,), (0,)),
        ("selection.dynamic_sampling", False, (), ()),
        ("selection.min_success", 0.0, (0, 1), (-LITTLE, 1 + LITTLE)),
        ("selection.max_success", 1.0, (0, 1), (-LITTLE, 1 + LITTLE)),
        ("selection.refill_limit", 10, (1,), (0,)),
        ("selection.oversampling", 1.0, (1, 8), (1 - LITTLE, 8.000001)),
        ("selection.curriculum", False, (), ()),
        ("selection.curriculum_floor", 0.25, (LITTLE, 1), (0, 1 + LITTLE)),
        ("objective.clip_eps", 0.2, (LITTLE, 1 - LITTLE), (0, 1)),
        ("objective.clip_eps_high", None, (LITTLE,), (0,)),
        ("objective.clip_delta", 4.0, (1 + LITTLE,), (1,)),
        ("objective.dual_clip", 3.0, (1 + LITTLE,), (1,)),
        ("objective.cispo_cap", None, (1,), (1 - LITTLE,)),
        ("objective.sapo_tau_positive", 1.0, (LITTLE,), (0,)),
        ("objective.sapo_tau_negative", 1.05, (LITTLE,), (0,)),
        ("objective.kl_coeff", 0.0, (0,), (-LITTLE,)),
        ("objective.reference_refresh_updates", 0, (0,), (-1,)),
        ("objective.reference_refresh_alpha", 0.6, (LITTLE, 1), (0, 1 + LITTLE)),
        ("objective.correction_floor", 0.0, (0, 1), (-LITTLE, 1 + LITTLE)),
        ("objective.correction_cap", 3.0, (1,), (1 - LITTLE,)),
        ("objective.mask_truncated", False, (), ()),
        ("objective.overlong_tokens", 0, (0,), (-1,)),
        ("objective.entropy_coeff", 0.0, (), ()),
        ("objective.top_entropy_share", 1.0, (LITTLE, 1), (0, 1 + LITTLE)),
        ("learner.learning_rate", 1e-06, (0,), (-LITTLE,)),
        ("learner.num_epochs", 1, (1,), (0,)),
        ("learner.max_updates", 0, (0,), (-1,)),
        ("learner.batch_size", 1, (1,), (0,)),
        ("learner.gradient_accumulation_steps", 4, (1,), (0,)),
        ("learner.num_iterations", 1, (1,), (0,)),
        ("learner.warmup_ratio", 0.1, (0, 1 - LITTLE), (-LITTLE, 1)),
        ("learner.max_grad_norm", 1.0, (0,), (-LITTLE,)),
        ("learner.adam_beta1", 0.9, (0, 1 - LITTLE), (-LITTLE, 1)),
        ("learner.adam_beta2", 0.999, (0, 1 - LITTLE), (-LITTLE, 1)),
        ("learner.weight_decay", 0.0, (0,), (-LITTLE,)),
        ("learner.ranks", 1, (1,), (0,)),
        ("learner.divide_model", False, (), ()),
        ("learner.divide_gradient", False, (), ()),
        ("learner.use_compile", True, (), ()),
        ("learner.gradient_checkpointing", False, (), ()),
        ("learner.skip_zero_advantage", True, (), ()),
        ("evaluator.eval_every_updates", 25, (0,), (-1,)),
        ("evaluator.evaluator_device", "auto", (0,), (-1,)),
        ("evaluator.eval_subset_size", 200, (0,), (-1,)),
        ("evaluator.eval_max_new_tokens", 0, (0,), (-1,)),
        ("evaluator.eval_batch_size", 32, (1,), (0,)),
        ("evaluator.eval_temperature", 1.0, (LITTLE,), (0,)),
        ("evaluator.eval_sampled", False, (), ()),
        ("transport.port", 0, (0, 65533), (-1, 65534)),
        ("transport.insecure", False, (), ()),
        ("transport.events_text", False, (), ()),
        ("metrics.logging_steps", 1, (1,), (0,)),
        ("metrics.log_jsonl", True, (), ()),
        ("metrics.record_groups", False, (), ()),
        ("metrics.write_report", True, (), ()),
        ("metrics.log_completions", 1, (0,), (-1,)),
        ("health.patience_updates", 10, (1,), (0,)),
        ("health.max_kl", 1.0, (LITTLE,), (0,)),
        ("health.max_ratio", 100.0, (1 + LITTLE,), (1,)),
        ("health.max_logprob_gap", 0.1, (LITTLE,), (0,)),
        ("health.max_mismatch_kl", 0.05, (LITTLE,), (0,)),
        ("health.min_entropy", 0.005, (0,), (-LITTLE,)),
        ("health.max_length_growth", 4.0, (1 + LITTLE,), (1,)),
        ("health.max_truncated_share", 0.8, (LITTLE, 1), (0, 1 + LITTLE)),
        ("health.max_failed_share", 0.0, (0, 1 - LITTLE), (-LITTLE, 1)),
        ("health.max_skipped_steps", 3, (1,), (0,)),
    ],
)
def test_a_number_has_its_default_and_its_bounds_and_a_switch_its_position(key, default, allowed, refused):
    section, leaf = key.split(".")
    kind = SECTIONS[section]
    assert getattr(kind(), leaf) == default
    for value in allowed:
        assert getattr(kind(**{leaf: value}), leaf) == value
    for value in refused:
        with pytest.raises(ValidationError, match=leaf):
            kind(**{leaf: value})


@pytest.mark.parametrize("value", [(0, 3), ()])
def test_numbers_of_gpus_count_from_0(value):
    for kind, leaf in ((RolloutConfig, "rollout_devices"), (LearnerConfig, "learner_devices")):
        assert getattr(kind(**{leaf: list(value)}), leaf) == value
        with pytest.raises(ValidationError, match=leaf):
            kind(**{leaf: [*value, -1]})


@pytest.mark.parametrize(
    ("leaf", "allowed", "refused"),
    [
        ("weight", (LITTLE,), (0,)),
        ("gym_size", (1, 2**20), (0, 2**20 + 1)),
        ("gym_eval_size", (1, 2**18), (0, 2**18 + 1)),
        ("num_shots", (0, 3), (-1, 4)),
        ("max_train_samples", (0,), (-1,)),
        ("eval_fraction", (LITTLE, 1 - LITTLE), (0, 1)),
        ("name", ("x" * 100,), ("", "x" * 101, "a/b")),
    ],
)
def test_a_source_has_the_bounds_of_the_data_and_no_value_of_its_own(leaf, allowed, refused):
    given = {"name": "a"}
    for value in allowed:
        assert getattr(SourceConfig(**given | {leaf: value}), leaf) == value
    for value in refused:
        with pytest.raises(ValidationError, match=leaf):
            SourceConfig(**given | {leaf: value})
    if leaf != "name":
        assert getattr(SourceConfig(**given), leaf) is None
