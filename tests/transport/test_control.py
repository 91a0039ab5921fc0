"""The control sockets, with real ZeroMQ sockets."""

import time

import pytest
import zmq
from bounds import HANG_S
from real_sockets import wait_until

from grpo_actors.errors import ProtocolError, RunError
from grpo_actors.transport.control import MAX_MESSAGES_PER_CALL, ControlClient, ControlServer
from grpo_actors.transport.sockets import CONTROL_BYTES, QUEUED, Context, connect, zmq_context


def received(server: ControlServer, count: int = 1) -> list[tuple[bytes, bytes]]:
    got: list[tuple[bytes, bytes]] = []

    def enough() -> bool:
        server.socket.poll(50)
        got.extend((identity, data) for identity, data, _ in server.receive())
        return len(got) >= count

    wait_until(enough)
    return got


def connected(context: Context, server: ControlServer, address: str, name: str) -> ControlClient:
    """Return a client whose connection is established."""
    client = ControlClient(context, address, name)
    wait_until(lambda: client.send(b"hello"))
    assert received(server) == [(client.identity, b"hello")]
    return client


def test_messages_go_both_ways_under_the_peers_name(zmq_sockets, ipc_address):
    server = ControlServer(zmq_sockets, ipc_address)
    client = connected(zmq_sockets, server, ipc_address, "worker-0")
    assert server.send(client.identity, b"welcome")
    assert client.receive(HANG_S) == b"welcome"
    assert client.receive(0.0) is None


def test_a_send_before_the_connection_is_up_returns_false(zmq_sockets, ipc_address):
    assert not ControlClient(zmq_sockets, ipc_address, "early").send(b"hello")


def test_a_send_to_an_unknown_peer_returns_false(zmq_sockets, ipc_address):
    assert not ControlServer(zmq_sockets, ipc_address).send(b"nobody", b"x")


def test_a_send_by_a_closed_socket_is_an_error(zmq_sockets, ipc_address):
    server = ControlServer(zmq_sockets, ipc_address)
    server.socket.close()
    with pytest.raises(zmq.ZMQError):
        server.send(b"nobody", b"x")


def test_a_process_keeps_the_session_that_it_is_given(zmq_sockets, ipc_address):
    one, other, given = (
        ControlClient(zmq_sockets, ipc_address, "w", session=session).identity
        for session in (None, None, b"s")
    )
    assert given == b"s"
    assert one != other


def test_a_send_to_a_peer_that_has_left_returns_false(zmq_sockets, ipc_address):
    server = ControlServer(zmq_sockets, ipc_address)
    client = connected(zmq_sockets, server, ipc_address, "leaver")
    client.close()
    wait_until(lambda: not server.send(client.identity, b"x"))


def test_a_peer_that_reads_nothing_fills_its_own_queue_and_blocks_no_other_peer(zmq_sockets, ipc_address):
    server = ControlServer(zmq_sockets, ipc_address)
    deaf = connected(zmq_sockets, server, ipc_address, "deaf")
    reader = connected(zmq_sockets, server, ipc_address, "reader")
    sent, began = 0, time.monotonic()
    while server.send(deaf.identity, bytes(100_000)):
        sent += 1
    # Both queues and the kernel's buffers: far fewer messages than would fill the memory.
    assert QUEUED <= sent < 4 * QUEUED
    # A full queue is no sign that the peer is gone.
    assert server.reaches(deaf.identity, b"x")
    assert not server.reaches(b"nobody", b"x")
    assert time.monotonic() - began < HANG_S
    assert server.send(reader.identity, b"still served")
    assert reader.receive(HANG_S) == b"still served"


def test_a_second_connection_of_a_process_takes_over_its_messages(zmq_sockets, ipc_address):
    server = ControlServer(zmq_sockets, ipc_address)
    first = connected(zmq_sockets, server, ipc_address, "w")
    second = connect(zmq_sockets, zmq.DEALER, ipc_address, CONTROL_BYTES, [(zmq.IDENTITY, first.identity)])
    assert second.poll(int(HANG_S * 1000), zmq.POLLOUT)
    second.send(b"again")
    assert received(server) == [(first.identity, b"again")]
    assert server.send(first.identity, b"for the second")
    assert second.recv() == b"for the second"


