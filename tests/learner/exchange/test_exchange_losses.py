"""Peers that die, hang, come back, or break the protocol."""

import os
import socket
import subprocess
import sys

import pytest
from peers_for_tests import completion, evaluation, group, wait_until

from grpo_actors.learner.exchange.dispatcher import TICK_S
from grpo_actors.learner.exchange.peers import (
    FORGET_S,
    LOADING_S,
    LOST_S,
    MAX_OFFENCES,
    MAX_OFFENDERS,
    PROBE_S,
    RATE_S,
    Roster,
    process_lives,
)
from grpo_actors.schedule.leases import GRACE_S
from grpo_actors.transport.access import Sender
from grpo_actors.wire import messages as wire

# --- losses ------------------------------------------------------------------------------------------


def test_a_silent_peers_leases_go_out_again_with_the_same_seeds(run):
    hung, alive = run.peer("hung").join(), run.peer("alive").join()
    old = hung.take()
    alive.take()
    run.clock.ahead_s += LOST_S + 1
    alive.beat(capacity=4, holding=[2, 3])
    new = alive.receive(wire.Grant).leases
    assert [(lease.lease, lease.attempt, lease.seeds) for lease in new] == [
        (lease.lease, 2, lease.seeds) for lease in old
    ]
    lost = next(record for record in run.records("worker") if record["state"] == "lost")
    assert (lost["worker"], lost["why"][:10]) == ("hung", "silent for")
    # It was only stopped: it takes part again, but its late result is of no use.
    assert not hung.deliver(old[0]).accepted
    wait_until(lambda: run.states("hung") == ["joined", "waiting", "lost", "joined"])


def test_a_peer_on_another_host_whose_connection_is_closed_is_lost_after_a_silence_of_two_seconds(run):
    killed, alive = run.peer("killed").join(), run.peer("alive").join()
    old = killed.take()
    alive.take()
    killed.control.socket.close(linger=0)  # what the kernel does for a process that was killed
    run.clock.ahead_s += PROBE_S + 0.1
    alive.beat(capacity=4, holding=[2, 3])
    assert [(lease.lease, lease.attempt) for lease in alive.receive(wire.Grant).leases] == [(0, 2), (1, 2)]
    assert old[0].lease == 0
    lost = next(record for record in run.records("worker") if record["state"] == "lost")
    assert (lost["worker"], lost["why"]) == ("killed", "its connection is closed")


def test_a_peer_that_loads_its_model_may_be_silent_for_long(run):
    run.peer("loading").join()
    evaluator = run.peer("evaluator", role="evaluator").join()
    run.clock.ahead_s += LOADING_S - 5
    evaluator.beat(capacity=0)
    wait_until(run.exchange.evaluator_present)
    assert run.states("loading") == ["joined"]
    run.clock.ahead_s += 10
    wait_until(lambda: run.states("loading") == ["joined", "lost"])


def test_a_peer_in_the_learners_own_process_is_never_lost_for_its_silence(run):
    inside = run.peer("local", host=socket.gethostname(), pid=os.getpid()).join()
    outside = run.peer("w").join()
    inside.take()
    outside.wait_until_seen()
    run.clock.ahead_s += LOST_S + 1
    wait_until(lambda: "lost" in run.states("w"))
    assert "lost" not in run.states("local")


def test_a_killed_local_process_is_seen_at_the_next_tick_and_its_leases_are_out_again(run):
    """Its end is seen, and not its silence: the clock stands before `PROBE_S` and `LOST_S`."""
    assert TICK_S < 1.0
    run.clock.freeze()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        victim = run.peer("victim", host=socket.gethostname(), pid=process.pid).join()
        victim.take()
        other = run.peer("other").join()
        other.take()
        other.beat(capacity=4, holding=[2, 3])
        process.kill()
        process.wait()
        run.clock.ahead_s += TICK_S
        assert [(lease.lease, lease.attempt) for lease in other.receive(wire.Grant).leases] == [
            (0, 2),
            (1, 2),
        ]
    lost = next(record for record in run.records("worker") if record["state"] == "lost")
    assert (lost["worker"], lost["why"]) == ("victim", "its process ended")


def test_a_process_of_another_host_that_has_the_same_name_is_not_watched(run):
    # No process here has this number: a peer that cannot be seen at its Hello lives elsewhere.
    twin = run.peer("twin", host=socket.gethostname(), pid=2**31 - 1).join()
    assert twin.take()
    run.clock.ahead_s += 1.0
    twin.beat(capacity=2, holding=[0, 1])
    twin.receive(wire.Announcement)
    assert "lost" not in run.states("twin")


