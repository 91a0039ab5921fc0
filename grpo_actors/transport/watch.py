"""The watch over a run's TCP sockets: it bounds what peers can make ZeroMQ keep in memory, as `gate` does for Unix sockets.

The kernel counts the bytes of each connection, and `Access` those of the messages that the application has received.
What lies between is in ZeroMQ's memory: whole messages not yet read, and the frames of one that is not finished. A
connection for which that is too much is closed, and so is one too many. Checked every `PERIOD_S`, so a peer can exceed its
bound by what its network carries in that time.

Only Linux tells the count; elsewhere only the number of connections is bounded.
"""

import contextlib
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import zmq
from zmq.utils.monitor import recv_monitor_message

from grpo_actors.transport.limits import MAX_CONNECTIONS, MAX_MESSAGE_BYTES, MAX_TOTAL_BYTES
from grpo_actors.transport.sockets import Socket, cut, endpoint_of

#: Seconds between two checks.
PERIOD_S = 0.04
#: Bytes that a connection may receive besides messages: its handshake, and its heartbeats per second.
HANDSHAKE_BYTES = 2**14
HEARTBEAT_BYTES_PER_S = 2**10
#: Linux's struct tcp_info: its size as asked for, and where the number of received bytes stands.
TCP_INFO_BYTES, RECEIVED_AT = 192, 128

_EVENTS = zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED


class Watch:
    """The connections of some bound sockets, and a thread that looks at them."""

    def __init__(self, sockets: Sequence[Socket], delivered: Mapping[int, int]) -> None:
        """Begin to watch. `delivered`: descriptor -> bytes of the messages received from it; another thread counts them."""
        self._delivered = delivered
        self._sockets = {socket.get_monitor_socket(_EVENTS): socket for socket in sockets}
        #: Bound socket -> descriptor -> time at which it was accepted, and the bytes delivered of an earlier one.
        self._connections: dict[Socket, dict[int, tuple[float, int]]] = {socket: {} for socket in sockets}
        self._addresses = {socket: endpoint_of(socket) for socket in sockets}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread, by the thread that owns the sockets."""
        self._over.set()
        self._thread.join()
        for monitor, watched in self._sockets.items():
            watched.disable_monitor()
            monitor.close(linger=0)

    def _run(self) -> None:
        while not self._over.wait(PERIOD_S):
            for monitor, watched in self._sockets.items():
                with contextlib.suppress(zmq.Again):  # until no event is left
                    while True:
                        event = recv_monitor_message(monitor, zmq.NOBLOCK)
                        self._note(watched, event["event"], event["value"])
            self._check_bytes()

    def _note(self, watched: Socket, event: int, descriptor: int) -> None:
        connections = self._connections[watched]
        if event != zmq.EVENT_ACCEPTED:
            connections.pop(descriptor, None)
        elif len(connections) >= MAX_CONNECTIONS:
            cut(self._addresses[watched], descriptor)
        else:
            connections[descriptor] = time.monotonic(), self._delivered.get(descriptor, 0)

    def _check_bytes(self) -> None:
        now_s, total, largest = time.monotonic(), 0, (0, "", -1)
        for watched, connections in self._connections.items():
            for descriptor, (since_s, before) in connections.items():
                delivered = self._delivered.get(descriptor, 0) - before
                undelivered = undelivered_bytes(received_bytes(descriptor), delivered, now_s - since_s)
                total += undelivered
                largest = max(largest, (undelivered, self._addresses[watched], descriptor))
        undelivered, address, descriptor = largest
        if undelivered > MAX_MESSAGE_BYTES or total > MAX_TOTAL_BYTES:
            cut(address, descriptor)


def undelivered_bytes(received: int, delivered: int, age_s: float) -> int:
    """Return how much of what a connection of this age has received must lie in ZeroMQ's memory."""
    return max(0, int(received - delivered - HANDSHAKE_BYTES - HEARTBEAT_BYTES_PER_S * age_s))


def received_bytes(descriptor: int) -> int:
    """Return how many bytes a TCP connection has received; 0 if it is closed, or the system does not tell."""
    if sys.platform != "linux":
        return 0
    try:
        duplicate = os.dup(descriptor)
    except OSError:
        return 0
    try:
        connection = socket.socket(fileno=duplicate)
    except OSError:  # closed, and the number now belongs to a file
        os.close(duplicate)
        return 0
    with connection, contextlib.suppress(OSError, struct.error):  # no TCP, or a system that tells less
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_BYTES)
        (received,) = struct.unpack_from("Q", info, RECEIVED_AT)
        return int(received)
    return 0


@contextmanager
def watched(sockets: Sequence[Socket], delivered: Mapping[int, int]) -> Iterator[None]:
    """Watch those of the sockets that are bound to TCP addresses within the block; see `Watch`."""
    on_tcp = [socket for socket in sockets if endpoint_of(socket).startswith("tcp://")]
    if not on_tcp:
        yield
        return
    with contextlib.closing(Watch(on_tcp, delivered)):
        yield