def test_a_process_of_the_same_name_takes_over_nothing(zmq_sockets, ipc_address):
    server = ControlServer(zmq_sockets, ipc_address)
    first = connected(zmq_sockets, server, ipc_address, "w")
    second = connected(zmq_sockets, server, ipc_address, "w")
    assert server.send(first.identity, b"for the first")
    assert first.receive(HANG_S) == b"for the first"
    assert second.receive(0.0) is None


def test_a_client_comes_back_by_itself_when_the_learner_is_started_again(zmq_sockets, ipc_address):
    server = ControlServer(zmq_sockets, ipc_address)
    client = connected(zmq_sockets, server, ipc_address, "w")
    server.socket.close(linger=0)
    wait_until(lambda: not client.send(b"into the void"))
    again = ControlServer(zmq_sockets, ipc_address)

    def is_heard() -> bool:
        # More than once: what is sent into a connection that is just ending is lost, and sent again by its owner.
        client.send(b"hello again")
        again.socket.poll(50)
        return (client.identity, b"hello again") in [(who, data) for who, data, _ in again.receive()]

    wait_until(is_heard)


def test_a_flood_is_received_in_portions(zmq_sockets, ipc_address):
    server = ControlServer(zmq_sockets, ipc_address)
    client = connected(zmq_sockets, server, ipc_address, "flood")
    for number in range(MAX_MESSAGES_PER_CALL + 10):
        wait_until(lambda number=number: client.send(b"%d" % number))
    server.socket.poll(1000)
    first = list(server.receive())
    assert 0 < len(first) <= MAX_MESSAGES_PER_CALL
    rest = received(server, MAX_MESSAGES_PER_CALL + 10 - len(first))
    assert [arrival[1] for arrival in [*first, *rest]] == [
        b"%d" % number for number in range(MAX_MESSAGES_PER_CALL + 10)
    ]


def test_a_message_with_a_wrong_number_of_frames_is_received_as_empty(zmq_sockets, ipc_address):
    server = ControlServer(zmq_sockets, ipc_address)
    client = connected(zmq_sockets, server, ipc_address, "odd")
    client.socket.send_multipart([b"a", b"b"])
    client.socket.send(b"")
    assert received(server, 2) == [(client.identity, b""), (client.identity, b"")]


def test_a_message_that_is_too_large_for_the_receiver_is_not_sent(zmq_sockets, ipc_address):
    server = ControlServer(zmq_sockets, ipc_address)
    client = connected(zmq_sockets, server, ipc_address, "w")
    huge = bytes(CONTROL_BYTES + 1)
    with pytest.raises(ProtocolError, match=r"lower rollout\.num_generations"):
        client.send(huge)
    with pytest.raises(ProtocolError, match=r"at most 67108864 can be sent"):
        server.send(client.identity, huge)


def test_the_last_message_of_a_client_arrives(zmq_sockets, ipc_address):
    server = ControlServer(zmq_sockets, ipc_address)
    with zmq_context() as own:
        client = connected(own, server, ipc_address, "w")
        client.send(b"bye")
        client.close()
    assert received(server) == [(client.identity, b"bye")]


@pytest.mark.parametrize("name", ["", "a\nb", "é" * 201])
def test_a_name_that_cannot_be_shown_is_refused(zmq_sockets, ipc_address, name):
    with pytest.raises(RunError, match="--name: must have 1 to 200 printable characters"):
        ControlClient(zmq_sockets, ipc_address, name)


def test_the_longest_name_is_allowed(zmq_sockets, ipc_address):
    assert ControlClient(zmq_sockets, ipc_address, "é" * 200).name == "é" * 200


def test_a_peer_that_may_wait_for_hours_tries_to_connect_every_five_seconds(zmq_sockets, ipc_address):
    intervals = [
        ControlClient(zmq_sockets, ipc_address, "w", backs_off=backs_off).socket.getsockopt(
            zmq.RECONNECT_IVL_MAX
        )
        for backs_off in (False, True)
    ]
    assert intervals == [200, 5_000]  # milliseconds
