"""How a peer joins, and the way of a lease: granted, sampled, accepted."""

from itertools import islice

import pytest
from bounds import HANG_S
from peers_for_tests import PROBLEMS, completion, tokens_of, wait_until

from grpo_actors.errors import DataError
from grpo_actors.learner.exchange.supply import Supply
from grpo_actors.schedule.order import ProblemOrder, sample_seeds
from grpo_actors.tasks.task import Problem
from grpo_actors.wire import messages as wire
from grpo_actors.wire.messages import PROTOCOL_VERSION

# --- who takes part ----------------------------------------------------------------------------------


def test_a_hello_is_answered_with_what_a_peer_needs(run):
    peer = run.peer("w")
    peer.send(peer.hello(run_id="run-1"))
    welcome = peer.receive(wire.Welcome)
    assert (welcome.run_id, welcome.weights_endpoint, welcome.beat_s) == ("run-1", run.endpoints.weights, 1.0)
    wait_until(lambda: run.states("w") == ["joined"])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"protocol": 1}, f"protocol 1 there, {PROTOCOL_VERSION} here: install the same version"),
        ({"run_id": "run-0"}, "this is run run-1, not run-0"),
        (
            {"role": "evaluator"},
            "only the run's own evaluator, or one whose key has that role, may report scores",
        ),
        (
            {"role": "evaluator", "token": "guess"},
            "only the run's own evaluator, or one whose key has that role, may report scores",
        ),
    ],
    ids=["protocol", "run", "evaluator", "guess"],
)
def test_a_hello_that_does_not_fit_is_refused_with_the_reason(run, changes, reason):
    peer = run.peer("w")
    peer.send(peer.hello(**changes))
    bye = peer.receive(wire.Bye)
    assert (bye.reason, bye.again) == (reason, False)
    assert run.states("w") == []


def test_an_unknown_peer_is_asked_to_say_hello(run):
    peer = run.peer("stranger")
    peer.beat(capacity=2)
    assert peer.receive(wire.Bye).again
    assert peer.join().take()


def test_every_beat_is_answered_with_the_newest_version(run):
    peer = run.peer("w").join()
    peer.beat(capacity=0)
    assert peer.receive(wire.Announcement).version == 0
    run.publish(1)
    assert peer.receive(wire.Announcement).version == 1  # at once
    peer.beat(capacity=0)
    assert peer.receive(wire.Announcement).version == 1  # and again, should the first have been lost


# --- leases and groups -------------------------------------------------------------------------------


def test_a_lease_carries_all_that_a_worker_needs(run):
    first, second = run.peer("w").join().take()
    assert (first.lease, second.lease, first.attempt, first.min_version) == (0, 1, 1, 0)
    assert first.problem_id == "p0"
    assert wire.read_ints(first.prompt) == [ord(letter) % 100 for letter in "problem 0"]
    assert first.seeds == sample_seeds(3, 0, "p0", 2)
    assert (first.messages, first.answer, first.columns) == (
        [{"role": "user", "content": "problem 0"}],
        "0",
        {"n": 0},
    )


def test_groups_become_batches_in_the_order_of_their_leases(run):
    peer = run.peer("w").join()
    leases = peer.take(capacity=4, runs=2)
    for lease in reversed(leases):
        assert peer.deliver(lease).accepted
    batch = run.exchange.next_batch(HANG_S)
    assert [group.lease for group in batch] == [0, 1]
    assert batch[0].problem is PROBLEMS[0]
    assert batch[0].worker == "w"
    assert [c.tokens for c in batch[0].completions] == [
        wire.read_ints(tokens_of(seed)) for seed in leases[0].seeds
    ]
    assert run.exchange.next_batch(0.05) is None  # one at a time, until it was published
    run.publish(1, [0, 1])
    assert [group.lease for group in run.exchange.next_batch(HANG_S)] == [2, 3]


