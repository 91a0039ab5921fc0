"""Frames between a process and the child that runs a user's rewards: what is no message is one kind of error."""

import socket
import struct

import pytest

from grpo_actors.tasks.own import frames


def received(data: bytes) -> object:
    near, far = socket.socketpair()
    with near, far:
        far.sendall(data)
        far.shutdown(socket.SHUT_WR)
        return frames.receive(near)


def framed(payload: bytes) -> bytes:
    return struct.pack("!I", len(payload)) + payload


def test_a_message_arrives_as_it_was_sent():
    near, far = socket.socketpair()
    with near, far:
        frames.send(far, {"values": [0.5, None, "ü"]})
        assert frames.receive(near) == {"values": [0.5, None, "ü"]}


@pytest.mark.parametrize(
    "payload",
    [b"", b"{", b"[1]", b"7", b"\xff\xfe{", b"[" * 3000, b'{"a":' * 3000],
    ids=lambda p: p[:8],
)
def test_what_is_no_message_is_a_value_error(payload):
    with pytest.raises(ValueError, match=r"."):
        received(framed(payload))


@pytest.mark.parametrize("data", [b"", b"\0\0", framed(b'{"a": 1}')[:-1]])
def test_a_message_that_is_cut_off_is_the_end(data):
    with pytest.raises(EOFError):
        received(data)


def test_a_length_beyond_the_bound_is_refused_unread():
    with pytest.raises(ValueError, match="a message may have"):
        received(struct.pack("!I", frames.MAX_FRAME_BYTES + 1))
