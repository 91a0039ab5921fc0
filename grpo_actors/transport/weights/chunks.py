"""Transport in chunks over ZeroMQ: the weights sockets, where a version is a manifest and a range of bytes.

The learner announces a version by a small message on the control socket, and workers request it here. So a slow reader
delays no one, and a worker that joins late is served like any other. The server keeps only the newest version: a client
in the middle of an older one gets an empty chunk and starts over.

Chunks of 2 MiB with a few requests in flight move 2.5 to 3.9 GB/s over ipc; one huge message is the slowest choice
(0.75 to 1.1 GB/s).

What the server copies for its clients is bounded. ZeroMQ queues at most `CREDITS` chunks for one client; further requests
get no answer. For all clients together, ZeroMQ tells when it has done with a chunk (a tracker): beyond `MAX_UNSENT_BYTES`,
requests wait. If they do, clients that have not read for `STALLED_S` are cut off.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import zmq

from grpo_actors.errors import ProtocolError
from grpo_actors.transport.access import Access
from grpo_actors.transport.keys import ClientKey
from grpo_actors.transport.sockets import (
    CONTROL_BYTES,
    LEAST_FRAME_BYTES,
    Context,
    bind,
    connect,
    cut,
    endpoint_of,
)
from grpo_actors.transport.weights.base import Format, ReceivedVersion, Version

#: Requests in flight: enough to hide the round trip, few enough that a slow reader ties up little memory.
WINDOW = 4
#: Answers queued for one client. Not WINDOW: ZeroMQ learns only after each half of the queue that it was read. With
#: twice as many, the queue of a client that keeps to WINDOW is full only where the news was not looked at (`_reply`).
CREDITS = 2 * WINDOW
#: Bytes of unsent chunks of all clients together.
MAX_UNSENT_BYTES = 128 * 2**20
#: Requests of all clients that wait together.
MAX_WAITING = 1024
#: Seconds after which a client that does not read may be cut off. Less than FETCH_TIMEOUT_S, so that those who wait for
#: its memory still get their answer.
STALLED_S = 5.0
#: Requests answered per call of `serve`: about 10 ms of copying; then the caller can see to its other duties.
MAX_REQUESTS_PER_CALL = 16
#: Longest wait for an answer during a fetch, in seconds; then the fetch starts over with the newest version.
FETCH_TIMEOUT_S = 10.0


@dataclass(slots=True)
class Client:
    """What the server holds for one client."""

    descriptor: int = -1
    #: Trackers of unsent chunks with their bytes and the time at which they were queued, oldest first.
    unsent: deque[tuple[zmq.MessageTracker, int, float]] = field(default_factory=deque)
    #: Requests that wait for memory.
    waiting: int = 0

    def settle(self) -> int:
        """Forget the chunks that were sent, and return the bytes of those that were not."""
        while self.unsent and self.unsent[0][0].done:
            self.unsent.popleft()
        return sum(size for _, size, _ in self.unsent)


class WeightsServer:
    """The learner's end. Not thread-safe: one thread owns it."""

    def __init__(self, context: Context, endpoint: str, wire: Format, access: Access | None = None) -> None:
        self._wire = wire
        self._access = access or Access()
        options = [*self._access.options("weights"), (zmq.SNDHWM, CREDITS)]
        self.socket = bind(context, zmq.ROUTER, endpoint, LEAST_FRAME_BYTES, options)
        self._endpoint = endpoint_of(self.socket)
        #: Identity -> client, of those for whom something is held.
        self._clients: dict[bytes, Client] = {}
        #: Requests for chunks that wait for memory: identity, version, index.
        self._waiting: deque[tuple[bytes, int, int]] = deque()
        self._version = -1
        self._manifest = b""
        self._data = memoryview(b"")
        self._chunk_bytes = 1

    def publish(self, version: int, manifest: bytes, data: memoryview, chunk_bytes: int) -> None:
        """Serve this version from now on. `data` must not change until the next version is published."""
        self._version, self._manifest, self._data, self._chunk_bytes = version, manifest, data, chunk_bytes

    def serve(self) -> None:
        """Answer some of the requests that have arrived, without waiting.

        A request that does not parse, or is one too many, gets no answer; its sender times out.
        """
        unsent = self._settle()
        while self._waiting and unsent < MAX_UNSENT_BYTES:
            peer, version, index = self._waiting.popleft()
            self._clients[peer].waiting -= 1
            unsent += self._send_chunk(peer, version, index)
        for _ in range(MAX_REQUESTS_PER_CALL):
            try:
                frames = self.socket.recv_multipart(zmq.DONTWAIT, copy=False)
            except zmq.Again:
                break
            descriptor = int(frames[-1].get(zmq.SRCFD))
            if self._access.sender(frames[-1], "weights") is None:
                cut(self._endpoint, descriptor)
                continue
            try:
                wanted = self._wire.read_request(frames[-1].bytes)
            except ProtocolError:
                continue
            peer = frames[0].bytes
            if wanted is None:
                self._reply(peer, self._manifest, b"")
                continue
            client = self._clients.setdefault(peer, Client())
            client.descriptor = descriptor
            if unsent < MAX_UNSENT_BYTES and not self._waiting:
                unsent += self._send_chunk(peer, *wanted)
            elif client.waiting < WINDOW and len(self._waiting) < MAX_WAITING:
                client.waiting += 1
                self._waiting.append((peer, *wanted))
        if self._waiting:
            self._cut_stalled()

    @property
    def is_short(self) -> bool:
        """Whether requests wait for memory; call `serve` again soon, without waiting for a message."""
        return bool(self._waiting)

    def _settle(self) -> int:
        """Return the bytes of all unsent chunks; forget clients for whom nothing is held."""
        total = 0
        for peer, client in list(self._clients.items()):
            total += client.settle()
            if not client.unsent and not client.waiting:
                del self._clients[peer]
        return total

    def _cut_stalled(self) -> None:
        """Close the connections of clients that do not read; ZeroMQ then frees what they were to get."""
        now_s = time.monotonic()
        for client in self._clients.values():
            if client.unsent and now_s - client.unsent[0][2] > STALLED_S:
                cut(self._endpoint, client.descriptor)

    def _send_chunk(self, peer: bytes, version: int, index: int) -> int:
        """Send one chunk, and return its bytes."""
        chunk = self._chunk(version, index)
        tracker = self._reply(peer, self._wire.chunk_header(version, index), chunk)
        if tracker is None or tracker.done:
            return 0
        self._clients[peer].unsent.append((tracker, len(chunk), time.monotonic()))
        return len(chunk)

    def _chunk(self, version: int, index: int) -> bytes:
        if version != self._version:
            return b""
        # A copy: a chunk queued for a slow peer must not change when a later version overwrites the memory.
        return bytes(self._data[index * self._chunk_bytes : (index + 1) * self._chunk_bytes])

    def _reply(self, peer: bytes, header: bytes, body: bytes) -> zmq.MessageTracker | None:
        for _ in range(2):
            try:
                return self.socket.send_multipart([peer, header, body], zmq.DONTWAIT, copy=False, track=True)
            except zmq.ZMQError as error:
                if error.errno == zmq.EHOSTUNREACH:
                    break
                if error.errno != zmq.EAGAIN:
                    raise
            # A send looks at most once a millisecond at what its clients have read; this looks now.
            self.socket.getsockopt(zmq.EVENTS)
        return None


