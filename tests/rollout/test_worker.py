"""A worker against a learner's sockets driven by hand: it handles messages between two steps, with and without draining."""

import contextlib
import itertools
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import pytest
from bounds import HANG_S

from grpo_actors import progress
from grpo_actors.config import Config
from grpo_actors.errors import ProtocolError
from grpo_actors.policy.weights import freeze, pack
from grpo_actors.progress import LOADING_S, scoring_patience_s
from grpo_actors.rollout.worker import RolloutWorker
from grpo_actors.tasks.scoring import Scorer
from grpo_actors.transport.control import ControlClient, ControlServer
from grpo_actors.transport.sockets import zmq_context
from grpo_actors.transport.weights import WeightsClient, WeightsServer
from grpo_actors.wire import fetching
from grpo_actors.wire import messages as wire

NAME = "w"
CONFIG = Config.model_validate(
    {
        "model": {"dtype": "float32"},
        "data": {"task": "arithmetic"},
        "reward": {"functions": {"correctness": 1.0}},
        "rollout": {
            "num_generations": 2,
            "max_new_tokens": 12,
            "batch_groups": 1,
            "in_flight_updates": True,
            "max_staleness": 2,
        },
    }
)
#: With the embedded model's prompt below, two completions have a row at a time.
DRAINING = CONFIG.model_copy(
    update={
        "rollout": CONFIG.rollout.model_copy(
            update={"in_flight_updates": False, "batch_groups": 2, "max_kv_tokens": 2 * (4 + 12)}
        )
    }
)
#: Far more turns than a few groups of twelve tokens take.
TURNS = 200


class HandLearner:
    """A learner that grants what a test asks for and keeps what it receives. A thread serves its weights."""

    def __init__(self, folder: str, context: Any, policy: Any, config: Config) -> None:
        self.received: list[wire.Message] = []
        self._control = ControlServer(context, f"ipc://{folder}/c")
        self._weights = WeightsServer(context, f"ipc://{folder}/w", fetching)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()
        client = ControlClient(context, f"ipc://{folder}/c", NAME)
        welcome = wire.Welcome(
            run_id="r", config="{}", identity="{}", weights_endpoint=f"ipc://{folder}/w", beat_s=1e-9
        )
        policy.stop_tokens = frozenset()  # every completion has all twelve tokens
        self.initial = policy.trainable()
        scorer = Scorer(config.reward.functions, timeout_s=HANG_S)
        weights = WeightsClient(context, f"ipc://{folder}/w", fetching)
        self.worker = RolloutWorker(client, welcome, config, policy, scorer, weights, version=0)

    def send(self, message: wire.Message) -> None:
        """Send a message; return once it has arrived, so that the worker's next turn handles it."""
        while not self._control.send(self.worker.control.identity, wire.encode(message)):
            self.turns(1)  # the worker connects
        assert self.worker.control.socket.poll(int(HANG_S * 1000))

    def grant(self, *leases: int, attempt: int = 1, min_version: int = 0) -> None:
        granted = []
        for lease in leases:
            base = {"lease": lease, "attempt": attempt, "token": 10 * lease + attempt}
            base |= {"min_version": min_version, "problem_id": f"p{lease}"}
            prompt = {"prompt": wire.ints([2, 21, 22, 3]), "messages": [], "answer": "1", "columns": "{}"}
            seeds = {"seeds": [2 * lease, 2 * lease + 1]}
            granted.append(wire.Lease.model_validate(base | prompt | seeds))
        self.send(wire.Grant(leases=granted))

    def publish(self, version: int) -> None:
        arrays = {name: array + 0.01 * version for name, array in self.initial.items()}
        mx.eval(arrays)
        manifest, data = pack(freeze(version, arrays), 2**20)
        self._weights.publish(version, wire.encode(manifest), data, manifest.chunk_bytes)
        self.send(wire.Announcement(version=version))

    def _serve(self) -> None:
        while not self._over.is_set():
            if self._weights.socket.poll(10):
                self._weights.serve()

    def turns(self, count: int) -> None:
        for _ in range(count):
            self.worker.turn(wait_s=0.001)
            self.read()

    def read(self) -> None:
        self.received += [wire.decode(wire.from_peer, data) for _, data, _ in self._control.receive()]

    def wait_for_groups(self, count: int) -> None:
        """Read until so many groups have come in all; the worker has sent them already."""
        while len(self.groups()) < count:
            assert self._control.socket.poll(int(HANG_S * 1000))
            self.read()

    def wait_for_sampling(self) -> None:
        """Read until the newest beat says that the worker samples; the worker has sent it already."""
        while self.last_beat().state != "sampling":
            assert self._control.socket.poll(int(HANG_S * 1000))
            self.read()

    def groups(self) -> list[wire.Group]:
        return [message for message in self.received if isinstance(message, wire.Group)]

    def last_beat(self) -> wire.Beat:
        return [message for message in self.received if isinstance(message, wire.Beat)][-1]

    def close(self) -> None:
        self._over.set()
        self._thread.join()


