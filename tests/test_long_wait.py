"""When a wait is explained."""

from grpo_actors.long_wait import LongWait

SILENT = ["rollout-0 is silent"]


def lines(wait: LongWait, times_s, reasons=SILENT) -> list[str]:
    return [line for now_s in times_s if (line := wait.explain(now_s, reasons)) is not None]


def test_the_reason_is_given_after_half_a_minute_and_then_each_time_the_wait_has_doubled():
    assert lines(LongWait("no update"), range(1000, 1400)) == [
        f"no update for {waited_s} s: rollout-0 is silent" for waited_s in (30, 60, 120, 240)
    ]


def test_what_comes_ends_the_wait():
    wait = LongWait("no update")
    assert lines(wait, range(29)) == []
    wait.end()
    assert lines(wait, range(29, 59)) == []
    assert lines(wait, [59]) == ["no update for 30 s: rollout-0 is silent"]


def test_a_wait_without_a_reason_is_not_explained_until_it_has_one():
    wait = LongWait("no update")
    assert lines(wait, range(1000), []) == []
    assert lines(wait, [1000]) == ["no update for 1000 s: rollout-0 is silent"]


def test_all_reasons_are_named():
    wait = LongWait("no update")
    wait.explain(0.0, [])
    assert wait.explain(30.0, [*SILENT, "learner starts"]) == (
        "no update for 30 s: rollout-0 is silent; learner starts"
    )
