"""Find the files of a checkpoint and read the model's sizes from its meta file.

Opens neither weights nor tokenizer. It looks where the hub and nanochat itself put the files:

    DIR/model_000650.pt, DIR/meta_000650.json     the newest step is used
    DIR/tokenizer.pkl                             layout of nanochat's models on the hub
    DIR/tokenizer/tokenizer.pkl                   the same with a folder for the tokenizer
    DIR/../../tokenizer/tokenizer.pkl             nanochat's own layout, where DIR is chatsft_checkpoints/d20
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_actors.errors import ModelError

_TOKENIZER = "tokenizer.pkl"


@dataclass(frozen=True)
class Source:
    """The three files of one checkpoint."""

    step: int
    model: Path
    meta: Path
    tokenizer: Path


@dataclass(frozen=True)
class Sizes:
    """Sizes of the model; `vocab` is the number of the tokenizer's tokens, including special ones."""

    context: int
    vocab: int
    layers: int
    heads: int
    kv_heads: int
    hidden: int


#: Key in the meta file -> field of `Sizes`.
META_NAMES = {
    "sequence_len": "context",
    "vocab_size": "vocab",
    "n_layer": "layers",
    "n_head": "heads",
    "n_kv_head": "kv_heads",
    "n_embd": "hidden",
}


def find(folder: Path) -> Source:
    """Find the newest checkpoint in `folder`.

    Raises:
        ModelError: one of the three files is missing.
    """
    if not folder.is_dir():
        raise ModelError(
            f"{folder}: --nanochat must name a folder with model_*.pt, meta_*.json and {_TOKENIZER}"
        )
    steps = {
        int(match[1]): path
        for path in folder.iterdir()
        if (match := re.fullmatch(r"model_([0-9]{1,12})\.pt", path.name))
    }
    if not steps:
        raise ModelError(
            f"{folder}: no model_*.pt here (a step in digits); name the folder with the checkpoints of one model"
        )
    step, model = max(steps.items())
    meta = model.with_name(model.name.replace("model_", "meta_")).with_suffix(".json")
    if not meta.is_file():
        raise ModelError(
            f"{model}: {meta.name} is missing beside it; it holds the number of layers and heads"
        )
    folders = [folder, folder / "tokenizer", folder.resolve().parent.parent / "tokenizer"]
    found = [each / _TOKENIZER for each in folders if (each / _TOKENIZER).is_file()]
    if not found:
        raise ModelError(
            f"{folder}: no {_TOKENIZER} in any of {', '.join(map(str, folders))}; copy it into the first"
        )
    return Source(step, model, meta, found[0])


def read_sizes(meta: Path) -> Sizes:
    """Read the sizes of the model.

    Raises:
        ModelError: a size is missing or impossible, or the model has parts that mlx-lm's nanochat lacks.
    """
    described = _model_config(meta)
    sizes: dict[str, int] = {}
    for key, field in META_NAMES.items():
        value = described.pop(key, None)
        if type(value) is not int or value < 1:
            raise ModelError(f"{meta}: model_config.{key} must be a whole number ≥ 1, got {value!r:.60}")
        sizes[field] = value
    if set(str(described.get("window_pattern", "L"))) == {"L"}:
        described.pop("window_pattern", None)  # every layer sees the whole context, as in mlx-lm's model
    if described:
        key, value = next(iter(described.items()))
        raise ModelError(
            f"{meta}: model_config has {key!r:.40} = {value!r:.40}, a part of newer nanochats that mlx-lm's lacks; "
            f"supported are {', '.join(META_NAMES)}"
        )
    return _checked(Sizes(**sizes), meta)


def _model_config(meta: Path) -> dict[str, Any]:
    try:
        content = json.loads(meta.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{meta}: must be a JSON file, cannot be read: {error}") from None
    described = content.get("model_config") if isinstance(content, dict) else None
    if not isinstance(described, dict):
        raise ModelError(f'{meta}: must hold "model_config" with {", ".join(META_NAMES)}')
    return dict(described)


def _checked(sizes: Sizes, meta: Path) -> Sizes:
    if sizes.hidden % (2 * sizes.heads):
        raise ModelError(
            f"{meta}: model_config.n_embd must be an even multiple of n_head = {sizes.heads} (rotated in pairs), "
            f"got {sizes.hidden}"
        )
    if sizes.heads % sizes.kv_heads:
        raise ModelError(
            f"{meta}: model_config.n_kv_head must divide n_head = {sizes.heads}, got {sizes.kv_heads}"
        )
    return sizes
