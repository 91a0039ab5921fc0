"""Write the files of a model folder from a nanochat checkpoint.

Combines the other modules of this package. The caller decides where the folder lies and what happens to a
half-written one.
"""

from dataclasses import dataclass
from pathlib import Path

from mlx import nn
from mlx_lm.models import nanochat
from mlx_lm.utils import save_model

from grpo_actors.atomic import write_fault
from grpo_actors.convert.nanochat import bpe, encoding, tensor_names
from grpo_actors.convert.nanochat.source_files import Sizes, Source, find, read_sizes
from grpo_actors.convert.nanochat.torch_file import TorchFile
from grpo_actors.errors import ModelError
from grpo_actors.policy.model import DTYPES
from grpo_actors.rundir.checkpoints import write_json


@dataclass(frozen=True)
class Conversion:
    """Facts about a converted checkpoint, for the summary."""

    step: int
    layers: int
    vocab: int
    source_bytes: int


def write_folder(source: Path, folder: Path, dtype: str) -> Conversion:
    """Write config, weights, tokenizer and generation config of the newest checkpoint in `source`.

    Args:
        source: A folder as `grpo_actors.convert.nanochat.source_files` describes.
        folder: An empty folder.
        dtype: ``float32``, ``bfloat16`` or ``float16``.

    Raises:
        ModelError: a file is missing, damaged or belongs to another model, or the disk is too small.
    """
    files = find(source)
    sizes = read_sizes(files.meta)
    stored = encoding.read(files.tokenizer)
    if stored.vocab != sizes.vocab:
        raise ModelError(
            f"{files.tokenizer}: must have the model's {sizes.vocab} tokens ({files.meta.name}), has {stored.vocab}; "
            "it is another model's"
        )
    # The tokenizer comes first, because the weights are slow to read.
    text = bpe.build(files.tokenizer, stored).to_str(pretty=True)
    ids = bpe.token_ids(stored)
    try:
        # Through mlx-lm's model and into its shards: a file that mlx-lm would not load is never written.
        save_model(folder, _read_model(files, sizes, dtype))
    except (RuntimeError, OSError) as error:
        raise ModelError(f"{folder}: cannot be written: {write_fault(error, folder)}") from None
    write_json(folder / "config.json", tensor_names.config(sizes, dtype) | ids)
    write_json(folder / "generation_config.json", ids)
    write_json(folder / "tokenizer_config.json", bpe.config(stored, sizes.context))
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    return Conversion(files.step, sizes.layers, sizes.vocab, files.model.stat().st_size)


def source_model(source: Path) -> nn.Module:
    """Load the model in `source` in float32, to compare a folder with; raises ModelError as `write_folder` does."""
    files = find(source)
    return _read_model(files, read_sizes(files.meta), "float32")


def _read_model(files: Source, sizes: Sizes, dtype: str) -> nn.Module:
    with TorchFile(files.model) as file:
        weights = [
            (name, tensor_names.weight(file, name, stored_name, sizes, DTYPES[dtype]))
            for name, stored_name in tensor_names.stored_names(file, sizes).items()
        ]
    model: nn.Module = nanochat.Model(nanochat.ModelArgs.from_dict(tensor_names.config(sizes, dtype)))
    model.load_weights(weights)
    return model
