"""Peers that die, hang, come back, or break the protocol."""

import os
import socket
import subprocess
import sys

import pytest
from peers_for_tests import evaluation, group, wait_until

from grpo_actors.learner.exchange.dispatcher import TICK_S
from grpo_actors.learner.exchange.peers import (
    FORGET_S,
    LOADING_S,
    LOST_S,
    MAX_OFFENCES,
    MAX_OFFENDERS,
    PROBE_S,
    Roster,
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
