"""Peers that claim what is not so: leases that they do not hold, contents that no worker can have sampled."""

import os
import socket

import pytest
from bounds import HANG_S
from peers_for_tests import completion, group, wait_until

from grpo_actors.learner.exchange.peers import MAX_OFFENCES
from grpo_actors.learner.exchange.standstill import MAX_NAMED, Standstill
from grpo_actors.long_wait import LONG_WAIT_S
from grpo_actors.schedule.quarantine import MAX_UPDATES_BEYOND, Gap
from grpo_actors.wire import messages as wire

# --- leases of others -----------------------------------------------------------------------------


def test_of_a_thousand_groups_for_leases_of_another_worker_none_trains(run):
    holder, liar = run.peer("holder").join(), run.peer("liar").join()
    leases = holder.take(capacity=4, runs=2)
    for number in range(1000):
        if number % MAX_OFFENCES == 0:
            liar.join()  # a new session, or the others would not even be judged
        lease = leases[number % 4]
        guessed = lease.model_copy(update={"token": (lease.token + 1 + number) % 2**64})
        ack = liar.deliver(guessed)
        assert (ack.accepted, ack.reason) == (
            False,
            f"attempt 1 of lease {lease.lease} was not granted to the sender",
        )
    # No refusal took a lease from its holder: each still has its first attempt.
    for lease in leases:
        assert holder.deliver(lease).reason == ""
    assert [group.worker for group in run.exchange.next_batch(HANG_S)] == ["holder"] * 2
    run.publish(1, [0, 1])
    assert [group.worker for group in run.exchange.next_batch(HANG_S)] == ["holder"] * 2


def test_a_stolen_token_is_of_no_use_to_another_peer(run):
    holder, liar = run.peer("holder").join(), run.peer("liar").join()
    lease, _ = holder.take()
    ack = liar.deliver(lease)
    assert (ack.accepted, ack.reason) == (False, "lease 0 is not held by the sender")
    assert holder.deliver(lease).reason == ""


def test_a_bad_group_for_the_lease_of_another_worker_leaves_the_lease_with_it(run):
    holder, liar = run.peer("holder").join(), run.peer("liar").join()
    lease, _ = holder.take()
    assert not liar.deliver(lease, completions=[completion(1, 0)]).accepted
    assert not liar.deliver(lease, version=5).accepted
    assert holder.deliver(lease).reason == ""


def test_a_forged_group_for_a_lease_that_has_its_group_does_no_harm(run):
    holder, liar = run.peer("holder").join(), run.peer("liar").join()
    leases = holder.take()
    for lease in leases:
        holder.deliver(lease)
    for attempt in (1, 2):
        for sender in (liar, holder):
            invented = leases[0].model_copy(update={"attempt": attempt, "token": 1})
            assert not sender.deliver(invented).accepted
    assert [group.lease for group in run.exchange.next_batch(HANG_S)] == [0, 1]


def test_forged_groups_are_offences_but_late_ones_are_not(run):
    slow, quick, liar = (run.peer(name).join() for name in ("slow", "quick", "liar"))
    [late, _] = slow.take()
    run.clock.ahead_s += 61  # past the deadline of the lease
    slow.beat(capacity=0, holding=[0, 1])
    [lease, _] = quick.take()
    for _ in range(MAX_OFFENCES + 1):
        assert not slow.deliver(late).accepted
    for _ in range(MAX_OFFENCES):
        liar.send(group(lease.model_copy(update={"token": lease.token ^ 1})))
    assert liar.receive(wire.Bye).reason.startswith(
        "10 messages against the protocol, the last: attempt 2 of lease 0"
    )
    assert {record["text"].split(":")[0] for record in run.records("log")} == {"liar"}
    assert quick.deliver(lease).accepted


def test_a_session_that_is_replaced_takes_its_leases_with_it(run):
    former = run.peer("w").join()
    lease, _ = former.take()
    former.join()  # the same process says Hello again, before its lease is granted again
    ack = former.deliver(lease)
    assert not ack.accepted
    assert run.records("log") == []  # no lie: its Hello crossed the grant


