"""A policy version as bytes, and back.

A version is every trainable tensor, back to back, in the order of its manifest: the adapter of a
LoRA run, all weights of a full one. bf16 has no NumPy type: it leaves MLX as the 16-bit integers
that it is, bit for bit.
"""

import math
from collections.abc import Mapping
from typing import Literal

import mlx.core as mx
import numpy as np
import xxhash

from grpo_actors.errors import ProtocolError
from grpo_actors.messages import Manifest, TensorEntry

DtypeName = Literal["float32", "float16", "bfloat16", "uint32", "uint8"]

#: Name on the wire -> type in MLX, and type of the bytes in NumPy.
_TYPES: dict[DtypeName, tuple[mx.Dtype, type[np.generic]]] = {
    "float32": (mx.float32, np.float32),
    "float16": (mx.float16, np.float16),
    "bfloat16": (mx.bfloat16, np.uint16),
    "uint32": (mx.uint32, np.uint32),
    "uint8": (mx.uint8, np.uint8),
}
_NAMES: dict[mx.Dtype, DtypeName] = {dtype: name for name, (dtype, _) in _TYPES.items()}


def pack(version: int, arrays: Mapping[str, mx.array], chunk_bytes: int) -> tuple[Manifest, memoryview]:
    """One version's manifest and bytes.

    Args:
        version: Number of updates behind it.
        arrays: Name -> array, evaluated or not.
        chunk_bytes: Length of the pieces it is served in.
    """
    entries = []
    offset = 0
    for name, array in arrays.items():
        entry = TensorEntry(name=name, dtype=_NAMES[array.dtype], shape=list(array.shape), offset=offset)
        entries.append(entry)
        offset += array.nbytes
    buffer = bytearray(offset)
    for entry, array in zip(entries, arrays.values(), strict=True):
        if array.size:
            flat = array.reshape(-1)
            stored = np.asarray(flat.view(mx.uint16) if array.dtype == mx.bfloat16 else flat)
            np.frombuffer(buffer, stored.dtype, count=stored.size, offset=entry.offset)[:] = stored
    manifest = Manifest(
        version=version, size=offset, digest=digest(buffer), chunk_bytes=chunk_bytes, tensors=entries
    )
    return manifest, memoryview(buffer)


def unpack(manifest: Manifest, data: bytearray) -> dict[str, mx.array]:
    """The arrays of a version: all of them, or an error.

    Raises:
        ProtocolError: the bytes are not those that the manifest describes, or it contradicts itself.
    """
    where = f"version {manifest.version}"
    if len(data) != manifest.size or digest(data) != manifest.digest:
        raise ProtocolError(f"{where}: its bytes do not have the digest of its manifest")
    arrays: dict[str, mx.array] = {}
    end = 0
    for entry in manifest.tensors:
        dtype, stored = _TYPES[entry.dtype]
        # Python's integers: a product of claimed sizes must not wrap around.
        count = math.prod(entry.shape)
        if entry.name in arrays or entry.offset != end:
            raise ProtocolError(
                f"{where}: {entry.name} occurs twice, or does not begin where its forerunner ends"
            )
        end += count * dtype.size
        if end > manifest.size:
            raise ProtocolError(f"{where}: {entry.name} reaches beyond the end")
        if count:
            flat = mx.array(np.frombuffer(data, stored, count=count, offset=entry.offset))
            arrays[entry.name] = (flat.view(dtype) if dtype == mx.bfloat16 else flat).reshape(entry.shape)
        else:
            arrays[entry.name] = mx.zeros(entry.shape, dtype)
    if end != manifest.size:
        raise ProtocolError(f"{where}: {manifest.size - end} bytes belong to no tensor")
    return arrays


def digest(data: bytes | bytearray) -> str:
    """xxh3-128 of a version's bytes: an error check at memory speed, no defence against forgery."""
    return xxhash.xxh3_128_hexdigest(data)
