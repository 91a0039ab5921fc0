"""The lease table, rule by rule; `test_leases_property` lets hypothesis search for further cases."""

from dataclasses import replace

import pytest
from deliveries import claim, deliver

from grpo_actors.schedule.lease import MAX_LOSSES, Cursor, Granted
from grpo_actors.schedule.leases import GRACE_S, LeaseTable

TIMEOUT_S = 100.0


def make_table(groups=4, staleness=1, batch=2, last=100, **more) -> LeaseTable[str]:
    return LeaseTable(groups, staleness, batch, TIMEOUT_S, last, **more)


def leases(granted: list[Granted]) -> list[int]:
    return [grant.lease for grant in granted]


def grants(granted: list[Granted]) -> list[tuple[int, int]]:
    return [(grant.lease, grant.attempt) for grant in granted]


def grant_all(table: LeaseTable[str], worker: str = "w", now_s: float = 0.0) -> list[Granted]:
    """Grant all leases that may go out to one worker of unlimited capacity."""
    granted: list[Granted] = []
    while run := table.grant(worker, 10_000, now_s):
        granted += run
    return granted


def accept(
    table: LeaseTable[str], granted: list[Granted], version: int | None = None, worker: str = "w"
) -> None:
    for grant in granted:
        oldest = table.version if version is None else version
        assert deliver(table, grant, oldest, f"group {grant.lease}", worker=worker).accepted


def train(table: LeaseTable[str]) -> list[int]:
    batch = table.next_batch()
    assert batch is not None
    positions = [position for position, _ in batch]
    table.consume(positions)
    return positions


def test_leases_go_out_in_aligned_runs():
    table = make_table(groups=4, batch=2)
    assert [leases(table.grant("w", 100, 0.0)) for _ in range(3)] == [[0, 1], [2, 3], [4, 5]]


def test_a_worker_holds_no_more_than_it_asked_for():
    table = make_table(groups=4, batch=2)
    assert leases(table.grant("w", 3, 0.0)) == [0, 1]
    assert table.grant("w", 3, 0.0) == []  # a run of two would make four
    assert leases(table.grant("other", 2, 0.0)) == [2, 3]


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_at_most_s_plus_one_updates_of_leases_are_open(staleness):
    table = make_table(groups=4, staleness=staleness)
    assert len(grant_all(table)) == (staleness + 1) * 4
    assert table.grant("late", 100, 0.0) == []


@pytest.mark.parametrize("version", [0, 5])
def test_no_lease_is_granted_that_would_train_after_the_last_version(version):
    table = make_table(groups=4, staleness=3, last=version + 2, version=version)
    assert leases(grant_all(table)) == list(range(8))


# S = 1, at version 5: the leases of update 6 train at version 5 and may be of version 4,
# those of update 7 train at version 6 and must be of version 5. No version comes before 0.
@pytest.mark.parametrize(("version", "oldest"), [(5, [4, 4, 5, 5]), (1, [0, 0, 1, 1]), (0, [0, 0, 0, 0])])
def test_the_oldest_version_allowed_rises_with_the_update_that_a_lease_is_for(version, oldest):
    table = make_table(groups=2, staleness=1, batch=1, version=version)
    assert [grant.min_version for grant in grant_all(table)] == oldest


def test_a_group_that_is_too_old_is_refused_and_its_lease_waits_again():
    table = make_table(groups=2, staleness=1, batch=1, version=5)
    first, *_ = grant_all(table)
    verdict = deliver(table, first, 3, "old")
    assert not verdict.accepted
    assert verdict.reason == "lease 0 was sampled with version 3, needs 4"
    [again] = table.grant("other", 1, 0.0)
    assert (again.lease, again.attempt, again.min_version) == (0, 2, 4)


def test_groups_are_consumed_in_order_whatever_order_they_came_in():
    table = make_table(groups=4)
    accept(table, grant_all(table)[::-1])
    assert train(table) == [0, 1, 2, 3]
    assert train(table) == [4, 5, 6, 7]


