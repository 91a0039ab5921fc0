"""Frames between a process and the child that runs a user's rewards: what is no message is one kind of error."""

import socket
import struct
import time
from concurrent.futures import ThreadPoolExecutor

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


def test_a_message_of_just_the_bound_passes_both_sides(monkeypatch):
    near, far = socket.socketpair()
    with near, far:
        monkeypatch.setattr(frames, "MAX_FRAME_BYTES", len(b'{"a":1}'))
        frames.send(far, {"a": 1})
        assert frames.receive(near) == {"a": 1}
        with pytest.raises(ValueError, match="a message may have 7 bytes, got 8"):
            frames.send(far, {"a": 12})
        far.sendall(framed(b'{"a":12}'))
        with pytest.raises(ValueError, match="a message may have 7 bytes, got 8"):
            frames.receive(near)


def test_a_message_larger_than_any_buffer_arrives_whole():
    near, far = socket.socketpair()
    text = "x" * 3 * 2**20
    with near, far, ThreadPoolExecutor(1) as pool:
        sent = pool.submit(frames.send, far, {"text": text})
        assert frames.receive(near) == {"text": text}
        sent.result()


def test_after_the_deadline_only_what_has_already_arrived_is_received():
    near, far = socket.socketpair()
    past_s = time.monotonic() - 5
    with near, far:
        frames.send(far, {"a": 1}, past_s)
        assert frames.receive(near, past_s) == {"a": 1}
        with pytest.raises(TimeoutError):
            frames.receive(near, past_s)
        with pytest.raises(TimeoutError):  # no buffer has room for it, and nobody reads
            frames.send(far, {"a": "x" * 2**24}, past_s)


def test_a_length_beyond_the_bound_is_refused_unread():
    with pytest.raises(ValueError, match="a message may have"):
        received(struct.pack("!I", frames.MAX_FRAME_BYTES + 1))
