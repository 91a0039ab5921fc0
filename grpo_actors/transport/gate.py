"""The gate in front of a run's Unix sockets: it bounds what peers can make ZeroMQ keep in memory.

ZeroMQ bounds a frame (MAXMSGSIZE) and the number of whole unread messages (RCVHWM). The frames of a message that is not
finished count as neither: it keeps them all, without limit, and the application sees nothing of them. It also accepts any
number of connections. So peers connect to the gate, which passes their bytes on to the socket behind it, reads the
heads of the frames on the way, and closes the connection of a peer that goes too far. No peer of ours sends a message
of several frames, so none is let through; and the frames that are on their way are bounded together.

Bytes on the way to the peers, which may be whole versions of the weights, are moved within the kernel where it can
(splice). Measured on two cores: 0.9 to 1.1 GB/s in chunks, as without a gate.

TCP sockets have no gate (their frames may be encrypted), but a watch (`watch`), for which the kernel counts the bytes.
"""

import contextlib
import fcntl
import os
import selectors
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from grpo_actors.errors import RunError
from grpo_actors.transport.limits import MAX_CONNECTIONS, MAX_MESSAGE_BYTES, MAX_TOTAL_BYTES
from grpo_actors.transport.sockets import INNER, Endpoints

#: Bytes read at a time.
READ_BYTES = 2**18
#: Size of the pipes in the kernel through which bytes go to the peers.
PIPE_BYTES = 2**20
#: Seconds that the last bytes have to reach their peers when the gate closes.
FAREWELL_S = 0.3
#: Connections that wait to be accepted.
BACKLOG = 100
#: Command number of Linux's fcntl that sets the size of a pipe; Python 3.11 has no name for it on every build.
F_SETPIPE_SZ = 1031

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE

# The parts of ZMTP 3, ZeroMQ's protocol: a greeting, then frames, each with flags and a size of one or eight bytes.
GREETING_BYTES = 64
SIGNATURE, MAJOR_AT, MAJOR = 0xFF, 10, 3
LONG, COMMAND = 2, 4


class TooMuch(Exception):  # noqa: N818 - no error of ours: the connection is closed
    """Raised when a connection sends what is not ZeroMQ's protocol, or more than it may."""


@dataclass
class Frames:
    """The sizes of one connection's frames, read from its bytes."""

    #: Bytes of the frame that has not arrived whole; 0 between two frames.
    unfinished: int = 0
    _skip: int = 0
    _head: bytearray = field(default_factory=bytearray)
    _greeted: bool = False

    def read(self, data: bytes) -> None:
        """Go through bytes that arrived.

        Raises:
            TooMuch: they are not frames, a frame is too large, or a message has several.
        """
        at = 0 if self._greeted else self._read_greeting(data)
        while at < len(data):
            if not self._skip:
                self._head.append(data[at])
                at += 1
                self._read_head()
            step = min(self._skip, len(data) - at)
            self._skip -= step
            at += step
            if not self._skip:
                self.unfinished = 0

    def _read_greeting(self, data: bytes) -> int:
        """Return where the frames begin."""
        missing = GREETING_BYTES - len(self._head)
        self._head += data[:missing]
        if self._head[0] != SIGNATURE or (len(self._head) > MAJOR_AT and self._head[MAJOR_AT] < MAJOR):
            raise TooMuch("not ZeroMQ 4")
        if len(self._head) == GREETING_BYTES:
            self._greeted = True
            self._head.clear()
        return min(missing, len(data))

    def _read_head(self) -> None:
        flags = self._head[0]
        if flags & ~(LONG | COMMAND):
            raise TooMuch("not a frame, or one of several")
        if len(self._head) < (9 if flags & LONG else 2):
            return
        size = int.from_bytes(self._head[1:], "big")
        self._head.clear()
        if size > MAX_MESSAGE_BYTES:
            raise TooMuch("a frame too large")
        self.unfinished = self._skip = size


