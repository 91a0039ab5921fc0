"""Read tokenizer.pkl, a pickled ``tiktoken.Encoding``, without running any code in it.

tiktoken pickles an encoding as its class and a dictionary of four plain values; a stand-in for the class keeps the
dictionary.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiktoken

from grpo_actors.convert.nanochat import pickles
from grpo_actors.errors import ModelError

_WANTED = "a tiktoken.Encoding"
#: Largest accepted file; 65,536 tokens take 1 MB.
_PICKLE_BYTES = 64 << 20


@dataclass(frozen=True)
class StoredEncoding:
    """The parts of a tiktoken encoding."""

    name: str
    #: Regular expression that splits the text before bytes are merged.
    pattern: str
    #: Bytes of a token -> its id, which is also its merge priority: lower ids merge first.
    ranks: dict[bytes, int]
    #: Text of a special token -> its id.
    special: dict[str, int]

    @property
    def vocab(self) -> int:
        """Number of tokens; ids run from 0."""
        return len(self.ranks) + len(self.special)

    def build(self, path: Path) -> tiktoken.Encoding:
        """Build the encoding itself; `path` is for messages.

        Raises:
            ModelError: the pattern is not a valid regular expression.
        """
        try:
            return tiktoken.Encoding(
                self.name, pat_str=self.pattern, mergeable_ranks=self.ranks, special_tokens=self.special
            )
        except ValueError as error:
            raise ModelError(
                f"{path}: its split pattern is not valid: {str(error).splitlines()[0]}"
            ) from None


def read(path: Path) -> StoredEncoding:
    """Read and check `path`.

    Raises:
        ModelError: the file cannot be read, or holds anything but a whole encoding.
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
    """Return `stored` if every byte is a token, every id occurs once and no token is empty; else raise ModelError."""
    absent = next((byte for byte in range(256) if bytes([byte]) not in stored.ranks), None)
    if absent is not None:
        raise ModelError(f"{path}: every single byte must be a token, {absent:#04x} is none")
    ids = sorted([*stored.ranks.values(), *stored.special.values()])
    if ids != list(range(stored.vocab)):
        raise ModelError(f"{path}: ids must be 0 to {stored.vocab - 1}, each once; they are not")
    if "" in stored.special or b"" in stored.ranks:
        raise ModelError(f"{path}: no token may be empty, one is")
    return stored