def is_let_in(peer):
    peer.send(peer.hello())
    return isinstance(peer.receive(wire.Welcome | wire.Bye), wire.Welcome)


def test_a_reconnect_under_the_same_name_gives_back_what_was_held(run):
    first = run.peer("w").join()
    old = first.take()
    first.control.close()
    second = run.peer("w", pid=8)
    wait_until(lambda: is_let_in(second))  # once the learner has noticed that the first connection is closed
    new = second.take()
    assert [(lease.lease, lease.attempt, lease.seeds) for lease in new] == [
        (lease.lease, 2, lease.seeds) for lease in old
    ]
    assert not second.deliver(old[0]).accepted
    assert second.deliver(new[0]).accepted


def test_leaving_gives_leases_back_at_once(run):
    leaver, stayer = run.peer("leaver").join(), run.peer("stayer").join()
    leaver.take()
    stayer.take()
    leaver.send(wire.Bye(reason="asked to leave"))
    stayer.beat(capacity=4, holding=[2, 3])
    assert [lease.lease for lease in stayer.receive(wire.Grant).leases] == [0, 1]
    assert run.states("leaver")[-1] == "left"


def test_a_grant_that_never_reached_its_worker_goes_out_again(run):
    peer = run.peer("w").join()
    peer.take()
    run.clock.ahead_s += GRACE_S + 1
    peer.beat(capacity=2, holding=[])  # it does not know of the grant
    assert [(lease.lease, lease.attempt) for lease in peer.receive(wire.Grant).leases] == [(0, 2), (1, 2)]


def test_a_problem_that_kills_three_workers_is_set_aside_with_an_alarm(start):
    run = start(batch_groups=1)
    for number in range(3):
        victim = run.peer(f"victim-{number}").join()
        assert [lease.lease for lease in victim.take(capacity=1)] == [0]
        run.clock.ahead_s += LOST_S + 1
        wait_until(lambda victim=victim: "lost" in run.states(victim.name))
    wait_until(lambda: run.records("alarm"))
    (alarm,) = run.records("alarm")
    assert alarm["text"] == (
        "p0: three attempts failed (a worker died, timed out, or sent a group that was refused); "
        "it is left out (lease 0)"
    )
    assert [lease.lease for lease in run.peer("w").join().take(capacity=1)] == [1]


def test_a_lost_peer_is_forgotten_in_the_end(run):
    run.peer("gone").join().wait_until_seen()
    run.clock.ahead_s += LOST_S + 1
    wait_until(lambda: "lost" in run.states("gone"))
    run.exchange.record("metrics", update=1)
    wait_until(lambda: run.states("gone")[-2:] == ["lost", "lost"])
    run.clock.ahead_s += FORGET_S
    recorded = len(run.states("gone"))
    another = run.peer("another").join()  # by now a tick has passed
    run.clock.ahead_s += 1.0
    another.wait_until_seen()
    run.exchange.record("metrics", update=2)
    wait_until(lambda: run.records("metrics")[-1]["update"] == 2)
    assert len(run.states("gone")) == recorded


def admitted(roster, process):
    fields = {"protocol": wire.PROTOCOL_VERSION, "role": "rollout", "name": "w"}
    fields |= {"host": socket.gethostname(), "pid": process.pid}
    return roster.admit(b"w", wire.Hello.model_validate(fields), Sender(), now_s=0.0)


@pytest.mark.parametrize("lost_before", [False, True])
def test_a_dead_local_process_is_lost_once_and_no_longer_in_the_roster(lost_before):
    roster = Roster("run-1", lost_s=10.0)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        peer = admitted(roster, process)
        peer.record_beat(wire.Beat(state="waiting"), 0.0)
        assert list(roster.find_lost(9.0)) == []
        if lost_before:
            assert list(roster.find_lost(11.0)) == [(peer, "silent for 11 s")]
            peer.state = "lost"
            assert list(roster) == [peer], "a hung process may come back"
        process.kill()
    found = [] if lost_before else [(peer, "its process ended")]
    assert (list(roster.find_lost(12.0)), list(roster), roster.get(b"w")) == (found, [], None)
    assert list(roster.find_lost(13.0)) == []


def peer_of(roster, name="w", **changes):
    fields = {"protocol": wire.PROTOCOL_VERSION, "role": "rollout", "name": name, "host": "h", "pid": 7}
    hello = wire.Hello.model_validate(fields | changes)
    return roster.admit(name.encode(), hello, Sender(), now_s=0.0)


