import math

import pytest
from pydantic import ValidationError
from scores import MEASURE, report, score

from grpo_actors.score import Estimate, Report, best_of, verdict


@pytest.mark.parametrize(
    ("values", "best"),
    [
        ({}, None),
        ({0: 0.5}, 0),
        ({0: 0.5, 1: 0.5, 2: 0.25}, 0),
        ({0: 0.5, 1: 0.75, 2: 0.75, 3: 0.5}, 2),
        ({1: 0.25, 2: 0.125}, 1),
        ({0: -2.0, 1: -1.0}, 1),
    ],
)
def test_the_highest_score_is_the_best_and_a_tie_goes_to_the_base_model_and_then_to_the_newest(values, best):
    assert best_of({update: score(value) for update, value in values.items()}) == best


def test_what_differs_between_two_measures_is_named_with_both_values():
    assert MEASURE.changes(MEASURE) == ""
    later = MEASURE.model_copy(update={"max_new_tokens": 7, "temperature": 0.5})
    assert MEASURE.changes(later) == (
        f"temperature {MEASURE.temperature} → 0.5, max_new_tokens {MEASURE.max_new_tokens} → 7"
    )


def test_scores_that_were_measured_differently_are_never_compared():
    for change in ({"metric": "reward"}, {"digest": "e"}, {"temperature": 1.0}, {"weights": {"a": 1.0}}):
        with pytest.raises(AssertionError):
            score(1.0).beats(score(0.5, **change))


def test_a_measure_says_what_was_measured_and_how():
    assert str(MEASURE) == "accuracy, greedy, on 10 held-out problems"
    sampled = MEASURE.model_copy(update={"metric": "reward", "temperature": 0.7, "problems": 1319})
    assert str(sampled) == "reward, sampled at temperature 0.7, on 1,319 held-out problems"


def test_a_score_is_shown_with_its_interval():
    assert str(score(0.5)) == "0.500 [0.400, 0.600]"


@pytest.mark.parametrize(
    ("low", "high", "says"),
    [
        (0.01, 0.2, ", +0.100 [+0.010, +0.200]"),
        (-0.01, 0.2, ", +0.100 [-0.010, +0.200]: no difference that these problems show"),
        (0.0, 0.2, ", +0.100 [+0.000, +0.200]: no difference that these problems show"),
    ],
)
def test_a_gain_is_a_difference_only_if_its_interval_is_on_one_side_of_0(low, high, says):
    assert verdict(Estimate(value=0.1, low=low, high=high)) == says
    assert verdict(None) == ""


def many(count, value):
    return {f"n{number}": value for number in range(count)}


ESTIMATE = {"value": 0.5, "low": 0.4, "high": 0.6}


@pytest.mark.parametrize(
    "changes",
    [
        {"seconds": 0.0, "completion_length_mean": 0.0},
        {"rewards": many(64, 0.0), "by_source": many(64, ESTIMATE)},
        {"rewards": {"r" * 5000: 0.0}, "by_source": {"s" * 200: ESTIMATE}},
        {"reward": -3.0, "accuracy": 1.0, "sampled_accuracy": 0.0},
    ],
)
def test_a_report_within_its_bounds_is_read(changes):
    assert Report.model_validate(report().model_dump() | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"seconds": -0.5},
        {"completion_length_mean": -0.5},
        {"accuracy": 1.5},
        {"truncated_share": -0.5},
        {"rewards": many(65, 0.0)},
        {"by_source": many(65, ESTIMATE)},
        {"rewards": {"r" * 5001: 0.0}},
        {"by_source": {"s" * 201: ESTIMATE}},
        {"reward": math.nan},
        {"reward": "1.0"},
        {"unknown": 1},
    ],
    ids=lambda changes: str(changes)[:40],
)
def test_a_report_beyond_its_bounds_is_refused(changes):
    with pytest.raises(ValidationError):
        Report.model_validate(report().model_dump() | changes)


def test_a_score_never_changes():
    with pytest.raises(ValidationError, match="frozen"):
        score(0.5).value = 1.0
