"""The events socket over real sockets: ipc in a short folder, tcp on a free port."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq
from bounds import HANG_S
from hostile import RawPeer, frame

from grpo_actors.errors import RunError
from grpo_actors.transport.events import (
    EVENTS_HELD,
    MAX_EVENT_BYTES,
    MAX_TOPIC_BYTES,
    MAX_TOPICS,
    EventPublisher,
    EventSubscriber,
)


@pytest.fixture
def context() -> Iterator["zmq.Context[zmq.Socket[bytes]]"]:
    with zmq.Context() as context:
        yield context


@pytest.fixture
def address() -> Iterator[str]:
    # Not tmp_path: on macOS it is longer than the 103 characters that an ipc path may have there.
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield f"ipc://{folder}/e"


def publish_until_received(publisher: EventPublisher, subscriber: EventSubscriber) -> None:
    """Publish hellos until the subscriber receives one, because a late one misses earlier events; then drain the hellos."""
    deadline = time.monotonic() + HANG_S
    while subscriber.receive(0.05) is None:
        assert time.monotonic() < deadline, "the subscriber never connected"
        publisher.publish("hello", b"{}")
    publisher.publish("ready", b"{}")
    while (event := subscriber.receive(HANG_S)) is not None and event[0] != "ready":
        pass


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + HANG_S
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"


def test_events_arrive_whole_and_in_order(context, address):
    with EventPublisher(context, address) as publisher, EventSubscriber(address) as subscriber:
        publish_until_received(publisher, subscriber)
        for number in range(100):
            assert publisher.publish("metrics", b"%d" % number)
        got = [subscriber.receive(HANG_S) for _ in range(100)]
    assert got == [("metrics", b"%d" % number) for number in range(100)]


def test_a_subscriber_matches_its_topics_by_whole_name_and_not_by_prefix(context, address):
    with (
        EventPublisher(context, address) as publisher,
        EventSubscriber(address, ["eval", "hello", "ready"]) as reader,
    ):
        publish_until_received(publisher, reader)
        for topic in ("metrics", "evaluation", "eval"):
            publisher.publish(topic, topic.encode())
        assert reader.receive(HANG_S) == ("eval", b"eval")


def test_receive_returns_none_after_its_timeout(address):
    with EventSubscriber(address) as subscriber:
        began = time.monotonic()
        assert subscriber.receive(0.3) is None
        assert 0.3 <= time.monotonic() - began < HANG_S
        assert subscriber.receive(0) is None


def test_iterating_yields_events(context, address):
    with EventPublisher(context, address) as publisher, EventSubscriber(address) as subscriber:
        publish_until_received(publisher, subscriber)
        publisher.publish("stop", b"{}")
        assert next(iter(subscriber)) == ("stop", b"{}")


def test_a_subscriber_may_come_first_and_survives_a_restart_of_the_publisher(context, address):
    with EventSubscriber(address) as subscriber:
        with EventPublisher(context, address) as first:
            publish_until_received(first, subscriber)
        with EventPublisher(context, address) as second:
            publish_until_received(second, subscriber)


def test_a_subscriber_that_reads_nothing_never_blocks_the_publisher_and_keeps_the_oldest_events(
    context, address
):
    with EventPublisher(context, address) as publisher, EventSubscriber(address) as lazy:
        publish_until_received(publisher, lazy)
        began = time.monotonic()
        # Far beyond both high-water marks and the kernel's buffers: 8,000 × 32 KiB = 250 MiB.
        for number in range(8_000):
            publisher.publish("metrics", b"%-32768d" % number)
        assert time.monotonic() - began < HANG_S
        got = []
        while (event := lazy.receive(0.5)) is not None:
            got.append(int(event[1]))
    # The hellos before may have used up half of the queue: ZeroMQ frees it in halves.
    assert got[: EVENTS_HELD // 2] == list(range(EVENTS_HELD // 2))
    assert len(got) < 8_000


STOPPED_READER = """
import sys
from grpo_actors.transport.events import EventSubscriber
with EventSubscriber(sys.argv[1]) as subscriber:
    for topic, event in subscriber:
        print(topic, flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_stopped_subscriber_costs_no_time_and_bounded_memory(context, address):
    command = [sys.executable, "-c", STOPPED_READER, address]
    with (
        EventPublisher(context, address) as publisher,
        subprocess.Popen(command, stdout=subprocess.PIPE) as reader,
    ):
        assert reader.stdout is not None
        os.set_blocking(reader.stdout.fileno(), False)
        wait_until(lambda: publisher.publish("hello", b"{}") and bool(reader.stdout.read(1)))
        reader.send_signal(signal.SIGSTOP)
        before = resident_mib()
        began = time.monotonic()
        for _ in range(4 * EVENTS_HELD):
            publisher.publish("metrics", bytes(MAX_EVENT_BYTES))
        elapsed = time.monotonic() - began
        grown = resident_mib() - before
        reader.kill()
    assert elapsed < HANG_S
    assert grown < 20.0  # MiB; 16 by the module's bound, and 4 × 16 were published


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def test_an_event_that_is_too_large_is_not_sent_and_publish_returns_false(context, address):
    with EventPublisher(context, address) as publisher, EventSubscriber(address) as subscriber:
        publish_until_received(publisher, subscriber)
        assert not publisher.publish("sample", bytes(MAX_EVENT_BYTES + 1))
        assert publisher.publish("sample", bytes(MAX_EVENT_BYTES))
        assert subscriber.receive(HANG_S) == ("sample", bytes(MAX_EVENT_BYTES))


def test_a_message_that_is_not_an_event_is_dropped_and_counted(context, address):
    with context.socket(zmq.PUB) as stranger, EventSubscriber(address) as subscriber:
        stranger.bind(address)
        wait_until(
            lambda: (
                stranger.send_multipart([b"hello", b"{}"]) is None and subscriber.receive(0.05) is not None
            )
        )
        for frames in ([b"one frame"], [b"a", b"b", b"c"], [b"\xff", b"{}"], [b"good", b"{}"]):
            stranger.send_multipart(frames)
        topics = []
        while "good" not in topics:
            topics += [event[0] for event in [subscriber.receive(HANG_S)] if event]
        assert set(topics) <= {"hello", "good"}
        assert subscriber.malformed == 3


def test_the_publisher_names_the_port_it_was_given(context):
    with EventPublisher(context, "tcp://127.0.0.1:*") as publisher:
        assert publisher.endpoint.removeprefix("tcp://127.0.0.1:").isdecimal()
        with EventSubscriber(publisher.endpoint) as subscriber:
            publish_until_received(publisher, subscriber)


def test_a_port_in_use_is_refused_with_the_cure(context):
    with (
        EventPublisher(context, "tcp://127.0.0.1:*") as publisher,
        pytest.raises(RunError, match="in use; stop"),
    ):
        EventPublisher(context, publisher.endpoint)


def test_an_ipc_path_that_is_too_long_is_refused_with_the_cure(context):
    with pytest.raises(RunError, match=r"too long for an ipc path .* shorter folder"):
        EventPublisher(context, f"ipc:///tmp/{'x' * 120}")


def test_an_invalid_address_is_refused():
    with pytest.raises(RunError, match="tcp://host is no address to connect to"):
        EventSubscriber("tcp://host")
    with pytest.raises(RunError, match=r"no address to connect to .*ipc:///path"):
        EventSubscriber("nonsense")


def test_closing_leaves_no_socket_file(context, address):
    path = Path(address.removeprefix("ipc://"))
    with EventPublisher(context, address):
        assert path.exists()
    assert not path.exists()


@pytest.mark.parametrize("topic", [b"x" * (MAX_TOPIC_BYTES + 1), b"x" * 5000], ids=["long", "very long"])
def test_a_reader_that_subscribes_to_a_long_topic_is_cut_off(context, address, topic):
    with EventPublisher(context, address) as publisher, RawPeer(address, b"SUB") as reader:
        reader.socket.sendall(frame(b"\1" + topic))
        assert tended(publisher, reader)


def test_a_reader_of_many_topics_is_cut_off(context, address):
    with EventPublisher(context, address) as publisher, RawPeer(address, b"SUB") as reader:
        reader.socket.sendall(frame(b"\1" + b"x" * MAX_TOPIC_BYTES))
        for number in range(1, MAX_TOPICS):
            reader.socket.sendall(frame(b"\1topic-%d" % number))
        assert not tended(publisher, reader, times=10)
        reader.socket.sendall(frame(b"\1one more"))
        assert tended(publisher, reader)


def test_topics_that_another_reader_has_count_for_each(context, address):
    with (
        EventPublisher(context, address) as publisher,
        RawPeer(address, b"SUB") as one,
        RawPeer(address, b"SUB") as other,
    ):
        for reader in (one, other):
            for number in range(MAX_TOPICS):
                reader.socket.sendall(frame(b"\1topic-%d" % number))
            assert not tended(publisher, reader, times=10)
        other.socket.sendall(frame(b"\1one more"))
        assert tended(publisher, other)
        assert not tended(publisher, one, times=10)


def tended(publisher: EventPublisher, reader: RawPeer, times: int = 1000) -> bool:
    """Tend the publisher again and again; return whether the reader is cut off meanwhile."""
    reader.socket.settimeout(0.01)
    for _ in range(times):
        publisher.tend()
        try:
            if not reader.socket.recv(4096):
                return True
        except TimeoutError:
            pass
        except ConnectionError:
            return True
    return False
