"""Load pickles as data: they run no code of their own, and of this program only what the caller passes in."""

import io
import pickle
import pickletools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from grpo_actors.errors import ModelError

#: Errors that the standard library raises for a damaged pickle.
_DAMAGE = (
    *(pickle.UnpicklingError, EOFError, AttributeError, IndexError, KeyError),
    *(TypeError, ValueError, MemoryError, OverflowError, RecursionError),
)

#: Operations that store an object under a number in the unpickler's table.
_NUMBERING = {"PUT", "BINPUT", "LONG_BINPUT"}

#: Returns the object for a persistent id, by which a pickle refers to data outside itself.
Resolve = Callable[[Any], Any]


def load(
    path: Path, data: bytes, names: Mapping[str, Any], wanted: str, resolve: Resolve | None = None
) -> Any:
    """Load the object in `data`; the pickle may import only the names in `names`.

    Args:
        path: The file, for messages.
        data: A pickle of any protocol.
        names: Dotted name in the pickle -> the object to use for it. Build a new mapping for each call: a pickle
            may set attributes on these objects.
        wanted: The expected content of the file, for messages.
        resolve: Resolves persistent ids; None if none are allowed.

    Raises:
        ModelError: the pickle imports another name, or is damaged.
    """
    try:
        _check_numbers(data)
        return _Unpickler(path, data, names, wanted, resolve).load()
    except _DAMAGE as error:
        raise ModelError(
            f"{path}: must hold {wanted}, and its pickle cannot be read: {error or type(error).__name__}"
        ) from None


def _check_numbers(data: bytes) -> None:
    """Refuse object numbers above the size of the pickle.

    Ten bytes with a huge number would otherwise make the standard library's table of objects fill the memory.
    """
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
        """Return the object for an imported name; a pickle can reach callables in no other way."""
        dotted = f"{module}.{name}"
        if dotted not in self._names:
            raise ModelError(
                f"{self._path}: must hold {self._wanted} and nothing else, its pickle asks for {dotted!r:.80}; "
                "nothing of it was run"
            )
        return self._names[dotted]

    def persistent_load(self, pid: Any) -> Any:
        """Return the object for a persistent id."""
        if self._resolve is None:
            raise ModelError(f"{self._path}: must hold {self._wanted}; it refers to data outside the file")
        return self._resolve(pid)
