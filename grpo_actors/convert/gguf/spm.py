"""SentencePiece BPE (GGUF's tokenizer model ``llama``): scores become ranked merges.

SentencePiece joins, of all neighbours whose union is a token, the pair whose union scores best. BPE joins
the pair of best rank. Listing every way to cut every token in two, best score first, makes the two agree.
"""

from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE

from grpo_actors.convert.gguf import vocabulary
from grpo_actors.convert.gguf.reader import GgufFile
from grpo_actors.convert.gguf.vocabulary import PREFIX, Kind, Vocabulary
from grpo_actors.errors import ModelError

SPACE = "▁"


def build(gguf: GgufFile, tokens: Vocabulary) -> tuple[Tokenizer, bool, str]:
    """Tokenizer without its added tokens, that BOS is the habit, transformers' class."""
    _refuse_normalisation(gguf)
    model = BPE(
        vocab=tokens.ids,
        merges=ranked_merges(tokens, vocabulary.scores(gguf, tokens)),
        unk_token=tokens.role("unknown"),
        fuse_unk=True,
        byte_fallback=Kind.BYTE in tokens.kinds,
    )
    tokenizer = Tokenizer(model)
    prefixed = gguf.value(PREFIX + "add_space_prefix", bool, True)
    spaces = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefixed else spaces
    strip = [decoders.Strip(" ", 1, 0)] if prefixed else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer, True, "PreTrainedTokenizerFast"


def ranked_merges(tokens: Vocabulary, scores: list[float]) -> list[tuple[str, str]]:
    """Every cut of a normal token into two normal tokens; best score of the whole first, then by ids."""
    normal = {text: index for text, index in tokens.ids.items() if tokens.kinds[index] is Kind.NORMAL}
    cuts = [
        (-scores[index], normal[text[:at]], normal[text[at:]])
        for text, index in normal.items()
        for at in range(1, len(text))
        if text[:at] in normal and text[at:] in normal
    ]
    return [(tokens.texts[left], tokens.texts[right]) for _, left, right in sorted(cuts)]


def _refuse_normalisation(gguf: GgufFile) -> None:
    """Rules on the text itself that Llama's own tokenizers do not have and this module does not apply."""
    squeezes = gguf.value(PREFIX + "remove_extra_whitespaces", bool, False)
    if squeezes or PREFIX + "precompiled_charsmap" in gguf.metadata:
        raise ModelError(
            f"{gguf.path}: its SentencePiece tokenizer rewrites the text first, which is not supported"
        )