class Connection:
    """One peer's connection, and the gate's own to the socket behind it."""

    def __init__(self, path: str, outer: socket.socket, inner: socket.socket) -> None:
        self.path, self.outer, self.inner = path, outer, inner
        self.frames = Frames()
        #: Bytes on their way in.
        self.incoming = b""
        #: Whether the peer, or the socket behind the gate, has ended the connection.
        self.peer_left = self.inner_left = False
        #: Events that the selector watches, of the outer and of the inner socket.
        self.watched = {outer: 0, inner: 0}
        self._way_out = _open_way_out(inner, outer)

    @property
    def wanted(self) -> dict[socket.socket, int]:
        """Events to watch: read from one side only when the other has taken what was read before."""
        held = self._way_out.held
        return {
            self.outer: (READ if not self.incoming and not self.peer_left else 0) | (WRITE if held else 0),
            self.inner: (READ if not held and not self.inner_left else 0) | (WRITE if self.incoming else 0),
        }

    @property
    def is_over(self) -> bool:
        """Whether one end has left and the other has got all that it had sent."""
        return (self.peer_left and not self.incoming) or (self.inner_left and not self._way_out.held)

    def pass_on(self) -> None:
        """Move what can be moved now, in both directions; raises OSError if an end is gone, `TooMuch` if it must go."""
        if not self.incoming and not self.peer_left:
            with contextlib.suppress(BlockingIOError):
                self.incoming = self.outer.recv(READ_BYTES)
                self.peer_left = not self.incoming
                if self.incoming:
                    self.frames.read(self.incoming)
        if self.incoming:
            with contextlib.suppress(BlockingIOError):
                self.incoming = self.incoming[self.inner.send(self.incoming) :]
        with contextlib.suppress(BlockingIOError):
            self.inner_left = self.inner_left or not self._way_out.move()

    def close(self) -> None:
        """Close both connections."""
        self.outer.close()
        self.inner.close()
        self._way_out.close()


class _Copied:
    """Bytes to a peer, copied through this process."""

    def __init__(self, source: socket.socket, target: socket.socket) -> None:
        self._source, self._target, self._bytes = source, target, b""

    @property
    def held(self) -> int:
        return len(self._bytes)

    def move(self) -> bool:
        """Move what can be moved; return False if the source has ended."""
        if not self._bytes:
            self._bytes = self._source.recv(READ_BYTES)
            if not self._bytes:
                return False
        self._bytes = self._bytes[self._target.send(self._bytes) :]
        return True

    def close(self) -> None:
        pass


class _Spliced:
    """Bytes to a peer, moved through a pipe in the kernel (Linux)."""

    def __init__(self, source: socket.socket, target: socket.socket) -> None:
        self._source, self._target = source.fileno(), target.fileno()
        self._read, self._write = os.pipe()
        with contextlib.suppress(OSError):  # a user has only so many large pipes; a small one is slower
            fcntl.fcntl(self._write, F_SETPIPE_SZ, PIPE_BYTES)
        self.held = 0

    def move(self) -> bool:
        """Move what can be moved; return False if the source has ended."""
        if not self.held:
            self.held = os.splice(self._source, self._write, PIPE_BYTES, flags=os.SPLICE_F_NONBLOCK)
            if not self.held:
                return False
        self.held -= os.splice(self._read, self._target, self.held, flags=os.SPLICE_F_NONBLOCK)
        return True

    def close(self) -> None:
        os.close(self._read)
        os.close(self._write)


def _open_way_out(source: socket.socket, target: socket.socket) -> _Spliced | _Copied:
    return _Spliced(source, target) if hasattr(os, "splice") else _Copied(source, target)


