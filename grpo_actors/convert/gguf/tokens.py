"""Write a folder's tokenizer as GGUF metadata: byte-level BPE with a splitting rule that GGUF has a name for.

The file contains only the rule's name, which is found by comparing rules. The written file is read back and
must tokenise a trial text exactly as the folder does.
"""

import json
from pathlib import Path
from typing import Any

import gguf
from tokenizers import Tokenizer

from grpo_actors.convert.gguf import tokenizer_json as tokenizer
from grpo_actors.convert.gguf.bytelevel import SPLITTERS
from grpo_actors.convert.gguf.reader import GgufFile
from grpo_actors.convert.gguf.vocabulary import Kind
from grpo_actors.errors import ModelError
from grpo_actors.policy.tokenizer import load_tokenizer

#: Words, digits, spaces, line breaks, scripts and symbols: splitting rules differ in these.
_TRIAL = "Hello world's  end!\n\n\tx = 12345.67 + y_1; naïve café Ü 你好 123абв 🙂 <b>HTML</b>\r\n  I'LL go"


def add(writer: gguf.GGUFWriter, folder: Path, vocab_size: int) -> None:
    """Write the tokenizer in `folder`, padded to the `vocab_size` rows of the embedding.

    Raises:
        ModelError: GGUF has no name for its splitting rule.
    """
    loaded = _load(folder)
    described = json.loads(loaded.backend_tokenizer.to_str())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_rule(described))
    texts, kinds = _tokens(described, vocab_size)
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    writer.add_token_merges([_line(merge) for merge in described["model"]["merges"]])
    for number, write in (
        (loaded.eos_token_id, writer.add_eos_token_id),
        (loaded.bos_token_id, writer.add_bos_token_id),
        (loaded.pad_token_id, writer.add_pad_token_id),
    ):
        if number is not None:
            write(number)
    framed = loaded.encode("a")
    writer.add_add_bos_token(framed[0] == loaded.bos_token_id)
    writer.add_add_eos_token(framed[-1] == loaded.eos_token_id)
    templates = loaded.chat_template
    if isinstance(templates, dict):
        templates = [{"name": name, "template": text} for name, text in templates.items()]
    if templates is not None:
        writer.add_chat_template(templates)


def check(folder: Path, file: Path, vocab_size: int) -> None:
    """Reject a file whose tokenizer, read back, gives other ids than the folder's on the trial text."""
    written = Tokenizer.from_str(tokenizer.read(GgufFile(file), vocab_size).tokenizer_json)
    if written.encode(_TRIAL).ids != _load(folder).encode(_TRIAL):
        raise ModelError("--gguf: the tokenizer splits text in a way that no rule of a GGUF file names")


def _load(folder: Path) -> Any:
    return load_tokenizer(folder, trust_remote_code=False)


def _rule(described: dict[str, Any]) -> str:
    """Return the name of the splitting rule, the first of equivalent ones."""
    model, steps = described["model"], _plain(described["pre_tokenizer"])
    if model["type"] == "BPE" and not model.get("byte_fallback"):
        for name, rule in SPLITTERS.items():
            same_words = bool(model.get("ignore_merges")) == rule.whole_words
            if same_words and _plain(json.loads(rule.steps().__getstate__())) == steps:
                return name
    raise ModelError(
        f"--gguf: the tokenizer must be a byte-level BPE that splits text like one of {', '.join(SPLITTERS)}"
    )


def _plain(step: Any) -> list[dict[str, Any]]:
    """Flatten the steps of a pre-tokenizer, without settings that change no id."""
    if not isinstance(step, dict):
        return []
    if step["type"] == "Sequence":
        return [inner for each in step["pretokenizers"] for inner in _plain(each)]
    return [{key: value for key, value in step.items() if key != "trim_offsets"}]


def _tokens(described: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Return text and kind of every id; embedding rows without a token get fillers."""
    texts = [f"[PAD{row}]" for row in range(vocab_size)]
    kinds = [int(Kind.UNUSED)] * vocab_size
    for text, number in described["model"]["vocab"].items():
        texts[number], kinds[number] = text, int(Kind.NORMAL)
    for token in described["added_tokens"]:
        kind = Kind.CONTROL if token["special"] else Kind.USER_DEFINED
        texts[token["id"]], kinds[token["id"]] = token["content"], int(kind)
    return texts, kinds


def _line(merge: Any) -> str:
    """Return a merge in the file's form; tokenizer.json has a text or a pair."""
    return merge if isinstance(merge, str) else " ".join(merge)
