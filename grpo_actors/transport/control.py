"""The control sockets: ROUTER at the learner, DEALER at each peer.

Why nothing is lost: no one relies on delivery. A message may be lost with its connection (in kernel buffers, in a
killed process, unread in a queue), so a sender that needs an effect repeats its message. A worker keeps each group
until its Ack and sends it again after a silence. A lease whose worker is gone or silent is granted again. The
schedule's ledger makes all repeats harmless.

Why nothing blocks: a send never waits. If the peer is gone or its queue is full, the send returns False, and the caller
treats the message as lost.
"""

from collections.abc import Iterator

import zmq

from grpo_actors.errors import ProtocolError, RunError
from grpo_actors.transport.sockets import CONTROL_BYTES, Context, bind, connect

#: Messages per call of `receive`, so that a flood from one peer cannot keep the caller from its other duties.
MAX_MESSAGES_PER_CALL = 64
#: Longest pause between two attempts of a peer that backs off, in seconds.
LONGEST_BACKOFF_S = 5.0
#: Longest name in bytes: ZeroMQ's limit for an identity.
MAX_NAME_BYTES = 255


class ControlServer:
    """The learner's end. Not thread-safe: one thread owns it."""

    def __init__(self, context: Context, endpoint: str) -> None:
        self.socket = bind(context, zmq.ROUTER, endpoint, CONTROL_BYTES)

    def send(self, peer: bytes, data: bytes) -> bool:
        """Send; return False if the peer is not connected, or reads so slowly that its queue is full."""
        return self._try(peer, data) is None

    def reaches(self, peer: bytes, data: bytes) -> bool:
        """Send, and return whether the peer is connected; a peer whose queue is full is connected, too."""
        return self._try(peer, data) != zmq.EHOSTUNREACH

    def _try(self, peer: bytes, data: bytes) -> int | None:
        _check_size(data)
        try:
            self.socket.send_multipart([peer, data], zmq.DONTWAIT)
        except zmq.ZMQError as error:
            if error.errno in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                return error.errno
            raise
        return None

    def receive(self) -> Iterator[tuple[bytes, bytes]]:
        """Yield some of the (peer, data) that have arrived, without waiting; data is b"" for a wrong number of frames."""
        for _ in range(MAX_MESSAGES_PER_CALL):
            try:
                frames = self.socket.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return
            yield frames[0], frames[1] if len(frames) == 2 else b""


class ControlClient:
    """A worker's or an evaluator's end. Not thread-safe."""

    def __init__(self, context: Context, endpoint: str, name: str, *, backs_off: bool = False) -> None:
        """Connect in the background. `name` is the peer's identity: unique among all peers, the same at every reconnect.

        With `backs_off` the attempts to connect become rarer, for a peer that may wait for hours.

        Raises:
            RunError: `name` is not a valid identity, or `endpoint` not a valid address.
        """
        self.endpoint, self.name = endpoint, name
        identity = name.encode()
        # ZeroMQ reserves identities that begin with a zero byte.
        if not 0 < len(identity) <= MAX_NAME_BYTES or identity.startswith(b"\0"):
            raise RunError(
                f"--name: must have 1 to {MAX_NAME_BYTES} bytes, got {len(identity)}: {name[:40]!r}"
            )
        options: list[tuple[int, int | bytes]] = [(zmq.IDENTITY, identity)]
        if backs_off:
            options.append((zmq.RECONNECT_IVL_MAX, round(1000 * LONGEST_BACKOFF_S)))
        self.socket = connect(context, zmq.DEALER, endpoint, CONTROL_BYTES, options)

    def send(self, data: bytes) -> bool:
        """Send; return False if there is no connection now, and the caller has to send again later."""
        _check_size(data)
        try:
            self.socket.send(data, zmq.DONTWAIT)
        except zmq.Again:
            return False
        return True

    def receive(self, timeout_s: float) -> bytes | None:
        """Return the next message, or None after `timeout_s` seconds (0: do not wait)."""
        if not self.socket.poll(int(timeout_s * 1000)):
            return None
        frames = self.socket.recv_multipart()
        return frames[-1]

    def close(self) -> None:
        """Disconnect; messages sent before, such as a Bye, still have a second to leave."""
        self.socket.close(linger=1_000)


def _check_size(data: bytes) -> None:
    # The receiver would cut the connection, and every repeat would cut it again.
    if len(data) > CONTROL_BYTES:
        raise ProtocolError(
            f"a message of {len(data)} bytes, at most {CONTROL_BYTES} can be sent; "
            "lower rollout.num_generations or rollout.max_new_tokens"
        )
