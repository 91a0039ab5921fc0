"""What peers can make the learner keep in memory: the gate before Unix sockets, and the watch over TCP sockets."""

import contextlib
import os
import random
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq
from bounds import HANG_S
from hostile import COMMAND, GREETING, LONG, MORE, RawPeer, frame, ready
from real_sockets import KeepingContext, wait_until

from grpo_actors.errors import RunError
from grpo_actors.transport.access import Access
from grpo_actors.transport.control import ControlClient, ControlServer
from grpo_actors.transport.gate import Frames, TooMuch, gated
from grpo_actors.transport.limits import MAX_CONNECTIONS, MAX_MESSAGE_BYTES, MAX_TOTAL_BYTES
from grpo_actors.transport.sockets import CONTROL_BYTES, INNER, Endpoints, endpoint_of, zmq_context
from grpo_actors.transport.watch import (
    HANDSHAKE_BYTES,
    HEARTBEAT_BYTES_PER_S,
    received_bytes,
    undelivered_bytes,
    watched,
)

MIB = 2**20


# --- reading frames ----------------------------------------------------------------------------------


def test_frames_are_read_wherever_the_bytes_are_cut():
    rng = random.Random(0)
    data = GREETING + ready(b"DEALER") + b"\0\3abc" + frame(bytes(1000)) + frame(b"") + frame(bytes(70))[:-1]
    for longest in [1, *[200] * 50]:
        frames, at = Frames(), 0
        while at < len(data):
            step = rng.randint(1, longest)
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


def test_peers_learn_that_the_socket_behind_the_gate_was_closed(behind):
    with RawPeer(behind.address) as peer:
        behind.server.socket.close(linger=0)
        assert peer.is_cut()
        with pytest.raises(ConnectionError):
            RawPeer(behind.address)  # as one that comes before the socket is bound


@pytest.fixture
def flooded(ipc_address: str) -> Iterator[tuple[socket.socket, int, contextlib.ExitStack]]:
    """A peer of a gate that is to get so many bytes, more than the kernel holds for it; the stack closes the gate."""
    folder = Path(ipc_address.removeprefix("ipc://")).parent
    with contextlib.ExitStack() as stack, contextlib.ExitStack() as gate:
        listener, peer = (stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(2))
        listener.bind(f"{folder}/c{INNER}")
        listener.listen()
        gate.enter_context(gated(Endpoints(*(f"ipc://{folder}/{part}" for part in "cwe"), os.getpid())))
        peer.connect(f"{folder}/c")
        peer.settimeout(HANG_S)
        sender, _ = listener.accept()
        sent, quiet = 0, 0
        sender.settimeout(0.05)
        while quiet < 2:  # the gate takes more of it until it can pass on no more
            try:
                sent += sender.send(bytes(2**16))
            except TimeoutError:
                quiet += 1
        sender.close()
        yield peer, sent, gate


def test_the_last_bytes_reach_a_peer_that_reads_while_the_gate_closes(flooded, monkeypatch):
    monkeypatch.setattr("grpo_actors.transport.gate.FAREWELL_S", HANG_S)
    peer, sent, gate = flooded
    closing = threading.Thread(target=gate.close)
    closing.start()
    got = 0
    while chunk := peer.recv(2**16):
        got += len(chunk)
    assert got == sent
    closing.join(HANG_S / 2)
    assert not closing.is_alive(), "it waits for nobody else"


def test_a_peer_that_does_not_read_keeps_the_gate_from_closing_for_a_while_only(flooded, monkeypatch):
    monkeypatch.setattr("grpo_actors.transport.gate.FAREWELL_S", 0.05)
    peer, sent, gate = flooded
    closing = threading.Thread(target=gate.close, daemon=True)
    closing.start()
    closing.join(HANG_S)
    assert not closing.is_alive()
    got = 0
    with contextlib.suppress(ConnectionError):
        while chunk := peer.recv(2**16):
            got += len(chunk)
    assert got < sent


def test_a_gate_takes_the_place_of_one_that_was_killed(ipc_address):
    folder = Path(ipc_address.removeprefix("ipc://")).parent
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(f"{folder}/w")
    with gated(Endpoints(*(f"ipc://{folder}/{part}" for part in "cwe"), os.getpid())):
        assert sorted(path.name for path in folder.iterdir()) == ["c", "e", "w"]


def test_a_gate_that_cannot_be_bound_everywhere_is_bound_nowhere(ipc_address):
    folder = Path(ipc_address.removeprefix("ipc://")).parent
    endpoints = Endpoints(f"ipc://{folder}/c", f"ipc://{folder}/missing/w", f"ipc://{folder}/e", os.getpid())
    with (
        pytest.raises(RunError, match=r"missing/w cannot be bound \(No such file or directory\)"),
        gated(endpoints),
    ):
        pass
    assert list(folder.iterdir()) == []


def test_tcp_sockets_have_no_gate():
    endpoints = Endpoints(*(f"tcp://127.0.0.1:{port}" for port in (7000, 7001, 7002)), os.getpid())
    with gated(endpoints) as bound_at:
        assert bound_at == endpoints


