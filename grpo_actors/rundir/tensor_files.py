"""Write arrays as safetensors files: several files at once, each hashed and made durable by the thread that writes it.

MLX's writer works on one file at a time, and a digest would have to read each file again. Here the arrays are laid out
on the thread that computes (`freeze`), and other threads write their bytes (`write_files`). Depends on arrays and
bytes, not on what the arrays mean.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

#: Files that are written at the same time.
THREADS = 4
#: Bytes that are written and then hashed at a time: small enough to be hashed from a core's cache.
PIECE_BYTES = 1 << 20

#: Type in MLX -> name in a safetensors header.
_NAMES = {
    mx.bool_: "BOOL",
    mx.uint8: "U8",
    mx.uint16: "U16",
    mx.uint32: "U32",
    mx.uint64: "U64",
    mx.int8: "I8",
    mx.int16: "I16",
    mx.int32: "I32",
    mx.int64: "I64",
    mx.float16: "F16",
    mx.bfloat16: "BF16",
    mx.float32: "F32",
}
#: The header's length is a multiple of this number of bytes.
_ALIGNMENT = 8


@dataclass(frozen=True, slots=True)
class Remote:
    """An array that another process holds, and that `fetch` gets from it."""

    shape: tuple[int, ...]
    dtype: mx.Dtype
    fetch: Callable[[], mx.array]

    @property
    def nbytes(self) -> int:
        """Size of its data."""
        return math.prod(self.shape) * self.dtype.size

    def data(self) -> mx.array:
        """Fetch its bytes: a flat array of uint8, evaluated."""
        data = _bytes_of(self.fetch())
        mx.eval(data)
        return data


@dataclass(frozen=True, slots=True)
class TensorFile:
    """One safetensors file to be written. Its data never changes, whatever the arrays it was made from become."""

    name: str
    header: bytes
    #: Tensor name -> its bytes, in the order of the header: a flat array of uint8, evaluated, or a copy in host memory; or
    #: still with another process, until `fetched`.
    data: Mapping[str, mx.array | memoryview | Remote]

    @property
    def bytes(self) -> int:
        """Size of its data."""
        return sum(tensor.nbytes for tensor in self.data.values())


def freeze(
    stem: str, arrays: Mapping[str, mx.array | Remote], shard_bytes: int | None = None
) -> list[TensorFile]:
    """Lay out arrays as ``STEM.safetensors``, or as numbered files of about `shard_bytes` each, and evaluate them.

    Copies nothing: a result shares the memory of its array. MLX's arrays are immutable, and MLX reuses memory only
    if nothing else holds it, so the result keeps its values while training goes on, and costs memory from then on.
    """
    total = sum(array.nbytes for array in arrays.values())
    shards: list[dict[str, mx.array | Remote]] = [
        {} for _ in range(-(-total // (shard_bytes or total or 1)) or 1)
    ]
    done = 0
    for name, array in arrays.items():
        # By its middle, so that a file exceeds its part by half an array at most.
        shards[(done + array.nbytes // 2) * len(shards) // (total + 1)][name] = array
        done += array.nbytes
    shards = [shard for shard in shards if shard] or [{}]  # an array may be larger than a file's part
    names = (
        [f"{stem}.safetensors"]
        if len(shards) == 1
        else [f"{stem}-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    )
    files = [
        TensorFile(
            name,
            _header(shard),
            {key: a if isinstance(a, Remote) else _bytes_of(a) for key, a in shard.items()},
        )
        for name, shard in zip(names, shards, strict=True)
    ]
    mx.eval([data for file in files for data in file.data.values() if isinstance(data, mx.array)])
    return files


def fetched(files: Sequence[TensorFile], *, to_host: bool) -> list[TensorFile]:
    """Return the files with all arrays of other processes, one after the other.

    Args:
        files: The files.
        to_host: Whether to copy them to the host's memory, because the device's may have no room for all of them.
    """

    def here(data: mx.array | memoryview | Remote) -> mx.array | memoryview:
        if not isinstance(data, Remote):
            return data
        return np.array(data.data()).data if to_host else data.data()

    return [
        replace(file, data={name: here(data) for name, data in file.data.items()})
        if any(isinstance(data, Remote) for data in file.data.values())
        else file
        for file in files
    ]


def write_files(folder: Path, files: Sequence[TensorFile]) -> dict[str, dict[str, Any]]:
    """Write the files durably, `THREADS` at a time; return {name: {"bytes": size, "sha256": digest}}.

    On CUDA this moves arrays to where the host can read them, so nothing may be using them; copies in host memory stay.

    Raises:
        OSError: The disk is full, or the folder cannot be written.
    """
    with ThreadPoolExecutor(THREADS, thread_name_prefix="tensors") as threads:
        written = threads.map(lambda file: _write(folder / file.name, file), files)
        return {file.name: entry for file, entry in zip(files, written, strict=True)}


def _write(path: Path, file: TensorFile) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as target:

        def put(data: memoryview) -> None:
            for start in range(0, len(data), PIECE_BYTES):
                piece = rest = data[start : start + PIECE_BYTES]
                while rest:  # a nearly full file system may write only a part
                    rest = rest[target.write(rest) or 0 :]
                digest.update(piece)

        put(memoryview(file.header))
        for tensor in file.data.values():
            assert not isinstance(tensor, Remote)
            put(np.asarray(tensor).data)
        os.fsync(target.fileno())
    return {"bytes": len(file.header) + file.bytes, "sha256": digest.hexdigest()}


def _header(arrays: Mapping[str, mx.array | Remote]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    end = 0
    for name, array in arrays.items():
        start, end = end, end + array.nbytes
        entries[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _bytes_of(array: mx.array) -> mx.array:
    return array.reshape(-1).view(mx.uint8) if array.size else mx.zeros(0, mx.uint8)
