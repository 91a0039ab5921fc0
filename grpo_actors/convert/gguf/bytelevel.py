"""Byte-level BPE (GGUF's tokenizer model ``gpt2``): the rules that split text before the merges.

A GGUF file contains only the name of its splitting rule. The rules here are those that the models were
published with. An unknown name is rejected: a wrong rule gives other ids, and a model that is subtly worse.
"""

from dataclasses import dataclass

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import PreTokenizer

from grpo_actors.convert.gguf import vocabulary
from grpo_actors.convert.gguf.reader import GgufFile
from grpo_actors.convert.gguf.vocabulary import PREFIX, Vocabulary
from grpo_actors.errors import ModelError

#: Llama 3 and Qwen 2 differ only in digits: groups of up to three, or single digits.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Splitter:
    """A splitting rule and the other settings that its name implies.

    Attributes:
        digits: The pattern of digits in `WORDS`; None for GPT-2's own rule.
        digits_alone: Whether every digit is split off first.
        composes: Whether text is normalised to NFC first.
        whole_words: Whether a word that is a token is used as it is, without merging.
        adds_bos: Whether a BOS token is added, if the file does not specify it.
    """

    digits: str | None = None
    digits_alone: bool = False
    composes: bool = False
    whole_words: bool = False
    adds_bos: bool = False
    #: transformers rebuilds Qwen 2's tokenizer from its class; the default class reads tokenizer.json as it is.
    hf_class: str = "PreTrainedTokenizerFast"

    def steps(self) -> PreTokenizer:
        """Return the rule as a pre-tokenizer; its pieces are in GPT-2's byte alphabet."""
        steps: list[PreTokenizer] = (
            [pre_tokenizers.Digits(individual_digits=True)] if self.digits_alone else []
        )
        if self.digits is not None:
            steps.append(pre_tokenizers.Split(Regex(WORDS.format(digits=self.digits)), "isolated"))
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=self.digits is None))
        return pre_tokenizers.Sequence(steps)


_LLAMA3 = Splitter(digits=r"\p{N}{1,3}", whole_words=True, adds_bos=True)
_QWEN2 = Splitter(digits=r"\p{N}", composes=True, hf_class="Qwen2Tokenizer")
_DIGITS_ALONE = Splitter(digits_alone=True)

SPLITTERS = {
    "gpt-2": Splitter(),
    "smollm": _DIGITS_ALONE,
    "starcoder": _DIGITS_ALONE,
    "refact": _DIGITS_ALONE,
    "qwen2": _QWEN2,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    # SmolLM3's: Llama 3's rule without `whole_words` and `adds_bos`.
    "smaug-bpe": Splitter(digits=_LLAMA3.digits),
}


def splitter(gguf: GgufFile) -> Splitter:
    """Return the rule that the file names; raises ModelError if it is unknown."""
    name = gguf.value(PREFIX + "pre", str)
    if name not in SPLITTERS:
        raise ModelError(f"{gguf.path}: {PREFIX}pre must be one of {', '.join(SPLITTERS)}, got {name!r:.60}")
    return SPLITTERS[name]


def build(gguf: GgufFile, tokens: Vocabulary) -> tuple[Tokenizer, bool, str]:
    """Return the tokenizer without its added tokens, whether the rule implies BOS, and transformers' class."""
    rule = splitter(gguf)
    merges = vocabulary.merges(gguf, tokens)
    tokenizer = Tokenizer(BPE(vocab=tokens.ids, merges=merges, ignore_merges=rule.whole_words))
    if rule.composes:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = rule.steps()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer, rule.adds_bos, rule.hf_class
