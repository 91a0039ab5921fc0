"""The GGUF container: magic, metadata, the table of tensors, and the position of each tensor's bytes.

Does not depend on models. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

Reasons not to use a library: ``mx.load`` ends the process with a segmentation fault on a damaged header (MLX 0.32).
``gguf.GGUFReader`` (0.19, an optional extra) takes 4.9 s to open SmolLM2-135M (98 MB, Q4_1, two busy cores) and read its
metadata, `GgufFile` 0.6 s, at 200 MiB against 89. It also believes the counts in a header: 32 bytes that claim an array
of 2^40 items kept it busy until it was stopped after 25 s, and other damage ends in IndexError, ValueError or
RecursionError. Here every count and offset is checked against the size of the file before it is used.
"""

import math
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from grpo_actors.convert.gguf import number_formats as blocks
from grpo_actors.errors import ModelError

Value = str | int | float | bool | list["Value"]
T = TypeVar("T")

MAGIC = b"GGUF"
VERSIONS = (2, 3)
#: struct letters of the scalar metadata types, by their number in the file.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
#: The format allows 4 dimensions; arrays of arrays are legal, but no known key nests deeper than 2.
MAX_DIMENSIONS, MAX_NESTING = 4, 4


@dataclass(frozen=True)
class TensorInfo:
    """One entry of the tensor table; `shape` in NumPy's order (the file stores the reverse)."""

    name: str
    shape: tuple[int, ...]
    type_number: int
    offset: int

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