def versions(group: wire.Group) -> list[list[int]]:
    return [wire.read_ints(completion.versions) for completion in group.completions]


@contextlib.contextmanager
def hand_learner(policy: Any, config: Config) -> Iterator[HandLearner]:
    with (
        tempfile.TemporaryDirectory(dir="/tmp") as folder,
        zmq_context() as context,
        contextlib.closing(HandLearner(folder, context, policy, config)) as made,
    ):
        yield made


@pytest.fixture
def learner(tiny) -> Iterator[HandLearner]:
    with hand_learner(tiny, CONFIG) as made:
        yield made


@pytest.fixture
def draining(tiny_lora) -> Iterator[HandLearner]:
    """A learner whose worker drains, with a policy that has an adapter."""
    with hand_learner(tiny_lora, DRAINING) as made:
        yield made


# --- in flight ------------------------------------------------------------------------------------


def test_a_version_that_arrives_in_mid_completion_samples_all_tokens_from_the_next_step_on(learner):
    learner.grant(0)
    learner.turns(5)
    learner.publish(1)
    learner.turns(TURNS)
    [group] = learner.groups()
    # The first of the five turns may have gone into connecting, so the step of the adoption is not exact.
    [one, other] = versions(group)
    assert one == other == sorted(one)
    assert set(one) == {0, 1}
    assert len(one) == 12


def test_a_grant_waits_for_its_version(learner):
    learner.grant(0)
    learner.grant(1, min_version=1)
    learner.turns(TURNS)
    assert [group.lease for group in learner.groups()] == [0]
    assert learner.last_beat().state == "waiting"
    assert sorted(learner.last_beat().holding) == [0, 1]  # one unacknowledged, one that waits
    learner.publish(1)
    learner.turns(TURNS)
    assert [group.lease for group in learner.groups()] == [0, 1]
    assert versions(learner.groups()[1]) == [[1] * 12] * 2


def test_groups_of_several_grants_are_under_way_and_each_is_sent_as_soon_as_it_is_whole(learner):
    started_s = time.monotonic()
    for lease in range(3):
        learner.grant(lease)
    learner.turns(8)
    learner.wait_for_sampling()
    assert sorted(learner.last_beat().holding) == [0, 1, 2]
    assert learner.last_beat().credits == 3  # runs of one group
    learner.turns(12)
    learner.wait_for_groups(1)
    assert [group.lease for group in learner.groups()] == [0]  # two rows: one group after the other
    learner.turns(TURNS)
    learner.wait_for_groups(3)
    assert [group.lease for group in learner.groups()] == [0, 1, 2]
    # Steps that groups share are divided among them.
    assert 0.0 < sum(group.sampling_s for group in learner.groups()) <= time.monotonic() - started_s


@pytest.mark.parametrize("turns", [0, 1, 7])
def test_a_lease_that_is_granted_again_comes_back_once_under_its_new_attempt(learner, turns):
    learner.grant(0)
    learner.turns(turns)
    learner.grant(0, attempt=2)
    learner.turns(TURNS)
    [group] = learner.groups()
    assert (group.lease, group.attempt, group.token) == (0, 2, 2)
    assert learner.last_beat().holding == [0]


