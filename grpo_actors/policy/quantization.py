"""Quantised weights: the same modules and groups as mlx-lm's own conversion.

Depends on modules only. It serves the frozen base and a worker's copy of the policy alike.
"""

from typing import Any

import mlx.core as mx
import mlx_lm.utils
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.tuner.dora import DoRAEmbedding

from grpo_actors.policy.plan import GROUP_SIZE


def quantize(model: nn.Module, bits: int) -> None:
    """Quantise `model` in place, lazily, as ``mlx_lm.convert -q`` does: with embeddings and output head.

    A module whose rows do not divide into groups is left unchanged. A model may bring its own rules (most keep the
    router of their experts at 8 bits).
    """
    own_choice = getattr(model, "quant_predicate", None)
    # DoRAEmbedding reads its embedding's weight as floats when it serves as the output head.
    untouchable = {id(module.embedding) for module in model.modules() if isinstance(module, DoRAEmbedding)}

    def choice(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if not hasattr(module, "to_quantized") or module.weight.shape[-1] % GROUP_SIZE:
            return False
        if own_choice is None:
            return id(module) not in untouchable
        # An adapter wraps the module, which appends ".linear" to its name; the model's rules use the plain name.
        chosen: bool | dict[str, Any] = own_choice(path.removesuffix(".linear"), module)
        return id(module) not in untouchable and chosen

    nn.quantize(model, group_size=GROUP_SIZE, bits=bits, class_predicate=choice)


def is_quantized(model: nn.Module) -> bool:
    """Return whether any weights are packed into integers, by any scheme."""
    return any(not mx.issubdtype(array.dtype, mx.floating) for _, array in tree_flatten(model.parameters()))


def parameter_count(model: nn.Module) -> int:
    """Return the number of weights, with every packed weight counted."""
    if is_quantized(model):
        return int(mlx_lm.utils.get_total_parameters(model))
    return sum(array.size for _, array in tree_flatten(model.parameters()))


def storage(model: nn.Module) -> str:
    """Describe how the weights are stored: their types, or bits per weight with scales and offsets."""
    if is_quantized(model):
        return f"{mlx_lm.utils.compute_bits_per_weight(model):.2f} bits a weight"
    types = {str(array.dtype).removeprefix("mlx.core.") for _, array in tree_flatten(model.parameters())}
    return ", ".join(sorted(types))
