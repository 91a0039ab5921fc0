"""One participation of a worker in a run, against a learner's sockets: what it prints, its exit code and its Bye."""

import contextlib
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import mlx.core as mx
import pytest
from bounds import HANG_S

from grpo_actors.config import Config
from grpo_actors.errors import ConfigError, RunError
from grpo_actors.policy.weights import freeze, pack
from grpo_actors.process import StopRequest
from grpo_actors.rollout.absence import Absence, Place
from grpo_actors.rollout.participation import take_part
from grpo_actors.transport.control import ControlServer, new_session
from grpo_actors.transport.sockets import endpoint_of, zmq_context
from grpo_actors.transport.weights import WeightsServer
from grpo_actors.wire import fetching
from grpo_actors.wire import messages as wire

SESSION = new_session()
THERE = Place("tcp://127.0.0.1:9")


def settings(**sections):
    return Config.model_validate(
        {
            "model": {"dtype": "float32"},
            "run": {"run_name": "pears"},
            "data": {"task": "arithmetic"},
            "reward": {"functions": {"correctness": 1.0}},
        }
        | sections
    )


class Learner:
    """Answers Hello with `answer`, and the first beat with `sends`; keeps what it received."""

    def __init__(self, context, policy, config=None):
        self.control = ControlServer(context, "tcp://127.0.0.1:*")
        self.weights = WeightsServer(context, "tcp://127.0.0.1:*", fetching)
        arrays = policy.trainable()
        mx.eval(arrays)
        manifest, data = pack(freeze(0, arrays), 2**20)
        self.weights.publish(0, wire.encode(manifest), data, manifest.chunk_bytes)
        self.place = Place(endpoint_of(self.control.socket))
        self.welcome = self.answer = wire.Welcome(
            run_id="r",
            config=(config or settings()).model_dump_json(),
            identity=json.dumps(asdict(policy.identity)),
            weights_endpoint=endpoint_of(self.weights.socket),
            beat_s=1e-9,
        )
        self.sends = []
        #: Called at the first beat.
        self.at_beat = lambda: None
        self.received, self.peers = [], set()
        self.over = threading.Event()

    def serve(self):
        while not self.over.is_set():
            if self.weights.socket.poll(1):
                self.weights.serve()
            for peer, data, _ in self.control.receive():
                message = wire.decode(wire.from_peer, data)
                first_beat = isinstance(message, wire.Beat) and not any(
                    isinstance(before, wire.Beat) for before in self.received
                )
                self.peers.add(peer)
                self.received.append(message)
                if isinstance(message, wire.Hello):
                    self.control.send(peer, wire.encode(self.answer))
                elif first_beat:
                    for answer in self.sends:
                        self.control.send(peer, wire.encode(answer))
                    self.at_beat()
                elif isinstance(message, wire.Bye):
                    return

    def bye(self):
        """Wait for the worker's Bye, and return it."""
        self.served.result(HANG_S)
        return self.received[-1]


@contextlib.contextmanager
def serving(policy, config=None) -> Iterator[Learner]:
    with zmq_context() as context, ThreadPoolExecutor(1) as thread:
        made = Learner(context, policy, config)
        made.served = thread.submit(made.serve)
        try:
            yield made
        finally:
            made.over.set()


def part(learner, policy, stop=None, patience_s=HANG_S):
    """Take part in the learner's run."""
    absence = Absence(lambda: learner.place, learner.place, patience_s)
    stop = StopRequest() if stop is None else stop  # one that is not set is false
    return take_part(absence, "w", SESSION, stop, preloaded=policy)


def test_a_worker_that_is_dismissed_leaves_in_order(tiny, capsys):
    with serving(tiny) as learner:
        learner.sends = [
            wire.Ack(lease=1, attempt=1, accepted=True),
            wire.Bye(reason="the run is over", dismissed=True),
        ]
        assert part(learner, tiny) == 0
        assert learner.bye() == wire.Bye(reason="the run is over")
    assert capsys.readouterr().err.splitlines() == [
        "joined pears as w; Ctrl-C leaves it",
        "left after 1 groups: the run is over",
    ]
    assert learner.peers == {SESSION}


def test_a_worker_that_is_dropped_says_so_and_fails(tiny, capsys):
    with serving(tiny) as learner:
        learner.sends = [wire.Bye(reason="10 messages against the protocol")]
        assert part(learner, tiny) == 1
    told = capsys.readouterr().err.splitlines()
    assert told[1:] == ["w was dropped by the learner: 10 messages against the protocol"]


def test_a_worker_that_is_asked_to_stop_says_bye(tiny, capsys):
    stop = StopRequest()
    with serving(tiny) as learner:
        learner.at_beat = stop.set
        assert part(learner, tiny, stop) == 0
        assert learner.bye() == wire.Bye(reason="asked to leave")
    assert capsys.readouterr().err.endswith("left after 0 groups: asked to leave\n")


def test_a_worker_that_is_not_needed_loads_nothing(tiny):
    with serving(tiny) as learner:
        learner.answer = wire.Bye(reason="enough", dismissed=True)
        assert part(learner, None) == 0


def test_a_learner_that_asks_for_other_work_is_joined_anew(tiny, capsys):
    with serving(tiny) as learner:
        learner.sends = [learner.welcome.model_copy(update={"run_id": "s"})]
        assert part(learner, tiny) is learner.place
    assert capsys.readouterr().err.splitlines() == [
        "joined pears as w; Ctrl-C leaves it",
        "left after 0 groups, to join the run that is there now",
    ]


def test_a_learner_that_is_gone_is_looked_for_elsewhere(tiny, monkeypatch):
    monkeypatch.setattr("grpo_actors.rollout.absence.ABSENT_S", 0.0)  # at once
    with serving(tiny) as learner:
        absence = Absence(lambda: THERE, learner.place, HANG_S, 0.0)
        assert take_part(absence, "w", SESSION, StopRequest(), preloaded=tiny) is THERE


@pytest.mark.parametrize("moved", [True, False])
def test_a_learner_that_is_gone_for_too_long_is_an_error_unless_it_is_elsewhere(tiny, moved):
    with serving(tiny) as learner:
        absence = Absence(lambda: THERE if moved else learner.place, learner.place, HANG_S)

        def end_patience():
            absence.patience_s = -1.0

        learner.at_beat = end_patience
        gone = pytest.raises(RunError, match="the learner has been gone")
        with contextlib.nullcontext() if moved else gone:
            assert take_part(absence, "w", SESSION, StopRequest(), preloaded=tiny) is THERE


def test_a_worker_waits_for_its_learner_as_long_as_its_patience(tiny):
    with serving(tiny) as learner:
        learner.over.set()
        with pytest.raises(RunError, match=r"no learner answered within 0\.1 s"):
            part(learner, tiny, patience_s=0.1)


def test_code_of_the_learner_runs_only_with_consent(tiny):
    with serving(tiny, settings(reward={"functions": {"theirs.py:reward": 1.0}})) as learner:
        with pytest.raises(ConfigError, match=r"would run theirs\.py:reward here") as refused:
            part(learner, tiny)
        assert str(refused.value).startswith(learner.place.endpoint)
