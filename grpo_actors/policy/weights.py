"""A policy version as bytes, and back.

A version is every trainable tensor, one after the other, in the order of its manifest: the adapter of a
LoRA run, all weights of a full one. bf16 has no NumPy type: it leaves MLX as the 16-bit integers
that it is, bit for bit.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx
import numpy as np
import xxhash

from grpo_actors.errors import ProtocolError
from grpo_actors.policy.pinned import Pinned
from grpo_actors.wire.messages import Manifest, TensorEntry

DtypeName = Literal["float32", "float16", "bfloat16", "uint32", "uint8"]

#: That copy and digest side by side: one core does not fill a memory bus, four do.
THREADS = 4
#: Bytes that one of them digests at a time.
PIECE_BYTES = 2**24
#: Bytes; every tensor begins at a multiple of it.
ALIGNMENT = 64

#: Name on the wire -> type in MLX.
_TYPES: dict[DtypeName, mx.Dtype] = {
    "float32": mx.float32,
    "float16": mx.float16,
    "bfloat16": mx.bfloat16,
    "uint32": mx.uint32,
    "uint8": mx.uint8,
}
_NAMES: dict[mx.Dtype, DtypeName] = {dtype: name for name, dtype in _TYPES.items()}


@dataclass(frozen=True, slots=True)
class Frozen:
    """A version's arrays as they were, to be read on any thread: MLX has nothing more to compute."""

    version: int
    entries: list[TensorEntry]
    #: Flat, of a type that NumPy has.
    arrays: list[mx.array]
    size: int


def freeze(version: int, arrays: Mapping[str, mx.array]) -> Frozen:
    """Lay out a version.

    Args:
        version: Number of updates behind it.
        arrays: Name -> array, evaluated or not.
    """
    entries, end = [], 0
    for name, array in arrays.items():
        offset = _aligned(end)
        entries.append(
            TensorEntry(name=name, dtype=_NAMES[array.dtype], shape=list(array.shape), offset=offset)
        )
        end = offset + array.nbytes
    flat = [array.reshape(-1) for array in arrays.values()]
    stored = [a.view(mx.uint16) if a.dtype == mx.bfloat16 and a.size else a for a in flat]
    mx.eval(stored)
    return Frozen(version, entries, stored, end)


def pack(
    frozen: Frozen,
    chunk_bytes: int,
    room: memoryview | None = None,
    pinned: Pinned | None = None,
    path: Callable[[memoryview], str] = lambda _: "",
) -> tuple[Manifest, memoryview]:
    """One version's manifest and bytes.

    Args:
        frozen: The version.
        chunk_bytes: Length of the pieces it is served in.
        room: Where to write: `frozen.size` bytes, zeros where they were never written; None: a buffer of its own.
        pinned: What the device knows of the room, so that it writes there itself.
        path: Called with the bytes once they are written; returns what `Manifest.path` says about them.
    """
    buffer = memoryview(bytearray(frozen.size)) if room is None else room
    pairs = [pair for pair in zip(frozen.entries, frozen.arrays, strict=True) if pair[1].size]
    if pinned is not None:
        mx.eval(pinned.store({entry.offset: array for entry, array in pairs}))
    else:
        _copy_out(pairs, buffer)
    manifest = Manifest(
        version=frozen.version,
        size=frozen.size,
        digest=digest(buffer),
        chunk_bytes=chunk_bytes,
        path=path(buffer),
        tensors=frozen.entries,
    )
    return manifest, buffer


def _copy_out(pairs: Sequence[tuple[TensorEntry, mx.array]], buffer: memoryview) -> None:
    def copy(pair: tuple[TensorEntry, mx.array]) -> None:
        entry, array = pair
        stored = np.asarray(array)
        np.frombuffer(buffer, stored.dtype, count=stored.size, offset=entry.offset)[:] = stored

    with ThreadPoolExecutor(THREADS) as threads:
        list(threads.map(copy, pairs))


def unpack(
    manifest: Manifest,
    data: bytearray | memoryview,
    *,
    of_this_host: bool = False,
    pinned: Pinned | None = None,
) -> dict[str, mx.array]:
    """The arrays of a version: all of them, evaluated, or an error.

    Args:
        manifest: What the bytes are.
        data: They are copied.
        of_this_host: They came over no wire: their digest, which takes as long as the copy, is not computed.
        pinned: What the device knows of the data, so that it reads them itself.

    Raises:
        ProtocolError: the bytes are not those that the manifest describes, or it contradicts itself.
    """
    where = f"version {manifest.version}"
    if len(data) != manifest.size or not (of_this_host or digest(data) == manifest.digest):
        raise ProtocolError(f"{where}: its bytes do not have the digest of its manifest")
    # One copy to the device, and cut up there: hundreds of small ones take twice as long.
    whole = mx.array(np.frombuffer(data, np.uint8)) if pinned is None else pinned.load(manifest.size)
    arrays: dict[str, mx.array] = {}
    end = 0
    for entry in manifest.tensors:
        dtype = _TYPES[entry.dtype]
        # Python's integers: a product of claimed sizes must not wrap around.
        count = math.prod(entry.shape)
        if entry.name in arrays or entry.offset != _aligned(end):
            raise ProtocolError(
                f"{where}: {entry.name} occurs twice, or does not begin where its forerunner ends"
            )
        end = entry.offset + count * dtype.size
        if end > manifest.size:
            raise ProtocolError(f"{where}: {entry.name} reaches beyond the end")
        part = whole[entry.offset : end].view(dtype) if count else mx.zeros(0, dtype)
        arrays[entry.name] = part.reshape(entry.shape)
    if end != manifest.size:
        raise ProtocolError(f"{where}: {manifest.size - end} bytes belong to no tensor")
    mx.eval(arrays)
    return arrays


def digest(data: bytes | bytearray | memoryview) -> str:
    """xxh3-128 of the digests of a version's pieces: an error check at memory speed, no defence against forgery."""
    pieces = [memoryview(data)[start : start + PIECE_BYTES] for start in range(0, len(data), PIECE_BYTES)]
    with ThreadPoolExecutor(THREADS) as threads:
        return xxhash.xxh3_128_hexdigest(b"".join(threads.map(xxhash.xxh3_128_digest, pieces)))


def _aligned(offset: int) -> int:
    """Where the next tensor begins: kernels read several elements at once, from addresses that this divides."""
    return -(-offset // ALIGNMENT) * ALIGNMENT
