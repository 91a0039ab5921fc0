"""A GGUF file becomes the files of a model folder.

Puts together what the other modules know; does not decide where the folder lies or what happens to a
half-written one.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_actors.errors import ModelError
from grpo_actors.policy.gguf import tokenizer, weights
from grpo_actors.policy.gguf.architecture import Architecture
from grpo_actors.policy.gguf.reader import GgufFile


@dataclass(frozen=True)
class Conversion:
    """What was converted: for the summary."""

    architecture: str
    parameters: int
    source_bytes: int
    #: Number format in the source to number of tensors.
    formats: dict[str, int]


def write_folder(source: Path, folder: Path, dtype: str) -> Conversion:
    """Write config, weights, tokenizer and generation config of `source` into the existing `folder`.

    Args:
        source: a GGUF file.
        folder: an empty folder.
        dtype: ``float32``, ``bfloat16`` or ``float16``.

    Raises:
        ModelError: the file is damaged or not supported, or the disk is too small.
    """
    gguf = GgufFile(source)
    architecture = Architecture(gguf)
    slots = architecture.slots()
    # Before the weights: they take the time, and most refusals come from the tokenizer.
    written = tokenizer.read(gguf, vocab_size=architecture.sizes.vocab)
    _check_space(folder, weights.total_bytes(slots, dtype))
    _write_json(folder / "config.json", architecture.config(dtype) | written.token_ids())
    _write_json(folder / "generation_config.json", written.token_ids())
    _write_json(folder / "tokenizer_config.json", written.config)
    (folder / "tokenizer.json").write_text(written.tokenizer_json, encoding="utf-8")
    weights.save(gguf, slots, folder, dtype)
    return Conversion(
        architecture=architecture.name,
        parameters=sum(gguf.tensors[slot.stored].size for slot in slots),
        source_bytes=source.stat().st_size,
        formats=gguf.type_counts(),
    )


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ModelError(
            f"{folder}: the weights take {needed:,} bytes, the disk has {free:,} free; choose another disk"
        )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
