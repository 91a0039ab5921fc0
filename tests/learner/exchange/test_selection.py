"""What the selection counts, learns and reports."""

import pytest

from grpo_actors.learner.exchange.selection import Selection, likely_cause
from grpo_actors.learner.groups import SampledGroup
from grpo_actors.schedule.curriculum import Curriculum
from grpo_actors.schedule.group_criteria import NOT_FILTERED, FilterResult, GroupCriteria
from grpo_actors.schedule.lease import Consumption, Settled
from grpo_actors.tasks.task import Problem

WRONG = FilterResult(0.0, "no_signal")
GROUP = SampledGroup(0, 0, Problem("p", (), ""), [1], "w", [])


def selection(**more) -> Selection:
    return Selection(lambda position: (0, Problem(f"p{position % 3}", (), "")), **more)


@pytest.mark.parametrize(
    ("success", "signal", "flaw"),
    [
        (0.5, True, ""),
        (0.5, False, "no_signal"),
        (0.1, True, "too_hard"),
        (0.9, False, "too_easy"),
        (0.25, True, ""),
        (0.75, True, ""),
    ],
)
def test_a_group_is_judged_by_its_success_and_then_by_its_signal(success, signal, flaw):
    criteria = GroupCriteria(dynamic_sampling=True, min_success=0.25, max_success=0.75)
    assert criteria.filter_group(success, signal=signal) == FilterResult(success, flaw)


def test_without_dynamic_sampling_a_missing_signal_is_no_flaw():
    criteria = GroupCriteria(dynamic_sampling=False, min_success=0.25, max_success=0.75)
    assert criteria.filter_group(0.5, signal=False) == FilterResult(0.5, "")


def test_features_that_are_off_are_not_measured():
    everything = selection()
    assert not everything.skips(0)
    assert everything.filter_group(GROUP) is NOT_FILTERED
    assert selection(group_filter=lambda _: WRONG).filter_group(GROUP) is WRONG
    assert everything.success_rates() == {}
    assert everything.metrics() == {
        "groups_passed_over": None,
        "groups_resampled": 0,
        "problems_skipped": None,
    }


def test_metrics_are_those_of_the_last_update():
    chosen = selection(group_filter=lambda _: NOT_FILTERED, curriculum=Curriculum(0, 0.25))
    assert chosen.metrics() == {"groups_passed_over": {}, "groups_resampled": 0, "problems_skipped": 0}
    settled = [
        Settled(0, WRONG, False),
        Settled(1, FilterResult(1.0, "too_easy"), False),
        Settled(2, NOT_FILTERED, True),
    ]
    assert chosen.settle(Consumption(settled, skipped=4, outdated=5)) is None
    assert chosen.metrics() == {
        "groups_passed_over": {"no_signal": 1, "too_easy": 1},
        "groups_resampled": 5,
        "problems_skipped": 4,
    }


def test_the_curriculum_learns_from_what_trained_and_from_what_was_passed_over():
    chosen = selection(curriculum=Curriculum(0, 0.25))
    unknown = Settled(2, NOT_FILTERED, True)
    chosen.settle(Consumption([Settled(0, WRONG, False), Settled(1, FilterResult(0.5), True), unknown]))
    assert chosen.success_rates() == {"p0": 0.0, "p1": 0.5}


def test_a_problem_that_is_never_solved_is_skipped_in_all_but_a_floor_of_the_epochs():
    chosen = Selection(lambda position: (position, Problem("p", (), "")), curriculum=Curriculum(0, 0.25))
    assert not chosen.skips(0), "its rate is unknown"
    chosen.settle(Consumption([Settled(0, WRONG, True)]))
    assert sum(chosen.skips(epoch) for epoch in range(4)) == 3


def test_the_alarm_at_the_refill_limit_is_given_once_in_a_row():
    chosen = selection()
    at_limit = Consumption([Settled(0, WRONG, False), Settled(2, WRONG, False), Settled(1, WRONG, True)])
    assert chosen.settle(at_limit) == (
        "2 groups were passed over for one update (selection.refill_limit), and flawed ones now train as they are; "
        "no completion is right: too hard for this model, cut by rollout.max_new_tokens, or in another form"
    )
    assert chosen.alarm is not None
    assert chosen.settle(at_limit) is None
    assert chosen.alarm is None
    assert chosen.settle(Consumption([Settled(2, NOT_FILTERED, True)])) is None
    assert chosen.settle(at_limit) is not None


@pytest.mark.parametrize(
    ("shares", "flaw", "cause"),
    [
        ([0.0, 0.0], "no_signal", "no completion is right"),
        ([None, 0.04], "no_signal", "no completion is right"),
        ([1.0, 1.0], "no_signal", "all completions are right"),
        ([0.0, 0.5], "no_signal", "right and wrong completions are worth the same"),
        ([0.05], "no_signal", "right and wrong completions are worth the same"),  # no longer few
        ([0.95], "no_signal", "right and wrong completions are worth the same"),
        ([0.0, 0.5], "too_hard", "problems are solved nearly always or nearly never"),
        ([0.0, 1.0], "no_signal", "problems are solved nearly always or nearly never"),
    ],
)
def test_the_likely_cause_is_read_off_the_shares_of_right_completions(shares, flaw, cause):
    assert likely_cause([FilterResult(share, flaw) for share in shares]).startswith(cause)
