"""Sockets that ask for keys: who is let in, what for, and until when."""

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq
from bounds import HANG_S
from real_sockets import wait_until
from test_chunks import Numbers

from grpo_actors.errors import RunError
from grpo_actors.transport.access import ADDED_BYTES, Access, Sender
from grpo_actors.transport.control import ControlClient, ControlServer
from grpo_actors.transport.events import EventPublisher, EventSubscriber
from grpo_actors.transport.keys import RUN_ROLE, ClientKey, KeyFolder
from grpo_actors.transport.sockets import Context, endpoint_of, zmq_context
from grpo_actors.transport.weights import WeightsClient, WeightsServer

ANY_PORT = "tcp://127.0.0.1:*"


class Learner:
    """A learner's three sockets, which ask for keys."""

    def __init__(self, context: Context, folder: KeyFolder) -> None:
        self.folder, self.context = folder, context
        self.own = ClientKey.make("run", RUN_ROLE, folder.learner()[0])
        self.access = Access(folder, self.own)

    @contextlib.contextmanager
    def listening(self) -> Iterator["Learner"]:
        with self.access.enforced(self.context):
            self.control = ControlServer(self.context, ANY_PORT, self.access)
            self.weights = WeightsServer(self.context, ANY_PORT, Numbers(), self.access)
            self.weights.publish(1, b"manifest", memoryview(b"12345"), 5)
            self.events = EventPublisher(self.context, ANY_PORT, self.access)
            yield self
            # Before the authenticator ends.
            for each in (self.control.socket, self.weights.socket, self.events.socket):
                each.close(linger=0)

    def worker(self, key: ClientKey | None, name: str = "w") -> ControlClient:
        return ControlClient(self.context, endpoint_of(self.control.socket), name, key)

    def arrivals(self) -> list[tuple[bytes, str]]:
        self.control.socket.poll(50)
        return [(data, sender.role) for _, data, sender in self.control.receive()]

    def says(self, client: ControlClient, data: bytes) -> list[tuple[bytes, str]]:
        """Send a message, and return what arrives, with the sender's role."""
        wait_until(lambda: client.send(data))
        arrived: list[tuple[bytes, str]] = []
        wait_until(lambda: arrived.extend(self.arrivals()) or arrived)
        return arrived


@pytest.fixture
def learner(zmq_sockets: Context, tmp_path: Path) -> Iterator[Learner]:
    with Learner(zmq_sockets, KeyFolder(tmp_path / "keys")).listening() as learner:
        yield learner


def refusal(client: ControlClient, meanwhile: Callable[[], object] = lambda: None) -> str:
    """Return why a client is refused; call `meanwhile` again and again until it is."""

    def receive() -> None:
        deadline_s = time.monotonic() + HANG_S
        while time.monotonic() < deadline_s:
            meanwhile()
            client.receive(0.02)

    with pytest.raises(RunError) as refused:
        receive()
    return str(refused.value)


@pytest.mark.parametrize(
    ("role", "may"),
    [
        ("", "is_own may_sample"),
        (RUN_ROLE, "is_own may_sample"),
        ("worker", "may_sample"),
        ("evaluator", "may_evaluate"),
        ("reader", ""),
    ],
)
def test_a_role_says_what_its_holder_may_do(role, may):
    sender = Sender("k", role, 7)
    rights = ("is_own", "may_sample", "may_evaluate")
    assert [right for right in rights if getattr(sender, right)] == may.split()


def test_what_a_connection_delivers_is_counted_with_what_zeromq_adds(zmq_sockets, ipc_address):
    access = Access()
    server = ControlServer(zmq_sockets, ipc_address, access)
    client = ControlClient(zmq_sockets, ipc_address, "w")
    for _ in range(2):
        wait_until(lambda: client.send(bytes(1000)))
        wait_until(lambda: server.socket.poll(100))
        (arrival,) = server.receive()
    assert access.delivered == {arrival.sender.descriptor: 2 * (1000 + ADDED_BYTES)}


def test_a_damaged_list_is_refused_before_the_run_starts(tmp_path):
    folder = KeyFolder(tmp_path / "keys")
    folder.new("laptop", "worker")
    (folder.folder / "allowed.json").write_text("{")
    with pytest.raises(RunError, match=r"allowed\.json: is no key file"):
        Access(folder)


def test_without_encryption_there_are_no_keys(tmp_path, monkeypatch):
    monkeypatch.setattr(zmq, "has", lambda capability: capability != "curve")
    with pytest.raises(RunError, match="this pyzmq was built without CURVE, so TCP has no keys"):
        Access(KeyFolder(tmp_path / "keys"))


def test_who_asks_for_keys_leaves_no_thread(zmq_sockets, tmp_path):
    before = threading.enumerate()
    with Access(KeyFolder(tmp_path / "keys")).enforced(zmq_sockets):
        assert len(threading.enumerate()) == len(before) + 1
    assert threading.enumerate() == before


@pytest.mark.parametrize("role", ["worker", "evaluator"])
def test_a_listed_key_is_let_in_with_its_role(learner, role):
    assert learner.says(learner.worker(learner.folder.new("k", role)), b"hello") == [(b"hello", role)]


def test_the_runs_own_key_needs_no_list(learner):
    assert learner.says(learner.worker(learner.own), b"hello") == [(b"hello", "run")]


def test_a_peer_without_a_key_is_refused_and_told_why(learner):
    client = learner.worker(None)
    assert "needs a key: --key FILE, made by grpo keys new NAME" in refusal(client)
    assert not client.send(b"hello")
    assert learner.arrivals() == []