def test_a_gate_leaves_no_file_and_no_thread(ipc_address):
    folder = Path(ipc_address.removeprefix("ipc://")).parent
    with gated(Endpoints(*(f"ipc://{folder}/{part}" for part in "cwe"), os.getpid())):
        assert sorted(path.name for path in folder.iterdir()) == ["c", "e", "w"]
    assert list(folder.iterdir()) == []
    assert "gate" not in {thread.name for thread in threading.enumerate()}


def test_a_gate_leaves_no_descriptor_open(ipc_address):
    folder = Path(ipc_address.removeprefix("ipc://")).parent
    before = len([*Path("/dev/fd").iterdir()])
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{folder}/c{INNER}")
        listener.listen()
        with (
            gated(Endpoints(*(f"ipc://{folder}/{part}" for part in "cwe"), os.getpid())),
            socket.socket(socket.AF_UNIX) as stays,
            socket.socket(socket.AF_UNIX) as cut_off,
        ):
            inner = []
            for peer in (stays, cut_off):
                peer.settimeout(HANG_S)
                peer.connect(f"{folder}/c")
                inner.append(listener.accept()[0])
            cut_off.sendall(b"GET / HTTP/1.1")
            with contextlib.suppress(ConnectionError):
                assert cut_off.recv(1) == b""
        for end in inner:
            end.close()
    assert len([*Path("/dev/fd").iterdir()]) == before


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
def test_on_tcp_unfinished_messages_of_many_connections_are_bounded_together(on_tcp, monkeypatch):
    monkeypatch.setattr("grpo_actors.transport.watch.MAX_TOTAL_BYTES", 7 * MIB)
    _, address = on_tcp
    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(RawPeer(address)) for _ in range(4)]
        for peer in peers:
            peer.send_until_cut(frame(bytes(2 * MIB))[:-1], 1)
        # The fourth put them over 7 MiB: one was cut off, and the others have less.
        wait_until(lambda: any(is_cut(peer) for peer in peers))
        assert sum(is_cut(peer) for peer in peers) == 1


@needs_the_count
def test_the_received_bytes_of_a_connection_are_counted_and_of_nothing_else(tmp_path):
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as one,
    ):
        other, _ = server.accept()
        with other:
            assert received_bytes(other.fileno()) == 0
            one.sendall(bytes(1000))
            other.recv(1000, socket.MSG_WAITALL)
            assert received_bytes(other.fileno()) == 1000
            closed = os.dup(other.fileno())
        os.close(closed)
        assert received_bytes(closed) == 0
    with socket.socket(socket.AF_UNIX) as unix:
        assert received_bytes(unix.fileno()) == 0
    with (tmp_path / "file").open("wb") as file:
        free = os.dup(file.fileno())
        os.close(free)
        assert received_bytes(file.fileno()) == 0
        assert os.dup(file.fileno()) == free, "it is still open, and no other descriptor is left open"
        os.close(free)


def test_handshake_and_heartbeats_of_any_time_count_as_delivered():
    day_s = 24 * 60 * 60
    expected = HANDSHAKE_BYTES + HEARTBEAT_BYTES_PER_S * day_s
    assert undelivered_bytes(expected, 0, day_s) == 0
    assert undelivered_bytes(expected + 5, 2, day_s) == 3
    assert undelivered_bytes(0, 10**9, day_s) == 0, "no other connection may take its place"


@needs_the_count
def test_on_tcp_what_an_earlier_connection_of_the_same_descriptor_delivered_does_not_count(
    on_tcp, zmq_sockets, monkeypatch
):
    monkeypatch.setattr("grpo_actors.transport.watch.MAX_MESSAGE_BYTES", MIB)
    server, address = on_tcp
    descriptors = []
    for body in (bytes(CONTROL_BYTES // 8), b"x"):
        peer = RawPeer(address)
        peer.socket.sendall(frame(body))
        wait_until(lambda: server.socket.poll(100))
        (arrival,) = server.receive()
        descriptors.append(arrival.sender.descriptor)
        if body != b"x":
            peer.close()
            wait_until(lambda arrival=arrival: not server.send(arrival.identity, b"x"))
    assert len(set(descriptors)) == 1
    with peer:
        peer.send_until_cut(frame(bytes(MIB // 8), MORE), 8 * MIB)  # as many as the first one has delivered
        assert peer.is_cut()


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


def test_on_tcp_connections_are_bounded_and_a_closed_one_makes_room(on_tcp):
    server, address = on_tcp
    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(RawPeer(address)) for _ in range(MAX_CONNECTIONS)]

        def shut_out() -> bool:
            with contextlib.suppress(ConnectionError), RawPeer(address) as one_more:
                return one_more.is_cut()
            return True

        wait_until(shut_out)
        peers[0].close()

        def let_in() -> bool:
            with contextlib.suppress(ConnectionError), RawPeer(address) as one_more:
                one_more.socket.sendall(frame(b"here"))
                return bool(server.socket.poll(100))
            return False

        wait_until(let_in)


def test_a_watch_leaves_no_thread(zmq_sockets):
    server = ControlServer(zmq_sockets, "tcp://127.0.0.1:*")
    with watched([server.socket], {}):
        assert "watch" in {thread.name for thread in threading.enumerate()}
    assert "watch" not in {thread.name for thread in threading.enumerate()}
