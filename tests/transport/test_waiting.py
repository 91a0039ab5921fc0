"""A wait that a message or another thread can end."""

import threading
import time
from pathlib import Path

import pytest
import zmq
from bounds import HANG_S

from grpo_actors.transport.sockets import bind, connect
from grpo_actors.transport.waiting import Waiter


@pytest.fixture
def waiter():
    waiter = Waiter()
    yield waiter
    waiter.close()


def waited_s(waiter, timeout_s):
    began = time.monotonic()
    waiter.wait(timeout_s)
    return time.monotonic() - began


def test_a_wait_ends_with_its_timeout(waiter):
    assert 0.05 <= waited_s(waiter, 0.06) < HANG_S


def test_another_thread_ends_a_wait(waiter):
    timer = threading.Timer(0.05, waiter.wake)
    timer.start()
    assert waited_s(waiter, HANG_S) < HANG_S
    timer.join()


def test_wake_ups_before_a_wait_end_it_once_however_many_there_were(waiter):
    for _ in range(4000):
        waiter.wake()
    assert waited_s(waiter, HANG_S) < HANG_S
    assert waited_s(waiter, 0.06) >= 0.05


def test_a_flood_of_wake_ups_does_not_block(waiter):
    for _ in range(200_000):  # more than a pipe holds
        waiter.wake()


def test_a_message_ends_a_wait(waiter, zmq_sockets, ipc_address):
    server = bind(zmq_sockets, zmq.ROUTER, ipc_address, 1000)
    peer = connect(zmq_sockets, zmq.DEALER, ipc_address, 1000)
    waiter.watch(server)
    assert peer.poll(int(HANG_S * 1000), zmq.POLLOUT)
    peer.send(b"hello")
    assert waited_s(waiter, HANG_S) < HANG_S
    assert server.recv_multipart()[1] == b"hello"


def test_a_wake_up_after_the_end_and_closing_twice_are_harmless(waiter):
    waiter.close()
    waiter.close()
    waiter.wake()


def test_a_closed_wait_keeps_no_descriptor():
    def descriptors():
        return sorted(path.name for path in Path("/dev/fd").iterdir())

    before = descriptors()
    waiter = Waiter()
    assert len(descriptors()) > len(before)
    waiter.close()
    del waiter
    assert descriptors() == before