class GgufFile:
    """A GGUF file, memory-mapped: opening it reads only the metadata.

    Args:
        path: the file.

    Raises:
        ModelError: it is missing, not a GGUF file, of another version, cut short or inconsistent.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._bytes = _map(path)
        cursor = _Cursor(path, self._bytes)
        tensor_count, entry_count = _read_preamble(cursor)
        self.metadata: dict[str, Value] = {}
        for _ in range(entry_count):
            key = cursor.string()
            self.metadata[key] = cursor.value(cursor.number("I"))
        infos = [_read_tensor_info(cursor) for _ in range(tensor_count)]
        self.tensors = {info.name: info for info in infos}
        if len(self.tensors) != len(infos):
            raise ModelError(f"{path}: the tensor table names a tensor twice; fetch the file again")
        alignment = self.value("general.alignment", int, 32)
        if alignment < 1:
            raise ModelError(f"{path}: general.alignment must be ≥ 1, got {alignment}")
        self._data_start = -(-cursor.at // alignment) * alignment
        for info in infos:
            self._check_extent(info)

    def value(self, key: str, kind: type[T], default: T | None = None) -> T:
        """Return metadata entry `key`, which must be of type `kind`, or `default`; raises ModelError without either."""
        found: Any = self.metadata.get(key, default)
        if found is None:
            raise ModelError(f"{self.path}: metadata key {key} is missing; the file is not a whole model")
        if kind is float and type(found) is int:
            found = float(found)
        if type(found) is not kind or (isinstance(found, float) and not math.isfinite(found)):
            raise ModelError(f"{self.path}: {key} must be a usable {kind.__name__}, got {found!r:.60}")
        return found

    def read(self, name: str) -> npt.NDArray[np.float32]:
        """Decode tensor `name` to float32 of its shape; needs about twice the memory of the result."""
        info = self.tensors[name]
        try:
            return blocks.decode(self._raw(info), info.type_number, info.shape)
        except ModelError as error:
            raise ModelError(f"{self.path}: tensor {name}: {error}") from None

    def type_counts(self) -> dict[str, int]:
        """Count the tensors of each number format, most frequent first."""
        counts = Counter(blocks.type_name(info.type_number) for info in self.tensors.values())
        return dict(counts.most_common())

    def _raw(self, info: TensorInfo) -> npt.NDArray[np.uint8]:
        start = self._data_start + info.offset
        return self._bytes[start : start + blocks.byte_count(info.type_number, info.shape)]

    def _check_extent(self, info: TensorInfo) -> None:
        """Reject a tensor of unknown format, or one that reaches past the end of the file."""
        try:
            length = blocks.byte_count(info.type_number, info.shape)
        except ModelError as error:
            raise ModelError(f"{self.path}: tensor {info.name}: {error}") from None
        if self._data_start + info.offset + length > len(self._bytes):
            raise ModelError(
                f"{self.path}: the file ends inside tensor {info.name}; it was not fetched whole, fetch it again"
            )


class _Cursor:
    """Reader of consecutive little-endian values that never reads past the end."""

    def __init__(self, path: Path, data: npt.NDArray[np.uint8]) -> None:
        self.path, self.data, self.at = path, data, 0

    def take(self, length: int) -> bytes:
        if length > len(self.data) - self.at:
            raise ModelError(f"{self.path}: the file ends inside its header; fetch it again")
        taken = self.data[self.at : self.at + length].tobytes()
        self.at += length
        return taken

    def number(self, letter: str) -> int:
        return int(struct.unpack("<" + letter, self.take(struct.calcsize(letter)))[0])

    def string(self) -> str:
        # A damaged description is no reason to reject a model; damaged tokens are found as duplicates.
        return self.take(self.number("Q")).decode("utf-8", errors="replace")

    def value(self, type_number: int, nesting: int = 0) -> Value:
        if type_number == STRING:
            return self.string()
        if type_number == ARRAY and nesting < MAX_NESTING:
            return self._array(nesting)
        if type_number in SCALARS:
            letter = SCALARS[type_number]
            (scalar,) = struct.unpack("<" + letter, self.take(struct.calcsize(letter)))
            return _shortest(scalar) if letter == "f" else scalar
        raise ModelError(f"{self.path}: unknown metadata type {type_number}; the header is damaged")

    def _array(self, nesting: int) -> list[Value]:
        item_type, length = self.number("I"), self.number("Q")
        if item_type in SCALARS:
            letter = SCALARS[item_type]
            # Check the size before unpacking: a false length cannot allocate more than the file's size.
            raw = self.take(length * struct.calcsize(letter))
            return list(struct.unpack(f"<{length}{letter}", raw))
        # Each item takes at least 8 bytes, so a false length hits the end of the file.
        return [self.value(item_type, nesting + 1) for _ in range(length)]


def _map(path: Path) -> npt.NDArray[np.uint8]:
    try:
        if path.stat().st_size == 0:
            raise ModelError(f"{path}: the file is empty; fetch it again")
        return np.memmap(path, dtype=np.uint8, mode="r")
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}; give the path of a .gguf file") from None


def _read_preamble(cursor: _Cursor) -> tuple[int, int]:
    """Check magic and version; return the numbers of tensors and of metadata entries."""
    if len(cursor.data) < len(MAGIC) or cursor.take(len(MAGIC)) != MAGIC:
        raise ModelError(f"{cursor.path}: not a GGUF file (it does not begin with the bytes 'GGUF')")
    version = cursor.number("I")
    if version not in VERSIONS:
        # A big-endian file also fails here: its 3 reads as 50331648.
        raise ModelError(
            f"{cursor.path}: GGUF version must be 2 or 3, little-endian, got {version}; convert the file anew"
        )
    return cursor.number("Q"), cursor.number("Q")


def _read_tensor_info(cursor: _Cursor) -> TensorInfo:
    name, dimensions = cursor.string(), cursor.number("I")
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise ModelError(
            f"{cursor.path}: tensor {name:.60} claims {dimensions} dimensions; the header is damaged"
        )
    shape = tuple(cursor.number("Q") for _ in range(dimensions))[::-1]
    return TensorInfo(name, shape, cursor.number("I"), cursor.number("Q"))


def _shortest(value: float) -> float:
    """Return the float with the fewest digits that is the same float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))
