import pytest
from pydantic import ValidationError

from grpo_actors.config import (
    OWNER,
    SECTIONS,
    Config,
    LearnerConfig,
    ObjectiveConfig,
    RewardConfig,
    RolloutConfig,
)
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
