"""Transport in chunks over ZeroMQ: the weights sockets, where a version is a manifest and a range of bytes.

The learner announces a version by a small message on the control socket, and workers request it here. So a slow reader
delays no one, and a worker that joins late is served like any other. The server keeps only the newest version: a client
in the middle of an older one gets an empty chunk and starts over.

Chunks of 2 MiB with a few requests in flight move 2.5 to 3.9 GB/s over ipc; one huge message is the slowest choice
(0.75 to 1.1 GB/s). If a client stops reading, the few chunks that it asked for stay in memory until its connection's
heartbeat fails.
"""

from collections.abc import Callable

import zmq

from grpo_actors.errors import ProtocolError
from grpo_actors.transport.sockets import CONTROL_BYTES, Context, bind, connect
from grpo_actors.transport.weights.base import Format, ReceivedVersion, Version

#: Requests in flight: enough to hide the round trip, few enough that a slow reader ties up little memory.
WINDOW = 4
#: Requests answered per call of `serve`: about 10 ms of copying; then the caller can see to its other duties.
MAX_REQUESTS_PER_CALL = 16
#: Largest request in bytes; a request is a few numbers.
REQUEST_BYTES = 2**16
#: Longest wait for an answer during a fetch, in seconds; then the fetch starts over with the newest version.
FETCH_TIMEOUT_S = 10.0


class WeightsServer:
    """The learner's end. Not thread-safe: one thread owns it."""

    def __init__(self, context: Context, endpoint: str, wire: Format) -> None:
        self._wire = wire
        self.socket = bind(context, zmq.ROUTER, endpoint, REQUEST_BYTES)
        self._version = -1
        self._manifest = b""
        self._data = memoryview(b"")
        self._chunk_bytes = 1

    def publish(self, version: int, manifest: bytes, data: memoryview, chunk_bytes: int) -> None:
        """Serve this version from now on. `data` must not change until the next version is published."""
        self._version, self._manifest, self._data, self._chunk_bytes = version, manifest, data, chunk_bytes

    def serve(self) -> None:
        """Answer some of the requests that have arrived, without waiting.

        A request that does not parse gets no answer; its sender times out.
        """
        for _ in range(MAX_REQUESTS_PER_CALL):
            try:
                frames = self.socket.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return
            try:
                wanted = self._wire.read_request(frames[-1])
            except ProtocolError:
                continue
            if wanted is None:
                self._reply(frames[0], self._manifest, b"")
            else:
                self._reply(frames[0], self._wire.chunk_header(*wanted), self._chunk(*wanted))

    def _chunk(self, version: int, index: int) -> bytes:
        if version != self._version:
            return b""
        # A copy: a chunk queued for a slow peer must not change when a later version overwrites the memory.
        return bytes(self._data[index * self._chunk_bytes : (index + 1) * self._chunk_bytes])

    def _reply(self, peer: bytes, header: bytes, body: bytes) -> None:
        try:
            self.socket.send_multipart([peer, header, body], zmq.DONTWAIT, copy=False)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise


class WeightsSocket:
    """A worker's end of the weights socket. Not thread-safe."""

    def __init__(self, context: Context, endpoint: str, wire: Format) -> None:
        self.wire = wire
        self.timeout_s = FETCH_TIMEOUT_S
        self._context = context
        self._endpoint = endpoint
        self._open()

    def _open(self) -> None:
        self._socket = connect(self._context, zmq.DEALER, self._endpoint, CONTROL_BYTES)

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
        size, chunk_bytes, wire = version.size, version.chunk_bytes, self._socket.wire
        data = bytearray(size)
        chunks = -(-size // chunk_bytes)
        asked = 0
        awaited: set[int] = set()
        while asked < chunks or awaited:
            while asked < chunks and len(awaited) < WINDOW:
                if not self._socket.ask(wire.chunk_request(version.number, asked)):
                    return None
                awaited.add(asked)
                asked += 1
            frames = self._socket.answer()
            if frames is None or not frames[1]:
                self._socket.start_over()
                return None
            index = wire.chunk_index(frames[0], version.number)
            start, end = index * chunk_bytes, min((index + 1) * chunk_bytes, size)
            if index not in awaited or len(frames[1]) != end - start:
                self._socket.start_over()
                raise ProtocolError(f"weights: chunk {index} of {len(frames[1])} bytes was not asked for")
            awaited.remove(index)
            data[start:end] = frames[1]
            on_chunk()
        return ReceivedVersion(data)
