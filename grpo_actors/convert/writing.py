"""Checks and writers that every conversion shares: free disk space, finite weights, safetensors and JSON files."""

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx

from grpo_actors.atomic import write_fault
from grpo_actors.errors import ModelError
from grpo_actors.rundir.checkpoints import write_json


def check_space(folder: Path, needed: int) -> None:
    """Refuse a disk with less than `needed` bytes free; call it before anything is written."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ModelError(
            f"{folder}: the weights take {needed:,} bytes, the disk has {free:,} free; choose another disk"
        )


def check_finite(where: str, weight: mx.array, dtype: str) -> None:
    """Refuse a weight that is not finite after the cast to `dtype`; `where` names the file and the tensor."""
    if not mx.all(mx.isfinite(weight)).item():
        raise ModelError(
            f"{where} is not finite as {dtype}; take --dtype bfloat16 or float32, "
            "or fetch the file again if the weight is not finite in these either"
        )


def save_safetensors(path: Path, weights: dict[str, mx.array]) -> None:
    """Write one file; raises ModelError if the disk refuses."""
    try:
        # transformers rejects a file that does not name its framework.
        mx.save_safetensors(str(path), weights, metadata={"format": "mlx"})
    except (RuntimeError, OSError) as error:
        raise ModelError(f"{path}: cannot be written: {write_fault(error, path.parent)}") from None


def update_json(path: Path, changes: dict[str, Any]) -> None:
    """Set some keys of a JSON file; creates the file if it is absent."""
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    write_json(path, content | changes)
