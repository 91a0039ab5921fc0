"""What rewards may log: kept as plain values within bounds, and checked on both sides of their process."""

import numpy as np
import pytest

from grpo_actors.errors import RewardError
from grpo_actors.tasks.own.logs import (
    MAX_COLUMNS,
    MAX_METRICS,
    MAX_NAME_CHARACTERS,
    MAX_VALUE_CHARACTERS,
    MAX_VALUES,
    Logs,
)
from grpo_actors.tasks.scoring import Scorer
from grpo_actors.tasks.task import Problem
from grpo_actors.wire import messages as wire

PROBLEM = Problem("p", ({"role": "user", "content": "1+1?"},), "2", {})


def kept(value):
    logs = Logs(1)
    logs.log_extra("it", [value])
    return logs.extra["it"][0]


@pytest.mark.parametrize("value", ["a", 3, 2.5, True, None])
def test_texts_numbers_flags_and_none_are_kept_as_they_are(value):
    assert kept(value) == value
    assert type(kept(value)) is type(value)


def test_a_value_of_numpy_is_a_number_and_any_other_object_its_text():
    assert (kept(np.float32(0.5)), kept(np.int64(7)), kept(np.bool_(1))) == (0.5, 7, True)
    assert kept([1, "x"]) == "[1, 'x']"
    assert kept(2**60) == str(2**60), "too large for many a reader of JSON"
    assert kept(float("nan")) is None


def test_texts_are_cut_and_hold_whole_characters():
    logs = Logs(1)
    logs.log_extra(2 * MAX_NAME_CHARACTERS * "n", [2 * MAX_VALUE_CHARACTERS * "v"])
    assert logs.extra == {MAX_NAME_CHARACTERS * "n": [MAX_VALUE_CHARACTERS * "v"]}
    assert kept("half \ud83d") == "half ?"


def test_a_column_that_is_logged_again_is_replaced_and_a_metric_keeps_all_its_values():
    logs = Logs(2)
    for values in ([1, 2], [3, 4]):
        logs.log_extra("column", values)
        logs.log_metric("metric", values[0])
    logs.log_metric("metric", float("inf"))
    assert (logs.extra, logs.metrics) == ({"column": [3, 4]}, {"metric": [1.0, 3.0]})


def test_what_cannot_be_kept_is_refused_by_name():
    logs = Logs(2)
    with pytest.raises(RewardError, match="'column' must have a value for each of 2 completions, got 3"):
        logs.log_extra("column", [1, 2, 3])
    with pytest.raises(RewardError, match="'metric' must be a number, got 'high'"):
        logs.log_metric("metric", "high")


def full():
    logs = Logs(2)
    for number in range(MAX_COLUMNS):
        logs.log_extra(f"column {number}", 2 * [MAX_VALUE_CHARACTERS * "€"])
    for number in range(MAX_METRICS):
        logs.log_metric(f"metric {number}", 1.0)
    for _ in range(MAX_VALUES - 1):
        logs.log_metric("metric 0", 1.0)
    return logs


def test_there_is_a_bound_on_columns_metrics_and_values():
    logs = full()
    for refused, log, value in (
        ("there may be 16 columns, got 'more' too", logs.log_extra, [1, 2]),
        ("there may be 64 names, got 'more' too", logs.log_metric, 1.0),
    ):
        with pytest.raises(RewardError, match=refused):
            log("more", value)
    with pytest.raises(RewardError, match="'metric 0' may have 4096 values for a group"):
        logs.log_metric("metric 0", 1.0)


def test_the_most_that_may_be_logged_fits_into_a_message():
    logs = full()
    one = wire.Completion(
        tokens=wire.ints([1]),
        logprobs=wire.floats([0.0]),
        versions=wire.ints([0]),
        finished=True,
        rewards={},
        extra={column: values[0] for column, values in logs.extra.items()},
    )
    sent = wire.Group(
        lease=0, attempt=1, token=0, completions=[one], sampling_s=0, scoring_s=0, logged=logs.metrics
    )
    assert wire.decode(wire.from_peer, wire.encode(sent)) == sent


@pytest.mark.parametrize("reply", [{"extra": 3}, {"metrics": {"m": 1.0}}, {"metrics": {"m": ["x"]}}])
def test_the_reply_of_a_reward_s_process_is_checked_again(reply):
    with pytest.raises(RewardError):
        Logs(2).add(reply)


def test_rewards_of_one_group_log_together_and_a_wrong_call_fails_its_reward_alone(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def one(completions, log_extra, log_metric, **columns):\n"
        "    log_extra('seen', completions)\n"
        "    log_metric('mean', 0.5)\n"
        "    return [1.0] * len(completions)\n"
        "async def other(completions, log_metric, **columns):\n"
        "    log_metric('mean', 1.5)\n"
        "    return [2.0] * len(completions)\n"
        "def wrong(completions, log_extra, **columns):\n"
        "    log_extra('few', [])\n"
        "    return [3.0] * len(completions)\n"
    )
    names = {name: f"{tmp_path}/mine.py:{name}" for name in ("one", "other", "wrong")}
    problem = Problem("p", PROBLEM.messages, "2", {}, text_prompt=True)
    with Scorer(dict.fromkeys(names.values(), 1.0), timeout_s=60) as scorer:
        scores = [scorer.score(problem, ["a", "b"]) for _ in range(2)]
    for one in scores:  # nothing of the first call is in the second
        assert one.logs.extra == {"seen": ["a", "b"]}
        assert one.logs.metrics == {"mean": [0.5, 1.5]}
        assert one.rewards == {names["one"]: [1.0] * 2, names["other"]: [2.0] * 2, names["wrong"]: [None] * 2}
        assert list(one.failures) == [names["wrong"]]
        assert (
            "log_extra: 'few' must have a value for each of 2 completions, got 0"
            in one.failures[names["wrong"]]
        )
