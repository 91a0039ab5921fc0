"""What peers can make the learner keep in memory: the gate before Unix sockets, and the watch over TCP sockets."""

import contextlib
import os
import random
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq
from bounds import HANG_S
from hostile import COMMAND, GREETING, LONG, MORE, RawPeer, frame, ready
from real_sockets import KeepingContext, wait_until

from grpo_actors.transport.access import Access
from grpo_actors.transport.control import ControlClient, ControlServer
from grpo_actors.transport.gate import Frames, TooMuch, gated
from grpo_actors.transport.limits import MAX_CONNECTIONS, MAX_MESSAGE_BYTES, MAX_TOTAL_BYTES
from grpo_actors.transport.sockets import CONTROL_BYTES, INNER, Endpoints, endpoint_of, zmq_context
from grpo_actors.transport.watch import watched

MIB = 2**20


# --- reading frames ----------------------------------------------------------------------------------


def test_frames_are_read_wherever_the_bytes_are_cut():
    rng = random.Random(0)
    data = GREETING + ready(b"DEALER") + b"\0\3abc" + frame(bytes(1000)) + frame(b"") + frame(bytes(70))[:-1]
    for _ in range(50):
        frames, at = Frames(), 0
        while at < len(data):
            step = rng.randrange(1, 200)
            frames.read(data[at : at + step])
            at += step
        assert frames.unfinished == 70  # its last byte is missing
        frames.read(b"\0")
        assert frames.unfinished == 0


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n",
        GREETING[:10] + b"\x01" + GREETING[11:],
        GREETING + b"\xff",
        GREETING + bytes([MORE, 1]),
        GREETING + bytes([LONG]) + (MAX_MESSAGE_BYTES + 1).to_bytes(8, "big"),
        GREETING + bytes([COMMAND | LONG]) + (2**64 - 1).to_bytes(8, "big"),
    ],
    ids=["http", "ZeroMQ 2", "flags", "several frames", "too large", "command too large"],
)
def test_what_is_no_frame_or_claims_too_much_is_refused(data):
    with pytest.raises(TooMuch):
        Frames().read(data)


# --- the gate ----------------------------------------------------------------------------------------


class Behind:
    """A control socket behind a gate."""

    def __init__(self, context: zmq.Context, folder: str, endpoints: Endpoints) -> None:
        self.address = f"ipc://{folder}/c"
        self.context = context
        self.server = ControlServer(context, endpoints.control)

    def received(self, client: ControlClient, data: bytes) -> bool:
        self.server.socket.poll(50)
        return (client.identity, data) in [(identity, body) for identity, body, _ in self.server.receive()]


@pytest.fixture
def behind(ipc_address: str) -> Iterator[Behind]:
    folder = str(Path(ipc_address.removeprefix("ipc://")).parent)
    addresses = Endpoints(*(f"ipc://{folder}/{part}" for part in "cwe"), os.getpid())
    with gated(addresses) as endpoints:
        assert endpoints.control == f"ipc://{folder}/c{INNER}"
        context = KeepingContext()
        yield Behind(context, folder, endpoints)
        context.destroy(linger=0)
        KeepingContext.kept.clear()


@pytest.mark.parametrize("way", ["in the kernel", "copied"])
def test_messages_of_any_size_pass_in_both_directions(behind, way, monkeypatch):
    if way == "copied":  # as where there is no splice
        monkeypatch.delattr(os, "splice", raising=False)
    client = ControlClient(behind.context, behind.address, "w")
    for size in (0, 1, 254, 255, 256, 2**18, 5 * MIB + 3, CONTROL_BYTES):
        data = os.urandom(min(size, 1000)).ljust(size, b"x")
        wait_until(lambda data=data: client.send(data))
        wait_until(lambda data=data: behind.received(client, data))
        assert behind.server.send(client.identity, data)
        assert client.receive(HANG_S) == data


def test_a_peer_that_leaves_before_its_greeting_closes_the_gate_to_nobody(behind):
    with socket.socket(socket.AF_UNIX) as silent:
        silent.connect(behind.address.removeprefix("ipc://"))
    client = ControlClient(behind.context, behind.address, "w")
    wait_until(lambda: client.send(b"here"))
    wait_until(lambda: behind.received(client, b"here"))


def test_a_message_of_several_frames_is_cut_off_at_its_first(behind):
    with RawPeer(behind.address) as peer:
        # A frame and what lay in the kernel's buffers.
        assert peer.send_until_cut(frame(bytes(MIB), MORE), 10 * MAX_MESSAGE_BYTES) <= 4 * MIB
    assert not list(behind.server.receive())


