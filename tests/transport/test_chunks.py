"""Transport in chunks over real sockets, with a simple wire format: two numbers."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import zmq
from bounds import HANG_S
from real_sockets import wait_until

from grpo_actors.errors import ProtocolError
from grpo_actors.transport.sockets import Context, connect
from grpo_actors.transport.weights import Version, WeightsClient, WeightsServer
from grpo_actors.transport.weights.chunks import CREDITS, MAX_REQUESTS_PER_CALL, WINDOW

CHUNK = 1000


class Numbers:
    """The wire format; a test may override its methods."""

    def manifest_request(self) -> bytes:
        return b"manifest"

    def chunk_request(self, version: int, index: int) -> bytes:
        return b"%d %d" % (version, index)

    def read_request(self, data: bytes) -> tuple[int, int] | None:
        if data == b"manifest":
            return None
        try:
            version, index = map(int, data.split())
        except ValueError as error:
            raise ProtocolError("not two numbers") from error
        return version, index

    def chunk_header(self, version: int, index: int) -> bytes:
        return b"%d %d" % (version, index)

    def chunk_index(self, header: bytes, version: int) -> int:
        parsed = self.read_request(header)
        assert parsed is not None
        assert parsed[0] == version
        return parsed[1]


def contents(version: int, size: int) -> bytes:
    return bytes((version * 31 + at * 7) % 256 for at in range(size))


class Learner(Numbers):
    """Serves in a thread; `publish` takes effect between two requests."""

    def __init__(self, context: Context, address: str) -> None:
        self.server = WeightsServer(context, address, self)
        self.lock = threading.Lock()
        self.served = 0
        self.replace_after: tuple[int, int, int] | None = None
        self.stopped = False
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def publish(self, version: int, size: int) -> None:
        with self.lock:
            self.server.publish(
                version, b"manifest %d %d" % (version, size), memoryview(contents(version, size)), CHUNK
            )

    def chunk_header(self, version: int, index: int) -> bytes:
        self.served += 1
        if self.replace_after and self.served > self.replace_after[0]:
            _, version_now, size = self.replace_after
            self.replace_after = None
            self.server.publish(
                version_now,
                b"manifest %d %d" % (version_now, size),
                memoryview(contents(version_now, size)),
                CHUNK,
            )
        return super().chunk_header(version, index)

    def _run(self) -> None:
        while not self.stopped:
            self.server.socket.poll(20)
            with self.lock:
                self.server.serve()

    def close(self) -> None:
        self.stopped = True
        self.thread.join()


@pytest.fixture
def learner(zmq_sockets: Context, ipc_address: str) -> Iterator[Learner]:
    learner = Learner(zmq_sockets, ipc_address)
    yield learner
    learner.close()


def client_of(context: Context, address: str, wire: Numbers | None = None) -> WeightsClient:
    client = WeightsClient(context, address, wire or Numbers())
    client.socket.timeout_s = HANG_S
    return client


def fetch(client: WeightsClient, version: int, size: int, **more: Any) -> bytearray | memoryview | None:
    arrived = client.fetch(Version(version, size, CHUNK), **more)
    return None if arrived is None else arrived.data


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, WINDOW * CHUNK, 37 * CHUNK + 5])
def test_a_version_arrives_whole_whatever_its_size(zmq_sockets, ipc_address, learner, size):
    learner.publish(3, size)
    client = client_of(zmq_sockets, ipc_address)
    assert client.manifest() == b"manifest 3 %d" % size
    assert fetch(client, 3, size) == contents(3, size)


def test_before_the_first_version_there_is_nothing_to_fetch(zmq_sockets, ipc_address, learner):
    assert client_of(zmq_sockets, ipc_address).manifest() is None


def test_a_version_that_is_replaced_in_mid_fetch_is_dropped_and_the_new_one_fetched(
    zmq_sockets, ipc_address, learner
):
    learner.publish(1, 50 * CHUNK)
    client = client_of(zmq_sockets, ipc_address)
    learner.replace_after = (10, 2, 3 * CHUNK)
    assert fetch(client, 1, 50 * CHUNK) is None
    assert client.manifest() == b"manifest 2 3000"
    assert fetch(client, 2, 3 * CHUNK) == contents(2, 3 * CHUNK)


def test_several_fetch_at_once(zmq_sockets, ipc_address, learner):
    learner.publish(1, 200 * CHUNK)
    results: list[bytearray | None] = []
    clients = [client_of(zmq_sockets, ipc_address) for _ in range(4)]
    threads = [threading.Thread(target=lambda c=c: results.append(fetch(c, 1, 200 * CHUNK))) for c in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [contents(1, 200 * CHUNK)] * 4


def test_a_client_that_keeps_to_its_window_gets_an_answer_to_every_request(zmq_sockets, ipc_address, learner):
    # So many small chunks in so short a time that the server does not see by itself how many were read.
    with learner.lock:
        learner.server.publish(1, b"m", memoryview(contents(1, 500)), 1)
    arrived = client_of(zmq_sockets, ipc_address).fetch(Version(1, 500, 1))
    assert arrived is not None
    assert arrived.data == contents(1, 500)


def test_on_chunk_is_called_for_each_chunk(zmq_sockets, ipc_address, learner):
    learner.publish(1, 5 * CHUNK)
    calls: list[None] = []
    fetch(client_of(zmq_sockets, ipc_address), 1, 5 * CHUNK, on_chunk=lambda: calls.append(None))
    assert len(calls) == 5


def test_a_fetch_from_a_silent_server_ends_with_the_timeout(zmq_sockets, ipc_address):
    client = client_of(zmq_sockets, ipc_address)
    began = time.monotonic()
    client.socket.timeout_s = 0.2
    assert client.manifest() is None
    assert fetch(client, 1, 10) is None
    assert 0.4 <= time.monotonic() - began < HANG_S


def test_an_answer_that_came_too_late_is_not_taken_for_the_next_one(zmq_sockets, ipc_address, learner):
    learner.publish(1, 10)
    client = client_of(zmq_sockets, ipc_address)
    assert client.manifest()
    with learner.lock:  # the server does not answer while this is held
        client.socket.timeout_s = 0.2
        assert client.manifest() is None
    client.socket.timeout_s = HANG_S
    assert fetch(client, 1, 10) == contents(1, 10)


@pytest.mark.parametrize("lie", [b"1 7", b"1 0", b"1 999999999999"], ids=["not asked", "wrong length", "far"])
def test_a_chunk_that_was_not_asked_for_is_refused(zmq_sockets, ipc_address, learner, lie):
    class Liar(Numbers):
        def chunk_request(self, version: int, index: int) -> bytes:
            return super().chunk_request(1, 3)

        def chunk_index(self, header: bytes, version: int) -> int:
            return super().chunk_index(lie, version)

    learner.publish(1, 4 * CHUNK)
    client = client_of(zmq_sockets, ipc_address, Liar())
    # The server's fourth chunk is longer than this client believes.
    version = Version(1, 3 * CHUNK + 1, CHUNK // 2 if lie == b"1 0" else CHUNK)
    with pytest.raises(ProtocolError, match="was not asked for"):
        client.fetch(version)
    # What else was on its way is not taken for the answer to the next request.
    assert client.manifest() == b"manifest 1 4000"


@pytest.mark.parametrize("request_", [b"", b"x", b"1 x", b"9 0", b"1 99999999999999999", b"1 -1"])
def test_invalid_requests_get_no_data_and_disturb_no_other_client(
    zmq_sockets, ipc_address, learner, request_
):
    learner.publish(1, 2 * CHUNK)
    stranger = connect(zmq_sockets, zmq.DEALER, ipc_address, 10**6)
    stranger.poll(1000, zmq.POLLOUT)
    stranger.send(request_)
    assert fetch(client_of(zmq_sockets, ipc_address), 1, 2 * CHUNK) == contents(1, 2 * CHUNK)
    if stranger.poll(100):
        assert stranger.recv_multipart()[1] == b""


def test_a_flood_of_requests_is_answered_in_portions(zmq_sockets, ipc_address):
    served = []

    class Counting(Numbers):
        def chunk_header(self, version: int, index: int) -> bytes:
            served.append((version, index))
            return b"h"

    server = WeightsServer(zmq_sockets, ipc_address, Counting())
    server.publish(1, b"m", memoryview(bytes(CHUNK)), CHUNK)
    stranger = connect(zmq_sockets, zmq.DEALER, ipc_address, 10**6)
    for _ in range(MAX_REQUESTS_PER_CALL + 10):
        assert stranger.poll(int(HANG_S * 1000), zmq.POLLOUT)
        stranger.send(b"1 0")
    server.socket.poll(int(HANG_S * 1000))
    server.serve()
    assert 0 < len(served) <= MAX_REQUESTS_PER_CALL


# --- clients that ask and do not read ----------------------------------------------------------------

BIG = 2**21


def unread(context: Context, address: str, requests: int) -> Any:
    """A client that sends so many requests for chunks and reads no answer."""
    client = context.socket(zmq.DEALER)
    client.setsockopt(zmq.RCVHWM, 1)
    client.connect(address)
    for index in range(requests):
        assert client.poll(int(HANG_S * 1000), zmq.POLLOUT)
        client.send(b"1 %d" % index)
    return client


def serve_all(server: WeightsServer) -> None:
    while server.socket.poll(100):
        server.serve()


def unsent_bytes(server: WeightsServer) -> int:
    return sum(client.settle() for client in server._clients.values())


def test_a_client_that_does_not_read_gets_no_more_than_its_credits(zmq_sockets, ipc_address):
    server = WeightsServer(zmq_sockets, ipc_address, Numbers())
    server.publish(1, b"m", memoryview(bytes(50 * BIG)), BIG)
    unread(zmq_sockets, ipc_address, 40)
    serve_all(server)
    # Those in its queue, and those on their way from there to the kernel.
    assert 0 < unsent_bytes(server) <= (CREDITS + 2) * BIG


def test_all_clients_together_get_no_more_than_the_bound_and_those_that_read_are_served(
    zmq_sockets, ipc_address, monkeypatch
):
    monkeypatch.setattr("grpo_actors.transport.weights.chunks.MAX_UNSENT_BYTES", 10 * BIG)
    monkeypatch.setattr("grpo_actors.transport.weights.chunks.STALLED_S", 0.5)
    learner = Learner(zmq_sockets, ipc_address)
    try:
        with learner.lock:
            learner.server.publish(1, b"m", memoryview(bytes(50 * BIG)), BIG)
        for _ in range(5):
            unread(zmq_sockets, ipc_address, 10)
        # Served once the stalled ones are cut off, although they had used up all memory. On a busy machine it may be slow
        # enough to be cut off too; then it starts over, as workers do.
        client = client_of(zmq_sockets, ipc_address)
        client.socket.timeout_s = 2.0
        wait_until(lambda: client.fetch(Version(1, 50 * BIG, BIG)))
        with learner.lock:
            assert unsent_bytes(learner.server) <= 10 * BIG + BIG
    finally:
        learner.close()


def test_without_memory_so_many_requests_of_each_client_and_of_all_together_wait(
    zmq_sockets, ipc_address, monkeypatch
):
    monkeypatch.setattr("grpo_actors.transport.weights.chunks.MAX_UNSENT_BYTES", 0)
    monkeypatch.setattr("grpo_actors.transport.weights.chunks.MAX_WAITING", 2 * WINDOW + 1)
    server = WeightsServer(zmq_sockets, ipc_address, Numbers())
    server.publish(1, b"m", memoryview(bytes(CHUNK)), CHUNK)
    assert not server.is_short
    waiting = []
    for _ in range(4):
        unread(zmq_sockets, ipc_address, WINDOW + 2)
        serve_all(server)
        assert server.is_short
        waiting.append(len(server._waiting))
    assert waiting == [WINDOW, 2 * WINDOW, 2 * WINDOW + 1, 2 * WINDOW + 1]
    # With memory, all of them are answered, and nothing is held for the clients once they have read.
    monkeypatch.setattr("grpo_actors.transport.weights.chunks.MAX_UNSENT_BYTES", 10**9)
    server.serve()
    assert not server.is_short
    assert {client.waiting for client in server._clients.values()} <= {0}


def test_a_client_that_left_costs_nothing(zmq_sockets, ipc_address):
    server = WeightsServer(zmq_sockets, ipc_address, Numbers())
    server.publish(1, b"m", memoryview(bytes(50 * BIG)), BIG)
    client = unread(zmq_sockets, ipc_address, 10)
    serve_all(server)
    client.close(linger=0)

    def forgotten() -> bool:
        server.serve()
        return not server._clients

    wait_until(forgotten)