def test_an_update_waits_for_its_first_lease_even_if_later_ones_are_done():
    table = make_table(groups=4)
    granted = grant_all(table)
    accept(table, granted[1:])
    assert table.next_batch() is None
    accept(table, granted[:1])
    assert table.next_batch() is not None


def test_a_repeat_is_accepted_and_changes_nothing():
    table = make_table(groups=1, batch=1, staleness=0)
    granted = grant_all(table)
    accept(table, granted)
    again = deliver(table, granted[0], 0, "another")
    assert again.accepted
    assert not again.new
    assert table.next_batch() == [(0, "group 0")]
    train(table)
    after = deliver(table, granted[0], 0, "another")
    assert after.accepted
    assert not after.new
    # The cursor's own position comes after what is settled.
    assert not deliver(table, Granted(table.cursor.position, 1, 0, 0), 0, "invented").accepted


def test_a_verdict_serves_once():
    table = make_table(groups=1, batch=1)
    grant, *_ = grant_all(table)
    verdict = table.judge(claim(grant))
    table.accept(verdict, "group")
    with pytest.raises(AssertionError, match="has changed since"):
        table.accept(verdict, "another")
    with pytest.raises(AssertionError, match="was accepted"):
        table.refuse(claim(grant))
    with pytest.raises(AssertionError, match="had it"):
        table.accept(table.judge(claim(grant)), "another")
    assert table.next_batch() == [(0, "group")]


def test_a_result_of_an_older_attempt_is_refused():
    table = make_table()
    old, _ = table.grant("dead", 2, 0.0)
    table.release("dead")
    table.grant("alive", 2, 0.0)
    verdict = deliver(table, old, 0, "late", worker="dead")
    assert (verdict.accepted, verdict.reason) == (False, "attempt 1 of lease 0 was given up; 2 is the last")


def test_a_late_result_is_taken_while_no_other_worker_has_the_lease():
    table = make_table()
    first, _ = table.grant("silent", 2, 0.0)
    table.release("silent")
    assert deliver(table, first, 0, "late", worker="silent").new


@pytest.mark.parametrize("attempt", [0, 1])
def test_a_lease_that_was_never_granted_takes_no_group(attempt):
    table = make_table()
    table.grant("w", 2, 0.0)
    assert not deliver(table, Granted(3, attempt, 0, 0), 0, "invented").accepted  # open, but not out
    assert not deliver(table, Granted(1000, attempt, 0, 0), 0, "invented").accepted


# --- who holds a lease ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("worker", "attempt", "off", "reason"),
    [
        ("liar", 1, 1, "attempt 1 of lease 0 was not granted to the sender"),
        ("holder", 1, 1, "attempt 1 of lease 0 was not granted to the sender"),
        ("liar", 2, 0, "attempt 2 of lease 0 was not granted to the sender"),
        ("liar", 1, 0, "lease 0 is not held by the sender"),
    ],
    ids=["guessed token", "the holder's wrong token", "later attempt", "stolen token"],
)
def test_only_the_holder_of_a_lease_delivers_its_group_and_a_refusal_leaves_the_lease_with_it(
    worker, attempt, off, reason
):
    table = make_table()
    granted, _ = table.grant("holder", 2, 0.0)
    invented = replace(granted, attempt=attempt, token=granted.token ^ off)
    verdict = deliver(table, invented, 0, "forged", worker=worker)
    assert (verdict.accepted, verdict.reason) == (False, reason)
    assert verdict.forged == (invented != granted)
    assert table.held_by("holder") == table.holdings()["holder"] == 2
    assert deliver(table, granted, 0, "true", worker="holder").new


def test_a_forged_group_is_refused_also_once_the_true_one_is_there():
    table = make_table(groups=1, batch=1)
    granted, _ = grant_all(table)
    accept(table, [granted])
    for invented in (replace(granted, token=granted.token ^ 1), replace(granted, attempt=2)):
        for worker in ("liar", "w"):
            assert deliver(table, invented, 0, "forged", worker=worker).forged
    assert table.next_batch() == [(0, "group 0")]