def test_a_group_is_sent_again_until_it_is_acknowledged(learner, monkeypatch):
    learner.grant(0, attempt=2)
    learner.turns(TURNS)
    [group] = learner.groups()
    learner.send(wire.Ack(lease=0, attempt=1, accepted=False))  # of an attempt that was given up
    monkeypatch.setattr("grpo_actors.rollout.worker.RESEND_S", 0.0)
    learner.turns(1)
    learner.wait_for_groups(2)
    assert learner.groups() == [group] * 2
    assert (learner.worker.delivered, learner.last_beat().holding) == (0, [0])
    learner.send(wire.Ack(lease=0, attempt=2, accepted=True))
    learner.turns(TURNS)
    assert learner.groups() == [group] * 2
    assert (learner.worker.delivered, learner.last_beat().holding) == (1, [])


def test_a_group_that_was_just_sent_is_not_sent_again(learner, monkeypatch):
    monkeypatch.setattr("grpo_actors.rollout.worker.RESEND_S", HANG_S)
    learner.grant(0)
    learner.turns(TURNS)
    assert learner.last_beat().holding == [0]
    assert len(learner.groups()) == 1


def test_the_supervisor_is_told_which_leases_are_sampled(tiny, monkeypatch):
    read, write = os.pipe()
    monkeypatch.setenv(progress.PROGRESS, str(write))
    monkeypatch.setattr(progress, "_reporter", progress._Reporter())
    with hand_learner(tiny, DRAINING) as learner:
        learner.grant(0, 1)
        learner.turns(TURNS)
        learner.grant(2)
        learner.turns(TURNS)
        assert len(learner.groups()) == 3
    os.close(write)
    patience_s = scoring_patience_s(DRAINING.reward.reward_timeout_s)
    with os.fdopen(read) as told:
        works = [work for work, _ in itertools.groupby(told.read().splitlines())]
    # Only the first step may compile.
    assert works == [
        f"{patience_s} ",
        f"{LOADING_S} leases 0, 1",
        f"{patience_s} leases 0, 1",
        f"{patience_s} ",
        f"{patience_s} lease 2",
        f"{patience_s} ",
    ]


def test_an_idle_worker_beats_as_often_as_the_learner_asks(learner):
    learner.turns(TURNS)
    learner.worker.welcome = learner.worker.welcome.model_copy(update={"beat_s": HANG_S})
    learner.turns(2)  # the first of them may be the last one of the old kind
    beats = len([message for message in learner.received if isinstance(message, wire.Beat)])
    learner.turns(10)
    assert len([message for message in learner.received if isinstance(message, wire.Beat)]) <= beats + 1
    # A learner that welcomes it once more hears from it at once.
    learner.received.clear()
    learner.send(learner.worker.welcome)
    learner.turns(1)
    learner.turns(1)
    assert learner.last_beat().state == "waiting"


@pytest.mark.parametrize(
    ("changes", "must_rejoin"),
    [
        ({}, False),
        ({"beat_s": 2.0}, False),
        ({"run_id": "s"}, True),
        ({"config": "[]"}, True),
        ({"identity": "[]"}, True),
        ({"weights_endpoint": "ipc:///x"}, True),
    ],
)
def test_a_worker_joins_anew_what_is_another_run_than_its_own(learner, changes, must_rejoin):
    learner.turns(1)
    learner.send(learner.worker.welcome.model_copy(update=changes))
    learner.turns(1)
    assert learner.worker.must_rejoin is must_rejoin


def test_what_a_worker_may_not_get_is_an_error(learner):
    learner.turns(1)
    learner.send(wire.Hello(protocol=wire.PROTOCOL_VERSION, role="rollout", name="w", host="h", pid=7))
    with pytest.raises(ProtocolError):
        learner.turns(1)


def test_an_answer_that_is_no_manifest_is_an_error(learner):
    learner._weights.publish(1, wire.encode(wire.Chunk(version=1, index=0)), b"", 1)
    learner.send(wire.Announcement(version=1))
    with pytest.raises(ProtocolError, match="asked for a manifest, got Chunk"):
        learner.turns(1)


def test_a_restarted_learner_gets_no_group_that_its_predecessor_granted(learner):
    learner.grant(0)
    learner.turns(5)
    learner.send(wire.Bye(again=True))
    learner.turns(TURNS)
    assert learner.groups() == []
    assert any(isinstance(message, wire.Hello) for message in learner.received)
    assert learner.last_beat().holding == []
    assert learner.last_beat().version == -1
    learner.grant(0)
    learner.publish(3)
    learner.turns(TURNS)
    [group] = learner.groups()
    assert versions(group) == [[3] * 12] * 2


