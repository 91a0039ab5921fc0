"""Build tokenizer.json from a tiktoken encoding, and check that both give the same ids.

tiktoken is the reference: the new tokenizer is compared with it on texts of every kind before it is written, so
that no other module depends on where the tokenizer came from.
"""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tiktoken
from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers.convert_slow_tokenizer import bytes_to_unicode

from grpo_actors.convert.nanochat import chat_template
from grpo_actors.convert.nanochat.encoding import StoredEncoding
from grpo_actors.errors import ModelError
from grpo_actors.policy.tokenizer import PROBE

#: The probe, then runs of blanks, digits of several scripts, letters outside the first Unicode plane, and code.
SAMPLES = (
    PROBE,
    "The quick brown fox jumps over the lazy dog. I'll say it's 'fine', THEY'RE not; d'accord?",
    "1 12 123 1234 12345.678 1,000,000 ٣٤٥ Ⅷ½ 0x1F 3*4=12",
    " a  b   c    \t\t d \n \n\n e\r\n\r\n   f   \n",
    "for (i = 0; i < n; ++i) { x[i] += \"y\" ? '\\n' : b'0'; }  // see <a href='#'>§</a>",
    "Größe, naïve, Ελληνικά, русский, 日本語のテキスト, 한국어, עברית, العربية, हिन्दी, 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 👩‍👩‍👧‍👦",
)
#: Number of texts made of random tokens of the vocabulary, in which merges compete.
_RANDOM_TEXTS = 300


def build(path: Path, stored: StoredEncoding) -> Tokenizer:
    """Build the tokenizer that encodes as `stored` does.

    Args:
        path: The encoding's file, for messages.
        stored: The encoding.

    Raises:
        ModelError: one of nanochat's special tokens is missing, or tiktoken gives different ids.
    """
    absent = [text for text in chat_template.SPECIAL_TOKENS if text not in stored.special]
    if absent:
        raise ModelError(f"{path}: must have nanochat's special tokens, {', '.join(absent)} is missing")
    letters = bytes_to_unicode()
    names = {token: "".join(letters[byte] for byte in token) for token in stored.ranks}
    merges = [(names[left], names[right]) for left, right in _merges(stored.ranks)]
    vocabulary = {names[token]: rank for token, rank in stored.ranks.items()}
    # ignore_merges: tiktoken looks up a whole word before it merges anything.
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_regex(path, stored.pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    # In the order of their ids: each gets the next free id.
    special = sorted(stored.special, key=stored.special.__getitem__)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    check(path, stored, tokenizer)
    return tokenizer


def config(stored: StoredEncoding, context: int) -> dict[str, Any]:
    """Return the content of tokenizer_config.json."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        "bos_token": chat_template.BOS,
        "eos_token": chat_template.ASSISTANT_END,
        "additional_special_tokens": [
            text for text in stored.special if text not in (chat_template.BOS, chat_template.ASSISTANT_END)
        ],
        "chat_template": chat_template.TEMPLATE,
    }


def token_ids(stored: StoredEncoding) -> dict[str, Any]:
    """Return the token ids for config.json and generation_config.json."""
    return {
        "bos_token_id": stored.special[chat_template.BOS],
        "eos_token_id": [stored.special[text] for text in chat_template.STOPS],
    }


def check(path: Path, stored: StoredEncoding, tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer whose ids differ from tiktoken's on any trial text."""
    reference = stored.build(path)
    for text in _trial_texts(stored, reference):
        expected = reference.encode(text, allowed_special="all")
        if tokenizer.encode(text, add_special_tokens=False).ids != expected:
            raise ModelError(
                f"{path}: its encoding has no equal tokenizer.json: tiktoken splits {text!r:.60} differently"
            )


def _merges(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """Yield every pair of tokens that joins to a third, by the third's rank; tiktoken may merge any of them."""
    for token in sorted(ranks, key=ranks.__getitem__):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ranks and right in ranks:
                yield left, right


def _regex(path: Path, pattern: str) -> Regex:
    try:
        return Regex(pattern)
    except Exception as error:  # noqa: BLE001 - tokenizers raises nothing narrower
        raise ModelError(
            f"{path}: its split pattern is not supported by tokenizers: {str(error)!r:.80}"
        ) from None


def _trial_texts(stored: StoredEncoding, reference: tiktoken.Encoding) -> Iterator[str]:
    yield from SAMPLES
    yield "".join(f"{text}a {text}\n" for text in stored.special)
    rng = random.Random(0)
    for _ in range(_RANDOM_TEXTS):
        yield reference.decode([rng.randrange(len(stored.ranks)) for _ in range(rng.randint(1, 40))])
