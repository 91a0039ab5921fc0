"""A wait for messages at several sockets or for a wake-up from another thread."""

import contextlib
import os

import zmq

from grpo_actors.transport.sockets import Socket


class Waiter:
    """A wait that messages and other threads can end.

    Only the thread that owns the sockets may call `wait` and `watch`; any thread may call `wake`.
    """

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
        """Wait until a message can be read, `wake` is called, or `timeout_s` has passed."""
        if self._read in dict(self._poller.poll(int(timeout_s * 1000))):
            os.read(self._read, 4096)

    def wake(self) -> None:
        """End the current wait, or else the next one. Does nothing after `close`."""
        if self._write < 0:
            return
        with contextlib.suppress(BlockingIOError):  # the pipe is already full of wake-ups
            os.write(self._write, b"!")

    def close(self) -> None:
        """Close the pipe; no thread may be waiting. May be called twice."""
        for descriptor in (self._read, self._write):
            if descriptor >= 0:
                os.close(descriptor)
        self._read = self._write = -1