def test_a_silent_peer_is_probed_every_two_seconds_until_it_speaks():
    roster = Roster("run-1")
    peer, lost = peer_of(roster), peer_of(roster, "lost")
    peer_of(roster, "local", host=socket.gethostname(), pid=os.getpid())
    lost.state = "lost"
    times = (PROBE_S, PROBE_S + 0.1, 2 * PROBE_S, 2 * PROBE_S + 0.2)
    assert [list(roster.to_probe(now_s)) for now_s in times] == [[], [peer], [], [peer]]
    peer.last_seen_s = 10.0
    assert [list(roster.to_probe(10.0 + s)) for s in (PROBE_S, PROBE_S + 0.1)] == [[], [peer]]


def test_each_silence_has_its_own_limit():
    roster = Roster("run-1", lost_s=10.0)
    loading, working = peer_of(roster, "loading"), peer_of(roster, "working")
    working.record_beat(wire.Beat(state="waiting"), 0.0)
    assert list(roster.find_lost(10.0)) == []
    assert list(roster.find_lost(10.1)) == [(working, "silent for 10 s")]
    working.state = "lost"
    assert list(roster.find_lost(FORGET_S)) == []
    assert list(roster) == [loading, working]
    assert list(roster.find_lost(FORGET_S + 0.1)) == []
    assert list(roster) == [loading]
    assert list(roster.find_lost(LOADING_S)) == []
    assert list(roster.find_lost(LOADING_S + 0.1)) == [(loading, f"silent for {LOADING_S:.0f} s")]


def test_a_killed_process_that_nobody_has_waited_for_yet_is_dead():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        assert process_lives(process.pid)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert not process_lives(process.pid)


# --- offences ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [b"", b"\xc1", b"x" * 1000, wire.encode(wire.FetchManifest())],
    ids=["nothing", "garbage", "text", "of another socket"],
)
def test_after_ten_offences_a_peer_is_dropped_and_its_leases_go_out_again(run, data):
    offender, other = run.peer("offender").join(), run.peer("other").join()
    offender.take()
    for _ in range(MAX_OFFENCES):
        offender.send(data)
    assert offender.receive(wire.Bye).reason.startswith("10 messages against the protocol, the last: ")
    other.beat(capacity=2)
    assert [lease.lease for lease in other.receive(wire.Grant).leases] == [0, 1]
    assert run.states("offender")[-1] == "lost"
    offender.send(data)
    offender.beat(capacity=2)
    other.wait_until_seen()  # the offender's messages came before this one, to no effect
    assert run.states("offender")[-1] == "lost"
    assert len(run.records("log")) == MAX_OFFENCES


@pytest.mark.parametrize("pid", [7, 8], ids=["the same process", "another process"])
def test_a_hello_after_a_ban_starts_clean(run, pid):
    offender = run.peer("w").join()
    for _ in range(MAX_OFFENCES):
        offender.send(b"\xc1")
    offender.receive(wire.Bye)
    offender.control.close()
    after = run.peer("w", pid=pid).join()
    for _ in range(MAX_OFFENCES - 1):
        after.send(b"\xc1")
    first, _ = after.take()
    assert after.deliver(first).accepted


def test_a_ban_does_not_count_against_the_problems_that_its_worker_held(run):
    for _ in range(4):  # after three losses a problem would be set aside
        offender = run.peer("w").join()
        assert [lease.lease for lease in offender.take()] == [0, 1]
        for _ in range(MAX_OFFENCES):
            offender.send(b"\xc1")
        offender.receive(wire.Bye)
        offender.control.close()
    assert run.records("alarm") == []


def test_nine_offences_are_tolerated(run):
    peer = run.peer("clumsy").join()
    for _ in range(MAX_OFFENCES - 1):
        peer.send(b"\xc1")
    assert len(peer.take()) == 2


def test_a_stranger_with_many_identities_fills_no_memory(run):
    roster = Roster("run-1")
    for number in range(3 * MAX_OFFENDERS):
        roster.count_offence(b"%d" % number)
    assert len(roster._offences) == MAX_OFFENDERS
    # Who goes on is not forgotten before those who have stopped.
    for number in range(MAX_OFFENCES):
        assert not roster.banned(b"stubborn")
        roster.count_offence(b"stubborn")
        for other in range(MAX_OFFENDERS - 1):
            roster.count_offence(b"%d of %d" % (other, number))
    assert roster.banned(b"stubborn")


def test_a_message_of_the_other_role_is_an_offence(run):
    worker = run.peer("w").join()
    evaluator = run.peer("evaluator", role="evaluator").join()
    lease = worker.take()[0]
    worker.send(evaluation(0))
    evaluator.send(group(lease))
    wait_until(lambda: len(run.records("log")) == 2)
    assert [record["text"] for record in run.records("log")] == [
        "w: Evaluation from a peer whose role is rollout",
        "evaluator: Group from a peer whose role is evaluator",
    ]
    assert run.exchange.take_evaluations() == []


