"""Encode requests for weights and their answers: the `Format` that `transport.weights` is given."""

from grpo_actors.errors import ProtocolError
from grpo_actors.wire import messages as wire
from grpo_actors.wire.digest import digest

__all__ = ["chunk_header", "chunk_index", "chunk_request", "digest", "manifest_request", "read_request"]


def manifest_request() -> bytes:
    """Return a request for the newest version's manifest."""
    return wire.encode(wire.FetchManifest())


def chunk_request(version: int, index: int) -> bytes:
    """Return a request for one chunk of a version."""
    return wire.encode(wire.FetchChunk(version=version, index=index))


def read_request(data: bytes) -> tuple[int, int] | None:
    """Return (version, chunk index), or None if the manifest is requested.

    Raises:
        ProtocolError: the data are not a request.
    """
    request = wire.decode(wire.weights_request, data)
    return None if isinstance(request, wire.FetchManifest) else (request.version, request.index)


def chunk_header(version: int, index: int) -> bytes:
    """Return the header that precedes a chunk in its answer."""
    return wire.encode(wire.Chunk(version=version, index=index))


def chunk_index(header: bytes, version: int) -> int:
    """Return the index in a chunk's header.

    Raises:
        ProtocolError: the header does not belong to a chunk of this version.
    """
    chunk = wire.decode(wire.weights_reply, header)
    if not isinstance(chunk, wire.Chunk) or chunk.version != version:
        raise ProtocolError(f"weights: asked for a chunk of version {version}, got something else")
    return chunk.index
