"""Checkpoints: whole or absent.

A checkpoint is written beside its name, made durable file by file, and renamed: a kill at any
moment leaves the last one or this one, never half of one. Its manifest holds the size and sha256 of
every file; the newest whose manifest verifies is the one to go on from.

    RUN/checkpoint-40/   model.safetensors, config.json, tokenizer files   (full: mlx_lm.load reads it)
                         adapters.safetensors, adapter_config.json         (LoRA: mlx_lm.load's adapter_path)
                         optimizer.safetensors, state.json, manifest.json
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
from mlx.utils import tree_flatten, tree_unflatten

from grpo_actors.errors import ModelError, RunError
from grpo_actors.policy.model import Policy

MANIFEST = "manifest.json"
STATE = "state.json"
OPTIMIZER = "optimizer.safetensors"
ADAPTER = "adapters.safetensors"
BEST = "best.json"

#: Beside the weights: what a model folder needs to be loaded and talked to.
_COMPANIONS = ("generation_config.json", "*.py", "LICENSE*")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    path: Path
    #: Updates behind it.
    update: int


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
        _write_json(temporary / STATE, {"update": update, **state})
        _write_json(temporary / MANIFEST, {"files": {p.name: _describe(p) for p in sorted(temporary.iterdir())}})
        for path in (*temporary.iterdir(), temporary):
            _sync(path)
        shutil.rmtree(final, ignore_errors=True)  # only ever an unreadable one: `resume` went past it
        temporary.rename(final)
        _sync(run_dir)
    except (OSError, RuntimeError) as error:  # mlx reports a full disk as RuntimeError
        shutil.rmtree(temporary, ignore_errors=True)
        raise RunError(f"{final}: cannot be written ({error}); free space on this disk and start again") from error
    return Checkpoint(final, update)


def find_checkpoints(run_dir: Path) -> list[Checkpoint]:
    """All whole-looking checkpoints of a run (renamed into place), oldest first."""
    found = []
    for path in run_dir.glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if number.isdigit() and (path / MANIFEST).is_file():
            found.append(Checkpoint(path, int(number)))
    return sorted(found, key=lambda checkpoint: checkpoint.update)


def newest_sound(run_dir: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies, and a line on each newer one that does not."""
    complaints = []
    for checkpoint in reversed(find_checkpoints(run_dir)):
        complaint = verify(checkpoint)
        if complaint is None:
            return checkpoint, complaints
        complaints.append(complaint)
    return None, complaints


def verify(checkpoint: Checkpoint) -> str | None:
    """None if every file has the size and digest of the manifest; else what is wrong."""
    try:
        files = json.loads((checkpoint.path / MANIFEST).read_text())["files"]
        for name, expected in files.items():
            if _describe(checkpoint.path / name) != expected:
                return f"{checkpoint.path / name}: not the file that was written (size or sha256 differs)"
    except (OSError, ValueError, KeyError) as error:
        return f"{checkpoint.path}: unreadable ({error})"
    return None


def read_state(checkpoint: Checkpoint) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((checkpoint.path / STATE).read_text())
    return state


def restore(checkpoint: Checkpoint, policy: Policy, optimizer: Any) -> None:
    """Put a checkpoint's weights and optimizer state in place."""
    policy.load_trainable(_read_weights(checkpoint.path))
    optimizer.state = tree_unflatten(list(mx.load(str(checkpoint.path / OPTIMIZER)).items()))
    mx.eval(policy.model.parameters(), optimizer.state)


def load_weights(path: Path, policy: Policy) -> None:
    """Put the weights of the checkpoint folder `path` into a policy of its kind."""
    policy.load_trainable(_read_weights(path))
    mx.eval(policy.model.parameters())


def mark_best(run_dir: Path, update: int, accuracy: float) -> None:
    """Remember which checkpoint scored best; `prune` keeps it."""
    temporary = run_dir / f"{BEST}.tmp"
    _write_json(temporary, {"checkpoint": f"checkpoint-{update}", "update": update, "accuracy": accuracy})
    temporary.replace(run_dir / BEST)


def best(run_dir: Path) -> dict[str, Any] | None:
    """{"checkpoint", "update", "accuracy"} of the best one; None before the first evaluation."""
    path = run_dir / BEST
    if not path.is_file():
        return None
    marked: dict[str, Any] = json.loads(path.read_text())
    return marked


def prune(run_dir: Path, keep: int, protected: frozenset[int]) -> None:
    """Remove all but the newest `keep`, the best, and those in `protected` (not yet evaluated)."""
    marked = best(run_dir)
    spared = protected | ({int(marked["update"])} if marked else set())
    for checkpoint in find_checkpoints(run_dir)[:-keep]:
        if checkpoint.update not in spared:
            shutil.rmtree(checkpoint.path, ignore_errors=True)


def _write_weights(folder: Path, policy: Policy) -> None:
    if policy.has_adapter:
        mx.save_safetensors(str(folder / ADAPTER), policy.trainable())
        _write_json(folder / "adapter_config.json", adapter_config(policy))
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


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
