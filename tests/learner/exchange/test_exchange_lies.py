"""Peers that claim what is not so: leases that they do not hold, contents that no worker can have sampled."""

import pytest
from peers_for_tests import DEADLINE_S, completion, group, wait_until

from grpo_actors.learner.exchange.peers import MAX_OFFENCES
from grpo_actors.learner.exchange.standstill import MAX_NAMED, STANDSTILL_S, Standstill
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
    assert [group.worker for group in run.exchange.next_batch(DEADLINE_S)] == ["holder"] * 2
    run.publish(1, [0, 1])
    assert [group.worker for group in run.exchange.next_batch(DEADLINE_S)] == ["holder"] * 2


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
    assert [group.lease for group in run.exchange.next_batch(DEADLINE_S)] == [0, 1]


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


# --- what is wrong, said aloud --------------------------------------------------------------------


def test_a_run_that_only_gets_groups_that_it_refuses_says_why(run):
    peer = run.peer("w").join()
    for lease in peer.take():
        peer.deliver(lease, completions=[completion(1, 0)])
    run.clock.ahead_s += STANDSTILL_S + 1
    wait_until(lambda: "no group was accepted for" in str(run.records("log")[-1:]))
    assert run.records("log")[-1]["text"].endswith(" s; w: a group has 2 completions, got 1")


def test_a_run_whose_worker_was_dropped_says_why(run):
    peer = run.peer("w").join()
    for _ in range(MAX_OFFENCES):
        peer.send(b"\xc1")
    peer.receive(wire.Bye)
    run.clock.ahead_s += STANDSTILL_S + 1
    wait_until(lambda: len(run.records("log")) > MAX_OFFENCES)
    assert "w: dropped after 10 messages against the protocol, the last: " in run.records("log")[-1]["text"]


def explain(standstill, now_s, *, waits=True, shut_out=()):
    return standstill.explain(now_s, waits=waits, shut_out=dict(shut_out))


def test_a_standstill_is_explained_after_30_s_and_whenever_it_has_doubled():
    standstill = Standstill()
    standstill.note("w", "bad group")
    explained = [now_s for now_s in range(200) if explain(standstill, now_s)]
    assert explained == [30, 60, 120]


def test_a_standstill_is_counted_from_the_beginning_of_the_wait():
    standstill = Standstill()
    standstill.note("w", "bad group")
    assert explain(standstill, 0.0, waits=False) is None
    assert explain(standstill, 100.0) is None
    assert explain(standstill, 129.0) is None
    assert explain(standstill, 130.0) == "no group was accepted for 30 s; w: bad group"
    standstill.end()
    assert explain(standstill, 200.0) is None
    assert explain(standstill, 300.0) is None  # a slow worker, and nothing went wrong


def test_a_standstill_names_the_newest_reason_of_each_peer_and_a_few_peers():
    standstill = Standstill()
    for number in range(1000):
        standstill.note(f"stranger-{number}", "?")
    standstill.note("w", "old")
    standstill.note("w", "new")
    explain(standstill, 0.0)
    text = explain(standstill, 30.0, shut_out={"x": "quarantined"})
    assert text.endswith("; w: new; x: quarantined")
    assert text.count("; ") == MAX_NAMED


@pytest.mark.parametrize("shut_out", [{}, {"w": "quarantined"}])
def test_who_is_shut_out_is_a_reason_by_itself(shut_out):
    standstill = Standstill()
    explain(standstill, 0.0)
    text = explain(standstill, 30.0, shut_out=shut_out)
    assert text == ("no group was accepted for 30 s; w: quarantined" if shut_out else None)
