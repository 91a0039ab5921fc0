"""What every transport of weights has in common: an outlet at the learner, an inlet at a worker.

They carry bytes and addresses; they know no arrays and no messages.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

#: Makes a piece of memory known to the device; returns what the device then knows of it (a `Pin`), or None.
PinMemory = Callable[[memoryview], Any]


class Pin(Protocol):
    """What a device knows of a piece of memory, until it is closed."""

    def close(self) -> None:
        """Before the memory is unmapped."""


@dataclass(frozen=True, slots=True)
class Room:
    """Memory to write a version into; None: nobody offers any, and plain memory must do."""

    data: memoryview | None = None
    pin: Any = None


@dataclass(frozen=True, slots=True)
class Version:
    """What a manifest says about a version's bytes."""

    number: int
    size: int
    chunk_bytes: int
    #: Of each outlet that gave one: where the version is. An inlet tries them all, and skips what it cannot read.
    addresses: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Arrived:
    """A version's bytes at a worker, valid until the inlet takes the next version."""

    data: bytearray | memoryview
    pin: Any = None
    #: The bytes crossed no wire: their digest, which takes as long as the copy, need not be computed.
    of_this_host: bool = False
    #: To be asked once the data were read: whether they belonged to the version all that time.
    whole: Callable[[], bool] = lambda: True


class Outlet(Protocol):
    """The learner's end. One thread owns it."""

    def room(self, version: int, size: int) -> Room | None:
        """Memory of this transport to write a version into; None: it has none of its own.

        Only one outlet's room is used, the first one's. It stays unchanged until the next version but one.
        """

    def put(self, version: int, data: memoryview) -> str:
        """Make a whole version available; `data` may be this outlet's room. Returns its address; empty: none."""

    def close(self) -> None:
        """Free what the outlet holds."""


class Inlet(Protocol):
    """A worker's end. Not thread-safe."""

    def take(self, version: Version, on_chunk: Callable[[], None]) -> Arrived | None:
        """The bytes of a version; None: this transport cannot reach them, or they were replaced meanwhile.

        `on_chunk` is called from time to time in a long transfer, as a sign of life.
        """


class Format(Protocol):
    """How requests at the weights socket and their answers look as bytes."""

    def manifest_request(self) -> bytes:
        """Asks for the newest version's manifest."""

    def chunk_request(self, version: int, index: int) -> bytes:
        """Asks for one chunk of a version."""

    def read_request(self, data: bytes) -> tuple[int, int] | None:
        """(version, chunk index), or None for the manifest; a `ProtocolError` if it is no request."""

    def chunk_header(self, version: int, index: int) -> bytes:
        """What precedes a chunk in its answer."""

    def chunk_index(self, header: bytes, version: int) -> int:
        """The index in a chunk's header; a `ProtocolError` if it belongs to no chunk of this version."""
