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
from grpo_actors.transport.weights.chunks import ChunkReceiver, WeightsServer, WeightsSocket
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
    receiver: Callable[[WeightsSocket, PinMemory], Receiver]


#: Fastest first: a worker fetches a version by the first transport that can reach it.
TRANSPORTS = (
    Transport(SharedMemoryWriter, lambda _, pin: SharedMemoryReader(pin)),
    Transport(None, lambda socket, _: ChunkReceiver(socket)),
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
        key: ClientKey | None = None,
    ) -> None:
        """Open all receivers. `pin` is called with the memory in which a learner on this host keeps its versions."""
        self.socket = WeightsSocket(context, endpoint, wire, key)
        self._receivers = [transport.receiver(self.socket, pin) for transport in TRANSPORTS]

    def manifest(self) -> bytes | None:
        """Return the newest version's manifest; None if no answer came in time, or there is no version yet."""
        return self.socket.manifest()

    def fetch(self, version: Version, on_chunk: Callable[[], None] = lambda: None) -> ReceivedVersion | None:
        """Fetch the bytes of a version; None if it was replaced meanwhile, or the server stopped answering."""
        arrived = (receiver.fetch(version, on_chunk) for receiver in self._receivers)
        return next((found for found in arrived if found is not None), None)
