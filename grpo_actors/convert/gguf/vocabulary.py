"""The token list of a GGUF file: texts, kinds, and the ids that have a role."""

from dataclasses import dataclass
from enum import IntEnum

from tokenizers import AddedToken

from grpo_actors.convert.gguf.reader import GgufFile
from grpo_actors.errors import ModelError

PREFIX = "tokenizer.ggml."
ROLES = ("bos", "eos", "unknown", "padding")
#: Texts that end an answer. A file names one end token; chat models have two: end of turn, end of text.
END_TEXTS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>")


class Kind(IntEnum):
    """GGUF's token types, by their numbers in the file."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Vocabulary:
    """Token list: `texts[i]` and `kinds[i]` describe token i; `roles` maps each role in the file to its id."""

    texts: list[str]
    kinds: list[Kind]
    ids: dict[str, int]
    roles: dict[str, int]

    def added(self) -> list[AddedToken]:
        """Return the tokens that are matched, each as one id, before the text is split.

        Control tokens are special: decoding for a reader omits them. User-defined tokens are not.
        """
        return [
            AddedToken(text, special=kind is not Kind.USER_DEFINED, normalized=False)
            for text, kind in zip(self.texts, self.kinds, strict=True)
            if kind in (Kind.CONTROL, Kind.UNKNOWN, Kind.USER_DEFINED)
        ]

    def role(self, name: str) -> str | None:
        """Return the text of the token with role `name`; None if the file names none."""
        return self.texts[self.roles[name]] if name in self.roles else None

    def stop_ids(self) -> list[int]:
        """Return the ids that end an answer, the file's own end token first."""
        named = [self.roles[name] for name in ("eos", "eot", "eom") if name in self.roles]
        known = [self.ids[text] for text in END_TEXTS if text in self.ids]
        control = [token for token in known if self.kinds[token] is Kind.CONTROL]
        return list(dict.fromkeys(named + control))


def read(gguf: GgufFile, vocab_size: int) -> Vocabulary:
    """Read and check the token list; `vocab_size` is the number of embedding rows.

    Raises:
        ModelError: the token list is missing or does not fit the embedding, a text occurs twice, or a
            role is out of range.
    """
    texts = _strings(gguf, PREFIX + "tokens")
    kinds = _kinds(gguf, len(texts))
    if len(texts) > vocab_size:
        raise ModelError(
            f"{gguf.path}: {len(texts)} tokens do not fit {vocab_size} embedding rows; the file is damaged"
        )
    # Fillers that pad the list to the number of embedding rows have no meaningful text.
    while kinds and kinds[-1] is Kind.UNUSED:
        kinds.pop()
        texts.pop()
    ids = {text: index for index, text in enumerate(texts)}
    if len(ids) != len(texts):
        double = next(text for index, text in enumerate(texts) if ids[text] != index)
        raise ModelError(
            f"{gguf.path}: token {double!r} stands twice in the token list; its id is not certain"
        )
    return Vocabulary(texts, kinds, ids, _roles(gguf, len(texts)))


def _strings(gguf: GgufFile, key: str) -> list[str]:
    values = gguf.value(key, list)
    if not all(isinstance(value, str) for value in values):
        raise ModelError(f"{gguf.path}: {key} must be a list of texts; the header is damaged")
    return [str(value) for value in values]


def _kinds(gguf: GgufFile, count: int) -> list[Kind]:
    numbers = gguf.value(PREFIX + "token_type", list)
    known = {int(kind) for kind in Kind}
    if len(numbers) != count or not known.issuperset(number for number in numbers if isinstance(number, int)):
        raise ModelError(f"{gguf.path}: {PREFIX}token_type must give each of {count} tokens a type 1 to 6")
    return [Kind(int(str(number))) for number in numbers]


def _roles(gguf: GgufFile, count: int) -> dict[str, int]:
    roles = {}
    for name in (*ROLES, "eot", "eom"):
        key = f"{PREFIX}{name}_token_id"
        if key in gguf.metadata:
            token = gguf.value(key, int)
            if not 0 <= token < count:
                raise ModelError(f"{gguf.path}: {key} must be below {count}, got {token}")
            roles[name] = token
    if "eos" not in roles:
        raise ModelError(
            f"{gguf.path}: metadata key {PREFIX}eos_token_id is missing; answers would never end"
        )
    return roles


def merges(gguf: GgufFile, vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Return the BPE merges in order of rank; each part and each result must be a token."""
    pairs = []
    for line in _strings(gguf, PREFIX + "merges"):
        left, gap, right = line.partition(" ")
        if not gap or not {left, right, left + right} <= vocabulary.ids.keys():
            raise ModelError(f"{gguf.path}: merge {line!r:.60} does not join two tokens to a third")
        pairs.append((left, right))
    return pairs


def scores(gguf: GgufFile, vocabulary: Vocabulary) -> list[float]:
    """Return SentencePiece's score of each token."""
    values = gguf.value(PREFIX + "scores", list)[: len(vocabulary.texts)]
    numbers = [float(value) for value in values if isinstance(value, int | float)]
    if len(numbers) != len(vocabulary.texts):
        raise ModelError(
            f"{gguf.path}: {PREFIX}scores must give each of {len(vocabulary.texts)} tokens a score"
        )
    return numbers
