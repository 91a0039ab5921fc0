"""One wait for several sockets and for a wake-up from other threads."""

import contextlib
import os

import zmq

from grpo_actors.transport.sockets import Socket


class Waiter:
    """`wait` and `watch` belong to the thread that owns the sockets; `wake` may be called on any."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._poller = zmq.Poller()
        self._poller.register(self._read, zmq.POLLIN)

    def watch(self, *sockets: Socket) -> None:
        """Let messages at these sockets end a wait."""
        for socket in sockets:
            self._poller.register(socket, zmq.POLLIN)

    def wait(self, timeout_s: float) -> None:
        """Until a message can be read, somebody wakes this thread, or the time is over."""
        if self._read in dict(self._poller.poll(int(timeout_s * 1000))):
            os.read(self._read, 4096)

    def wake(self) -> None:
        """End the present wait, or else the next one; nothing after `close`."""
        if self._write < 0:
            return
        with contextlib.suppress(BlockingIOError):  # the pipe is full of wake-ups already
            os.write(self._write, b"!")

    def close(self) -> None:
        """Close the pipe, once nobody waits; may be called twice."""
        for descriptor in (self._read, self._write):
            if descriptor >= 0:
                os.close(descriptor)
        self._read = self._write = -1
