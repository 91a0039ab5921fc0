"""The weights sockets: one version is a manifest and a byte range, fetched in chunks.

The learner announces a version by a small message elsewhere; whoever wants it asks here, so a slow
reader delays nobody and a late joiner is served as any other. The server keeps the newest version
only: a client in the middle of an older one is told so by an empty chunk, and starts over.

Chunks of 2 MiB with a few requests in flight move 2.5 to 3.9 GB/s over ipc; one huge message is the
slowest choice (0.75 to 1.1 GB/s). A client that stops reading keeps the few chunks that it asked for alive
until its connection's heartbeat fails.
"""

from collections.abc import Callable
from typing import Any

import zmq

from grpo_actors.errors import ProtocolError
from grpo_actors.transport.shared import Pin, Reader
from grpo_actors.transport.sockets import CHUNK_BYTES, CONTROL_BYTES, Context, bind, connect

#: Requests in flight: enough to hide the round trip, few enough that a slow reader holds little memory.
WINDOW = 4
#: Requests answered before the caller may look at its other duties: about 10 ms of copying.
ANSWERED_AT_ONCE = 16
#: A request is a few numbers.
REQUEST_BYTES = 2**16


class WeightsServer:
    """The learner's end. Not thread-safe: one thread owns it."""

    def __init__(self, context: Context, endpoint: str) -> None:
        self.socket = bind(context, zmq.ROUTER, endpoint, REQUEST_BYTES)
        self._version = -1
        self._manifest = b""
        self._data = memoryview(b"")
        self._chunk_bytes = 1

    def publish(self, version: int, manifest: bytes, data: memoryview, chunk_bytes: int) -> None:
        """Serve this version from now on. `data` must not change until the next one is published."""
        self._version, self._manifest, self._data, self._chunk_bytes = version, manifest, data, chunk_bytes

    def serve(
        self, parse: Callable[[bytes], tuple[int, int] | None], header: Callable[[int, int], bytes]
    ) -> None:
        """Answer some of the requests that have arrived; does not wait.

        Args:
            parse: Request bytes -> (version, chunk index), or None for the manifest.
            header: (version, index) -> header frame of a chunk.

        A request that does not parse is not answered: its sender runs into its own time-out.
        """
        for _ in range(ANSWERED_AT_ONCE):
            try:
                frames = self.socket.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return
            try:
                wanted = parse(frames[-1])
            except ProtocolError:
                continue
            if wanted is None:
                self._reply(frames[0], self._manifest, b"")
            else:
                self._reply(frames[0], header(*wanted), self._chunk(*wanted))

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


class WeightsClient:
    """A worker's end. Not thread-safe."""

    def __init__(
        self, context: Context, endpoint: str, pin: Callable[[memoryview], Pin | None] = lambda _: None
    ) -> None:
        """`pin` is told of the memory in which a learner of this host has its versions."""
        self._context = context
        self._endpoint = endpoint
        #: Where a version is read that has a file of this host; the sockets are for all others.
        self.memory: Reader[Any] = Reader(pin)
        self._open()

    def _open(self) -> None:
        self.socket = connect(self._context, zmq.DEALER, self._endpoint, CONTROL_BYTES)

    def manifest(self, request: bytes, timeout_s: float) -> bytes | None:
        """The newest version's manifest; None: no answer in time, or no version yet."""
        frames = self._answer(timeout_s) if self._ask(request, timeout_s) else None
        return frames[0] if frames and frames[0] else None

    def fetch(
        self,
        size: int,
        request: Callable[[int], bytes],
        parse: Callable[[bytes], int],
        timeout_s: float,
        *,
        chunk_bytes: int = CHUNK_BYTES,
        on_chunk: Callable[[], None] = lambda: None,
    ) -> bytearray | None:
        """All `size` bytes of one version; None: it was replaced meanwhile, or the server fell silent.

        Args:
            size: Bytes, from the manifest.
            request: Chunk index -> request.
            parse: Header -> chunk index.
            timeout_s: Longest silence to bear.
            chunk_bytes: Bytes of every chunk but the last, from the manifest.
            on_chunk: Called after each: a sign of life in a long transfer.

        Raises:
            ProtocolError: an answer that does not parse, or that was not asked for.
        """
        data = bytearray(size)
        chunks = -(-size // chunk_bytes)
        asked = 0
        awaited: set[int] = set()
        while asked < chunks or awaited:
            while asked < chunks and len(awaited) < WINDOW:
                if not self._ask(request(asked), timeout_s):
                    return None
                awaited.add(asked)
                asked += 1
            frames = self._answer(timeout_s)
            if frames is None or not frames[1]:
                self._start_over()
                return None
            index = parse(frames[0])
            start, end = index * chunk_bytes, min((index + 1) * chunk_bytes, size)
            if index not in awaited or len(frames[1]) != end - start:
                self._start_over()
                raise ProtocolError(f"weights: chunk {index} of {len(frames[1])} bytes was not asked for")
            awaited.remove(index)
            data[start:end] = frames[1]
            on_chunk()
        return data

    def _ask(self, request: bytes, timeout_s: float) -> bool:
        if not self.socket.poll(int(timeout_s * 1000), zmq.POLLOUT):
            self._start_over()
            return False
        self.socket.send(request, zmq.DONTWAIT)
        return True

    def _answer(self, timeout_s: float) -> list[bytes] | None:
        if not self.socket.poll(int(timeout_s * 1000)):
            self._start_over()
            return None
        frames = self.socket.recv_multipart()
        return frames if len(frames) == 2 else None

    def _start_over(self) -> None:
        """A fresh socket: answers still under way to the old one can not be taken for new ones."""
        self.socket.close(linger=0)
        self._open()
