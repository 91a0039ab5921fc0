"""Decoded tensors to safetensors, one shard in memory at a time."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx

from grpo_actors.errors import ModelError
from grpo_actors.policy.gguf.architecture import Slot
from grpo_actors.policy.gguf.reader import GgufFile

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
#: Bounds the memory: one shard is held, and one tensor decoded to float32.
SHARD_BYTES = 2 << 30


def total_bytes(slots: list[Slot], dtype: str) -> int:
    """Bytes of all weights in `dtype`."""
    return sum(_slot_bytes(slot, dtype) for slot in slots)


def save(gguf: GgufFile, slots: list[Slot], folder: Path, dtype: str, shard_bytes: int = SHARD_BYTES) -> None:
    """Write ``model.safetensors``, or numbered shards and their index where one is not enough.

    Raises:
        ModelError: a weight is not finite in `dtype`, or the file cannot be written.
    """
    shards = list(_shards(slots, dtype, shard_bytes))
    names = [
        "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for number in range(1, len(shards) + 1)
    ]
    for name, shard in zip(names, shards, strict=True):
        _save_shard(folder / name, {slot.name: _weight(gguf, slot, dtype) for slot in shard})
    if len(shards) > 1:
        places = {slot.name: name for name, shard in zip(names, shards, strict=True) for slot in shard}
        index = {"metadata": {"total_size": total_bytes(slots, dtype)}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")


def _shards(slots: list[Slot], dtype: str, shard_bytes: int) -> Iterator[list[Slot]]:
    """Consecutive runs of at most `shard_bytes`; a tensor larger than that is a shard of its own."""
    run: list[Slot] = []
    held = 0
    for slot in slots:
        size = _slot_bytes(slot, dtype)
        if run and held + size > shard_bytes:
            yield run
            run, held = [], 0
        run.append(slot)
        held += size
    yield run


def _slot_bytes(slot: Slot, dtype: str) -> int:
    return math.prod(slot.shape) * DTYPES[dtype].size


def _weight(gguf: GgufFile, slot: Slot, dtype: str) -> mx.array:
    rows = gguf.read(slot.stored)
    if slot.undo is not None:
        rows = slot.undo(rows)
    weight = mx.array(rows).astype(DTYPES[dtype])
    if not mx.all(mx.isfinite(weight)).item():
        raise ModelError(
            f"{gguf.path}: tensor {slot.stored} is not finite as {dtype}; take --dtype bfloat16 or float32, "
            "or fetch the file again if it is so there too"
        )
    return weight


def _save_shard(path: Path, weights: dict[str, mx.array]) -> None:
    try:
        # transformers refuses a file that does not name its framework.
        mx.save_safetensors(str(path), weights, metadata={"format": "mlx"})
    except (RuntimeError, OSError) as error:
        raise ModelError(f"{path}: cannot be written: {error}; free some disk space") from None
