"""Write a model folder as a GGUF file: the inverse of reading one.

Matrices have one type and vectors are float32, as in llama.cpp. One tensor is in memory at a time. Rejects
models that the file cannot express: another architecture, another rotary rule, quantised weights.
"""

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Type

from grpo_actors.convert.gguf import rope, tokens
from grpo_actors.convert.gguf.families import FAMILIES, Family
from grpo_actors.convert.gguf.model_config import Slot, expected_slots
from grpo_actors.convert.gguf.sizes import Floats, Sizes
from grpo_actors.errors import ModelError

#: Architectures of which this module writes all settings.
WRITTEN = tuple(name for name in ("llama", "qwen2", "qwen3") if name in FAMILIES)
#: Type of the matrices -> its type in the file, its size in bytes, and the file type.
_TYPES = {
    "float32": (Type.F32, 4, gguf.LlamaFileType.ALL_F32),
    "float16": (Type.F16, 2, gguf.LlamaFileType.MOSTLY_F16),
    "bfloat16": (Type.BF16, 2, gguf.LlamaFileType.MOSTLY_BF16),
}


def write_file(folder: Path, target: Path, dtype: str) -> None:
    """Write the model in `folder` to the file `target`.

    Args:
        folder: config, safetensors and tokenizer, as mlx-lm and transformers load them.
        target: overwritten if it exists; the caller removes what a failure leaves behind.
        dtype: of the matrices: ``float32``, ``float16`` or ``bfloat16``.

    Raises:
        ModelError: a GGUF file cannot express the model.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    family, sizes = _family(config), _sizes(config)
    weights = _load(folder)
    slots = _slots(weights, family, sizes)
    writer = gguf.GGUFWriter(target, config["model_type"])
    with contextlib.closing(writer):
        writer.add_file_type(_TYPES[dtype][2])
        _add_architecture(writer, config, sizes)
        factors = _add_rope(writer, config, sizes)
        tokens.add(writer, folder, sizes.vocab)
        for slot in slots:
            kind, itemsize, _ = _type_of(slot, dtype)
            nbytes = itemsize * math.prod(slot.shape)
            writer.add_tensor_info(slot.stored, slot.shape, np.dtype(np.float32), nbytes, raw_dtype=kind)
        if factors is not None:
            writer.add_tensor_info(rope.FACTORS, factors.shape, factors.dtype, factors.nbytes)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for slot in slots:
            rows = _stored(slot, weights.pop(slot.name), dtype)
            writer.write_tensor_data(gguf.quants.quantize(rows, _type_of(slot, dtype)[0]))
        if factors is not None:
            writer.write_tensor_data(factors)
    tokens.check(folder, target, sizes.vocab)


def _type_of(slot: Slot, dtype: str) -> tuple[Type, int, gguf.LlamaFileType]:
    return _TYPES[dtype if len(slot.shape) > 1 else "float32"]


def _family(config: dict[str, Any]) -> Family:
    """Return the architecture's table; rejects a model that shares its name but not its maths."""
    name = config.get("model_type")
    if name not in WRITTEN:
        raise ModelError(f"--gguf: the architecture must be one of {', '.join(WRITTEN)}, got {name}")
    if "quantization" in config:
        raise ModelError("--gguf: the weights are quantised; add --dequantize")
    for key, wanted in (("hidden_act", "silu"), ("use_sliding_window", False), ("num_local_experts", 0)):
        if config.get(key, wanted) != wanted:
            raise ModelError(f"--gguf: {name} with {key} = {config[key]} cannot be written")
    return FAMILIES[name]


def _sizes(config: dict[str, Any]) -> Sizes:
    heads = config["num_attention_heads"]
    return Sizes(
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        inner=config["intermediate_size"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        vocab=config["vocab_size"],
    )


def _load(folder: Path) -> dict[str, mx.array]:
    """Return all weights of the folder by name, each read when it is first used."""
    weights: dict[str, mx.array] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        arrays = mx.load(str(file))
        assert isinstance(arrays, dict)
        weights |= arrays
    return weights


def _slots(weights: dict[str, mx.array], family: Family, sizes: Sizes) -> list[Slot]:
    """Return the slots of all weights; rejects missing, unexpected and misshapen ones."""
    flags = {
        flag: any(f"model.layers.0.{place.name}" in weights for place in places.values())
        for flag, places in family.optional.items()
    }
    slots = list(expected_slots(family, sizes, flags, tied="lm_head.weight" not in weights))
    odd = weights.keys() ^ {slot.name for slot in slots}
    if odd:
        raise ModelError(
            f"--gguf: {min(odd)} is not where {family.model_type} has its weights; the model is another one"
        )
    for slot in slots:
        if weights[slot.name].shape != slot.shape:
            raise ModelError(
                f"--gguf: {slot.name} must have shape {slot.shape}, got {weights[slot.name].shape}"
            )
    return slots


def _stored(slot: Slot, weight: mx.array, dtype: str) -> Floats:
    """Return the weight in the file's order of rows, from which `undo` restores the folder's."""
    rows = np.array(weight.astype(mx.float32))
    if dtype == "float16" and rows.ndim > 1 and np.abs(rows).max() > np.finfo(np.float16).max:
        raise ModelError(f"--gguf: {slot.name} is too large for float16; add --dtype bfloat16 or float32")
    if slot.undo is None:
        return rows
    # Apply `undo` to row numbers: the result shows which stored row the reader puts where.
    order = slot.undo(np.arange(len(rows), dtype=np.float32)).astype(np.int64)
    stored = np.empty_like(rows)
    stored[order] = rows
    return stored


def _add_architecture(writer: gguf.GGUFWriter, config: dict[str, Any], sizes: Sizes) -> None:
    writer.add_block_count(sizes.layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(sizes.hidden)
    writer.add_feed_forward_length(sizes.inner)
    writer.add_head_count(sizes.heads)
    writer.add_head_count_kv(sizes.kv_heads)
    writer.add_key_length(sizes.head_dim)
    writer.add_value_length(sizes.head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(sizes.vocab)


def _add_rope(
    writer: gguf.GGUFWriter, config: dict[str, Any], sizes: Sizes
) -> npt.NDArray[np.float32] | None:
    """Write base and scaling of the rotary positions; return the divisor tensor of Llama 3's rule, or None."""
    # transformers 5 keeps both in one table.
    table = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or table
    base = float(config.get("rope_theta") or table.get("rope_theta") or 10000.0)
    writer.add_rope_dimension_count(sizes.head_dim)
    writer.add_rope_freq_base(base)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(scaling["factor"])
        return None
    if kind == "llama3":
        factors = rope.llama3_factors(base, sizes.head_dim, scaling["factor"])
        if {key: scaling.get(key) for key in rope.LLAMA3} == rope.LLAMA3:
            return factors
    raise ModelError(f"--gguf: rotary positions scaled by {json.dumps(scaling)} cannot be written")
