"""What a run adds to its settings, and which of them may continue it."""

import pytest
from checkpoint_files import write_checkpoint_files

from grpo_actors.config import load_config
from grpo_actors.errors import ConfigError, RunError
from grpo_actors.rundir.claim import check_resume, total_updates, with_rewards
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


def test_epochs_that_have_fewer_problems_than_one_update_are_refused():
    config = resolved("batch_size=8", "num_generations=4", "num_epochs=2")
    groups = config.groups_per_update
    assert total_updates(config, 5 * groups) == 10
    assert total_updates(resolved("batch_size=8", "num_generations=4", "max_updates=7"), 1) == 7
    with pytest.raises(ConfigError, match=r"learner\.num_epochs: 2 × 1 problems are fewer than the"):
        total_updates(config, 1)


@pytest.mark.parametrize(
    ("resume", "without", "with_checkpoint"),
    [("auto", None, None), ("must", "holds no checkpoint", None), ("never", None, "holds checkpoint-4")],
)
def test_whether_a_folder_may_hold_checkpoints_is_the_users_choice(
    tmp_path, resume, without, with_checkpoint
):
    config = resolved(f"resume={resume}")

    def refusal():
        try:
            check_resume(config, tmp_path)
        except RunError as error:
            return str(error)
        return None

    def is_as_expected(expected):
        found = refusal()
        return found is None if expected is None else expected in found

    assert is_as_expected(without)
    write_checkpoint_files(tmp_path, 4)
    assert is_as_expected(with_checkpoint)


def test_a_run_is_not_continued_by_a_replay_nor_a_replay_by_workers(tmp_path):
    write_checkpoint_files(tmp_path, 4, recording="")
    check_resume(resolved(), tmp_path)
    with pytest.raises(RunError, match="holds a live run, got a replay of groups"):
        check_resume(resolved(), tmp_path, recording="groups")
