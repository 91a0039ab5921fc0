"""Who a peer is: unique names, the evaluator's token, keys, and warnings that cannot flood the records."""

import os
import socket
import subprocess
import sys

import pytest
import zmq
from bounds import HANG_S
from peers_for_tests import TOKEN, evaluation, group, wait_until

from grpo_actors.learner.exchange.peers import MAX_OFFENCES, Roster
from grpo_actors.learner.exchange.throttle import MAX_CHARS, PERIOD_S, WARNINGS, Throttle
from grpo_actors.transport.access import Access, Sender
from grpo_actors.transport.keys import KeyFolder
from grpo_actors.transport.sockets import CONTROL_BYTES, connect
from grpo_actors.wire import messages as wire

# --- names -------------------------------------------------------------------------------------------


def test_a_newcomer_with_a_live_name_is_refused_and_the_owner_keeps_its_leases(run):
    owner = run.peer("w").join()
    leases = owner.take()
    thief = run.peer("w", pid=8)
    thief.send(thief.hello())
    bye = thief.receive(wire.Bye)
    assert (bye.again, bye.reason) == (False, "a live peer has the name 'w'; choose another with --name")
    assert [owner.deliver(lease).accepted for lease in leases] == [True, True]
    assert run.states("w") == ["joined", "waiting"]


def test_a_worker_tells_its_device(run):
    worker = run.peer("w")
    worker.send(worker.hello(device="GPU 3"))
    worker.receive(wire.Welcome)
    run.exchange.snapshot()
    (record,) = run.records("worker")
    assert (record["worker"], record["device"]) == ("w", "GPU 3")


def test_one_process_has_one_name():
    roster = Roster("run-1")
    roster.admit(b"id", hello("a"), Sender(), now_s=0.0)
    assert roster.refusal(b"id", hello("a"), Sender()) is None
    assert roster.refusal(b"id", hello("b"), Sender()) == "this process joined as 'a' already"
    assert roster.refusal(b"another", hello("b"), Sender()) is None


def test_a_name_is_free_again_when_its_process_has_ended(run):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        run.peer("w", host=socket.gethostname(), pid=process.pid).join()
        process.kill()
        process.wait()
        run.peer("w", host=socket.gethostname(), pid=os.getpid()).join()


def test_a_process_that_reconnects_with_its_session_token_is_the_same_peer(run):
    peer = run.peer("w").join()
    old = peer.take()
    # What a cut connection comes back as: another one with the same identity.
    again = connect(
        run.context, zmq.DEALER, run.endpoints.control, CONTROL_BYTES, [(zmq.IDENTITY, peer.control.identity)]
    )
    assert again.poll(int(HANG_S * 1000), zmq.POLLOUT)
    peer.control.socket.close(linger=0)
    peer.control.socket = again
    peer.join()
    new = peer.take()
    assert [(lease.lease, lease.attempt) for lease in new] == [(lease.lease, 2) for lease in old]
    assert run.states("w").count("lost") == 0


def test_a_ban_ends_with_the_process_that_earned_it(run):
    offender = run.peer("w").join()
    for _ in range(MAX_OFFENCES):
        offender.send(b"\xc1")
    offender.receive(wire.Bye)
    assert run.peer("w", pid=8).join().take()


# --- scores ------------------------------------------------------------------------------------------


def test_a_forged_score_is_refused_whoever_sends_it(run):
    forger = run.peer("evaluator", role="evaluator")
    forger.send(forger.hello(token=""))
    assert "only the run's own evaluator" in forger.receive(wire.Bye).reason
    forger.send(evaluation(0, accuracy=1.0))  # as if it had been let in
    assert forger.receive(wire.Bye).again
    worker = run.peer("w").join()
    worker.send(evaluation(0, accuracy=1.0))
    wait_until(lambda: any("Evaluation from a peer" in record["text"] for record in run.records("log")))
    assert run.exchange.take_evaluations() == []
    assert not run.exchange.evaluator_present()


@pytest.mark.parametrize(("update", "name"), [(0, "../x"), (4, "base"), (4, "checkpoint-3")])
def test_a_score_names_the_checkpoint_of_its_update(start, update, name):
    run = start(version=4)
    evaluator = run.peer("evaluator", role="evaluator").join()
    evaluator.send(evaluation(update).model_copy(update={"checkpoint": name}))
    wait_until(lambda: run.records("log"))
    assert run.exchange.take_evaluations() == []


# --- keys --------------------------------------------------------------------------------------------


