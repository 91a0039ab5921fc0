"""What a run adds to its settings, and which of them may continue it."""

import pytest

from grpo_actors.config import load_config
from grpo_actors.errors import ConfigError
from grpo_actors.rundir.claim import with_rewards
from grpo_actors.tasks.registry import load_task


def resolved(*overrides):
    config = load_config(None, ["task=arithmetic", *overrides]).config
    return with_rewards(config, load_task(config.data, seed=0))


@pytest.mark.parametrize(
    ("functions", "metric"),
    [
        ("{}", "accuracy"),
        ("{ correctness = 1.0, xml_count = 0.5 }", "accuracy"),
        ('{ correctness = 1.0, "mine.py:short" = 0.5 }', "reward"),
        ('{ correctness = 1.0, "mine.py:short" = 0.0 }', "accuracy"),
        # It reads boxed answers, which the accuracy does not.
        ("{ math_verify = 1.0 }", "reward"),
    ],
)
def test_the_weighted_reward_decides_where_a_reward_of_the_users_counts(functions, metric):
    assert resolved(f"functions={functions}").evaluator.metric == metric
    assert resolved(f"functions={functions}", "metric=accuracy").evaluator.metric == "accuracy"


def test_a_reward_that_compares_with_true_answers_is_refused_if_the_data_has_none(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"question": "a"}\n{"question": "b"}\n')
    data = ("task=dataset", f"path={path}")
    with pytest.raises(
        ConfigError, match=r"reward.functions: correctness compares with true answers, and the data"
    ):
        resolved(*data)
    assert resolved(*data, "functions={ soft_format = 1.0 }").evaluator.metric == "accuracy"


def test_the_metric_may_be_one_reward_function_of_the_run():
    assert resolved("metric=strict_format").evaluator.metric == "strict_format"
    with pytest.raises(
        ConfigError, match=r"evaluator.metric: must be one of accuracy, reward, .*, got speed"
    ):
        resolved("metric=speed")
    with pytest.raises(ConfigError, match=r"evaluator.metric must be one of accuracy, reward, integer"):
        load_config(None, ["functions={ integer = 1.0 }", "metric=correctness"])
