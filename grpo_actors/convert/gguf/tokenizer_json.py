"""Build tokenizer.json and tokenizer_config.json from a GGUF file's metadata.

Combines the vocabulary with one of the two tokenizer kinds, and adds the special tokens and the chat template.
transformers cannot do it here: its ``gguf_file=`` (5.24) imports PyTorch, which this package does not require.
"""

from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer, processors

from grpo_actors.convert.gguf import bytelevel, spm, vocabulary
from grpo_actors.convert.gguf.reader import GgufFile
from grpo_actors.convert.gguf.vocabulary import PREFIX, Vocabulary
from grpo_actors.errors import ModelError

BUILDERS = {"gpt2": bytelevel.build, "llama": spm.build}
TEMPLATE_KEY = "tokenizer.chat_template"
#: Role -> transformers' name for it.
HF_ROLES = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}


@dataclass(frozen=True)
class WrittenTokenizer:
    """Contents of the two files, and the token ids that the model's config repeats."""

    tokenizer_json: str
    config: dict[str, Any]
    vocabulary: Vocabulary

    def token_ids(self) -> dict[str, Any]:
        """Return ``eos_token_id`` (a list if several ids end an answer), ``bos_token_id``, ``pad_token_id``."""
        stops = self.vocabulary.stop_ids()
        ids: dict[str, Any] = {"eos_token_id": stops[0] if len(stops) == 1 else stops}
        for role, key in (("bos", "bos_token_id"), ("padding", "pad_token_id")):
            if role in self.vocabulary.roles:
                ids[key] = self.vocabulary.roles[role]
        return ids


def read(gguf: GgufFile, vocab_size: int) -> WrittenTokenizer:
    """Rebuild the tokenizer of `gguf`, whose embedding has `vocab_size` rows.

    Raises:
        ModelError: the file has no tokenizer, or one of an unknown kind.
    """
    kind = gguf.value(PREFIX + "model", str)
    if kind not in BUILDERS:
        raise ModelError(f"{gguf.path}: {PREFIX}model must be one of {', '.join(BUILDERS)}, got {kind!r:.60}")
    tokens = vocabulary.read(gguf, vocab_size)
    tokenizer, adds_bos, hf_class = BUILDERS[kind](gguf, tokens)
    tokenizer.add_tokens(tokens.added())
    _frame(gguf, tokenizer, tokens, adds_bos=adds_bos)
    return WrittenTokenizer(tokenizer.to_str(), _config(gguf, tokens, hf_class), tokens)


def _frame(gguf: GgufFile, tokenizer: Tokenizer, tokens: Vocabulary, *, adds_bos: bool) -> None:
    """Make encoding add BOS before and EOS after the text if the file or its kind requires it."""
    bos = tokens.role("bos") if gguf.value(PREFIX + "add_bos_token", bool, adds_bos) else None
    eos = tokens.role("eos") if gguf.value(PREFIX + "add_eos_token", bool, False) else None
    if bos is None and eos is None:
        return
    single = [text for text in (bos, "$A", eos) if text is not None]
    pair = [text for text in (bos, "$A", bos, "$B", eos) if text is not None]
    specials = {text: tokens.ids[text] for text in (bos, eos) if text is not None}
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=pair, special_tokens=list(specials.items())
    )


def _config(gguf: GgufFile, tokens: Vocabulary, hf_class: str) -> dict[str, Any]:
    architecture = gguf.value("general.architecture", str)
    config: dict[str, Any] = {
        "tokenizer_class": hf_class,
        "model_max_length": gguf.value(f"{architecture}.context_length", int),
        "clean_up_tokenization_spaces": False,
    }
    for role, key in HF_ROLES.items():
        text = tokens.role(role)
        if text is not None:
            config[key] = text
    if TEMPLATE_KEY in gguf.metadata:
        config["chat_template"] = gguf.value(TEMPLATE_KEY, str)
    return config