def test_unfinished_frames_of_many_connections_are_bounded_together(behind):
    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(RawPeer(behind.address)) for _ in range(6)]
        for peer in peers:
            peer.send_until_cut(frame(bytes(50 * MIB))[:-1], 1)
        # The sixth put them over 256 MiB: one of those with the most was cut off.
        assert 6 * 50 * MIB > MAX_TOTAL_BYTES > 5 * 50 * MIB
        wait_until(lambda: sum(is_cut(peer) for peer in peers) == 1)


def is_cut(peer: RawPeer) -> bool:
    peer.socket.setblocking(False)
    try:
        while peer.socket.recv(2**16):
            pass
    except BlockingIOError:
        return False
    except ConnectionError:
        pass
    return True


def test_connections_are_bounded_and_a_closed_one_makes_room(behind):
    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(RawPeer(behind.address)) for _ in range(MAX_CONNECTIONS)]
        with pytest.raises(ConnectionError):
            RawPeer(behind.address)
        peers[0].close()

        def let_in() -> bool:
            with contextlib.suppress(ConnectionError), RawPeer(behind.address):
                return True
            return False

        wait_until(let_in)


def test_the_last_message_before_a_peer_leaves_arrives(behind):
    with zmq_context() as own:
        client = ControlClient(own, behind.address, "w")
        wait_until(lambda: client.send(b"bye"))
        client.close()
    wait_until(lambda: behind.received(client, b"bye"))
    wait_until(lambda: not behind.server.send(client.identity, b"x"))


def test_a_peer_that_does_not_read_blocks_nobody(behind):
    deaf = ControlClient(behind.context, behind.address, "deaf")
    reader = ControlClient(behind.context, behind.address, "reader")
    for client in (deaf, reader):
        wait_until(lambda client=client: client.send(b"x"))
        wait_until(lambda client=client: behind.received(client, b"x"))
    while behind.server.send(deaf.identity, bytes(2**17)):
        pass
    assert behind.server.send(reader.identity, b"still served")
    assert reader.receive(HANG_S) == b"still served"


def test_a_gate_leaves_no_file_and_no_thread(ipc_address):
    import threading

    folder = Path(ipc_address.removeprefix("ipc://")).parent
    with gated(Endpoints(*(f"ipc://{folder}/{part}" for part in "cwe"), os.getpid())):
        assert sorted(path.name for path in folder.iterdir()) == ["c", "e", "w"]
    assert list(folder.iterdir()) == []
    assert "gate" not in {thread.name for thread in threading.enumerate()}


# --- the watch ---------------------------------------------------------------------------------------


@pytest.fixture
def on_tcp(zmq_sockets: zmq.Context) -> Iterator[tuple[ControlServer, str]]:
    access = Access()
    server = ControlServer(zmq_sockets, "tcp://127.0.0.1:*", access)
    with watched([server.socket], access.delivered):
        yield server, endpoint_of(server.socket)


needs_the_count = pytest.mark.skipif(
    not Path("/proc").exists(), reason="only Linux counts a connection's bytes"
)


@needs_the_count
def test_on_tcp_an_unfinished_message_is_cut_off(on_tcp):
    _, address = on_tcp
    with RawPeer(address) as peer:
        most = 100 * MAX_MESSAGE_BYTES
        assert MAX_MESSAGE_BYTES <= peer.send_until_cut(frame(bytes(MIB), MORE), most) < most


@needs_the_count
def test_on_tcp_a_connection_that_delivers_its_messages_may_send_any_number(on_tcp, zmq_sockets):
    server, address = on_tcp
    client = ControlClient(zmq_sockets, address, "w")
    data = bytes(8 * MIB)
    for _ in range(3 * MAX_MESSAGE_BYTES // len(data)):
        wait_until(lambda: client.send(data))
        wait_until(lambda: server.socket.poll(100))
        (arrival,) = server.receive()
        descriptor = arrival.sender.descriptor
        assert len(arrival.data) == len(data)
    assert server.send(client.identity, b"never cut")
    assert client.receive(HANG_S) == b"never cut"
    assert arrival.sender.descriptor == descriptor


def test_on_tcp_connections_are_bounded(on_tcp):
    _, address = on_tcp
    with contextlib.ExitStack() as stack:
        for _ in range(MAX_CONNECTIONS):
            stack.enter_context(RawPeer(address))

        def shut_out() -> bool:
            with contextlib.suppress(ConnectionError), RawPeer(address) as one_more:
                return one_more.is_cut()
            return True

        wait_until(shut_out)