class WeightsSocket:
    """A worker's end of the weights socket. Not thread-safe."""

    def __init__(self, context: Context, endpoint: str, wire: Format, key: ClientKey | None = None) -> None:
        self.wire = wire
        self._key = key
        self.timeout_s = FETCH_TIMEOUT_S
        self._context = context
        self._endpoint = endpoint
        self._open()

    def _open(self) -> None:
        options = self._key.options if self._key is not None else ()
        self._socket = connect(self._context, zmq.DEALER, self._endpoint, CONTROL_BYTES, options)

    def manifest(self) -> bytes | None:
        """Return the newest version's manifest; None if no answer came in time, or there is no version yet."""
        frames = self.answer() if self.ask(self.wire.manifest_request()) else None
        return frames[0] if frames and frames[0] else None

    def ask(self, request: bytes) -> bool:
        """Send a request; return False if there was no connection in time."""
        if not self._socket.poll(int(self.timeout_s * 1000), zmq.POLLOUT):
            self.start_over()
            return False
        self._socket.send(request, zmq.DONTWAIT)
        return True

    def answer(self) -> list[bytes] | None:
        """Return header and body of the next answer; None if none came in time, or it has a wrong number of frames."""
        if not self._socket.poll(int(self.timeout_s * 1000)):
            self.start_over()
            return None
        frames = self._socket.recv_multipart()
        return frames if len(frames) == 2 else None

    def start_over(self) -> None:
        """Replace the socket, so that late answers to the old one cannot be taken for answers to new requests."""
        self.close()
        self._open()

    def close(self) -> None:
        """Disconnect."""
        self._socket.close(linger=0)


class ChunkReceiver:
    """The receiver: fetches a version in chunks."""

    def __init__(self, socket: WeightsSocket) -> None:
        self._socket = socket

    def fetch(self, version: Version, on_chunk: Callable[[], None]) -> ReceivedVersion | None:
        """Fetch all bytes of a version; None if it was replaced meanwhile, or the server stopped answering.

        `on_chunk` is called after each chunk.

        Raises:
            ProtocolError: an answer does not parse, or was not asked for.
        """
        data = memoryview(bytearray(version.size))
        return ReceivedVersion(data) if self.fetch_into(data, version, on_chunk) else None

    def fetch_into(self, data: memoryview, version: Version, on_chunk: Callable[[], None]) -> bool:
        """Write all bytes of a version to `data`; return whether they arrived (`fetch`)."""
        size, chunk_bytes, wire = version.size, version.chunk_bytes, self._socket.wire
        chunks = -(-size // chunk_bytes)
        asked = 0
        awaited: set[int] = set()
        while asked < chunks or awaited:
            while asked < chunks and len(awaited) < WINDOW:
                if not self._socket.ask(wire.chunk_request(version.number, asked)):
                    return False
                awaited.add(asked)
                asked += 1
            frames = self._socket.answer()
            if frames is None or not frames[1]:
                self._socket.start_over()
                return False
            index = wire.chunk_index(frames[0], version.number)
            start, end = index * chunk_bytes, min((index + 1) * chunk_bytes, size)
            if index not in awaited or len(frames[1]) != end - start:
                self._socket.start_over()
                raise ProtocolError(f"weights: chunk {index} of {len(frames[1])} bytes was not asked for")
            awaited.remove(index)
            data[start:end] = frames[1]
            on_chunk()
        return True
