"""Send and receive frames between a process and the child that runs a user's own rewards: a length, then JSON.

The format is JSON and never pickle, because values and errors of a reward are unchecked. NaN is allowed, because a column
of the data may hold it. The length of a frame is bounded. Deadlines are `time.monotonic` seconds; without one, a call blocks.
"""

import json
import socket
import struct
import time
from typing import Any

_LENGTH = struct.Struct("!I")

#: A group of 64 completions of 32,000 tokens is about 10 MB.
MAX_FRAME_BYTES = 256 * 2**20
#: Bytes received at a time.
_PART_BYTES = 2**20
#: Shortest time-out in seconds.
_LEAST_S = 0.01


def send(channel: socket.socket, message: dict[str, Any], deadline_s: float | None = None) -> None:
    """Send one message. Raises TimeoutError, OSError, and TypeError or ValueError for what is not JSON."""
    payload = json.dumps(message, separators=(",", ":")).encode()
    if len(payload) > MAX_FRAME_BYTES:
        raise ValueError(f"a message may have {MAX_FRAME_BYTES:,} bytes, got {len(payload):,}")
    _set_timeout(channel, deadline_s)
    channel.sendall(_LENGTH.pack(len(payload)) + payload)


def receive(channel: socket.socket, deadline_s: float | None = None) -> dict[str, Any]:
    """Return the next message. Raises EOFError if the other side is gone, TimeoutError, OSError and ValueError."""
    [length] = _LENGTH.unpack(_exactly(channel, _LENGTH.size, deadline_s))
    if length > MAX_FRAME_BYTES:
        raise ValueError(f"a message may have {MAX_FRAME_BYTES:,} bytes, got {length:,}")
    payload = _exactly(channel, length, deadline_s)
    try:
        message = json.loads(payload)
    except RecursionError as error:
        raise ValueError(f"not JSON within the limits: {error}") from None
    if not isinstance(message, dict):
        raise ValueError(f"a message is a JSON object, got {type(message).__name__}")  # noqa: TRY004
    return message


def _exactly(channel: socket.socket, count: int, deadline_s: float | None) -> bytearray:
    received = bytearray()
    while len(received) < count:
        _set_timeout(channel, deadline_s)
        part = channel.recv(min(count - len(received), _PART_BYTES))
        if not part:
            raise EOFError
        received += part
    return received


def _set_timeout(channel: socket.socket, deadline_s: float | None) -> None:
    # Never 0: a process that was suspended past the deadline can still read an answer that has already arrived.
    channel.settimeout(None if deadline_s is None else max(deadline_s - time.monotonic(), _LEAST_S))
