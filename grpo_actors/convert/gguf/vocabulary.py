"""The token list of a GGUF file: texts, kinds, and which ids have a role."""

from dataclasses import dataclass
from enum import IntEnum

from tokenizers import AddedToken

from grpo_actors.convert.gguf.reader import GgufFile
from grpo_actors.errors import ModelError

PREFIX = "tokenizer.ggml."
ROLES = ("bos", "eos", "unknown", "padding")
#: Texts that end an answer. A file names one end token; chat models have two (end of turn, end of text).
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
    """`texts[i]` and `kinds[i]` describe token i; `roles` gives the ids that the file names."""

    texts: list[str]
    kinds: list[Kind]
    ids: dict[str, int]
    roles: dict[str, int]

    def added(self) -> list[AddedToken]:
        """Tokens that are found in the text before it is split, each as one id.

        Control tokens are special (left out when text is decoded for a reader), user-defined ones not.
        """
        return [
            AddedToken(text, special=kind is not Kind.USER_DEFINED, normalized=False)
            for text, kind in zip(self.texts, self.kinds, strict=True)
            if kind in (Kind.CONTROL, Kind.UNKNOWN, Kind.USER_DEFINED)
        ]

    def role(self, name: str) -> str | None:
        """Text of the token with role `name`, if the file names one."""
        return self.texts[self.roles[name]] if name in self.roles else None

    def stop_ids(self) -> list[int]:
        """Ids that end an answer; the file's own end token first."""
        named = [self.roles[name] for name in ("eos", "eot", "eom") if name in self.roles]
        known = [self.ids[text] for text in END_TEXTS if text in self.ids]
        control = [token for token in known if self.kinds[token] is Kind.CONTROL]
        return list(dict.fromkeys(named + control))


def read(gguf: GgufFile, vocab_size: int) -> Vocabulary:
    """Read and check the token list; `vocab_size` is the number of embedding rows.

    Raises:
        ModelError: no token list, one that does not fit the embedding, a text given twice, a role out
            of range.
    """
    texts = _strings(gguf, PREFIX + "tokens")
    kinds = _kinds(gguf, len(texts))
    if len(texts) > vocab_size:
        raise ModelError(
            f"{gguf.path}: {len(texts)} tokens do not fit {vocab_size} embedding rows; the file is damaged"
        )
    # Fillers that pad the list up to the embedding's rows have no text of their own.
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
    """The BPE merges in order of rank; each part and each result must be a token."""
    pairs = []
    for line in _strings(gguf, PREFIX + "merges"):
        left, gap, right = line.partition(" ")
        if not gap or not {left, right, left + right} <= vocabulary.ids.keys():
            raise ModelError(f"{gguf.path}: merge {line!r:.60} does not join two tokens to a third")
        pairs.append((left, right))
    return pairs


def scores(gguf: GgufFile, vocabulary: Vocabulary) -> list[float]:
    """SentencePiece's score of each token."""
    values = gguf.value(PREFIX + "scores", list)[: len(vocabulary.texts)]
    numbers = [float(value) for value in values if isinstance(value, int | float)]
    if len(numbers) != len(vocabulary.texts):
        raise ModelError(
            f"{gguf.path}: {PREFIX}scores must give each of {len(vocabulary.texts)} tokens a score"
        )
    return numbers
