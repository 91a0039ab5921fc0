"""The links between the ranks of one group: messages of bytes between rank 0 and each of the others.

What the ranks compute together goes through MLX's collectives, which nothing can interrupt: on CUDA they wait for a dead
rank without end. All else goes through these links. Who waits here does not compute, and a thread on each side notices at
once that the other side has ended.

Whoever connects must prove by HMAC that it knows a secret. Messages are not encrypted, nor is what MLX sends.
"""

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener, answer_challenge, deliver_challenge
from queue import SimpleQueue
from typing import Any

#: Options of a link, where the system has them: that a host is gone without a word is noticed within 15 seconds.
_KEEP_ALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPALIVE": 5, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 5}
#: Seconds that whoever connects has to prove that it knows the secret; the others wait meanwhile.
HANDSHAKE_S = 5.0
#: The last message of the side that ends first.
_FAREWELL = b""


class LinkClosedError(Exception):
    """The other side has ended in order."""


class Link:
    """One end of a link. A thread reads it, so that the other side never waits for this one to read."""

    def __init__(self, connection: "Connection[Any, Any]", lost: Callable[[], None]) -> None:
        """Take over a connection; `lost` is called from the thread if the other side ends without `close`."""
        self._connection = connection
        self._lost = lost
        self._messages: SimpleQueue[bytes] = SimpleQueue()
        self._closes = False
        #: Held while a message is written: a descriptor that is closed then may become that of another file.
        self._writing = threading.Lock()
        _keep_alive(connection.fileno())
        self._thread = threading.Thread(target=self._read, name="link", daemon=True)
        self._thread.start()

    def send(self, message: bytes) -> None:
        """Send a message, which is not empty. If the other side is gone, return when the thread has noticed it."""
        try:
            self._write(message)
        except OSError:
            self._thread.join()

    def receive(self) -> bytes:
        """Wait for the next message.

        Raises:
            LinkClosedError: The other side has ended in order.
        """
        message = self._messages.get()
        if message == _FAREWELL:
            raise LinkClosedError
        return message

    def close(self) -> None:
        """End in order: tell the other side, and wait until it has closed the link."""
        self._closes = True
        with contextlib.suppress(OSError):
            self._write(_FAREWELL)
        self._thread.join()

    def _write(self, message: bytes) -> None:
        with self._writing:
            self._connection.send_bytes(message)

    def _read(self) -> None:
        try:
            while message := self._connection.recv_bytes():
                self._messages.put(message)
        except (EOFError, OSError):
            if not self._closes:
                self._lost()
        with self._writing:
            self._connection.close()
        self._messages.put(_FAREWELL)


def _keep_alive(descriptor: int) -> None:
    with socket.socket(fileno=os.dup(descriptor)) as same:
        same.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name in _KEEP_ALIVE.keys() & vars(socket).keys():
            same.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), _KEEP_ALIVE[name])


@dataclass(frozen=True, slots=True)
class Entrance:
    """A listening socket, and the secret that whoever connects must know."""

    listener: Listener
    secret: bytes

    @property
    def address(self) -> tuple[str, int]:
        """Its host and port."""
        host, port = self.listener.address
        return str(host), int(port)


@contextlib.contextmanager
def listening(host: str, secret: bytes) -> Iterator[Entrance]:
    """Listen on a free port of an address of this host; whoever connects must know the secret."""
    # Without the secret, whose handshake in `accept` has no end if the other side says nothing.
    with Listener((host, 0), backlog=128) as listener:
        yield Entrance(listener, secret)


def accept(entrance: Entrance) -> "Connection[Any, Any]":
    """Wait for the next one who connects and knows the secret.

    Raises:
        OSError: Nobody can be let in, as when this process has no descriptor left.
    """
    while True:
        try:
            connection = entrance.listener.accept()
        except ConnectionAbortedError:  # who connected has gone
            continue
        try:
            with _cut_after(HANDSHAKE_S, connection.fileno()):
                deliver_challenge(connection, entrance.secret)
                answer_challenge(connection, entrance.secret)
        except (AuthenticationError, EOFError, OSError):
            connection.close()
        else:
            return connection


@contextlib.contextmanager
def _cut_after(seconds: float, descriptor: int) -> Iterator[None]:
    """Shut a connection down if the block takes longer."""

    def cut() -> None:
        with contextlib.suppress(OSError):  # the other side has gone
            same.shutdown(socket.SHUT_RDWR)

    with socket.socket(fileno=os.dup(descriptor)) as same:
        timer = threading.Timer(seconds, cut)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


def connect(host: str, port: int, secret: bytes) -> "Connection[Any, Any]":
    """Connect to a listener.

    Raises:
        OSError: It is not there.
        AuthenticationError: One side does not know the secret.
    """
    return Client((host, port), authkey=secret)
