"""A policy version as bytes, and back.

A version is every trainable tensor, back to back, in the order of its manifest: the adapter of a
LoRA run, all weights of a full one. bf16 has no NumPy type: it leaves MLX as the 16-bit integers
that it is, bit for bit.
"""

from collections.abc import Mapping

import mlx.core as mx
import numpy as np
import xxhash

from grpo_actors.errors import ProtocolError
from grpo_actors.messages import Manifest, TensorEntry

_NAMES = {mx.float32: "float32", mx.float16: "float16", mx.bfloat16: "bfloat16", mx.uint32: "uint32", mx.uint8: "uint8"}
_TYPES = {name: dtype for dtype, name in _NAMES.items()}
_STORED = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16, "uint32": np.uint32, "uint8": np.uint8}


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
        entries.append(TensorEntry(name=name, dtype=_NAMES[array.dtype], shape=list(array.shape), offset=offset))
        offset += array.nbytes
    buffer = bytearray(offset)
    for entry, array in zip(entries, arrays.values(), strict=True):
        raw = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
        if array.nbytes:
            flat = np.array(raw, copy=False).reshape(-1)
            np.frombuffer(buffer, dtype=flat.dtype, count=flat.size, offset=entry.offset)[:] = flat
    manifest = Manifest(
        version=version, size=offset, digest=digest(buffer), chunk_bytes=chunk_bytes, tensors=entries
    )
    return manifest, memoryview(buffer)


def unpack(manifest: Manifest, data: bytearray) -> dict[str, mx.array]:
    """The arrays of a version: all of them, or an error.

    Raises:
        ProtocolError: the bytes are not those that the manifest describes.
    """
    if len(data) != manifest.size or digest(data) != manifest.digest:
        raise ProtocolError(f"version {manifest.version}: its bytes do not have the digest of its manifest")
    arrays = {}
    for entry in manifest.tensors:
        stored = np.dtype(_STORED[entry.dtype])
        count = int(np.prod(entry.shape, dtype=np.int64))
        if entry.offset + count * stored.itemsize > manifest.size:
            raise ProtocolError(f"version {manifest.version}: {entry.name} reaches beyond the end")
        flat = np.frombuffer(data, dtype=stored, count=count, offset=entry.offset).reshape(entry.shape)
        array = mx.array(flat)
        arrays[entry.name] = array.view(mx.bfloat16) if entry.dtype == "bfloat16" else array
    return arrays


def digest(data: bytes | bytearray) -> str:
    """xxh3-128 of a version's bytes: an error check at memory speed, no defence against forgery."""
    return xxhash.xxh3_128_hexdigest(data)
