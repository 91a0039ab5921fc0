"""tokenizer.pkl: a pickled ``tiktoken.Encoding``, read without running any of it.

tiktoken pickles an encoding as its class and a dictionary of four plain values; the class is stood for by
one that keeps the dictionary.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiktoken

from grpo_actors.convert.nanochat import pickles
from grpo_actors.errors import ModelError

_WANTED = "a tiktoken.Encoding"
#: 65,536 tokens take 1 MB.
_PICKLE_BYTES = 64 << 20


@dataclass(frozen=True)
class StoredEncoding:
    """What makes an encoding."""

    name: str
    #: How text is split before bytes are merged: a regular expression.
    pattern: str
    #: Bytes of a token -> its id, which is also when it is merged: lower ones first.
    ranks: dict[bytes, int]
    #: Text -> id.
    special: dict[str, int]

    @property
    def vocab(self) -> int:
        """How many tokens there are; ids run from 0."""
        return len(self.ranks) + len(self.special)

    def build(self, path: Path) -> tiktoken.Encoding:
        """Make the encoding itself; `path` is for messages.

        Raises:
            ModelError: the pattern is not one.
        """
        try:
            return tiktoken.Encoding(
                self.name, pat_str=self.pattern, mergeable_ranks=self.ranks, special_tokens=self.special
            )
        except ValueError as error:
            raise ModelError(f"{path}: its split pattern is none: {str(error).splitlines()[0]}") from None


def read(path: Path) -> StoredEncoding:
    """Read and check `path`.

    Raises:
        ModelError: it cannot be read, or holds anything but a whole encoding.
    """

    class Recorded:
        state: Any = None

        def __setstate__(self, state: Any) -> None:
            self.state = state

    try:
        data = path.read_bytes() if path.stat().st_size <= _PICKLE_BYTES else b""
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from None
    content = pickles.load(path, data, {"tiktoken.core.Encoding": Recorded}, _WANTED)
    if not isinstance(content, Recorded):
        raise ModelError(f"{path}: must hold {_WANTED}, got {type(content).__name__}")
    return _checked(path, _from_state(path, content.state))


def _from_state(path: Path, state: Any) -> StoredEncoding:
    match state:
        case str():
            raise ModelError(
                f"{path}: names tiktoken's encoding {state!r:.40} and does not hold it; nanochat's own tokenizer does"
            )
        case {
            "name": str(name),
            "pat_str": str(pattern),
            "mergeable_ranks": dict(ranks),
            "special_tokens": dict(special),
        } if _maps(ranks, bytes) and _maps(special, str):
            return StoredEncoding(name, pattern, ranks, special)
    raise ModelError(
        f"{path}: must hold {_WANTED} with name, pat_str, mergeable_ranks and special_tokens, its state is another"
    )


def _maps(table: dict[Any, Any], kind: type) -> bool:
    return all(isinstance(key, kind) and type(value) is int for key, value in table.items())


def _checked(path: Path, stored: StoredEncoding) -> StoredEncoding:
    """With every byte a token, and every id given once."""
    absent = next((byte for byte in range(256) if bytes([byte]) not in stored.ranks), None)
    if absent is not None:
        raise ModelError(f"{path}: every single byte must be a token, {absent:#04x} is none")
    ids = sorted([*stored.ranks.values(), *stored.special.values()])
    if ids != list(range(stored.vocab)):
        raise ModelError(f"{path}: ids must be 0 to {stored.vocab - 1}, each once; they are not")
    if "" in stored.special or b"" in stored.ranks:
        raise ModelError(f"{path}: no token may be empty, one is")
    return stored
