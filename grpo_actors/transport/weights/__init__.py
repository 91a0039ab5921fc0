"""The transports of weights. To add one, write a file with a sender and a receiver, and add its row to `TRANSPORTS`."""

from collections.abc import Callable
from typing import NamedTuple

from grpo_actors.transport.keys import ClientKey
from grpo_actors.transport.sockets import Context
from grpo_actors.transport.weights.base import (
    Buffer,
    Format,
    PinMemory,
    ReceivedVersion,
    Receiver,
    Sender,
    Version,
)
from grpo_actors.transport.weights.chunks import WeightsServer, WeightsSocket
from grpo_actors.transport.weights.host_copy import HostCopyReceiver
from grpo_actors.transport.weights.shared_memory import (
    SharedMemoryReader,
    SharedMemoryWriter,
    remove_leftovers,
)

__all__ = [
    "TRANSPORTS",
    "Buffer",
    "Version",
    "WeightsClient",
    "WeightsServer",
    "open_senders",
    "remove_leftovers",
]


class Transport(NamedTuple):
    """One way in which versions reach workers."""

    #: None if the transport has no sender: the weights socket serves it, and gets every version with its manifest.
    sender: Callable[[PinMemory], Sender] | None
    #: Its arguments: the worker's end of the weights socket, what registers memory with the device, and the run's name.
    receiver: Callable[[WeightsSocket, PinMemory, str], Receiver]


#: Fastest first: a worker fetches a version by the first transport that can reach it.
TRANSPORTS = (
    Transport(SharedMemoryWriter, lambda _socket, pin, _run: SharedMemoryReader(pin)),
    Transport(None, HostCopyReceiver),
)


def open_senders(pin: PinMemory) -> list[Sender]:
    """Open the learner's ends of all transports, in their order."""
    return [transport.sender(pin) for transport in TRANSPORTS if transport.sender is not None]


class WeightsClient:
    """A worker's end: fetches the newest manifest and the bytes of a version. Not thread-safe."""

    def __init__(
        self,
        context: Context,
        endpoint: str,
        wire: Format,
        pin: PinMemory = lambda _: None,
        *,
        key: ClientKey | None = None,
        run: str = "",
    ) -> None:
        """Open all receivers.

        Args:
            context: That of the process.
            endpoint: Address of the weights socket.
            wire: Encoding of the requests.
            pin: Called with the memory in which this host keeps versions.
            key: That of the worker, if the socket asks for one.
            run: Names the run, with whose other workers on this host versions from another host are shared; empty: with none.
        """
        self.socket = WeightsSocket(context, endpoint, wire, key)
        self._receivers = [transport.receiver(self.socket, pin, run) for transport in TRANSPORTS]

    def manifest(self) -> bytes | None:
        """Return the newest version's manifest; None if no answer came in time, or there is no version yet."""
        return self.socket.manifest()

    def fetch(self, version: Version, on_chunk: Callable[[], None] = lambda: None) -> ReceivedVersion | None:
        """Fetch the bytes of a version; None if it was replaced meanwhile, or the server stopped answering."""
        arrived = (receiver.fetch(version, on_chunk) for receiver in self._receivers)
        return next((found for found in arrived if found is not None), None)

    def close(self) -> None:
        """Free what the receivers hold, and disconnect."""
        for receiver in self._receivers:
            receiver.close()
        self.socket.close()
