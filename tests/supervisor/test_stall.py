"""When a run that stands still says why."""

from grpo_actors.supervisor.stall import Stall

SILENT = {"rollout-0": "is silent"}


def lines(stall: Stall, times_s, troubles=SILENT) -> list[str]:
    return [line for now_s in times_s if (line := stall.explain(now_s, troubles)) is not None]


def test_the_reason_is_given_after_half_a_minute_and_then_each_time_the_wait_has_doubled():
    assert lines(Stall(), range(1000, 1400)) == [
        f"no update for {waited_s} s: rollout-0 is silent" for waited_s in (30, 60, 120, 240)
    ]


def test_an_update_ends_the_wait():
    stall = Stall()
    assert lines(stall, range(29)) == []
    stall.end()
    assert lines(stall, range(29, 59)) == []
    assert lines(stall, [59]) == ["no update for 30 s: rollout-0 is silent"]


def test_an_update_that_takes_long_while_all_work_is_no_stall():
    assert lines(Stall(), range(1000), {}) == []


def test_all_troubles_are_named():
    stall = Stall()
    stall.explain(0.0, {})
    assert stall.explain(30.0, {**SILENT, "learner": "starts"}) == (
        "no update for 30 s: rollout-0 is silent; learner starts"
    )
