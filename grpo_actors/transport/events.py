"""The events socket: what a run says about itself, from the learner to whoever cares to listen.

Knows topics and bytes; what stands in the bytes is the business of `grpo_actors.observe`.

What is lost: PUB keeps the OLDEST `EVENTS_HELD` events for each slow subscriber and drops newer ones,
silently; a subscriber that connects late has missed all that came before; an event of more than
`MAX_EVENT_BYTES` is not published at all. What is not: order, and the wholeness of each event. Every
record carries a gapless number and is written to the run folder before it is published, so a reader
on this host sees each loss in the numbers and fills it from the file (`grpo_actors.observe.follow`).
Nothing on which training depends goes this way.

What never happens: the publisher waiting. A stopped, slow or absent reader costs it at most
`EVENTS_HELD` × `MAX_EVENT_BYTES` = 16 MiB, and after `HEARTBEAT_TIMEOUT_S` of silence nothing.
"""

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Self

import zmq

from grpo_actors.errors import RunError
from grpo_actors.transport.sockets import Context, bind, connect

#: Events kept for one slow subscriber. Several a step: a minute of pause at one step a second.
EVENTS_HELD = 256
#: The largest event: 16 completions of 1,000 tokens fit; see the module's bound on memory.
MAX_EVENT_BYTES = 64 * 1024
#: No single wait is longer, so that a signal handler which only sets a flag is heeded.
LONGEST_WAIT_S = 0.2
#: What the last events of a run get to reach a reader that is not stopped.
FAREWELL_S = 0.3


class EventPublisher:
    """Binds `endpoint` and publishes events; belongs to the thread that made it."""

    def __init__(self, context: Context, endpoint: str) -> None:
        """Bind; a `RunError` says why it cannot. The context stays the caller's to close."""
        self._socket = bind(context, zmq.PUB, endpoint, MAX_EVENT_BYTES, [(zmq.SNDHWM, EVENTS_HELD)])

    @property
    def endpoint(self) -> str:
        """The address to connect to, with the real port where ``tcp://…:*`` was asked for."""
        return self._socket.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")

    def publish(self, topic: str, event: bytes) -> bool:
        """Hand an event to all subscribers of `topic` and return at once.

        False: it is larger than `MAX_EVENT_BYTES` and went to nobody. True promises no arrival.
        """
        if len(event) > MAX_EVENT_BYTES:
            return False
        self._socket.send_multipart((topic.encode(), event), flags=zmq.NOBLOCK)
        return True

    def close(self) -> None:
        """Unbind; what slow readers do not take within `FAREWELL_S` is dropped. May be called twice."""
        if self._socket.closed:
            return
        endpoint = self.endpoint
        self._socket.close(linger=int(FAREWELL_S * 1000))
        # ZeroMQ leaves the file of an ipc socket behind. "@" is Linux's name space without files.
        if endpoint.startswith("ipc://") and not endpoint.startswith("ipc://@"):
            Path(endpoint.removeprefix("ipc://")).unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class EventSubscriber:
    """Connects to a publisher, now or once it comes up, and again whenever the link is cut."""

    #: Messages that were not an event (wrong number of frames, topic not UTF-8) and were dropped.
    malformed: int = 0

    def __init__(self, endpoint: str, topics: Iterable[str] = ()) -> None:
        """Connect in the background. `topics`: only these, by whole name; none given means all."""
        self.endpoint = endpoint
        self._topics = frozenset(topics)
        self._context: Context = zmq.Context()
        # Subscribed before connecting: the link then carries events from its first moment on.
        wanted = [(zmq.SUBSCRIBE, topic.encode()) for topic in self._topics or ("",)]
        try:
            self._socket = connect(
                self._context, zmq.SUB, endpoint, MAX_EVENT_BYTES, [(zmq.RCVHWM, EVENTS_HELD), *wanted]
            )
        except RunError:
            self._context.term()
            raise

    def receive(self, timeout_s: float | None) -> tuple[str, bytes] | None:
        """The next event as (topic, bytes), or None when `timeout_s` passed without one.

        0 takes only what is already here; None waits without end.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left_s = LONGEST_WAIT_S if deadline is None else deadline - time.monotonic()
            if self._socket.poll(int(1000 * min(max(left_s, 0.0), LONGEST_WAIT_S))):
                event = self._parse(self._socket.recv_multipart(zmq.NOBLOCK))
                if event is not None:
                    return event
            elif deadline is not None and time.monotonic() >= deadline:
                return None

    def __iter__(self) -> Iterator[tuple[str, bytes]]:
        """Events without end; leave the loop to stop."""
        while True:
            event = self.receive(None)
            if event is not None:
                yield event

    def close(self) -> None:
        """Disconnect; may be called twice."""
        self._socket.close(linger=0)
        self._context.term()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _parse(self, frames: list[bytes]) -> tuple[str, bytes] | None:
        try:
            topic_frame, event = frames
            topic = topic_frame.decode()
        except ValueError:  # also what UnicodeDecodeError is
            self.malformed += 1
            return None
        # ZeroMQ filters by prefix: "eval" would let "evaluation" through.
        return (topic, event) if not self._topics or topic in self._topics else None
