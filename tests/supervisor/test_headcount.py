"""Test the number of workers on simulated machines: a table gives the time of an update with n workers."""

import random
from collections.abc import Callable, Iterator
from dataclasses import asdict

import pytest

from grpo_actors.observe.text import headcount_line
from grpo_actors.rundir.decisions import Decision
from grpo_actors.supervisor.headcount import Headcount, Measurement

#: Tokens of one update, by all workers together.
TOKENS = 10_000
#: Updates after which the number must be settled: at most 2 skipped + 3 blocks of 8, for each of 8 numbers.
ENOUGH = 300


def update(update_s: float, train_s: float) -> Measurement:
    """Make the measurement of an update in which the learner trains for `train_s` and waits for the rest."""
    return Measurement(update_s, 1 - train_s / update_s, TOKENS / update_s)


def climb(
    seconds: Callable[[int], float], *, train_s: float, room: int = 8, start: int = 1
) -> Iterator[tuple[int, Decision]]:
    """Yield (update, decision) of a whole run in which a new worker delivers at once."""
    headcount = Headcount(start)
    for number in range(ENOUGH):
        measured = update(seconds(headcount.workers), train_s)
        decision = headcount.record_update(measured, active=headcount.workers, room=lambda: room)
        if decision is not None:
            yield number, decision
            assert headcount.workers == decision.workers
        if headcount.loading:
            headcount.trial_started()
    assert headcount.settled
    assert headcount.kept == headcount.workers


def line(decision: Decision) -> str:
    """Format a decision as the supervisor does."""
    return headcount_line(asdict(decision))


def numbers(decisions: Iterator[tuple[int, Decision]]) -> list[int]:
    return [decision.workers for _, decision in decisions]


def on_a_gpu(workers: int) -> float:
    """Return the seconds of an update of 100k tokens: one worker decodes 11.9k/s, two 21.8k, three and more 30.6k.

    That is 8.4, 4.6, 3.3, 3.3 s: the second gives 21.8 / 11.9 = 1.83 times the rate, the third 1.40, the fourth 1.00.
    """
    return 100 / {1: 11.9, 2: 21.8}.get(workers, 30.6)


def test_it_settles_at_three_workers_if_each_is_bound_by_kernel_launches():
    decisions = [line(decision) for _, decision in climb(on_a_gpu, train_s=1.0)]
    # The learner waits 1 - 1 / 8.40 = 88 %, then 78 %, then 69 %.
    assert decisions == [
        "rollout workers: 1 → 2 (the learner waits 88% of an update of 8.40 s)",
        "rollout workers: 2 → 3 (one worker more gave 1.83 times the rate; the learner waits 78% of an update of 4.59 s)",
        "rollout workers: 3 → 4 (one worker more gave 1.40 times the rate; the learner waits 69% of an update of 3.27 s)",
        "rollout workers: 4 → 3 (one worker more gave 1.00 times the rate)",
    ]


def test_a_second_worker_that_takes_the_first_ones_core_is_stopped():
    # 1.95 updates/s with one worker, 1.77 with two.
    seconds = {1: 1 / 1.95, 2: 1 / 1.77}
    decisions = [decision for _, decision in climb(seconds.__getitem__, train_s=0.25)]
    assert [decision.workers for decision in decisions] == [2, 1]
    assert decisions[1].reason == "one worker more gave 0.91 times the rate"


def test_no_worker_is_added_if_the_learner_hardly_waits():
    # It waits 1 - 0.92 = 8 % of its time.
    ((_, decision),) = climb(lambda _: 1.0, train_s=0.92)
    assert line(decision) == "rollout workers: 1, settled (the learner waits 8% of an update of 1.00 s)"


def test_no_worker_is_added_without_room():
    ((_, decision),) = climb(on_a_gpu, train_s=1.0, room=1)
    assert line(decision).endswith("an update of 8.40 s, and there is room for no more)")
    assert numbers(climb(on_a_gpu, train_s=1.0, room=2)) == [2, 2]


def test_it_starts_from_the_given_number():
    assert numbers(climb(on_a_gpu, train_s=1.0, start=3)) == [4, 3]


