"""The events socket: the learner publishes a run's records to any number of subscribers.

It carries topics and bytes; `grpo_actors.observe` defines the content.

What may be lost: PUB keeps the OLDEST `EVENTS_HELD` events for each slow subscriber and silently drops newer ones; a
subscriber that connects late has missed all earlier events; an event larger than `MAX_EVENT_BYTES` is not published at
all. What always holds: events arrive in order, and each arrives whole. Every record has a gapless number and is written
to the run folder before it is published, so a reader on this host detects each loss by the numbers and fills it from the
file (`grpo_actors.observe.follow`). Training depends on nothing that is sent here.

The publisher never waits. A stopped, slow or absent reader costs at most `EVENTS_HELD` × `MAX_EVENT_BYTES` = 16 MiB, and
nothing after `HEARTBEAT_TIMEOUT_S` of silence.

Readers only subscribe. ZeroMQ keeps each subscription as a tree of its letters, 40 times as large, so topics are short
and few (`MAX_TOPIC_BYTES`, `MAX_TOPICS`); a reader that wants more is cut off. The socket is XPUB, which shows the
subscriptions, and with them each reader's key.
"""

import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Self

import zmq

from grpo_actors.errors import RunError
from grpo_actors.transport.access import Access, Sender
from grpo_actors.transport.keys import ClientKey
from grpo_actors.transport.refusals import Refusals
from grpo_actors.transport.sockets import LEAST_FRAME_BYTES, Context, bind, connect, cut, endpoint_of

#: Events kept for one slow subscriber. A step has several: enough for a pause of a minute at one step per second.
EVENTS_HELD = 256
#: Largest event: 16 completions of 1,000 tokens fit. The bound on memory above depends on it.
MAX_EVENT_BYTES = 64 * 1024
#: Longest name of a topic in bytes, and most subscriptions of one reader.
MAX_TOPIC_BYTES = 64
MAX_TOPICS = 32
#: Longest single wait in seconds, so that a flag set by a signal handler is seen soon.
LONGEST_WAIT_S = 0.2
#: Seconds that the last events of a run have to reach a reader that is not stopped.
FAREWELL_S = 0.3


