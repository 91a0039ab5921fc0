"""A peer that speaks ZeroMQ's protocol by hand, to send what no ZeroMQ socket would."""

import contextlib
import socket
from typing import NoReturn, Self

MORE, LONG, COMMAND = 1, 2, 4


def frame(body: bytes, flags: int = 0) -> bytes:
    """Return a frame of ZMTP 3 with eight bytes of size."""
    return bytes([flags | LONG]) + len(body).to_bytes(8, "big") + body


def ready(kind: bytes, identity: bytes = b"") -> bytes:
    """Return the command that ends the handshake of the mechanism NULL."""
    fields = b"".join(
        bytes([len(name)]) + name + len(value).to_bytes(4, "big") + value
        for name, value in ((b"Socket-Type", kind), (b"Identity", identity))
    )
    return frame(b"\x05READY" + fields, COMMAND)


GREETING = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)


def _raise_cut() -> NoReturn:
    raise ConnectionResetError("the other side closed the connection")


class RawPeer:
    """A connection to a bound ZeroMQ socket of the mechanism NULL, after its handshake."""

    def __init__(self, endpoint: str, kind: bytes = b"DEALER") -> None:
        if endpoint.startswith("ipc://"):
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.connect(endpoint.removeprefix("ipc://"))
        else:
            host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
            self.socket = socket.create_connection((host, int(port)))
        self.socket.settimeout(10.0)
        try:
            self.socket.sendall(GREETING + ready(kind))
            greeted = b""
            while len(greeted) < len(GREETING):
                greeted += self.socket.recv(4096) or _raise_cut()
        except ConnectionError:
            self.close()
            raise

    def send_until_cut(self, data: bytes, most: int) -> int:
        """Send these bytes again and again; return how many were sent when the connection was cut, or `most`."""
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < most:
                self.socket.sendall(data)
                sent += len(data)
        return sent

    def is_cut(self) -> bool:
        """Wait until the other side closes the connection."""
        with contextlib.suppress(ConnectionError):
            while self.socket.recv(2**16):
                pass
        return True

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
