"""Pickles as data: no code of theirs runs, and none of this program's but what the caller hands in."""

import io
import pickle
import pickletools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from grpo_actors.errors import ModelError

#: What a damaged pickle makes the standard library raise, beside its own error.
_DAMAGE = (
    *(pickle.UnpicklingError, EOFError, AttributeError, IndexError, KeyError),
    *(TypeError, ValueError, MemoryError, OverflowError, RecursionError),
)

#: The operations that number what they have built.
_NUMBERING = {"PUT", "BINPUT", "LONG_BINPUT"}

#: Replaces a persistent id, which is what a pickle writes for data that lies elsewhere.
Resolve = Callable[[Any], Any]


def load(
    path: Path, data: bytes, names: Mapping[str, Any], wanted: str, resolve: Resolve | None = None
) -> Any:
    """The object in `data`, in which every imported name is one of `names`.

    Args:
        path: For messages.
        data: A pickle of any protocol.
        names: Dotted name as the pickle writes it -> what stands for it here. Make it anew for each call:
            a pickle may set attributes on what it is given.
        wanted: What the file should hold, for messages.
        resolve: Of persistent ids; None: there must be none.

    Raises:
        ModelError: another name, or no whole pickle.
    """
    try:
        _check_numbers(data)
        return _Unpickler(path, data, names, wanted, resolve).load()
    except _DAMAGE as error:
        raise ModelError(
            f"{path}: must hold {wanted}, and its pickle cannot be read: {error or type(error).__name__}"
        ) from None


def _check_numbers(data: bytes) -> None:
    """Refuse ten bytes that would make the standard library's table of objects fill the memory."""
    for operation, number, _ in pickletools.genops(data):
        if operation.name in _NUMBERING and (number is None or number > len(data)):
            raise pickle.UnpicklingError(f"object number {number} of {len(data)} bytes")


class _Unpickler(pickle.Unpickler):
    def __init__(
        self, path: Path, data: bytes, names: Mapping[str, Any], wanted: str, resolve: Resolve | None
    ) -> None:
        super().__init__(io.BytesIO(data))
        self._path, self._names, self._wanted, self._resolve = path, names, wanted, resolve

    def find_class(self, module: str, name: str) -> Any:
        """The only way by which a pickle gets at anything that can be called."""
        dotted = f"{module}.{name}"
        if dotted not in self._names:
            raise ModelError(
                f"{self._path}: must hold {self._wanted} and nothing else, its pickle asks for {dotted!r:.80}; "
                "nothing of it was run"
            )
        return self._names[dotted]

    def persistent_load(self, pid: Any) -> Any:
        """What lies elsewhere."""
        if self._resolve is None:
            raise ModelError(f"{self._path}: must hold {self._wanted}; parts of it lie elsewhere")
        return self._resolve(pid)
