"""Links between ranks, over real sockets: messages arrive, an end in order is told, and any other end is noticed."""

import socket
import threading
from multiprocessing import AuthenticationError

import pytest
from bounds import HANG_S

from grpo_actors.transport import links
from grpo_actors.transport.links import Link, LinkClosedError, accept, connect, listening

HOST, SECRET = "127.0.0.1", b"s" * 32


@pytest.fixture
def ends():
    """The connections of both sides."""
    with listening(HOST, SECRET) as listener:
        port = listener.address[1]
        made = []
        connecting = threading.Thread(target=lambda: made.append(connect(HOST, port, SECRET)))
        connecting.start()
        accepted = accept(listener)
        connecting.join()
    yield accepted, made[0]
    for connection in (accepted, made[0]):
        connection.close()


def test_messages_of_any_size_arrive_in_order_though_nobody_waits_for_them(ends):
    never = threading.Event()
    first, other = (Link(connection, never.set) for connection in ends)
    sent = [b"x", bytes(10_000_000), b"y"]
    for message in sent:
        first.send(message)
        other.send(message)
    assert [first.receive() for _ in sent] == [other.receive() for _ in sent] == sent
    first.close()
    with pytest.raises(LinkClosedError):
        other.receive()
    assert not never.is_set()


def test_an_end_without_a_farewell_is_noticed_while_nobody_reads(ends):
    lost = threading.Event()
    link = Link(ends[0], lost.set)
    ends[1].close()
    assert lost.wait(HANG_S)
    link.send(b"nobody is there")  # returns
    link.close()


def test_only_who_knows_the_secret_is_let_in():
    with listening(HOST, SECRET) as listener:
        port, accepted = listener.address[1], []
        accepting = threading.Thread(target=lambda: accepted.append(accept(listener)))
        accepting.start()
        with pytest.raises(AuthenticationError):
            connect(HOST, port, b"another")
        with socket.create_connection((HOST, port)) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        with connect(HOST, port, SECRET) as friend:
            accepting.join(HANG_S)
            friend.send_bytes(b"hello")
            assert accepted[0].recv_bytes() == b"hello"
        accepted[0].close()


def test_a_stranger_who_says_nothing_keeps_the_others_waiting_for_a_while_only(monkeypatch):
    monkeypatch.setattr(links, "HANDSHAKE_S", 0.1)
    with listening(HOST, SECRET) as listener, socket.create_connection(listener.address):
        accepted = []
        accepting = threading.Thread(target=lambda: accepted.append(accept(listener)), daemon=True)
        accepting.start()
        with connect(*listener.address, SECRET):
            accepting.join(HANG_S)
            (connection,) = accepted
            connection.close()
