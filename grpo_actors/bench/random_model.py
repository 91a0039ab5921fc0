"""Make a model folder of a well-known architecture with random weights: as fast as the real one, without a download.

The tokenizer is that of the embedded model; all its ids are below the architecture's vocabulary size. Random weights
rarely produce the end token, so completions run to their limit.
"""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx_lm.utils import _get_classes, save_model

from grpo_actors.assets import TINY
from grpo_actors.bench.known_models import KNOWN_MODELS
from grpo_actors.errors import ModelError
from grpo_actors.policy.model import DTYPES

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@contextlib.contextmanager
def random_model(architecture: str, dtype: str, keep: str | None) -> Iterator[Path]:
    """Make the folder, or find it in `keep`; without `keep` it is removed after the block.

    Args:
        architecture: A name in `KNOWN_MODELS`.
        dtype: Type of the weights; "auto" means bfloat16, in which all of these models were published.
        keep: A new folder, or one that an earlier call has made with the same architecture and type.

    Raises:
        ModelError: the name is unknown, or `keep` holds something else.
    """
    if architecture not in KNOWN_MODELS:
        raise ModelError(f"--random: must be one of {', '.join(KNOWN_MODELS)}, got {architecture}")
    with contextlib.ExitStack() as stack:
        folder = Path(keep or stack.enter_context(tempfile.TemporaryDirectory(prefix="grpo-bench-model-")))
        config = config_json(architecture, "bfloat16" if dtype == "auto" else dtype)
        if not _is_made(folder, config):
            try:
                write_folder(folder, config)
            except OSError as error:
                raise ModelError(
                    f"{folder}: cannot be written ({error.strerror}); choose another --keep"
                ) from error
        yield folder


def config_json(architecture: str, dtype: str) -> dict[str, Any]:
    """Return the architecture's config.json with the special token ids of the embedded tokenizer."""
    tiny = json.loads((TINY / "config.json").read_text())
    tokens = {name: tiny[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {**KNOWN_MODELS[architecture], **tokens, "torch_dtype": dtype}


def build(config: Mapping[str, Any]) -> nn.Module:
    """Build mlx-lm's model of a config.json with MLX's random initial weights; nothing is computed yet."""
    model_class, arguments_class = _get_classes(dict(config))
    model: nn.Module = model_class(arguments_class.from_dict(dict(config)))
    model.set_dtype(DTYPES[config["torch_dtype"]])
    if "quantization" in config:
        nn.quantize(model, **config["quantization"])
    return model


def write_folder(folder: Path, config: Mapping[str, Any]) -> None:
    """Write a folder for `mlx_lm.load`. config.json comes last: a folder without it is unfinished."""
    folder.mkdir(parents=True, exist_ok=True)
    mx.random.seed(0)
    model = build(config)
    save_model(folder, model)
    for name in TOKENIZER_FILES:
        shutil.copyfile(TINY / name, folder / name)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _is_made(folder: Path, config: Mapping[str, Any]) -> bool:
    """Return whether the folder holds this model; raises ModelError if it holds anything else."""
    written = folder / "config.json"
    if written.is_file() and json.loads(written.read_text()) == config:
        return True
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ModelError(f"--keep: {folder} must be a new folder, or hold this random model; choose another")
    return False
