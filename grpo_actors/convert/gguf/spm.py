"""SentencePiece BPE (GGUF's tokenizer model ``llama``): scores become ranked merges.

Among all neighbours whose union is a token, SentencePiece joins the pair whose union has the best score. BPE
joins the pair with the best rank. The two agree if the merges list every split of every token into two tokens,
best score first.
"""

from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE

from grpo_actors.convert.gguf import vocabulary
from grpo_actors.convert.gguf.reader import GgufFile
from grpo_actors.convert.gguf.vocabulary import PREFIX, Kind, Vocabulary
from grpo_actors.errors import ModelError

SPACE = "▁"


def build(gguf: GgufFile, tokens: Vocabulary) -> tuple[Tokenizer, bool, str]:
    """Return the tokenizer without its added tokens, True (BOS is added by default), and transformers' class."""
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
    """Return every split of a normal token into two normal tokens, best score of the whole first, then by ids."""
    normal = {text: index for text, index in tokens.ids.items() if tokens.kinds[index] is Kind.NORMAL}
    cuts = [
        (-scores[index], normal[text[:at]], normal[text[at:]])
        for text, index in normal.items()
        for at in range(1, len(text))
        if text[:at] in normal and text[at:] in normal
    ]
    return [(tokens.texts[left], tokens.texts[right]) for _, left, right in sorted(cuts)]


def _refuse_normalisation(gguf: GgufFile) -> None:
    """Reject normalisation rules, which Llama's own tokenizers lack and this module does not apply."""
    squeezes = gguf.value(PREFIX + "remove_extra_whitespaces", bool, False)
    if squeezes or PREFIX + "precompiled_charsmap" in gguf.metadata:
        raise ModelError(
            f"{gguf.path}: its SentencePiece tokenizer rewrites the text first, which is not supported"
        )