def test_every_grant_has_its_own_token():
    table = make_table(groups=8)
    tokens = {grant.token for grant in grant_all(table)}
    table.release("w")
    tokens |= {grant.token for grant in grant_all(table)}
    assert len(tokens) == 32  # 16 leases, granted twice


@pytest.mark.parametrize("ends", ["hand_back", "refuse", "distrust"])
def test_a_grant_that_ended_without_a_loss_takes_no_late_group(ends):
    table = make_table()
    granted, _ = table.grant("w", 2, 0.0)
    if ends == "refuse":
        table.refuse(claim(granted))
    else:
        getattr(table, ends)("w")
    assert not deliver(table, granted, 0, "late").accepted
    # Nor does it under the next attempt number, which it can guess.
    assert not deliver(table, replace(granted, attempt=2), 0, "late").accepted


def test_a_lease_for_which_three_workers_send_faulty_groups_is_set_aside():
    table = make_table(groups=1, batch=1, staleness=0)
    for number in range(MAX_LOSSES - 1):
        [granted] = table.grant(f"w{number}", 1, 0.0)
        assert table.refuse(claim(granted, worker=f"w{number}"), faulty=True) == []
    [granted] = table.grant("w", 1, 0.0)
    assert table.refuse(claim(granted, worker="liar"), faulty=True) == []  # it is not the liar's
    assert table.refuse(claim(granted, worker="w"), faulty=True) == [0]
    assert leases(table.grant("w", 1, 0.0)) == [1]


def test_a_worker_whose_groups_are_always_faulty_uses_up_no_problem():
    table = make_table(groups=1, batch=1, staleness=0)
    for _ in range(10 * MAX_LOSSES):
        [granted] = table.grant("w", 1, 0.0)
        assert granted.lease == 0
        assert table.refuse(claim(granted), faulty=True) == []
    assert leases(table.grant("other", 1, 0.0)) == [0]


def test_groups_of_a_distrusted_worker_are_sampled_again_by_another_one():
    table = make_table(groups=2, batch=1)
    mine = table.grant("w", 4, 0.0) + table.grant("w", 4, 0.0)
    theirs = table.grant("other", 1, 0.0)
    accept(table, mine[:1])
    accept(table, theirs, worker="other")
    table.distrust("w")
    assert grants(grant_all(table, "other")) == [(0, 3), (1, 3), (3, 1)]
    assert not deliver(table, mine[1], 0, "late").accepted
    assert table.next_batch() is None


# --- losses ---------------------------------------------------------------------------------------


def test_a_dead_workers_leases_go_out_again_with_a_higher_attempt():
    table = make_table()
    table.grant("dead", 2, 0.0)
    assert table.release("dead") == []
    assert grants(table.grant("alive", 2, 0.0)) == [(0, 2), (1, 2)]


def test_leases_expire_at_their_deadline():
    table = make_table()
    table.grant("slow", 2, 10.0)
    table.expire(10.0 + TIMEOUT_S - 1)
    assert table.held_by("slow") == 2
    table.expire(10.0 + TIMEOUT_S)
    assert table.held_by("slow") == 0


def test_a_lease_that_lost_two_workers_is_granted_alone_and_set_aside_after_the_third():
    table = make_table(groups=2, batch=2)
    for _ in range(2):
        assert leases(table.grant("w", 2, 0.0)) == [0, 1]
        assert table.release("w") == []
    assert leases(table.grant("w", 2, 0.0)) == [0]
    assert table.release("w") == [0]
    alone = table.grant("w", 2, 0.0)
    assert leases(alone) == [1]
    # The update takes the next lease instead: 0 is gone, 1 and 2 complete it.
    accept(table, [*alone, *table.grant("w", 3, 0.0)])
    assert train(table) == [1, 2]