@pytest.mark.parametrize("seed", range(40))
def test_noise_of_ten_percent_changes_no_outcome_and_makes_nothing_oscillate(seed):
    noise = random.Random(seed)

    def noisy(seconds: Callable[[int], float]) -> Callable[[int], float]:
        return lambda workers: seconds(workers) * noise.uniform(0.9, 1.1)

    # Each number is tried once: up in steps of one, then one down.
    assert numbers(climb(noisy(on_a_gpu), train_s=1.0)) == [2, 3, 4, 3]
    assert numbers(climb(noisy(lambda _: 2.0), train_s=0.5)) == [2, 1]


def test_one_long_pause_within_a_window_decides_nothing():
    def paused() -> Callable[[int], float]:
        # For example an evaluation while the first worker is measured.
        times = iter([1.0] * 6 + [60.0] + [1.0] * ENOUGH)
        return lambda workers: next(times) / workers

    # Rates rise by 2, 3/2 and 4/3; with 4 the learner waits 1 - 0.24 / 0.25 = 4 %.
    assert numbers(climb(paused(), train_s=0.24)) == [2, 3, 4, 4]


def test_workers_whose_batches_end_together_are_rated_by_their_mean():
    """Three workers at once make one update of 2.8 s and two of 0.1 s: the median is 0.1 s, the mean 1.0 s."""

    def in_step() -> Callable[[int], float]:
        updates = 0

        def seconds(workers: int) -> float:
            nonlocal updates
            updates += 1
            # n workers on one core: each batch takes n times as long.
            return workers - 0.1 * (workers - 1) if updates % workers == 0 else 0.1

        return seconds

    assert numbers(climb(in_step(), train_s=0.1)) == [2, 1]


def test_the_first_updates_and_those_after_a_change_are_not_measured():
    # Two skipped, then three blocks of four. The same with the second worker, in blocks of a multiple of two.
    times = [number for number, _ in climb(lambda _: 1.0, train_s=0.5)]
    assert times == [13, 27]


def test_short_updates_are_measured_for_three_seconds():
    # Blocks of at least 1 s: 10 updates of 0.1 s each, or 11 by rounding. So 2 + 3 × 10 to 2 + 3 × 11.
    (first, _), *_ = climb(lambda _: 0.1, train_s=0.05)
    assert 2 + 3 * 10 - 1 <= first <= 2 + 3 * 11 - 1


def feed(headcount: Headcount, count: int, active: int = 1) -> list[Decision]:
    decided = (headcount.record_update(update(1.0, 0.5), active=active, room=lambda: 8) for _ in range(count))
    return [decision for decision in decided if decision is not None]


def test_a_worker_that_joins_by_hand_restarts_the_window():
    headcount = Headcount(1)
    assert feed(headcount, 13) == []
    assert headcount.workers_changed() is None
    assert feed(headcount, 13, active=2) == []
    assert len(feed(headcount, 1, active=2)) == 1


def test_a_window_ends_also_if_no_worker_is_known_to_deliver():
    assert len(feed(Headcount(1), 14, active=0)) == 1


@pytest.mark.parametrize(("tokens_per_s", "workers"), [(0.0, 1), (0.5, 2)])
def test_no_worker_is_added_where_no_token_arrives(tokens_per_s, workers):
    headcount = Headcount(1)
    measured = Measurement(1.0, 0.9, tokens_per_s)
    for _ in range(14):
        headcount.record_update(measured, active=1, room=lambda: 8)
    assert headcount.workers == workers
    assert headcount.settled == (workers == 1)


def test_nothing_is_measured_while_the_worker_on_trial_loads_its_model():
    headcount = Headcount(1)
    feed(headcount, 14)
    assert headcount.loading
    assert (headcount.workers, headcount.kept) == (2, 1)
    assert feed(headcount, ENOUGH) == []
    headcount.trial_started()
    assert len(feed(headcount, 14, active=2)) == 1


def test_a_trial_during_which_another_worker_joins_or_leaves_is_repeated():
    headcount = Headcount(1)
    feed(headcount, 14)
    headcount.trial_started()
    decision = headcount.workers_changed()
    assert (decision.before, decision.workers, headcount.settled) == (2, 1, False)
    (again,) = feed(headcount, 14)
    assert again.workers == 2


def test_after_a_death_it_settles_at_the_remaining_workers():
    headcount = Headcount(3)
    assert line(headcount.worker_died("was ended by signal 9")) == (
        "rollout workers: 3 → 2 (a worker was ended by signal 9)"
    )
    assert feed(headcount, ENOUGH, active=2) == []
    assert headcount.kept == 2
