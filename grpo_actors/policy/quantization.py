"""Weights in few bits: which modules, in which groups, as mlx-lm's own conversion does it.

Knows modules; refuses to know whether a frozen base is quantised here or a worker's copy of the policy.
"""

from typing import Any

import mlx.core as mx
import mlx_lm.utils
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm.tuner.dora import DoRAEmbedding

from grpo_actors.policy.plan import GROUP_SIZE


def quantize(model: nn.Module, bits: int) -> None:
    """Quantise in place, lazily, what ``mlx_lm.convert -q`` would: embeddings and output head included.

    A module whose rows do not divide into groups stays as it is; a model may have its own say (most
    keep the router of their experts at 8 bits).
    """
    own_choice = getattr(model, "quant_predicate", None)
    # Reads its embedding's weight as floats when it serves as the output head.
    untouchable = {id(module.embedding) for module in model.modules() if isinstance(module, DoRAEmbedding)}

    def choice(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if not hasattr(module, "to_quantized") or module.weight.shape[-1] % GROUP_SIZE:
            return False
        if own_choice is None:
            return id(module) not in untouchable
        # Under an adapter the module has moved one name down, and a model knows it by its own.
        chosen: bool | dict[str, Any] = own_choice(path.removesuffix(".linear"), module)
        return id(module) not in untouchable and chosen

    nn.quantize(model, group_size=GROUP_SIZE, bits=bits, class_predicate=choice)


def is_quantized(model: nn.Module) -> bool:
    """Whether any weights are packed into integers, by whatever scheme."""
    return any(not mx.issubdtype(array.dtype, mx.floating) for _, array in tree_flatten(model.parameters()))


def parameter_count(model: nn.Module) -> int:
    """Weights that the model stands for, packed ones counted one by one."""
    if is_quantized(model):
        return int(mlx_lm.utils.get_total_parameters(model))
    return sum(array.size for _, array in tree_flatten(model.parameters()))


def storage(model: nn.Module) -> str:
    """How the weights are stored: their types, or the bits that one takes, scales and offsets included."""
    if is_quantized(model):
        return f"{mlx_lm.utils.compute_bits_per_weight(model):.2f} bits a weight"
    types = {str(array.dtype).removeprefix("mlx.core.") for _, array in tree_flatten(model.parameters())}
    return ", ".join(sorted(types))