@pytest.mark.parametrize("ends", ["hand_back", "refuse", "withdraw"])
def test_a_grant_that_ends_in_order_costs_its_leases_nothing(ends):
    table = make_table()
    for number in range(10):
        worker = f"w{number}"
        granted = table.grant(worker, 2, 0.0)
        assert leases(granted) == [0, 1]
        if ends == "hand_back":
            table.hand_back(worker)
        elif ends == "withdraw":
            table.withdraw(granted)
        else:
            assert [table.refuse(claim(grant, worker=worker)) for grant in granted] == [[], []]


def test_a_grant_that_was_lost_on_its_way_goes_out_again_after_a_grace():
    table = make_table()
    table.grant("w", 2, 10.0)
    table.reconcile("w", [1], 10.0 + GRACE_S)
    assert table.held_by("w") == 2
    table.reconcile("w", [1], 10.0 + GRACE_S + 0.1)
    assert table.held_by("w") == 1
    assert grants(table.grant("w", 2, 0.0)) == [(0, 2)]


def test_one_workers_list_of_held_leases_does_not_affect_another_worker():
    table = make_table()
    table.grant("a", 2, 0.0)
    table.grant("b", 2, 0.0)
    table.reconcile("a", [], GRACE_S + 1)
    assert (table.held_by("a"), table.held_by("b")) == (0, 2)


def test_a_batch_does_not_straddle_two_updates():
    # 1 is left out, so update 1 is 0, 2, 3, 4 and update 2 begins with 5. 4 and 5 would otherwise be one run, but
    # they train at different times, and after a resume only one of them would be sampled.
    table = make_table(groups=4, batch=2, staleness=1, leaves_out=lambda position: position == 1)
    runs = []
    while run := table.grant("w", 100, 0.0):
        runs.append(leases(run))
    assert runs == [[0], [2, 3], [4], [5], [6, 7], [8]]


def test_what_is_left_out_takes_no_place_of_a_lease():
    # 0 to 3 are left out: the first look opens a whole update behind them, on policy no more than that.
    table = make_table(
        groups=4, batch=2, staleness=0, leaves_out=lambda position: position < 4 or position == 5
    )
    assert table.has_waiting()
    assert [leases(table.grant("w", 100, 0.0)) for _ in range(4)] == [[4], [6, 7], [8], []]


def test_a_resumed_run_continues_from_the_cursor():
    table = make_table(groups=2, batch=1, leaves_out=lambda position: position == 1)
    for _ in range(3):  # 3 kills its workers; 0, 2 and 4 are done
        accept(table, [grant for grant in grant_all(table) if grant.lease != 3])
        table.release("w")
    assert train(table) == [0, 2]
    assert table.cursor == Cursor(4, ())
    table = make_table(groups=2, batch=1, version=1, cursor=Cursor(4, (6,)))
    accept(table, grant_all(table))
    assert [train(table), train(table)] == [[4, 5], [7, 8]]


def test_what_was_set_aside_stays_in_the_cursor_until_it_has_passed():
    table = make_table(groups=1, batch=1, staleness=2)
    granted = grant_all(table)
    for _ in range(3):  # 2 kills its workers while 0 and 1 are done
        accept(table, [grant for grant in granted if grant.lease != 2])
        table.release("w")
        granted = table.grant("w", 1, 0.0)
    assert [train(table), table.cursor] == [[0], Cursor(1, (2,))]
    assert [train(table), table.cursor] == [[1], Cursor(3, ())]


def test_a_problem_set_aside_exactly_at_the_new_cursor_is_not_posed_again():
    # A resumed run knows of 4, beyond its window of two; its update ends right before it.
    table = make_table(groups=2, batch=1, staleness=0, version=1, cursor=Cursor(2, (4,)))
    accept(table, grant_all(table))
    assert train(table) == [2, 3]
    assert table.cursor == Cursor(4, (4,))
    assert leases(grant_all(table)) == [5, 6]


def test_a_window_of_thousands_is_granted_in_seconds():
    import time

    table = make_table(groups=1024, batch=4, staleness=1)
    began = time.process_time()
    assert len(grant_all(table)) == 2048
    assert time.process_time() - began < 5.0  # 0.3 s on a slow core
