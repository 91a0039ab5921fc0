"""The protocol of every transport of weights: a sender at the learner, a receiver at each worker.

Transports carry bytes and addresses; they do not depend on arrays or messages.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

#: Registers memory with the device; returns the registration (a `Pin`), or None if the device needs none.
PinMemory = Callable[[memoryview], Any]


class Pin(Protocol):
    """The registration of memory with the device, until it is closed."""

    def close(self) -> None:
        """End the registration; must be called before the memory is unmapped."""


@dataclass(frozen=True, slots=True)
class Buffer:
    """Memory to write a version into. `data` is None if no sender has any; ordinary memory is then used."""

    data: memoryview | None = None
    pin: Any = None


@dataclass(frozen=True, slots=True)
class Version:
    """The facts of a manifest that a transport needs to fetch a version's bytes."""

    number: int
    size: int
    chunk_bytes: int
    #: Addresses of the version, one of each sender that has one. A receiver tries them all and skips those it cannot read.
    addresses: tuple[str, ...] = ()
    #: That of its bytes, 32 hexadecimal digits; empty if it is not known: the version is then not shared.
    digest: str = ""


@dataclass(frozen=True, slots=True)
class ReceivedVersion:
    """A version's bytes at a worker, valid until the receiver fetches the next version."""

    data: bytearray | memoryview
    pin: Any = None
    #: True if the digest, which takes as long as the copy, need not be computed: the bytes did not cross a network, or
    #: the process that fetched them for this host has checked them.
    of_this_host: bool = False
    #: Call it after reading the data: returns whether they belonged to the version until now.
    whole: Callable[[], bool] = lambda: True


class Sender(Protocol):
    """The learner's end. One thread owns it."""

    def buffer(self, version: int, size: int) -> Buffer | None:
        """Return memory of this transport to write a version into; None if it has none.

        Only the buffer of the first sender that has one is used. It stays unchanged until the next version but one.
        """

    def publish(self, version: int, data: memoryview) -> str:
        """Make a whole version available, and return its address; empty if it has none.

        `data` may be the buffer of this sender.
        """

    def close(self) -> None:
        """Free the memory of this sender."""

    def unlink(self) -> None:
        """Remove what would outlive a process that ends at once; may be called by any thread, more than once."""


class Receiver(Protocol):
    """A worker's end. Not thread-safe."""

    def fetch(self, version: Version, on_chunk: Callable[[], None]) -> ReceivedVersion | None:
        """Fetch the bytes of a version; None if this transport cannot reach them, or they were replaced meanwhile.

        `on_chunk` is called repeatedly during a long transfer, so that the caller can give signs of life.
        """

    def close(self) -> None:
        """Free the memory of this receiver; what it has returned is no longer valid."""


class Format(Protocol):
    """Encoding of the requests at the weights socket and of their answers."""

    def manifest_request(self) -> bytes:
        """Return a request for the newest version's manifest."""

    def chunk_request(self, version: int, index: int) -> bytes:
        """Return a request for one chunk of a version."""

    def read_request(self, data: bytes) -> tuple[int, int] | None:
        """Return (version, chunk index), or None if the manifest is requested.

        Raises:
            ProtocolError: the data are not a request.
        """

    def chunk_header(self, version: int, index: int) -> bytes:
        """Return the header that precedes a chunk in its answer."""

    def digest(self, data: memoryview) -> str:
        """Return the digest of a version's bytes."""

    def chunk_index(self, header: bytes, version: int) -> int:
        """Return the index in a chunk's header.

        Raises:
            ProtocolError: the header does not belong to a chunk of this version.
        """
