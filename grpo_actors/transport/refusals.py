"""Why a connecting socket is refused.

ZeroMQ tells the application nothing: a send to a learner that refuses the connection waits for ever. Only the socket's
monitor has the reason, and after most of them the socket never tries again (measured), so each ends the command.
"""

import time
from collections import deque

import zmq
from zmq.utils.monitor import recv_monitor_message

from grpo_actors.errors import RunError
from grpo_actors.transport.keys import ClientKey
from grpo_actors.transport.sockets import Socket

#: Handshakes in a row that the learner breaks off without a word, and the seconds within which it does so, if the key
#: pins another learner: five a second. A learner that ends breaks off one, and one that is stopped lets them time out.
BROKEN_OFF, BROKEN_OFF_S = 10, 10.0


class Refusals:
    """The watch over one connecting TCP socket, by the thread that owns it. Unix sockets refuse nobody."""

    def __init__(self, endpoint: str, key: ClientKey | None) -> None:
        self._endpoint, self._key = endpoint, key
        #: Times of the last handshakes that were broken off.
        self._broken_off: deque[float] = deque(maxlen=BROKEN_OFF)
        self._socket: Socket | None = None
        self._monitor: Socket | None = None

    def watch(self, connecting: Socket) -> None:
        """Begin to watch a socket; before it connects, because the first refusal may be the only one."""
        if self._endpoint.startswith("tcp://"):
            self._socket = connecting
            self._monitor = connecting.get_monitor_socket(
                zmq.EVENT_HANDSHAKE_SUCCEEDED
                | zmq.EVENT_HANDSHAKE_FAILED_AUTH
                | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
                | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
            )

    def check(self) -> None:
        """Look at what happened since the last call.

        Raises:
            RunError: the learner refuses this peer for good.
        """
        while self._monitor is not None and self._monitor.poll(0):
            event = recv_monitor_message(self._monitor)["event"]
            if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                name = "" if self._key is None else f" {self._key.name!r} with the role {self._key.role!r}"
                raise RunError(
                    f"{self._endpoint}: the key{name} is not let in here: it was revoked, or is for something else "
                    "(grpo keys list, on the learner's host)"
                )
            if event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
                raise RunError(f"{self._endpoint}: {self._mismatch}")
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._broken_off.clear()
                continue
            self._broken_off.append(time.monotonic())
            quickly = self._broken_off[-1] - self._broken_off[0] < BROKEN_OFF_S
            if self._key is not None and len(self._broken_off) == BROKEN_OFF and quickly:
                raise RunError(
                    f"{self._endpoint}: is not the learner that the key {self._key.name!r} is for, or it has a new key"
                )

    @property
    def _mismatch(self) -> str:
        if self._key is None:
            return "needs a key: --key FILE, made by grpo keys new NAME on the learner's host"
        return "has no keys (transport.insecure = true there); leave --key out if you trust the network"

    def close(self) -> None:
        """Stop watching; before the socket is closed. May be called twice."""
        if self._monitor is not None and self._socket is not None:
            self._socket.disable_monitor()
            self._monitor.close(linger=0)
            self._monitor = None