def test_a_problem_for_which_three_workers_send_wrong_groups_is_set_aside_with_an_alarm(start):
    run = start(batch_groups=1)
    for number in range(3):
        worker = run.peer(f"w{number}").join()
        [lease] = worker.take(capacity=1)
        assert lease.lease == 0
        worker.beat(capacity=0, holding=[0])
        assert not worker.deliver(lease, completions=[completion(1, 0)]).accepted
    wait_until(lambda: run.records("alarm"))
    assert run.records("alarm")[0]["text"].startswith("p0: three attempts failed ")


# --- waiting -----------------------------------------------------------------------------------------


def spend(peer, working_s, waiting_s):
    peer.record_beat(wire.Beat(state="waiting", working_s=working_s, waiting_s=waiting_s), now_s=0.0)


def test_the_share_of_waiting_is_that_of_all_workers_since_it_was_last_taken():
    roster = Roster("run-1")

    def joins(name):
        fields = {"protocol": wire.PROTOCOL_VERSION, "role": "rollout", "name": name, "host": "h", "pid": 7}
        return roster.admit(name.encode(), wire.Hello.model_validate(fields), Sender(), now_s=0.0)

    one, other = joins("one"), joins("other")
    assert roster.take_wait_share() is None
    for peer in (one, other):
        spend(peer, 10.0, 90.0)  # of the time before this learner
    assert roster.take_wait_share() is None
    spend(one, 13.0, 91.0)
    spend(other, 10.0, 94.0)
    assert roster.take_wait_share() == 5.0 / 8.0  # 3 s of work and 1 + 4 s of waiting
    one = joins("one")  # its process was started again: its clocks, too
    spend(one, 0.0, 0.5)
    assert roster.take_wait_share() is None
    spend(one, 1.0, 0.5)
    assert roster.take_wait_share() == 0.0


def test_the_token_rate_is_measured_over_more_than_two_seconds():
    peer = peer_of(Roster("run-1"))
    rates = []
    # From 0 s to 3 s 300 tokens; from there to 8 s none; and then of a process that counts from 0 again.
    for now_s, tokens in (
        (0.0, 100),
        (1.0, 150),
        (RATE_S, 300),
        (3.0, 400),
        (5.0, 400),
        (8.0, 400),
        (11.0, 9),
    ):
        peer.record_beat(wire.Beat(state="sampling", tokens=tokens), now_s)
        rates.append(peer.tokens_per_s)
    assert rates == [0.0, 0.0, 0.0, 100.0, 100.0, 0.0, 0.0]


def test_a_worker_record_describes_the_worker():
    peer = peer_of(Roster("run-1"), device="GPU 3")
    described = peer.describe()
    assert (described["memory_gb"], described["version"], described["groups"]) == (None, -1, 0)
    peer.record_beat(wire.Beat(state="sampling", peak_bytes=2_500_000_000, version=4, tokens=0), 0.0)
    peer.record_beat(wire.Beat(state="sampling", peak_bytes=2_500_000_000, version=4, tokens=100), 3.0)
    assert peer.describe() == {
        "worker": "w",
        "role": "rollout",
        "state": "joined",
        "why": None,
        "groups": 0,
        "tokens_per_s": 33.3,
        "version": 4,
        "memory_gb": 2.5,
        "device": "GPU 3",
    }
    peer.quarantine = "2 nats off"
    states = []
    for peer.state in ("sampling", "lost", "left"):
        states.append((peer.describe()["state"], peer.describe()["why"]))
    assert states == [("quarantined", "2 nats off"), ("lost", None), ("left", None)]


def test_metrics_hold_the_memory_of_the_peers_in_other_processes(run):
    for name, place in (("w", {}), ("local", {"host": socket.gethostname(), "pid": os.getpid()})):
        peer = run.peer(name, **place).join()
        peer.send(wire.Beat(state="waiting", peak_bytes=3_000_000_000))
        peer.receive(wire.Announcement)
    evaluator = run.peer("evaluator", role="evaluator").join()
    evaluator.send(wire.Beat(state="waiting", peak_bytes=1_000_000_000))
    wait_until(lambda: run.states("evaluator")[-1:] == ["waiting"])
    before = len(run.records("worker"))
    run.exchange.record("metrics", update=1)
    run.exchange.snapshot()
    [metrics] = run.records("metrics")
    assert metrics["peers_memory_gb"] == {"w": 3.0, "evaluator": 1.0}
    assert [record["worker"] for record in run.records("worker")[before:]] == ["w", "local"]