class EventPublisher:
    """A publisher of events at a bound endpoint. It belongs to the thread that created it."""

    def __init__(self, context: Context, endpoint: str, access: Access | None = None) -> None:
        """Bind the socket. The caller closes the context.

        Raises:
            RunError: the endpoint cannot be bound.
        """
        self._access = access or Access()
        options = [
            *self._access.options("events"),
            (zmq.SNDHWM, EVENTS_HELD),
            (zmq.XPUB_VERBOSE, 1),  # show each subscription, not only the first to a topic
        ]
        self.socket = bind(context, zmq.XPUB, endpoint, LEAST_FRAME_BYTES, options)
        #: Connection (see `_connection`) -> its reader, and the number of its subscriptions.
        self._readers: dict[tuple[int, int], tuple[Sender, int]] = {}

    @property
    def endpoint(self) -> str:
        """The address to connect to, with the chosen port if the endpoint was ``tcp://…:*``."""
        return endpoint_of(self.socket)

    def tend(self) -> None:
        """Look through the readers: cut off those that subscribe to too much, and those whose key was revoked."""
        while self.socket.poll(0, zmq.POLLIN):
            frame = self.socket.recv_multipart(zmq.DONTWAIT, copy=False)[0]
            if frame.bytes[:1] == b"\1":
                self._note_subscription(frame)
        for connection, (reader, _) in list(self._readers.items()):
            if _connection(reader.descriptor) != connection:
                del self._readers[connection]
            elif not self._access.may(reader.key, "events"):
                cut(self.endpoint, reader.descriptor)

    def _note_subscription(self, frame: zmq.Frame) -> None:
        descriptor = int(frame.get(zmq.SRCFD))
        reader, connection = self._access.sender(frame, "events"), _connection(descriptor)
        subscriptions = 1 + (self._readers[connection][1] if connection in self._readers else 0)
        if reader is None or subscriptions > MAX_TOPICS or len(frame) > 1 + MAX_TOPIC_BYTES:
            cut(self.endpoint, descriptor)
        elif connection is not None:
            self._readers[connection] = reader, subscriptions

    def publish(self, topic: str, event: bytes) -> bool:
        """Send an event to all subscribers of `topic` and return at once.

        Returns False if the event is larger than `MAX_EVENT_BYTES` and was not sent. True does not guarantee arrival.
        """
        if len(event) > MAX_EVENT_BYTES:
            return False
        self.socket.send_multipart((topic.encode(), event), flags=zmq.NOBLOCK)
        return True

    def close(self) -> None:
        """Unbind; events that slow readers do not take within `FAREWELL_S` are dropped. May be called twice."""
        if self.socket.closed:
            return
        endpoint = self.endpoint
        self.socket.close(linger=int(FAREWELL_S * 1000))
        # ZeroMQ leaves the file of an ipc socket behind. "@" is Linux's abstract namespace, which has no files.
        if endpoint.startswith("ipc://") and not endpoint.startswith("ipc://@"):
            Path(endpoint.removeprefix("ipc://")).unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class EventSubscriber:
    """A subscriber that connects to a publisher as soon as it is up, and again after every lost connection."""

    #: Number of messages dropped because they were not events (wrong number of frames, topic not UTF-8).
    malformed: int = 0

    def __init__(self, endpoint: str, topics: Iterable[str] = (), key: ClientKey | None = None) -> None:
        """Connect in the background.

        Args:
            endpoint: The publisher's address.
            topics: Whole names of the topics to receive; empty means all.
            key: Needed where the learner asks for one.

        Raises:
            RunError: `endpoint` is not a valid address.
        """
        self.endpoint = endpoint
        self._topics = frozenset(topics)
        self._context: Context = zmq.Context()
        # Subscribe before connecting, so that the connection carries events from its first moment on.
        wanted = [(zmq.SUBSCRIBE, topic.encode()) for topic in self._topics or ("",)]
        try:
            options = [(zmq.RCVHWM, EVENTS_HELD), *wanted, *(key.options if key is not None else ())]
            self._refusals = Refusals(endpoint, key)
            self._socket = connect(
                self._context, zmq.SUB, endpoint, MAX_EVENT_BYTES, options, before=self._refusals.watch
            )
        except RunError:
            self._context.destroy(linger=0)  # `term` would wait for the socket that watches for refusals
            raise

    def receive(self, timeout_s: float | None) -> tuple[str, bytes] | None:
        """Return the next event as (topic, bytes), or None if none arrives within `timeout_s` seconds.

        0 returns only an event that has already arrived; None waits without limit.

        Raises:
            RunError: the learner refuses this reader.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            left_s = LONGEST_WAIT_S if deadline is None else deadline - time.monotonic()
            if self._socket.poll(int(1000 * min(max(left_s, 0.0), LONGEST_WAIT_S))):
                event = self._parse(self._socket.recv_multipart(zmq.NOBLOCK))
                if event is not None:
                    return event
                continue
            self._refusals.check()
            if deadline is not None and time.monotonic() >= deadline:
                return None

    def __iter__(self) -> Iterator[tuple[str, bytes]]:
        """Yield events without end; leave the loop to stop."""
        while True:
            event = self.receive(None)
            if event is not None:
                yield event

    def close(self) -> None:
        """Disconnect; may be called twice."""
        self._refusals.close()
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
        except ValueError:  # includes UnicodeDecodeError
            self.malformed += 1
            return None
        # ZeroMQ filters by prefix: "eval" would let "evaluation" through.
        return (topic, event) if not self._topics or topic in self._topics else None


def _connection(descriptor: int) -> tuple[int, int] | None:
    """Return what tells a connection from a later one with the same descriptor; None: it is closed."""
    try:
        return descriptor, os.fstat(descriptor).st_ino
    except OSError:
        return None