# --- log-probs ------------------------------------------------------------------------------------


def deliver_one(peer, version=0):
    """Take one lease and no other, and deliver its group."""
    [lease] = peer.take(capacity=1)
    peer.beat(capacity=0, holding=[lease.lease])
    assert peer.deliver(lease, version=version).accepted


def trained_gaps(run, liars, beyond=MAX_UPDATES_BEYOND, **place):
    """Train updates of one group of each of two workers; the liars' log-probs are 2 nats off. Return the next leases."""
    peers = [run.peer(name, **place).join() for name in ("w", "x")]
    for update in range(beyond):
        for peer in peers:
            deliver_one(peer, update)
        batch = run.exchange.next_batch(HANG_S)
        gaps = {group.lease: [Gap(0, 100, 200.0 if group.worker in liars else 2.0)] for group in batch}
        run.publish(update + 1, [group.lease for group in batch], gaps=gaps)
    return peers


def test_a_worker_beyond_the_band_for_three_updates_is_quarantined_and_the_others_do_its_work(start):
    run = start(max_staleness=0, batch_groups=1)
    w, x = trained_gaps(run, liars={"w"})
    w.beat(capacity=2, version=3)
    granted = x.take(capacity=2, runs=2)
    assert [lease.lease for lease in granted] == [6, 7]
    for lease in granted:
        x.deliver(lease, version=3)
    assert {group.worker for group in run.exchange.next_batch(HANG_S)} == {"x"}
    why = "log-probs 2 nats off the learner's, 0.1 at most, in 3 updates in a row"
    [alarm] = run.records("alarm")
    assert (alarm["name"], alarm["update"]) == ("worker quarantined", 3)
    assert alarm["text"] == f"w gets no more leases: {why}; start it again"
    assert run.exchange.alarm() == f"worker quarantined: {alarm['text']}"
    assert [(r["state"], r["why"]) for r in run.records("worker") if r["worker"] == "w"][-1] == (
        "quarantined",
        why,
    )
    run.exchange.record("metrics", update=4)
    wait_until(lambda: run.records("metrics"))
    assert run.states("w")[-1] == "quarantined"


def test_the_worker_in_the_learners_own_process_is_never_quarantined(start):
    run = start(max_staleness=0, batch_groups=1)
    w, _ = trained_gaps(run, liars={"w"}, host=socket.gethostname(), pid=os.getpid())
    assert w.take(capacity=1)
    assert run.records("alarm") == []


def test_two_updates_beyond_the_band_change_nothing(start):
    run = start(max_staleness=0, batch_groups=1)
    w, _ = trained_gaps(run, liars={"w"}, beyond=MAX_UPDATES_BEYOND - 1)
    assert w.take(capacity=1)
    assert run.records("alarm") == []
    assert run.exchange.alarm() is None


def test_groups_of_a_quarantined_worker_that_have_not_trained_are_sampled_again(start):
    run = start(max_staleness=1, batch_groups=1)
    w, x = run.peer("w").join(), run.peer("x").join()
    for update in range(3):
        for peer in (w, x) if update else (w, x, w, x):  # one update ahead
            deliver_one(peer, update)
        batch = run.exchange.next_batch(HANG_S)
        gaps = {group.lease: [Gap(0, 100, 200.0 if group.worker == "w" else 2.0)] for group in batch}
        run.publish(update + 1, [group.lease for group in batch], gaps=gaps)
    # Of update 4, the group of w is taken back, and with it the lease that it would get next.
    again = x.take(capacity=1)
    assert [(lease.lease, lease.attempt) for lease in again] == [(6, 3)]
    assert run.exchange.next_batch(0.0) is None
    x.deliver(again[0], version=3)
    assert [group.worker for group in run.exchange.next_batch(HANG_S)] == ["x", "x"]


