"""The number of workers against scripted machines: what an update takes with n workers is a table."""

import random
from collections.abc import Callable, Iterator
from dataclasses import asdict

import pytest

from grpo_actors.observe.text import headcount_line
from grpo_actors.rundir.decisions import Decision
from grpo_actors.supervisor.headcount import Headcount, Measurement

#: Tokens of one update, whoever sampled them.
TOKENS = 10_000
#: Updates after which whatever is not settled never will be: at most 2 skipped + 3 blocks of 8, for each of 8 numbers.
ENOUGH = 300


def update(update_s: float, train_s: float) -> Measurement:
    """One update, of which the learner trains for `train_s` and waits for the rest."""
    return Measurement(update_s, 1 - train_s / update_s, TOKENS / update_s)


def climb(
    seconds: Callable[[int], float], *, train_s: float, room: int = 8, start: int = 1
) -> Iterator[tuple[int, Decision]]:
    """(update, decision) of a whole run; a worker that was asked for delivers at once."""
    headcount = Headcount(start)
    for number in range(ENOUGH):
        measured = update(seconds(headcount.workers), train_s)
        decision = headcount.measured(measured, at_work=headcount.workers, room=lambda: room)
        if decision is not None:
            yield number, decision
            assert headcount.workers == decision.workers
        if headcount.loading:
            headcount.arrived()
    assert headcount.settled
    assert headcount.kept == headcount.workers


def said(decision: Decision) -> str:
    """As the supervisor says it."""
    return headcount_line(asdict(decision))


def numbers(decisions: Iterator[tuple[int, Decision]]) -> list[int]:
    return [decision.workers for _, decision in decisions]


def on_a_gpu(workers: int) -> float:
    """Seconds of an update of 100k tokens where one worker decodes 11.9k/s, two 21.8k, three and more 30.6k.

    8.4, 4.6, 3.3, 3.3: the second gives 21.8 / 11.9 = 1.83 times the rate, the third 1.40, the fourth 1.00.
    """
    return 100 / {1: 11.9, 2: 21.8}.get(workers, 30.6)


def test_where_each_process_is_bound_by_launches_it_settles_at_three():
    decisions = [said(decision) for _, decision in climb(on_a_gpu, train_s=1.0)]
    # The learner waits 1 - 1 / 8.40 = 88 %, then 78 %, then 69 %.
    assert decisions == [
        "rollout workers: 1 → 2 (the learner waits 88% of an update of 8.40 s)",
        "rollout workers: 2 → 3 (one worker more gave 1.83 times the rate; the learner waits 78% of an update of 4.59 s)",
        "rollout workers: 3 → 4 (one worker more gave 1.40 times the rate; the learner waits 69% of an update of 3.27 s)",
        "rollout workers: 4 → 3 (one worker more gave 1.00 times the rate)",
    ]


def test_where_a_second_worker_takes_the_first_ones_core_it_is_sent_home():
    # 1.95 updates/s with one worker, 1.77 with two.
    seconds = {1: 1 / 1.95, 2: 1 / 1.77}
    decisions = [decision for _, decision in climb(seconds.__getitem__, train_s=0.25)]
    assert [decision.workers for decision in decisions] == [2, 1]
    assert decisions[1].reason == "one worker more gave 0.91 times the rate"


def test_a_learner_that_hardly_waits_has_workers_enough():
    # It waits 1 - 0.92 = 8 % of its time.
    ((_, decision),) = climb(lambda _: 1.0, train_s=0.92)
    assert said(decision) == "rollout workers: 1, settled (the learner waits 8% of an update of 1.00 s)"


def test_no_worker_is_added_without_room():
    ((_, decision),) = climb(on_a_gpu, train_s=1.0, room=1)
    assert said(decision).endswith("an update of 8.40 s, and there is room for no more)")
    assert numbers(climb(on_a_gpu, train_s=1.0, room=2)) == [2, 2]