def test_a_duplicate_is_acknowledged_and_counted_once(run):
    peer = run.peer("w").join()
    lease, other = peer.take()
    assert peer.deliver(lease).reason == ""
    again = peer.deliver(lease)
    assert (again.accepted, again.reason) == (True, "had it")
    peer.deliver(other)
    run.exchange.next_batch(HANG_S)
    run.publish(1, [0, 1])
    late = peer.deliver(lease)
    assert (late.accepted, late.reason) == (True, "settled before")
    assert run.exchange.take_tokens() == 8  # two groups of two completions of two tokens
    assert run.exchange.take_tokens() == 0


def test_only_sampled_tokens_are_counted(run):
    peer = run.peer("w").join()
    lease = peer.take()[0]
    of_two_turns = {
        "tokens": wire.ints([1, 5, 7, 1]),
        "logprobs": wire.floats([-0.5, 0.0, 0.0, -0.25]),
        "versions": wire.ints([0] * 4),
        "inserted": wire.ints([1, 3]),
    }
    one, other = lease.seeds
    peer.deliver(lease, completions=[completion(one, 0), completion(other, 0, **of_two_turns)])
    assert run.exchange.take_tokens() == 4  # two of two, and two of four


def test_a_result_of_an_attempt_that_was_given_up_is_refused(run):
    slow, quick = run.peer("slow").join(), run.peer("quick").join()
    old = slow.take()[0]
    run.clock.ahead_s += 61  # past the lease's deadline, which beats do not extend
    slow.beat(capacity=0, holding=[0, 1])
    new = quick.take()[0]
    assert (new.lease, new.attempt, new.seeds) == (old.lease, 2, old.seeds)
    ack = slow.deliver(old)
    assert (ack.accepted, ack.reason) == (False, "attempt 1 of lease 0 was given up; 2 is the last")
    assert quick.deliver(new).accepted


def test_a_group_that_is_too_old_is_refused_and_sampled_again(start):
    run = start(version=5, max_staleness=0)
    peer = run.peer("w").join()
    lease = peer.take()[0]
    assert lease.min_version == 5
    ack = peer.deliver(lease, version=4)
    assert (ack.accepted, ack.reason) == (False, "lease 0 was sampled with version 4, needs 5")
    peer.beat(capacity=2, holding=[1])
    peer.beat(capacity=3, holding=[1])
    assert [(again.lease, again.attempt) for again in peer.receive(wire.Grant).leases] == [(0, 2)]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"completions": [completion(1, 0)]}, "a group has 2 completions, got 1"),
        ({"completions": [completion(1, 0, tokens=wire.ints([100, 1]))] * 2}, "token ids lie in 0 … 99"),
        ({"completions": [completion(1, 0, tokens=wire.ints([-1, 1]))] * 2}, "token ids lie in 0 … 99"),
        ({"completions": [completion(1, 1)] * 2}, "version 0 is the newest, got 1 … 1"),
        ({"completions": [completion(1, -1)] * 2}, "needs 0"),
        ({"completions": [completion(1, 0, rewards={})] * 2}, "the rewards are correct, got "),
        (
            {"completions": [completion(1, 0, rewards={"correct": 1.0, "x": 0.0})] * 2},
            "the rewards are correct",
        ),
        (
            {"completions": [completion(1, 0, tokens=bytes(20), logprobs=bytes(20), versions=bytes(20))] * 2},
            "a completion has at most 4 tokens, got 5",
        ),
    ],
    ids=["count", "large id", "negative id", "future", "past", "no reward", "unknown reward", "long"],
)
def test_a_group_that_would_harm_the_learner_is_refused_and_its_lease_goes_out_again(run, changes, complaint):
    peer = run.peer("w").join()
    lease = peer.take()[0]
    ack = peer.deliver(lease, **changes)
    assert not ack.accepted
    assert complaint in ack.reason
    peer.beat(capacity=3, holding=[1])
    assert [(again.lease, again.attempt) for again in peer.receive(wire.Grant).leases] == [(0, 2)]


def test_leases_are_shared_among_the_workers_that_have_room(start):
    run = start(max_staleness=0, batch_groups=1)  # two leases may be out
    first, second = run.peer("first").join(), run.peer("second").join()
    for peer in (first, second):
        peer.wait_until_seen()
    # Both ask before the thread looks at leases again, or the first takes one and then the other.
    second.beat(capacity=1)
    first.beat(capacity=1)
    assert {peer.receive(wire.Grant).leases[0].lease for peer in (first, second)} == {0, 1}


