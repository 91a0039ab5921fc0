"""Checkpoints as weights: written whole or not at all, and put back.

A checkpoint is written beside its name, made durable file by file, and renamed: a kill at any
moment leaves the last one or this one, never half of one.

    RUN/checkpoint-40/   model.safetensors, config.json, tokenizer files   (full: mlx_lm.load reads it)
                         adapters.safetensors, adapter_config.json         (LoRA: mlx_lm.load's adapter_path)
                         optimizer.safetensors, state.json, manifest.json
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
from mlx.utils import tree_flatten, tree_unflatten

from grpo_actors.checkpoints import STATE, Checkpoint, seal, write_json
from grpo_actors.errors import ModelError, RunError
from grpo_actors.policy.model import Policy

OPTIMIZER = "optimizer.safetensors"
ADAPTER = "adapters.safetensors"

#: Beside the weights: what a model folder needs to be loaded and talked to.
_COMPANIONS = ("generation_config.json", "*.py", "LICENSE*")


def write_checkpoint(run_dir: Path, update: int, policy: Policy, optimizer: Any, state: Mapping[str, Any]) -> Checkpoint:
    """Write checkpoint-`update`.

    Args:
        run_dir: The run folder.
        update: Updates done.
        policy: Its trainable weights are saved; with full fine-tuning that is the whole model.
        optimizer: An mlx optimizer; its state arrays are saved.
        state: JSON: the cursor, the count of records, the configuration's fingerprint.

    Raises:
        RunError: no room, or the folder is not writable; nothing half-written is left.
    """
    final = run_dir / f"checkpoint-{update}"
    temporary = run_dir / f"checkpoint-{update}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        _write_weights(temporary, policy)
        mx.save_safetensors(str(temporary / OPTIMIZER), dict(tree_flatten(optimizer.state)))
        write_json(temporary / STATE, {"update": update, **state})
        seal(temporary, final)
    except (OSError, RuntimeError) as error:  # mlx reports a full disk as RuntimeError
        shutil.rmtree(temporary, ignore_errors=True)
        raise RunError(f"{final}: cannot be written ({error}); free space on this disk and start again") from error
    return Checkpoint(final, update)


def restore(checkpoint: Checkpoint, policy: Policy, optimizer: Any) -> None:
    """Put a checkpoint's weights and optimizer state in place."""
    policy.load_trainable(_read_weights(checkpoint.path))
    optimizer.state = tree_unflatten(list(mx.load(str(checkpoint.path / OPTIMIZER)).items()))
    mx.eval(policy.model.parameters(), optimizer.state)


def load_weights(path: Path, policy: Policy) -> None:
    """Put the weights of the checkpoint folder `path` into a policy of its kind."""
    policy.load_trainable(_read_weights(path))
    mx.eval(policy.model.parameters())


def _write_weights(folder: Path, policy: Policy) -> None:
    if policy.has_adapter:
        mx.save_safetensors(str(folder / ADAPTER), policy.trainable())
        write_json(folder / "adapter_config.json", adapter_config(policy))
        return
    mlx_lm.utils.save_model(folder, policy.model)
    mlx_lm.utils.save_config(dict(policy.architecture), folder / "config.json")
    policy.tokenizer.save_pretrained(str(folder))
    for pattern in _COMPANIONS:
        for path in policy.source.glob(pattern):
            shutil.copy(path, folder)


def adapter_config(policy: Policy) -> dict[str, Any]:
    """What mlx-lm needs to load the adapter onto the base model."""
    config = policy.config
    layers = len(policy.model.layers) if config.lora_layers < 0 else config.lora_layers
    parameters: dict[str, Any] = {
        "rank": config.lora_rank,
        "scale": config.lora_scale,
        "dropout": config.lora_dropout,
    }
    if config.lora_keys:
        parameters["keys"] = list(config.lora_keys)
    return {
        "fine_tune_type": "lora",
        "model": config.model_name,
        "num_layers": layers,
        "lora_parameters": parameters,
    }


def _read_weights(folder: Path) -> dict[str, mx.array]:
    adapter = folder / ADAPTER
    paths = [adapter] if adapter.is_file() else sorted(folder.glob("model*.safetensors"))
    if not paths:
        raise ModelError(f"{folder}: no weights here (neither {ADAPTER} nor model*.safetensors)")
    arrays: dict[str, mx.array] = {}
    for path in paths:
        arrays |= mx.load(str(path))
    return arrays