def hello(name: str, role: str = "rollout", **changes: object) -> wire.Hello:
    fields = {"protocol": wire.PROTOCOL_VERSION, "role": role, "name": name, "host": "elsewhere", "pid": 7}
    return wire.Hello.model_validate(fields | changes)


@pytest.mark.parametrize(
    ("key", "role", "token", "refused"),
    [
        ("worker", "rollout", "", False),
        ("worker", "evaluator", "", True),
        ("worker", "evaluator", TOKEN, True),
        ("evaluator", "evaluator", "", False),
        ("evaluator", "rollout", "", True),
        ("run", "rollout", "", False),
        ("run", "evaluator", "", True),
        ("run", "evaluator", TOKEN, False),
        ("", "evaluator", TOKEN, False),
        ("", "evaluator", "", True),
    ],
)
def test_a_key_has_one_role(key, role, token, refused):
    roster = Roster("run-1", evaluator_token=TOKEN)
    refusal = roster.refusal(b"id", hello("p", role, token=token), Sender(key="k" if key else "", role=key))
    assert (refusal is not None) == refused


def test_without_a_token_of_its_own_a_run_has_no_evaluator():
    assert Roster("run-1").refusal(b"id", hello("p", "evaluator"), Sender()) is not None


def test_the_holder_of_a_listed_key_replaces_its_own_connection_and_no_other():
    roster = Roster("run-1")
    key, other, own = Sender("k1", "worker"), Sender("k2", "worker"), Sender("k3", "run")
    roster.admit(b"first", hello("w"), key, now_s=0.0)
    assert roster.refusal(b"second", hello("w"), key) is None
    assert roster.refusal(b"second", hello("w"), other) is not None
    roster.admit(b"third", hello("rollout-0"), own, now_s=0.0)
    # All of the run's processes have the run's key.
    assert roster.refusal(b"fourth", hello("rollout-0"), own) is not None


def test_a_worker_whose_key_is_revoked_is_lost_at_once_although_it_is_silent(start, tmp_path):
    folder = KeyFolder(tmp_path / "keys")
    keys = [folder.new(name, "worker") for name in ("laptop", "tablet")]
    run = start(access=Access(folder))
    one, two = (run.peer(key.name, key=key).join() for key in keys)
    leases = one.take()
    folder.revoke("laptop")
    wait_until(lambda: "lost" in run.states("laptop"))
    assert next(r for r in run.records("worker") if r["state"] == "lost")["why"] == "its key was revoked"
    assert [(lease.lease, lease.attempt) for lease in two.take()] == [(lease.lease, 2) for lease in leases]
    for peer in (one, two):
        peer.control.close()


# --- warnings ----------------------------------------------------------------------------------------


def test_warnings_are_limited_in_number_and_length_and_the_rest_is_counted():
    throttle = Throttle()
    lines = [line for _ in range(1000) for line in throttle.let_through("x" * 10_000, 0.0)]
    assert len(lines) == WARNINGS
    assert {len(line) for line in lines} == {MAX_CHARS + 2}
    assert list(throttle.let_through("later", PERIOD_S + 1)) == [
        f"{1000 - WARNINGS} more warnings about peers were left out",
        "later",
    ]


def test_as_many_warnings_as_are_let_through_leave_none_out():
    throttle, longest = Throttle(), "x" * MAX_CHARS
    for since_s in (0.0, PERIOD_S + 1):
        lines = [line for _ in range(WARNINGS) for line in throttle.let_through(longest, since_s)]
        assert lines == [longest] * WARNINGS
    assert list(throttle.let_through("later", 2 * PERIOD_S + 1)) == [], "the period has not ended"


def test_strangers_cannot_flood_the_records(run):
    for number in range(5):
        stranger = run.peer(f"stranger-{number}")
        for _ in range(MAX_OFFENCES):
            stranger.send(b"\xc1")
        stranger.receive(wire.Bye)
    worker = run.peer("w").join()
    assert worker.deliver(worker.take()[0]).accepted
    assert len(run.records("log")) == WARNINGS
    assert {record["text"][:12] for record in run.records("log")} == {"a stranger: "}


def test_failures_of_a_group_are_limited_too(run):
    worker = run.peer("w").join()
    for lease in worker.take():
        worker.send(group(lease, failures={"environment": "y" * 100_000, "z" * 200: "y" * 100_000}))
        assert worker.receive(wire.Ack).accepted
    assert sum(len(record["text"]) for record in run.records("log")) <= WARNINGS * (MAX_CHARS + 10)