def test_workers_take_turns_where_there_are_more_of_them_than_leases(start):
    run = start(max_staleness=0)  # one run of two leases may be out
    workers = [ask(run.peer(name).join()) for name in "abc"]
    for version, worker in enumerate(workers * 2):
        deliver(run, worker, version, granted(worker, version))


def test_a_worker_that_has_no_weights_yet_comes_after_those_that_have(start):
    run = start(max_staleness=0)
    early = ask(run.peer("early").join())
    late = ask(run.peer("late").join(), version=-1)
    for version in range(2):
        deliver(run, early, version, granted(early, version))
    leases = granted(early, 2)
    ask(late, version=0)
    deliver(run, early, 2, leases)
    deliver(run, late, 3, granted(late, 3))


def ask(worker, version=0):
    """Ask for a run of two leases, and wait until the learner knows."""
    worker.wait_until_seen()
    worker.beat(capacity=2, version=version)
    worker.receive(wire.Announcement)
    return worker


def granted(worker, version):
    """Return the leases of the update that follows a version, which the worker has been granted."""
    leases = worker.receive(wire.Grant).leases
    assert [lease.lease for lease in leases] == [2 * version, 2 * version + 1]
    return leases


def deliver(run, worker, version, leases):
    """Let the worker deliver the groups of an update, and train."""
    for lease in leases:
        worker.deliver(lease, version)
    run.publish(version + 1, consumed=[lease.lease for lease in leases])


def test_problems_whose_prompt_is_too_long_are_left_out_and_logged(start):
    long, longest = (
        Problem(name, ({"role": "user", "content": "x" * length},), "0")
        for name, length in (("long", 51), ("longest", 50))
    )
    run = start(problems=[PROBLEMS[0], long, longest], batch_groups=1)
    peer = run.peer("w").join()
    assert [lease.problem_id for lease in peer.take(capacity=4, runs=4)] == ["p0", "longest"] * 2
    logs = [record["text"] for record in run.records("log")]
    assert logs == ["long left out: 51 prompt tokens, data.max_prompt_length is 50"] * 2


def test_one_short_prompt_is_enough_wherever_an_epoch_poses_it():
    orders = [ProblemOrder(4, seed) for seed in range(200)]
    order = next(order for order in orders if order.at(0).index == order.at(7).index == 0)
    # Between its two turns there are 2 · 3 problems that are left out, more than an epoch has.
    supply = Supply(
        PROBLEMS[:4], order, 0, 2, 9, lambda messages: [0] * (9 + int(messages[0]["content"][-1])), rules=None
    )
    assert list(islice(supply.posed(), 2)) == [0, 7]


def test_a_data_set_without_a_short_prompt_ends_the_run_with_the_cure(start):
    run = start(max_prompt_length=3)
    peer = run.peer("w")
    peer.send(peer.hello())  # found out when the first leases are made, which is for the first worker
    with pytest.raises(DataError, match=r"no problem has a prompt of at most 3 tokens; raise it"):
        wait_until(lambda: run.exchange.next_batch(0.1))


def test_a_run_of_leases_waits_for_the_first_free_worker_not_behind_another_run(start):
    run = start(max_staleness=2)  # three runs of two leases may be out
    first = run.peer("first").join()
    held = first.take(capacity=2)
    busy = run.peer("busy").join()
    assert [lease.lease for lease in busy.take(capacity=4)] == [2, 3]
    busy.beat(4, holding=[2, 3])
    busy.receive(wire.Announcement)
    assert [message for message in busy.unread if isinstance(message, wire.Grant)] == []
    for lease in held:
        first.deliver(lease)
    assert [lease.lease for lease in first.take(capacity=2)] == [4, 5]


def test_a_worker_without_company_gets_the_next_run_while_it_samples_the_first(run):
    assert [lease.lease for lease in run.peer("alone").join().take(capacity=4, runs=2)] == [0, 1, 2, 3]