class Gate:
    """The gate of one run, with a thread that passes on the bytes."""

    def __init__(self, paths: Sequence[str]) -> None:
        """Listen at these paths; the sockets behind the gate are bound at the same ones followed by `INNER`.

        Raises:
            RunError: one cannot be bound.
        """
        self._listeners: dict[socket.socket, str] = {}
        self._connections: dict[socket.socket, Connection] = {}
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = os.pipe()
        self._selector.register(self._wake_read, READ)
        self._closing_s: float | None = None
        try:
            for path in paths:
                listener = _listen(Path(path))
                self._listeners[listener] = path
                self._selector.register(listener, READ)
        except RunError:
            self._release()
            raise
        self._thread = threading.Thread(target=self._run, name="gate", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Let no one in any more, give the last bytes `FAREWELL_S` to reach their peers, and end the thread.

        The sockets behind the gate must be closed before.
        """
        self._closing_s = time.monotonic() + FAREWELL_S
        os.write(self._wake_write, b"!")
        self._thread.join()
        self._release()

    def _release(self) -> None:
        for listener, path in self._listeners.items():
            listener.close()
            Path(path).unlink(missing_ok=True)
        for connection in set(self._connections.values()):
            connection.close()
        self._selector.close()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def _run(self) -> None:
        while self._closing_s is None or (self._connections and time.monotonic() < self._closing_s):
            for key, _ in self._selector.select(None if self._closing_s is None else 0.05):
                if key.fd == self._wake_read:
                    os.read(self._wake_read, 1)
                elif key.fileobj in self._listeners:
                    self._let_in(key.fileobj)
                elif (connection := self._connections.get(key.fileobj)) is not None:  # type: ignore[call-overload]
                    self._serve(connection)

    def _let_in(self, listener: socket.socket) -> None:
        path = self._listeners[listener]
        try:
            outer, _ = listener.accept()
        except OSError:  # the peer has gone, or this process has no descriptor left
            time.sleep(0.01)
            return
        here = sum(connection.path == path for connection in self._connections.values()) // 2
        if self._closing_s is not None or here >= MAX_CONNECTIONS:
            outer.close()
            return
        inner = socket.socket(socket.AF_UNIX)
        try:
            inner.connect(f"{path}{INNER}")
            for end in (outer, inner):
                end.setblocking(False)
            connection = Connection(path, outer, inner)
        except OSError:  # the socket behind the gate is not bound yet, or no more, or no descriptor is left
            outer.close()
            inner.close()
            return
        self._connections |= {outer: connection, inner: connection}
        self._watch(connection)

    def _serve(self, connection: Connection) -> None:
        try:
            connection.pass_on()
        except (OSError, TooMuch):
            self._shut(connection)
            return
        if connection.is_over:
            self._shut(connection)
            return
        self._watch(connection)
        if connection.frames.unfinished:
            others = set(self._connections.values())
            if sum(other.frames.unfinished for other in others) > MAX_TOTAL_BYTES:
                self._shut(max(others, key=lambda other: other.frames.unfinished))

    def _watch(self, connection: Connection) -> None:
        for end, events in connection.wanted.items():
            before = connection.watched[end]
            if events == before:
                continue
            if not before:
                self._selector.register(end, events)
            elif not events:
                self._selector.unregister(end)
            else:
                self._selector.modify(end, events)
            connection.watched[end] = events

    def _shut(self, connection: Connection) -> None:
        for end, events in connection.watched.items():
            if events:
                self._selector.unregister(end)
            del self._connections[end]
        connection.close()


def _listen(path: Path) -> socket.socket:
    path.unlink(missing_ok=True)  # of a killed run
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(str(path))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise RunError(
            f"transport: ipc://{path} cannot be bound ({error.strerror}); see transport.scheme"
        ) from None
    listener.setblocking(False)
    return listener


@contextmanager
def gated(endpoints: Endpoints) -> Iterator[Endpoints]:
    """Put a gate in front of Unix sockets within the block; yield the addresses at which to bind them.

    Raises:
        RunError: an address cannot be bound.
    """
    addresses = (endpoints.control, endpoints.weights, endpoints.events)
    if not all(address.startswith("ipc://") for address in addresses):
        yield endpoints
        return
    with contextlib.closing(Gate([address.removeprefix("ipc://") for address in addresses])):
        control, weights, events = (f"{address}{INNER}" for address in addresses)
        yield replace(endpoints, control=control, weights=weights, events=events)