def test_it_begins_with_the_number_it_is_given():
    assert numbers(climb(on_a_gpu, train_s=1.0, start=3)) == [4, 3]


@pytest.mark.parametrize("seed", range(40))
def test_noise_of_ten_percent_changes_no_outcome_and_makes_nothing_oscillate(seed):
    noise = random.Random(seed)

    def noisy(seconds: Callable[[int], float]) -> Callable[[int], float]:
        return lambda workers: seconds(workers) * noise.uniform(0.9, 1.1)

    # A number is tried once: up by ones, then one down.
    assert numbers(climb(noisy(on_a_gpu), train_s=1.0)) == [2, 3, 4, 3]
    assert numbers(climb(noisy(lambda _: 2.0), train_s=0.5)) == [2, 1]


def test_one_long_pause_within_a_window_decides_nothing():
    def paused() -> Callable[[int], float]:
        times = iter(
            [1.0] * 6 + [60.0] + [1.0] * ENOUGH
        )  # an evaluation, say, while the first one is measured
        return lambda workers: next(times) / workers

    # Rates rise by 2, 3/2 and 4/3; with 4 the learner waits 1 - 0.24 / 0.25 = 4 %.
    assert numbers(climb(paused(), train_s=0.24)) == [2, 3, 4, 4]


def test_workers_whose_batches_end_together_are_rated_by_their_mean():
    """Three at once make one update of 2.8 s and two of 0.1 s: the median is 0.1 s, the mean 1.0 s."""

    def in_step() -> Callable[[int], float]:
        place = 0

        def seconds(workers: int) -> float:
            nonlocal place
            place += 1
            # Sampling takes as long as before for each: n workers on one core.
            return workers - 0.1 * (workers - 1) if place % workers == 0 else 0.1

        return seconds

    assert numbers(climb(in_step(), train_s=0.1)) == [2, 1]


def test_the_first_updates_and_those_after_a_change_are_not_measured():
    # Two skipped, then three blocks of four; after the second one's arrival the same, in blocks of a multiple of two.
    times = [number for number, _ in climb(lambda _: 1.0, train_s=0.5)]
    assert times == [13, 27]


def test_short_updates_are_measured_for_three_seconds():
    # Blocks of at least 1 s: 10 updates of 0.1 s each and one of rounding, so 2 + 3 × 10 or 11.
    (first, _), *_ = climb(lambda _: 0.1, train_s=0.05)
    assert 2 + 3 * 10 - 1 <= first <= 2 + 3 * 11 - 1


def feed(headcount: Headcount, count: int, at_work: int = 1) -> list[Decision]:
    decided = (headcount.measured(update(1.0, 0.5), at_work=at_work, room=lambda: 8) for _ in range(count))
    return [decision for decision in decided if decision is not None]


def test_a_worker_that_joins_by_hand_restarts_the_window():
    headcount = Headcount(1)
    assert feed(headcount, 13) == []
    assert headcount.disturbed() is None
    assert feed(headcount, 13, at_work=2) == []
    assert len(feed(headcount, 1, at_work=2)) == 1


def test_a_worker_that_loads_its_model_is_waited_for():
    headcount = Headcount(1)
    feed(headcount, 14)
    assert headcount.loading
    assert feed(headcount, ENOUGH) == []
    headcount.arrived()
    assert len(feed(headcount, 14, at_work=2)) == 1


def test_a_trial_that_others_disturb_is_void_and_held_again():
    headcount = Headcount(1)
    feed(headcount, 14)
    headcount.arrived()
    decision = headcount.disturbed()
    assert (decision.before, decision.workers, headcount.settled) == (2, 1, False)
    (again,) = feed(headcount, 14)
    assert again.workers == 2


def test_after_a_death_the_rest_is_the_most():
    headcount = Headcount(3)
    assert said(headcount.died("was ended by signal 9")) == (
        "rollout workers: 3 → 2 (a worker was ended by signal 9)"
    )
    assert feed(headcount, ENOUGH, at_work=2) == []
    assert headcount.kept == 2