def test_a_dismissal_takes_effect_while_completions_are_under_way(learner):
    learner.grant(0)
    learner.turns(3)
    learner.send(wire.Bye(reason="the run is over", dismissed=True))
    learner.turns(1)
    assert (learner.worker.dismissed, learner.worker.dropped) == ("the run is over", False)
    assert learner.groups() == []


def test_a_worker_that_the_learner_drops_knows_that_this_is_an_error(learner):
    learner.send(wire.Bye(reason="10 messages against the protocol"))
    learner.turns(1)
    assert (learner.worker.dismissed, learner.worker.dropped) == ("10 messages against the protocol", True)


def test_time_counts_as_waiting_where_there_is_nothing_to_sample(learner):
    def after_a_beat():
        learner.worker._next_beat_s = 0.0
        learner.turns(1)
        return learner.last_beat()

    learner.turns(TURNS)
    idle = after_a_beat()
    learner.turns(TURNS)
    still_idle = after_a_beat()
    # What a turn does besides waiting is not worth a count: an idle worker does no work at all.
    assert (idle.working_s, still_idle.working_s) == (0.0, 0.0)
    assert 0.0 < idle.waiting_s < still_idle.waiting_s
    learner.grant(0)
    started_s = time.monotonic()
    while not learner.groups():
        learner.turns(1)
    took_s, beat = time.monotonic() - started_s, learner.last_beat()
    assert beat.state == "waiting"
    assert 0.0 < beat.working_s <= took_s, "counted once"
    [group] = learner.groups()
    assert 0.0 < group.scoring_s <= took_s
    assert beat.tokens == 2 * 12


# --- draining -------------------------------------------------------------------------------------


def test_a_batch_is_sent_together_before_the_next_one_begins(draining):
    draining.grant(1, 0)
    draining.grant(2)
    draining.turns(18)  # two rows: the first group is whole, the second is not
    assert draining.groups() == []
    draining.wait_for_sampling()
    assert sorted(draining.last_beat().holding) == [0, 1, 2]
    assert draining.last_beat().credits == 4  # two runs of two groups
    while draining.worker.busy:
        draining.turns(1)
    draining.wait_for_groups(2)
    assert [group.lease for group in draining.groups()] == [1, 0]
    assert draining.groups()[0].sampling_s == pytest.approx(draining.groups()[1].sampling_s)
    draining.turns(TURNS)
    draining.wait_for_groups(3)
    assert [group.lease for group in draining.groups()] == [1, 0, 2]


def test_a_version_that_arrives_in_mid_batch_waits_for_the_end_of_the_batch(draining):
    draining.grant(0, 1)
    draining.turns(5)
    draining.publish(1)
    draining.grant(2)
    draining.turns(TURNS)
    assert [versions(group) for group in draining.groups()] == [[[0] * 12] * 2] * 2 + [[[1] * 12] * 2]


@pytest.mark.parametrize("dropped", [0, 1])
def test_a_lease_that_is_granted_again_comes_back_once_and_after_its_old_batch(draining, dropped):
    draining.grant(0, 1)
    draining.turns(18)  # lease 0 is whole and waits for the other one
    draining.grant(dropped, attempt=2)
    draining.turns(TURNS)
    came = [(group.lease, group.attempt) for group in draining.groups()]
    assert came == [(1 - dropped, 1), (dropped, 2)]


@pytest.mark.parametrize("again", [True, False])
def test_open_completions_are_dropped_and_the_policy_is_restored_with_its_adapter(draining, again):
    draining.turns(5)
    draining.grant(0, 1)
    draining.turns(5)
    worker = draining.worker
    assert worker.busy
    assert worker.policy.trainable().keys() != draining.initial.keys()  # the adapter is part of the weights
    draining.send(wire.Bye(reason="the run is over", again=again))
    draining.turns(1)
    assert not worker.busy
    assert worker.policy.trainable().keys() == draining.initial.keys()
    draining.turns(TURNS)
    assert draining.groups() == []


def test_a_worker_that_is_asked_to_stop_leaves_at_its_next_turn(draining):
    draining.grant(0, 1)
    draining.turns(5)
    draining.worker.stop.set()
    draining.turns(1)
    assert not draining.worker.busy
    assert draining.worker.policy.trainable().keys() == draining.initial.keys()
