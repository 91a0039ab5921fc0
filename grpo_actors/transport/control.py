"""The control sockets: ROUTER at the learner, DEALER at each peer.

Why nothing is lost: neither socket is trusted to deliver. A message may die with a connection (in
kernel buffers, in a killed process, unread in a queue); whoever needs an effect repeats the cause. A
worker keeps each group until its Ack and sends it again after a silence; a lease whose worker is gone
or silent is granted again; the schedule's ledger makes all repeats harmless.

Why nothing blocks: sends never wait. A peer whose queue is full or gone is reported to the caller,
who treats it as lost.
"""

from collections.abc import Iterator

import zmq

from grpo_actors.errors import ProtocolError, RunError
from grpo_actors.transport.sockets import CONTROL_BYTES, Context, bind, connect

#: Messages taken in before the caller may look at its other duties: nobody's flood keeps it from them.
TAKEN_AT_ONCE = 64
#: Bytes of a name: what ZeroMQ has room for.
MAX_NAME_BYTES = 255


class ControlServer:
    """The learner's end. Not thread-safe: one thread owns it."""

    def __init__(self, context: Context, endpoint: str) -> None:
        self.socket = bind(context, zmq.ROUTER, endpoint, CONTROL_BYTES)

    def send(self, peer: bytes, data: bytes) -> bool:
        """False: the peer is not connected, or reads so slowly that its queue is full."""
        return self._try(peer, data) is None

    def reaches(self, peer: bytes, data: bytes) -> bool:
        """Send, to learn whether the peer is connected at all: a full queue is a connection, too."""
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
        """Some of the (peer, data) that have arrived; does not wait. Frames of a foreign shape come as b""."""
        for _ in range(TAKEN_AT_ONCE):
            try:
                frames = self.socket.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return
            yield frames[0], frames[1] if len(frames) == 2 else b""


class ControlClient:
    """A worker's or an evaluator's end. Not thread-safe."""

    def __init__(self, context: Context, endpoint: str, name: str) -> None:
        """`name` is the peer's identity: the same over reconnects, its own among all peers.

        Raises:
            RunError: the name is no identity, or the endpoint no address.
        """
        self.endpoint, self.name = endpoint, name
        identity = name.encode()
        # ZeroMQ keeps identities that begin with a zero byte for itself.
        if not 0 < len(identity) <= MAX_NAME_BYTES or identity.startswith(b"\0"):
            raise RunError(
                f"--name: must have 1 to {MAX_NAME_BYTES} bytes, got {len(identity)}: {name[:40]!r}"
            )
        self.socket = connect(context, zmq.DEALER, endpoint, CONTROL_BYTES, [(zmq.IDENTITY, identity)])

    def send(self, data: bytes) -> bool:
        """False: not connected now; say it again later."""
        _check_size(data)
        try:
            self.socket.send(data, zmq.DONTWAIT)
        except zmq.Again:
            return False
        return True

    def receive(self, timeout_s: float) -> bytes | None:
        """The next message, or None after `timeout_s` (0: do not wait)."""
        if not self.socket.poll(int(timeout_s * 1000)):
            return None
        frames = self.socket.recv_multipart()
        return frames[-1]

    def close(self) -> None:
        """Disconnect; what was sent last, a Bye, still has a second to leave."""
        self.socket.close(linger=1_000)


def _check_size(data: bytes) -> None:
    # The receiver would cut the link, and a repeat would cut it again, for ever.
    if len(data) > CONTROL_BYTES:
        raise ProtocolError(
            f"a message of {len(data)} bytes, at most {CONTROL_BYTES} can be sent; "
            "lower rollout.num_generations or rollout.max_new_tokens"
        )
