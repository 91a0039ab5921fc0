"""Convert a policy version to bytes and back.

A version holds every trainable tensor, one after the other, in the order of its manifest: the adapter of a LoRA
run, or all weights of a full one. NumPy has no bf16: these tensors leave MLX as 16-bit integers, bit for bit.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx
import numpy as np

from grpo_actors.errors import ProtocolError
from grpo_actors.policy.pinned import Pinned
from grpo_actors.wire.digest import digest
from grpo_actors.wire.messages import Manifest, TensorEntry

DtypeName = Literal["float32", "float16", "bfloat16", "uint32", "uint8"]

#: Threads that copy in parallel: one core does not saturate the memory bus, four do.
THREADS = 4
#: Every tensor begins at a multiple of this number of bytes.
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
    """A snapshot of a version's arrays. Any thread may read them: they are evaluated."""

    version: int
    entries: list[TensorEntry]
    #: Flat arrays, of a type that NumPy has.
    arrays: list[mx.array]
    size: int


def freeze(version: int, arrays: Mapping[str, mx.array]) -> Frozen:
    """Lay out a version and evaluate its arrays.

    Args:
        version: Number of updates done.
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
    """Return one version's manifest and bytes.

    Args:
        frozen: The version.
        chunk_bytes: Length of the chunks in which the version is served.
        room: Target buffer of `frozen.size` bytes, zero where never written; None allocates a new one.
        pinned: The pinned memory of the target, if any: the device then writes to it directly.
        path: Called with the bytes once they are written; returns the value of `Manifest.path`.
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
    """Return all arrays of a version, evaluated, or raise.

    Args:
        manifest: The description of the bytes.
        data: The bytes; they are copied.
        of_this_host: The bytes did not cross a network: skip their digest, which takes as long as the copy.
        pinned: The pinned memory of the data, if any: the device then reads it directly.

    Raises:
        ProtocolError: the bytes do not match the manifest, or it contradicts itself.
    """
    where = f"version {manifest.version}"
    if len(data) != manifest.size or not (of_this_host or digest(data) == manifest.digest):
        raise ProtocolError(f"{where}: its bytes do not have the digest of its manifest")
    # One copy to the device, split there: hundreds of small copies take twice as long.
    whole = mx.array(np.frombuffer(data, np.uint8)) if pinned is None else pinned.load(manifest.size)
    arrays: dict[str, mx.array] = {}
    end = 0
    for entry in manifest.tensors:
        dtype = _TYPES[entry.dtype]
        # Python integers: a product of untrusted sizes must not overflow.
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


def _aligned(offset: int) -> int:
    """Return the next aligned offset: kernels read several elements at once, from aligned addresses."""
    return -(-offset // ALIGNMENT) * ALIGNMENT
