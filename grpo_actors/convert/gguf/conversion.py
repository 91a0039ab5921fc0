"""Convert a GGUF file to the files of a model folder.

Combines the other modules. The caller chooses the folder and handles a half-written one.
"""

from dataclasses import dataclass
from pathlib import Path

import mlx_lm.utils
from mlx import nn

from grpo_actors.convert.gguf import shards as weights
from grpo_actors.convert.gguf import tokenizer_json as tokenizer
from grpo_actors.convert.gguf.model_config import Architecture
from grpo_actors.convert.gguf.reader import GgufFile
from grpo_actors.convert.writing import check_space
from grpo_actors.rundir.checkpoints import write_json


@dataclass(frozen=True)
class Conversion:
    """Facts about a finished conversion, for the summary."""

    architecture: str
    parameters: int
    source_bytes: int
    #: Number format in the source -> number of tensors.
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
    # Before the weights: those take the most time, and most errors come from the tokenizer.
    written = tokenizer.read(gguf, vocab_size=architecture.sizes.vocab)
    check_space(folder, weights.total_bytes(slots, dtype))
    write_json(folder / "config.json", architecture.config(dtype) | written.token_ids())
    write_json(folder / "generation_config.json", written.token_ids())
    write_json(folder / "tokenizer_config.json", written.config)
    (folder / "tokenizer.json").write_text(written.tokenizer_json, encoding="utf-8")
    weights.save(gguf, slots, folder, dtype)
    return Conversion(
        architecture=architecture.name,
        parameters=sum(gguf.tensors[slot.stored].size for slot in slots),
        source_bytes=source.stat().st_size,
        formats=gguf.type_counts(),
    )


def source_model(source: Path) -> nn.Module:
    """Load the model in `source` into memory, decoded to float32, for comparison with a folder.

    Raises:
        ModelError: as `write_folder`.
    """
    gguf = GgufFile(source)
    architecture = Architecture(gguf)
    model_class, arguments = mlx_lm.utils._get_classes(config := architecture.config("float32"))  # noqa: SLF001
    model: nn.Module = model_class(arguments.from_dict(config))
    decoded = {slot.name: weights.decode(gguf, slot, "float32") for slot in architecture.slots()}
    # Gemma's `sanitize` infers from the names that the head is the embedding.
    decoded = model.sanitize(decoded) if hasattr(model, "sanitize") else decoded
    model.load_weights(list(decoded.items()))
    model.eval()
    return model
