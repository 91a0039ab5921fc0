"""Write decoded tensors as safetensors, with one shard in memory at a time."""

import math
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx

from grpo_actors.convert.gguf.model_config import Slot
from grpo_actors.convert.gguf.reader import GgufFile
from grpo_actors.convert.writing import check_finite, save_safetensors
from grpo_actors.rundir.checkpoints import write_json

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
#: Limits the memory to one shard and one tensor decoded to float32.
SHARD_BYTES = 2 << 30


def total_bytes(slots: list[Slot], dtype: str) -> int:
    """Return the size of all weights in `dtype`, in bytes."""
    return sum(_slot_bytes(slot, dtype) for slot in slots)


def save(gguf: GgufFile, slots: list[Slot], folder: Path, dtype: str, shard_bytes: int = SHARD_BYTES) -> None:
    """Write ``model.safetensors``, or numbered shards and their index if one is not enough.

    Raises:
        ModelError: a weight is not finite in `dtype`, or the file cannot be written.
    """
    shards = list(_shards(slots, dtype, shard_bytes))
    names = [
        "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for number in range(1, len(shards) + 1)
    ]
    for name, shard in zip(names, shards, strict=True):
        save_safetensors(folder / name, {slot.name: decode(gguf, slot, dtype) for slot in shard})
    if len(shards) > 1:
        places = {slot.name: name for name, shard in zip(names, shards, strict=True) for slot in shard}
        index = {"metadata": {"total_size": total_bytes(slots, dtype)}, "weight_map": places}
        write_json(folder / "model.safetensors.index.json", index)


def _shards(slots: list[Slot], dtype: str, shard_bytes: int) -> Iterator[list[Slot]]:
    """Yield consecutive slots of at most `shard_bytes`; a larger tensor is a separate shard."""
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


def decode(gguf: GgufFile, slot: Slot, dtype: str) -> mx.array:
    """Return one tensor as stored in the folder; raises ModelError if it is not finite in `dtype`."""
    rows = gguf.read(slot.stored)
    if slot.undo is not None:
        rows = slot.undo(rows)
    weight = mx.array(rows).astype(DTYPES[dtype])
    check_finite(f"{gguf.path}: tensor {slot.stored}", weight, dtype)
    return weight
