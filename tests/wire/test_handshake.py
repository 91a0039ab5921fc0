"""How a peer joins a run: it says Hello until the learner answers, over real sockets."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import zmq
from bounds import HANG_S

from grpo_actors.errors import RunError
from grpo_actors.process import StopRequest
from grpo_actors.transport.control import ControlClient, ControlServer
from grpo_actors.transport.sockets import endpoint_of, zmq_context
from grpo_actors.wire import handshake as module
from grpo_actors.wire import messages as wire
from grpo_actors.wire.handshake import handshake

WELCOME = wire.Welcome(
    run_id="r", config="{}", identity="{}", weights_endpoint="ipc:///nowhere", beat_s=1.0, total_updates=5
)


class Learner:
    """Listens, and answers as a test says."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]") -> None:
        self.server = ControlServer(context, "tcp://127.0.0.1:*")
        self.peer = b""

    def hello(self) -> wire.Hello:
        """Wait for the next Hello."""
        assert self.server.socket.poll(int(HANG_S * 1000))
        *_, (self.peer, data, _) = self.server.receive()
        message = wire.decode(wire.from_peer, data)
        assert isinstance(message, wire.Hello)
        return message

    def answer(self, *messages: wire.Message) -> None:
        for message in messages:
            assert self.server.send(self.peer, wire.encode(message))


@pytest.fixture
def learner() -> Iterator[Learner]:
    with zmq_context() as context:
        yield Learner(context)


def joined(learner, answers, *, hellos=1, stops=False, patience_s=HANG_S, role="rollout"):
    """Join while the learner answers the last of so many Hellos; return what the handshake does, and that Hello.

    `stops`: whether the peer is asked to stop then.
    """
    stop, hello = StopRequest(), None

    def join():
        with zmq_context() as context:
            client = ControlClient(context, endpoint_of(learner.server.socket), "w")
            return handshake(client, role, stop, patience_s, token="5ecret")  # noqa: S106

    with ThreadPoolExecutor(1) as thread:
        outcome = thread.submit(join)
        for _ in range(hellos):
            hello = learner.hello()
        learner.answer(*answers)
        if stops:
            stop.set()
        return outcome.result(HANG_S), hello


def test_a_peer_says_who_it_is_and_gets_the_learners_welcome(learner, monkeypatch):
    monkeypatch.setattr(module, "HELLO_S", HANG_S)  # once is enough
    welcome, hello = joined(learner, [wire.Announcement(version=3), WELCOME], role="evaluator")
    assert welcome == WELCOME
    assert (hello.protocol, hello.role, hello.name, hello.token) == (
        wire.PROTOCOL_VERSION,
        "evaluator",
        "w",
        "5ecret",
    )
    assert list(learner.server.receive()) == []


def test_a_hello_that_is_not_answered_is_said_again(learner, monkeypatch):
    monkeypatch.setattr(module, "HELLO_S", 0.01)
    welcome, _ = joined(learner, [wire.Bye(again=True), WELCOME], hellos=3)
    assert welcome == WELCOME


def test_a_refusal_is_an_error_that_says_why(learner):
    with pytest.raises(RunError, match="the learner refused: this is run a, not b"):
        joined(learner, [wire.Bye(reason="this is run a, not b")])


def test_a_peer_that_is_not_needed_ends_without_an_error(learner, capsys):
    assert joined(learner, [wire.Bye(reason="the run is over", dismissed=True)])[0] is None
    assert capsys.readouterr().err == "w is not needed: the run is over\n"


def test_a_peer_that_is_asked_to_stop_waits_no_longer(learner):
    assert joined(learner, [], stops=True)[0] is None


def test_a_learner_that_does_not_answer_in_time_is_an_error(learner):
    with pytest.raises(RunError, match=r"no learner answered within 0\.2 s; is the run live\?"):
        joined(learner, [], hellos=0, patience_s=0.2)
