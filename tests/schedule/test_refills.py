"""Groups that teach nothing are passed over and refilled up to a limit; groups sampled too early are taken back."""

import pytest
from deliveries import deliver

from grpo_actors.schedule.group_criteria import NOT_FILTERED, FilterResult
from grpo_actors.schedule.lease import Consumption, Cursor, Settled
from grpo_actors.schedule.leases import LeaseTable

FLAWED = FilterResult(0.0, "no_signal")


def make_table(groups=2, staleness=1, batch=1, limit=4, last=100, **more) -> LeaseTable[str]:
    return LeaseTable(groups, staleness, batch, 100.0, last, refill_limit=limit, **more)


def sample(table: LeaseTable[str], *flawed: int) -> list[int]:
    """Grant and accept all leases that may go out, once; the groups of `flawed` have a flaw. Returns the leases."""
    leases = []
    while run := table.grant("w", 10_000, 0.0):
        for grant in run:
            result = FLAWED if grant.lease in flawed else NOT_FILTERED
            assert deliver(table, grant, table.version, "group", result).new
            leases.append(grant.lease)
    return leases


def train(table: LeaseTable[str]) -> Consumption:
    batch = table.next_batch()
    assert batch is not None
    return table.consume([position for position, _ in batch])


def test_the_next_position_takes_the_place_of_a_group_that_is_passed_over():
    table = make_table(groups=2, staleness=0)
    assert sample(table, 0, 2) == [0, 1, 2, 3]  # 2 is refilled in its turn
    assert train(table) == Consumption(
        [
            Settled(0, FLAWED, False),
            Settled(1, NOT_FILTERED, True),
            Settled(2, FLAWED, False),
            Settled(3, NOT_FILTERED, True),
        ]
    )
    assert table.cursor == Cursor(4)


def test_after_the_limit_groups_train_as_they_are():
    table = make_table(groups=2, staleness=0, limit=3)
    assert sample(table, *range(100)) == [0, 1, 2, 3, 4]
    assert [settled.trained for settled in train(table).settled] == [False, False, False, True, True]
    # Each update has its own limit.
    assert sample(table, *range(100)) == [5, 6, 7, 8, 9]


def test_the_limit_is_that_of_the_update_a_group_would_be_in():
    # Update 1 passes over 0 and takes 1 and 2; so 3 is the only one that update 2 passes over, and it takes 4 and 5.
    table = make_table(groups=2, staleness=1, limit=1)
    assert sample(table, 0, 3, 4) == [0, 1, 2, 3, 4, 5]


def test_without_refills_flawed_groups_train():
    table = LeaseTable(2, 0, 1, 100.0, 100)
    sample(table, 0, 1)
    assert [settled.trained for settled in train(table).settled] == [True, True]


def test_an_update_waits_for_what_lies_before_a_refill():
    table = make_table(groups=1, staleness=0, limit=1, ahead=2)
    first, second = (table.grant("w", 10, 0.0)[0] for _ in range(2))
    deliver(table, second, 0, "b")
    assert table.next_batch() is None  # the first may yet teach something
    deliver(table, first, 0, "a", FLAWED)
    assert table.next_batch() == [(1, "b")]


def test_groups_sampled_ahead_serve_the_next_update_while_they_are_young_enough():
    # ahead = 4 for 2 groups, S = 1: 8 leases; those at slots 4 to 7 are of version 0 and train at version 1 at most.
    table = make_table(groups=2, staleness=1, ahead=4)
    first = table.grant("w", 10, 0.0)
    assert [grant.lease for grant in first] == [0]
    assert sample(table) == [1, 2, 3, 4, 5, 6, 7]
    deliver(table, first[0], 0, "group")
    assert train(table).outdated == 0
    assert train(table).outdated == 4  # 4 to 7, which would now train at 2
    assert table.cursor == Cursor(4)


def test_what_was_given_up_for_its_age_is_refused_when_it_comes():
    table = make_table(groups=1, staleness=0, ahead=2)
    first, second = (table.grant("w", 10, 0.0)[0] for _ in range(2))
    deliver(table, first, 0, "group")
    assert train(table).outdated == 1
    again = table.grant("w", 10, 0.0)[0]
    assert (again.lease, again.attempt, again.min_version) == (second.lease, 3, 1)
    late = deliver(table, second, 1, "late")
    assert late.reason == "attempt 1 of lease 1 was given up; 3 is the last"


def test_nothing_is_sampled_that_would_be_too_old_once_the_batch_is_whole():
    table = make_table(groups=1, staleness=0, ahead=2)
    first = table.grant("w", 10, 0.0)[0]
    deliver(table, first, 0, "group")
    assert table.grant("w", 10, 0.0) == []


@pytest.mark.parametrize("limit", [1, 4])
def test_on_policy_a_refill_opens_a_whole_run(limit):
    table = make_table(groups=4, batch=4, staleness=0, limit=limit)
    assert sample(table, 1) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert train(table).outdated == 3
    # The rest of the run is sampled again together; the missing group comes with the whole next run.
    assert [grant.lease for grant in table.grant("w", 10, 0.0)] == [5, 6, 7]
    assert [grant.lease for grant in table.grant("w", 10, 0.0)] == [8, 9, 10, 11]


def test_after_the_last_update_no_run_is_completed():
    # 0 is passed over, 1 and 2 train, and 3, which shared a run with 2, is not sampled once more.
    table = make_table(groups=2, batch=2, staleness=0, last=1)
    assert sample(table, 0) == [0, 1, 2, 3]
    assert train(table).outdated == 1
    assert sample(table) == []


def test_off_policy_a_refill_takes_no_more_than_is_missing():
    table = make_table(groups=4, batch=4, staleness=1)
    assert sample(table, 1) == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert train(table).outdated == 0


def test_positions_that_are_skipped_are_counted_when_the_cursor_passes_them():
    table = make_table(groups=1, staleness=0, limit=0, skips=lambda position: position < 2)
    assert sample(table) == [2]
    assert train(table).skipped == 2


def test_what_is_skipped_is_decided_anew_after_an_update():
    table = make_table(groups=1, staleness=0, ahead=3)
    table.skips = lambda position: position == 1 and table.version == 0
    assert sample(table) == [0]
    assert train(table).skipped == 0
    assert sample(table) == [1]
    assert train(table).skipped == 0
