"""The control sockets: ROUTER at the learner, DEALER at each peer.

Why nothing is lost: no one relies on delivery. A message may be lost with its connection (in kernel buffers, in a
killed process, unread in a queue), so a sender that needs an effect repeats its message. A worker keeps each group
until its Ack and sends it again after a silence. A lease whose worker is gone or silent is granted again. The
schedule's ledger makes all repeats harmless.

Why nothing blocks: a send never waits. If the peer is gone or its queue is full, the send returns False, and the caller
treats the message as lost.
"""

import secrets
from collections.abc import Iterator
from typing import NamedTuple

import zmq

from grpo_actors.errors import ProtocolError, RunError
from grpo_actors.transport.access import Access, Sender
from grpo_actors.transport.keys import ClientKey
from grpo_actors.transport.refusals import Refusals
from grpo_actors.transport.sockets import CONTROL_BYTES, Context, bind, connect, cut, endpoint_of

#: Messages per call of `receive`, so that a flood from one peer cannot keep the caller from its other duties.
MAX_MESSAGES_PER_CALL = 64
#: Longest pause between two attempts of a peer that backs off, in seconds.
LONGEST_BACKOFF_S = 5.0
#: Longest name in characters.
MAX_NAME = 200
#: Messages of one peer that are kept unread. Few, because the largest may have 64 MiB.
UNREAD = 4


class Arrival(NamedTuple):
    """One message of a peer."""

    identity: bytes
    #: b"" for a wrong number of frames.
    data: bytes
    sender: Sender


def new_session() -> bytes:
    """Return a session token: a secret by which the learner knows a process again."""
    return secrets.token_hex(16).encode()


class ControlServer:
    """The learner's end. Not thread-safe: one thread owns it.

    A peer's identity is a secret of its process (`ControlClient.identity`). Whoever connects with an identity takes over
    its messages (HANDOVER), which is how a peer comes back after its connection was cut. So no one else can.
    """

    def __init__(self, context: Context, endpoint: str, access: Access | None = None) -> None:
        self._access = access or Access()
        options = [*self._access.options("control"), (zmq.RCVHWM, UNREAD)]
        self.socket = bind(context, zmq.ROUTER, endpoint, CONTROL_BYTES, options)
        self._endpoint = endpoint_of(self.socket)

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

    def receive(self) -> Iterator[Arrival]:
        """Yield some of the messages that have arrived, without waiting. One whose key was revoked ends its connection."""
        for _ in range(MAX_MESSAGES_PER_CALL):
            try:
                frames = self.socket.recv_multipart(zmq.DONTWAIT, copy=False)
            except zmq.Again:
                return
            sender = self._access.sender(frames[-1], "control")
            if sender is None:
                cut(self._endpoint, int(frames[-1].get(zmq.SRCFD)))
            else:
                yield Arrival(frames[0].bytes, frames[1].bytes if len(frames) == 2 else b"", sender)

    def admits(self, sender: Sender) -> bool:
        """Return whether the key of a peer is still listed."""
        return self._access.may(sender.key, "control")

    def cut(self, sender: Sender) -> None:
        """Close a peer's connection."""
        cut(self._endpoint, sender.descriptor)


class ControlClient:
    """A worker's or an evaluator's end. Not thread-safe."""

    def __init__(
        self,
        context: Context,
        endpoint: str,
        name: str,
        key: ClientKey | None = None,
        *,
        session: bytes | None = None,
        backs_off: bool = False,
    ) -> None:
        """Connect in the background.

        Args:
            context: The sockets' context.
            endpoint: Address of the learner's control socket.
            name: Unique among all peers.
            key: Needed where the learner asks for one.
            session: Token of a process that may connect several times; None: a new one.
            backs_off: Whether the attempts to connect become rarer, for a peer that may wait for hours.

        Raises:
            RunError: `name` is not a valid name, or `endpoint` not a valid address.
        """
        self.endpoint, self.name = endpoint, name
        if not 0 < len(name) <= MAX_NAME or not name.isprintable():
            raise RunError(f"--name: must have 1 to {MAX_NAME} printable characters, got {name[:40]!r}")
        #: Session token: the same at every reconnect of this process, and known to no one else but the learner.
        self.identity = session or new_session()
        options: list[tuple[int, int | bytes]] = [
            (zmq.IDENTITY, self.identity),
            *(key.options if key is not None else ()),
        ]
        if backs_off:
            options.append((zmq.RECONNECT_IVL_MAX, round(1000 * LONGEST_BACKOFF_S)))
        self._refusals = Refusals(endpoint, key)
        self.socket = connect(
            context, zmq.DEALER, endpoint, CONTROL_BYTES, options, before=self._refusals.watch
        )

    def send(self, data: bytes) -> bool:
        """Send; return False if there is no connection now, and the caller has to send again later."""
        _check_size(data)
        try:
            self.socket.send(data, zmq.DONTWAIT)
        except zmq.Again:
            return False
        return True

    def receive(self, timeout_s: float) -> bytes | None:
        """Return the next message, or None after `timeout_s` seconds (0: do not wait).

        Raises:
            RunError: the learner refuses this peer's key, or one of the two expects a key where the other has none.
        """
        if not self.socket.poll(int(timeout_s * 1000)):
            self._refusals.check()
            return None
        frames = self.socket.recv_multipart()
        return frames[-1]

    def close(self) -> None:
        """Disconnect; messages sent before, such as a Bye, still have a second to leave."""
        self._refusals.close()
        self.socket.close(linger=1_000)


def _check_size(data: bytes) -> None:
    # The receiver would cut the connection, and every repeat would cut it again.
    if len(data) > CONTROL_BYTES:
        raise ProtocolError(
            f"a message of {len(data)} bytes, at most {CONTROL_BYTES} can be sent; "
            "lower rollout.num_generations or rollout.max_new_tokens"
        )
