"""Read a file of ``torch.save`` that holds a dictionary of tensors, without torch.

The file is a zip: ``data.pkl`` has names, shapes and the numbers of storages, ``data/N`` the raw bytes of storage N.
Only float tensors in row-major order are supported; any other object in the pickle is refused.
"""

import contextlib
import math
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple, Self

import mlx.core as mx
import numpy as np

from grpo_actors.convert.nanochat import pickles
from grpo_actors.errors import ModelError

#: torch's storage class -> (MLX's type, NumPy integer type of the same width).
STORAGES = {
    "torch.FloatStorage": (mx.float32, "<u4"),
    "torch.BFloat16Storage": (mx.bfloat16, "<u2"),
    "torch.HalfStorage": (mx.float16, "<u2"),
}
_WANTED = "a dictionary of float32, bfloat16 or float16 tensors"
#: Largest accepted pickle: names and shapes of a thousand tensors take 0.2 MB.
_PICKLE_BYTES = 16 << 20
#: Most dimensions of a tensor, and an upper bound of sizes, strides and offsets; larger values mean damage.
_MAX_DIMENSIONS, _BOUND = 8, 2**63
_UNREADABLE = (
    *(zipfile.BadZipFile, zlib.error, OSError, EOFError, KeyError),
    *(NotImplementedError, RuntimeError),  # a compression that zipfile does not support; a password
)


class Storage(NamedTuple):
    """A contiguous run of numbers in the file."""

    kind: str
    key: str
    length: int


class Tensor(NamedTuple):
    """A tensor: the numbers of `storage` from `offset` on, arranged in `shape`."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]


class TorchFile:
    """An open file; `tensors` describes its tensors by name.

    Raises:
        ModelError: the file cannot be read, or holds anything but tensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._archive = zipfile.ZipFile(path)
        except _UNREADABLE as error:
            raise ModelError(
                f"{path}: must be a zip as torch.save writes it, cannot be read: {_reason(error)}"
            ) from None
        with contextlib.ExitStack() as opened:
            opened.callback(self._archive.close)
            self._prefix = self._find_prefix()
            self.tensors = self._read_tensors()
            opened.pop_all()  # no error: keep the archive open

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._archive.close()

    def read(self, name: str) -> mx.array:
        """Read one tensor in its stored type."""
        storage, offset, shape = self.tensors[name]
        dtype, bits = STORAGES[storage.kind]
        raw = self._bytes(f"data/{storage.key}", storage.length * dtype.size)
        numbers = np.frombuffer(raw, bits, math.prod(shape), offset * dtype.size)
        return mx.array(numbers).view(dtype).reshape(shape)

    def _find_prefix(self) -> str:
        """Return the folder within the zip; it is named after the file that torch.save wrote."""
        found = [name for name in self._archive.namelist() if name.endswith("/data.pkl")]
        if len(found) != 1:
            raise ModelError(f"{self.path}: must be a file of torch.save, its zip has no data.pkl of its own")
        return found[0].removesuffix("data.pkl")

    def _read_tensors(self) -> dict[str, Tensor]:
        if self._bytes("byteorder", None, b"little") != b"little":
            raise ModelError(f"{self.path}: must be written by a little-endian machine")
        content = pickles.load(
            self.path,
            self._bytes("data.pkl", None),
            {
                "collections.OrderedDict": OrderedDict,
                "torch._utils._rebuild_tensor_v2": self._rebuild_tensor,
                "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
                **{kind: kind for kind in STORAGES},
            },
            _WANTED,
            self._storage,
        )
        if not isinstance(content, dict) or not content:
            raise ModelError(f"{self.path}: must hold {_WANTED}, got {type(content).__name__}")
        for name, tensor in content.items():
            if not isinstance(name, str) or not isinstance(tensor, Tensor):
                # Only a string is shown: the repr of another object from a pickle may never end.
                entry = repr(name)[:60] if isinstance(name, str) else "an entry"
                raise ModelError(
                    f"{self.path}: must hold {_WANTED}, {entry} is {type(tensor).__name__} (the model's own state is "
                    "wanted, not a training state)"
                )
        return dict(content)

    def _storage(self, pid: Any) -> Storage:
        match pid:
            case ("storage", str(kind), str(key), str(), int(count)) if (
                kind in STORAGES and 0 <= count < _BOUND
            ):
                return Storage(kind, key, count)
        raise ModelError(f"{self.path}: must hold {_WANTED}, got a storage of another kind")

    def _rebuild_tensor(
        self, storage: Any, offset: Any, shape: Any, strides: Any, *_gradient_and_hooks: Any
    ) -> Tensor:
        """Build a `Tensor`; takes the place of torch's ``_rebuild_tensor_v2``."""
        if (
            not isinstance(storage, Storage)
            or not len(shape) == len(strides) <= _MAX_DIMENSIONS
            or not _whole_numbers((offset, *shape, *strides))
        ):
            raise ModelError(f"{self.path}: must hold {_WANTED}, got one of another kind")
        if not _row_by_row(shape, strides):
            raise ModelError(f"{self.path}: a tensor {shape} must lie row by row, got strides {strides}")
        if offset + math.prod(shape) > storage.length:
            raise ModelError(
                f"{self.path}: a tensor {shape} must fit its storage of {storage.length} numbers"
            )
        return Tensor(storage, offset, tuple(shape))

    def _bytes(self, entry: str, size: int | None, default: bytes | None = None) -> bytes:
        """Read one entry of the zip.

        Args:
            entry: Its name within the zip's folder.
            size: The number of bytes that it must have; None allows up to `_PICKLE_BYTES`.
            default: The content if the entry is absent; None means that it must exist.
        """
        name = self._prefix + entry
        if default is not None and name not in self._archive.namelist():
            return default
        try:
            # Check the size first: unpacked, an entry may be a thousand times larger than the file.
            stored = self._archive.getinfo(name).file_size
            if stored > _PICKLE_BYTES if size is None else stored != size:
                allowed = f"at most {_PICKLE_BYTES}" if size is None else size
                raise ModelError(f"{self.path}: {name!r:.80} must have {allowed} bytes, has {stored}")
            return self._archive.read(name)
        except _UNREADABLE as error:
            raise ModelError(
                f"{self.path}: {name!r:.80} cannot be read: {_reason(error)}; the file is damaged, fetch it again"
            ) from None


def _whole_numbers(values: tuple[Any, ...]) -> bool:
    return all(isinstance(value, int) and 0 <= value < _BOUND for value in values)


def _row_by_row(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Return whether the strides are those of row-major order."""
    step = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != step:
            return False
        step *= size
    return True


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error)
