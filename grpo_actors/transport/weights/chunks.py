"""Transport in chunks over ZeroMQ: the weights sockets, where a version is a manifest and a byte range.

The learner announces a version by a small message elsewhere; whoever wants it asks here, so a slow
reader delays nobody and a late joiner is served as any other. The server keeps the newest version
only: a client in the middle of an older one is told so by an empty chunk, and starts over.

Chunks of 2 MiB with a few requests in flight move 2.5 to 3.9 GB/s over ipc; one huge message is the
slowest choice (0.75 to 1.1 GB/s). A client that stops reading keeps the few chunks that it asked for alive
until its connection's heartbeat fails.
"""

from collections.abc import Callable

import zmq

from grpo_actors.errors import ProtocolError
from grpo_actors.transport.sockets import CONTROL_BYTES, Context, bind, connect
from grpo_actors.transport.weights.base import Arrived, Format, Version

#: Requests in flight: enough to hide the round trip, few enough that a slow reader holds little memory.
WINDOW = 4
#: Requests answered before the caller may look at its other duties: about 10 ms of copying.
ANSWERED_AT_ONCE = 16
#: A request is a few numbers.
REQUEST_BYTES = 2**16
#: Longest silence to bear while weights are fetched; then the newest version is asked for anew.
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
        """Serve this version from now on. `data` must not change until the next one is published."""
        self._version, self._manifest, self._data, self._chunk_bytes = version, manifest, data, chunk_bytes

    def serve(self) -> None:
        """Answer some of the requests that have arrived; does not wait.

        A request that does not parse is not answered: its sender runs into its own time-out.
        """
        for _ in range(ANSWERED_AT_ONCE):
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
        # A copy: what waits for a slow peer must not change when the memory gets a later version.
        return bytes(self._data[index * self._chunk_bytes : (index + 1) * self._chunk_bytes])

    def _reply(self, peer: bytes, header: bytes, body: bytes) -> None:
        try:
            self.socket.send_multipart([peer, header, body], zmq.DONTWAIT, copy=False)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise


class WeightsSocket:
    """A worker's end of the socket: one request after the other. Not thread-safe."""

    def __init__(self, context: Context, endpoint: str, wire: Format) -> None:
        self.wire = wire
        self.timeout_s = FETCH_TIMEOUT_S
        self._context = context
        self._endpoint = endpoint
        self._open()

    def _open(self) -> None:
        self._socket = connect(self._context, zmq.DEALER, self._endpoint, CONTROL_BYTES)

    def manifest(self) -> bytes | None:
        """The newest version's manifest; None: no answer in time, or no version yet."""
        frames = self.answer() if self.ask(self.wire.manifest_request()) else None
        return frames[0] if frames and frames[0] else None

    def ask(self, request: bytes) -> bool:
        """Send; False: no connection in time."""
        if not self._socket.poll(int(self.timeout_s * 1000), zmq.POLLOUT):
            self.start_over()
            return False
        self._socket.send(request, zmq.DONTWAIT)
        return True

    def answer(self) -> list[bytes] | None:
        """Header and body of the next answer; None: none in time, or one of a foreign shape."""
        if not self._socket.poll(int(self.timeout_s * 1000)):
            self.start_over()
            return None
        frames = self._socket.recv_multipart()
        return frames if len(frames) == 2 else None

    def start_over(self) -> None:
        """A fresh socket: answers still under way to the old one can not be taken for new ones."""
        self.close()
        self._open()

    def close(self) -> None:
        """Disconnect."""
        self._socket.close(linger=0)


class Chunks:
    """The inlet: takes a version in chunks."""

    def __init__(self, socket: WeightsSocket) -> None:
        self._socket = socket

    def take(self, version: Version, on_chunk: Callable[[], None]) -> Arrived | None:
        """All bytes of a version; None: it was replaced meanwhile, or the server fell silent.

        `on_chunk` is called after each chunk.

        Raises:
            ProtocolError: an answer that does not parse, or that was not asked for.
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
        return Arrived(data)
