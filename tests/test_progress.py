"""How long work may take."""

import pytest

from grpo_actors.progress import LOADING_S, LOST_S, Pace, scoring_patience_s


@pytest.mark.parametrize(
    ("steps_s", "patience_s"),
    [
        ([], LOADING_S),  # the first step may compile
        ([300.0], 3000.0),
        ([1.0, 300.0, 2.0], 120.0),  # ten times the median are 20 s
        ([20.0, 60.0, 30.0], 300.0),
    ],
)
def test_a_step_may_take_ten_times_the_median_and_two_minutes(steps_s, patience_s):
    pace = Pace()
    for step_s in steps_s:
        pace.add(step_s)
    assert pace.patience_s == patience_s


def test_a_loop_that_calls_a_reward_may_be_silent_as_long_as_the_reward():
    assert scoring_patience_s(1.0) == LOST_S == 120
    assert scoring_patience_s(200.0) == 205