def test_an_unlisted_key_is_refused_and_told_why(learner):
    stranger = ClientKey.make("mallory", "worker", learner.folder.learner()[0])
    client = learner.worker(stranger)
    assert "the key 'mallory' with the role 'worker' is not let in here" in refusal(client)
    assert not client.send(b"hello")


def test_a_key_for_another_learner_is_refused_and_told_why(learner, tmp_path):
    client = learner.worker(KeyFolder(tmp_path / "other").new("k", "worker"))
    assert "is not the learner that the key 'k' is for" in refusal(client)


def test_a_key_of_another_role_is_refused(learner):
    assert "with the role 'reader' is not let in" in refusal(
        learner.worker(learner.folder.new("r", "reader"))
    )
    worker = learner.folder.new("w", "worker")
    with (
        EventSubscriber(learner.events.endpoint, key=worker) as subscriber,
        pytest.raises(RunError, match="with the role 'worker' is not let in"),
    ):
        subscriber.receive(HANG_S)


def test_a_handshake_that_is_broken_off_a_few_times_refuses_nobody(zmq_sockets, learner):
    with socket.create_server(("127.0.0.1", 0)) as ending:  # as a learner that ends
        address = f"tcp://127.0.0.1:{ending.getsockname()[1]}"
        client = ControlClient(zmq_sockets, address, "w", learner.folder.new("k", "worker"))
        for _ in range(3):
            ending.accept()[0].close()
            assert client.receive(0.02) is None
    client.close()


def test_handshakes_that_were_broken_off_before_a_connection_do_not_count(zmq_sockets, learner, monkeypatch):
    monkeypatch.setattr("grpo_actors.transport.refusals.BROKEN_OFF", 3)
    port = 0
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            with socket.create_server(("127.0.0.1", port)) as ending:
                if not port:
                    port = ending.getsockname()[1]
                    key = learner.folder.new("k", "worker")
                    client = ControlClient(zmq_sockets, f"tcp://127.0.0.1:{port}", "w", key)
                for _ in range(2):
                    ending.accept()[0].close()
                    assert client.receive(0.02) is None
            server = ControlServer(zmq_sockets, f"tcp://127.0.0.1:{port}", learner.access)
            stack.callback(server.socket.close, linger=0)
            wait_until(lambda client=client: client.send(b"hello"))
            assert client.receive(0.02) is None
            server.socket.close(linger=0)
            wait_until(lambda client=client: not client.send(b"into the void"))


def test_a_closed_client_keeps_no_context_from_ending(learner):
    with zmq_context() as own:
        ControlClient(own, endpoint_of(learner.control.socket), "w", learner.own).close()


def test_a_key_at_a_learner_without_keys_says_so(zmq_sockets, learner):
    server = ControlServer(zmq_sockets, ANY_PORT)
    client = ControlClient(zmq_sockets, endpoint_of(server.socket), "w", learner.folder.new("k", "worker"))
    assert "has no keys (transport.insecure = true there)" in refusal(client)


def test_a_revoked_key_is_refused_at_its_next_message_although_it_is_connected(learner):
    client = learner.worker(learner.folder.new("laptop", "worker"))
    learner.says(client, b"one")
    learner.folder.revoke("laptop")
    wait_until(lambda: client.send(b"two"))
    arrived: list[tuple[bytes, str]] = []
    assert "it was revoked" in refusal(client, lambda: arrived.extend(learner.arrivals()))
    assert arrived == []  # the message was dropped


def test_revoking_one_key_leaves_the_others(learner):
    keys = [learner.folder.new(name, "worker") for name in ("one", "two")]
    clients = [learner.worker(key, key.name) for key in keys]
    for client in clients:
        learner.says(client, b"hello")
    learner.folder.revoke("one")
    assert learner.says(clients[1], b"still here") == [(b"still here", "worker")]


def test_weights_come_to_workers_until_their_key_is_revoked(learner):
    client = WeightsClient(
        learner.context,
        endpoint_of(learner.weights.socket),
        Numbers(),
        key=learner.folder.new("laptop", "worker"),
    )
    assert client.socket.ask(b"manifest")
    learner.weights.socket.poll(int(HANG_S * 1000))
    learner.weights.serve()
    assert client.socket.answer() == [b"manifest", b""]
    learner.folder.revoke("laptop")
    assert client.socket.ask(b"manifest")
    learner.weights.socket.poll(int(HANG_S * 1000))
    learner.weights.serve()
    client.socket.timeout_s = 0.2
    assert client.socket.answer() is None


def test_a_reader_whose_key_is_revoked_gets_no_more_events_although_it_only_listens(learner):
    key = learner.folder.new("screen", "reader")
    with EventSubscriber(learner.events.endpoint, key=key) as subscriber:

        def gets_events() -> bool:
            learner.events.tend()
            learner.events.publish("metrics", b"{}")
            return subscriber.receive(0.02) is not None

        wait_until(gets_events)
        learner.folder.revoke("screen")
        learner.events.tend()
        with pytest.raises(RunError, match="it was revoked"):
            wait_until(lambda: not gets_events() and subscriber.receive(0.05) is None and False)


@pytest.mark.parametrize("damage", ["no list", "out of reach"])
def test_a_list_that_is_damaged_while_the_run_lives_lets_nobody_in(learner, damage):
    client = learner.worker(learner.folder.new("laptop", "worker"))
    learner.says(client, b"one")
    path = learner.folder.folder / "allowed.json"
    if damage == "no list":
        path.write_text("{")
    else:
        path.unlink()
        path.symlink_to(path)  # as a network folder that is gone: the system tells nothing of it
    wait_until(lambda: client.send(b"two"))
    assert "is not let in" in refusal(client, learner.arrivals)
