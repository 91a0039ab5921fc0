"""The transports of weights. To add one, write a file with an outlet and an inlet, and add its row to `TRANSPORTS`."""

from collections.abc import Callable
from typing import NamedTuple

from grpo_actors.transport.sockets import Context
from grpo_actors.transport.weights.base import Arrived, Format, Inlet, Outlet, PinMemory, Room, Version
from grpo_actors.transport.weights.chunks import Chunks, WeightsServer, WeightsSocket
from grpo_actors.transport.weights.shared_memory import Reader, Shelf

__all__ = ["TRANSPORTS", "Room", "Version", "WeightsClient", "WeightsServer", "open_outlets"]


class Transport(NamedTuple):
    """One way for a version to travel."""

    #: None: the weights socket serves it, which is given every version with its manifest.
    outlet: Callable[[PinMemory], Outlet] | None
    inlet: Callable[[WeightsSocket, PinMemory], Inlet]


#: The fastest first: a worker takes a version by the first that reaches it.
TRANSPORTS = (
    Transport(Shelf, lambda _, pin: Reader(pin)),
    Transport(None, lambda socket, _: Chunks(socket)),
)


def open_outlets(pin: PinMemory) -> list[Outlet]:
    """The learner's ends, in order."""
    return [transport.outlet(pin) for transport in TRANSPORTS if transport.outlet is not None]


class WeightsClient:
    """A worker's end: what the newest version is, and its bytes. Not thread-safe."""

    def __init__(
        self, context: Context, endpoint: str, wire: Format, pin: PinMemory = lambda _: None
    ) -> None:
        """`pin` is given the memory in which a learner of this host has its versions."""
        self.socket = WeightsSocket(context, endpoint, wire)
        self._inlets = [transport.inlet(self.socket, pin) for transport in TRANSPORTS]

    def manifest(self) -> bytes | None:
        """The newest version's manifest; None: no answer in time, or no version yet."""
        return self.socket.manifest()

    def take(self, version: Version, on_chunk: Callable[[], None] = lambda: None) -> Arrived | None:
        """The bytes of a version; None: it was replaced meanwhile, or the server fell silent."""
        arrived = (inlet.take(version, on_chunk) for inlet in self._inlets)
        return next((found for found in arrived if found is not None), None)