def test_a_quarantined_worker_that_was_silent_is_still_quarantined_and_one_that_was_started_again_is_not(
    start,
):
    run = start(max_staleness=0, batch_groups=1)
    w, x = trained_gaps(run, liars={"w"})
    run.clock.ahead_s += 121
    wait_until(lambda: run.states("w")[-1] == "lost")
    w.beat(capacity=2, version=3)
    w.receive(wire.Announcement)
    x.beat(capacity=1, version=3)
    assert [lease.lease for lease in x.receive(wire.Grant).leases] == [6]
    assert run.states("w")[-1] == "quarantined"
    w.control.close()
    assert [lease.lease for lease in run.peer("w", pid=8).join().take(capacity=1)] == [7]


def test_a_run_whose_only_worker_is_quarantined_says_why(start):
    run = start(max_staleness=0, batch_groups=1)
    w, x = trained_gaps(run, liars={"w"})
    x.send(wire.Bye())
    w.beat(capacity=2, version=3)
    wait_until(lambda: run.states("x")[-1] == "left")
    run.exchange.snapshot()
    run.clock.ahead_s += 1
    wait_until(lambda: run.exchange.next_batch(0.3) is None)  # a tick has passed: the wait began
    run.clock.ahead_s += LONG_WAIT_S + 1
    wait_until(lambda: "no group was accepted for" in str(run.records("log")))
    assert "w: quarantined, log-probs 2 nats off" in run.records("log")[-1]["text"]


# --- what is wrong, said aloud --------------------------------------------------------------------


def test_a_run_that_only_gets_groups_that_it_refuses_says_why(run):
    peer = run.peer("w").join()
    for lease in peer.take():
        peer.deliver(lease, completions=[completion(1, 0)])
    run.clock.ahead_s += LONG_WAIT_S + 1
    wait_until(lambda: "no group was accepted for" in str(run.records("log")[-1:]))
    assert run.records("log")[-1]["text"].endswith(" s: w: a group has 2 completions, got 1")


def test_a_run_whose_worker_was_dropped_says_why(run):
    peer = run.peer("w").join()
    for _ in range(MAX_OFFENCES):
        peer.send(b"\xc1")
    peer.receive(wire.Bye)
    run.clock.ahead_s += LONG_WAIT_S + 1
    wait_until(lambda: len(run.records("log")) > MAX_OFFENCES)
    assert "w: dropped after 10 messages against the protocol, the last: " in run.records("log")[-1]["text"]


def explain(standstill, now_s, *, waits=True, shut_out=()):
    return standstill.explain(now_s, waits=waits, shut_out=dict(shut_out))


def test_a_standstill_is_counted_from_the_beginning_of_the_wait():
    standstill = Standstill()
    standstill.note("w", "bad group")
    assert explain(standstill, 0.0, waits=False) is None
    assert explain(standstill, 100.0) is None
    assert explain(standstill, 129.0) is None
    assert explain(standstill, 130.0) == "no group was accepted for 30 s: w: bad group"
    standstill.end()
    assert explain(standstill, 200.0) is None
    assert explain(standstill, 300.0) is None  # a slow worker, and nothing went wrong


def test_a_standstill_names_the_newest_reason_of_each_peer_and_a_few_peers():
    standstill = Standstill()
    for number in range(1000):
        standstill.note(f"stranger-{number}", "?")
    standstill.note("w", "old")
    standstill.note("stranger-1000", "?")
    standstill.note("w", "new")
    explain(standstill, 0.0)
    text = explain(standstill, 30.0, shut_out={"x": "quarantined"})
    assert text.endswith("; w: new; x: quarantined")
    assert text.count("; ") == MAX_NAMED - 1


@pytest.mark.parametrize("shut_out", [{}, {"w": "quarantined"}])
def test_who_is_shut_out_is_a_reason_by_itself(shut_out):
    standstill = Standstill()
    explain(standstill, 0.0)
    text = explain(standstill, 30.0, shut_out=shut_out)
    assert text == ("no group was accepted for 30 s: w: quarantined" if shut_out else None)
