"""Links between ranks, over real sockets: messages arrive, an end in order is told, and any other end is noticed."""

import contextlib
import os
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
    assert ends[0].closed
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


def test_a_send_that_fails_returns_when_the_end_has_been_noticed(ends):
    lost, noticed = threading.Event(), []
    link = Link(ends[0], lost.set)
    with socket.socket(fileno=os.dup(ends[0].fileno())) as same:
        same.shutdown(socket.SHUT_WR)

    def send():
        link.send(b"x")
        noticed.append(lost.is_set())

    sending = threading.Thread(target=send)
    sending.start()
    ends[1].close()
    sending.join()
    assert noticed == [True]


@pytest.mark.skipif(not hasattr(socket, "TCP_KEEPIDLE"), reason="macOS has other names for it")
def test_a_host_that_is_gone_without_a_word_is_noticed_within_fifteen_seconds(ends):
    link, other = (Link(connection, threading.Event().set) for connection in ends)
    with socket.socket(fileno=os.dup(ends[0].fileno())) as same:
        assert same.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        idle_s, interval_s, times = (
            same.getsockopt(socket.IPPROTO_TCP, option)
            for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
        )
    assert idle_s + interval_s * times <= 15
    for each in (link, other):
        each.close()


def test_only_who_knows_the_secret_is_let_in():
    with listening(HOST, SECRET) as listener:
        port, accepted = listener.address[1], []
        accepting = threading.Thread(target=lambda: accepted.append(accept(listener)))
        accepting.start()
        with pytest.raises(AuthenticationError):
            connect(HOST, port, b"another")
        with socket.create_connection((HOST, port)) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
            with contextlib.suppress(ConnectionResetError):
                while stranger.recv(4096):  # it is closed at once
                    pass
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


def test_who_was_let_in_stays(monkeypatch):
    monkeypatch.setattr(links, "HANDSHAKE_S", 0.1)
    with listening(HOST, SECRET) as listener:
        accepted = []
        accepting = threading.Thread(target=lambda: accepted.append(accept(listener)))
        accepting.start()
        with connect(*listener.address, SECRET) as friend:
            accepting.join()
            for timer in threading.enumerate():
                if isinstance(timer, threading.Timer):
                    timer.join()  # of the handshake: it has been called off
            with accepted[0] as connection:
                connection.send_bytes(b"hello")
                assert friend.recv_bytes() == b"hello"
