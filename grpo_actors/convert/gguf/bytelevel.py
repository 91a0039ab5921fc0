"""Byte-level BPE (GGUF's tokenizer model ``gpt2``): how text is split before the merges.

The file names its splitting rule and does not contain it; the rules are those that the models were
published with. An unknown name is refused: a wrong rule gives other ids, and a model that is subtly worse.
"""

from dataclasses import dataclass

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import PreTokenizer

from grpo_actors.convert.gguf import vocabulary
from grpo_actors.convert.gguf.reader import GgufFile
from grpo_actors.convert.gguf.vocabulary import PREFIX, Vocabulary
from grpo_actors.errors import ModelError

#: Llama 3 and Qwen 2 differ in the digits only: groups of up to three, or each on its own.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Splitter:
    """A splitting rule and the habits that go with its name.

    `digits` None is GPT-2's own rule. `digits_alone` cuts every digit off first. `whole_words` looks a word
    up before it merges it. `adds_bos` holds where the file does not say.
    """

    digits: str | None = None
    digits_alone: bool = False
    composes: bool = False
    whole_words: bool = False
    adds_bos: bool = False
    #: transformers rebuilds Qwen 2's tokenizer by its class; any other class stands for the file itself.
    hf_class: str = "PreTrainedTokenizerFast"

    def steps(self) -> PreTokenizer:
        """The rule as a pre-tokenizer whose pieces are in GPT-2's byte letters."""
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
    # SmolLM3's: Llama 3's rule without its habits.
    "smaug-bpe": Splitter(digits=_LLAMA3.digits),
}


def splitter(gguf: GgufFile) -> Splitter:
    """The rule that the file names; ModelError for one that is not known."""
    name = gguf.value(PREFIX + "pre", str)
    if name not in SPLITTERS:
        raise ModelError(f"{gguf.path}: {PREFIX}pre must be one of {', '.join(SPLITTERS)}, got {name!r:.60}")
    return SPLITTERS[name]


def build(gguf: GgufFile, tokens: Vocabulary) -> tuple[Tokenizer, bool, str]:
    """Tokenizer without its added tokens, whether the name implies a BOS token, transformers' class."""
    rule = splitter(gguf)
    merges = vocabulary.merges(gguf, tokens)
    tokenizer = Tokenizer(BPE(vocab=tokens.ids, merges=merges, ignore_merges=rule.whole_words))
    if rule.composes:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = rule.steps()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer, rule.adds_bos, rule.hf_class
