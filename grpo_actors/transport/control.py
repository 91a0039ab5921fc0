"""The control sockets: ROUTER at the learner, DEALER at each peer.

Why nothing is lost: neither socket is trusted to deliver. A message may die with a connection (in
kernel buffers, in a killed process); whoever needs an effect repeats the cause. A worker keeps each
group until its Ack and sends it again after a reconnect or a silence; a lease whose worker is gone
or silent is granted again; the schedule's ledger makes all repeats harmless.

Why nothing blocks: sends never wait. A peer whose queue is full or gone is reported to the caller,
who treats it as lost.
"""

from collections.abc import Iterator

import zmq

from grpo_actors.transport.sockets import CONTROL_BYTES, bind, connect


class ControlServer:
    """The learner's end. Not thread-safe: one thread owns it."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", endpoint: str) -> None:
        self.socket = bind(context, zmq.ROUTER, endpoint, CONTROL_BYTES)

    def send(self, peer: bytes, data: bytes) -> bool:
        """False: the peer is not connected, or reads so slowly that its queue is full."""
        try:
            self.socket.send_multipart([peer, data], zmq.DONTWAIT)
        except zmq.ZMQError as error:
            if error.errno in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                return False
            raise
        return True

    def receive(self) -> Iterator[tuple[bytes, bytes]]:
        """All (peer, data) that have arrived; does not wait. Frames of a foreign shape come as b""."""
        while True:
            try:
                frames = self.socket.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return
            yield frames[0], frames[1] if len(frames) == 2 else b""


class ControlClient:
    """A worker's or an evaluator's end. Not thread-safe."""

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", endpoint: str, name: str) -> None:
        self.endpoint, self.name = endpoint, name
        self.socket = connect(context, zmq.DEALER, endpoint, CONTROL_BYTES)
        self.socket.setsockopt(zmq.IDENTITY, name.encode())
        # Queue only on a finished connection: otherwise a message to a dead learner seems sent.
        self.socket.setsockopt(zmq.IMMEDIATE, 1)
        self.socket.connect(endpoint)

    def send(self, data: bytes) -> bool:
        """False: not connected now; say it again later."""
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
