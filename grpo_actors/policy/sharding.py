"""A model divided among ranks: each holds a part of every large matrix, and computes with it (tensor parallel, 1909.08053).

mlx-lm's models divide themselves (``shard``). Two kinds of layers result: one gives each rank a part of the outputs, the
other takes a part of the inputs from each rank and adds up the products. Embedding, norms and head stay whole. Between
the layers all ranks hold the same values.

An adapter is small. So each rank holds all of it, with the names and shapes that it has beside a whole model, and uses
only its part in a layer that is divided.
"""

import copy
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.nn.layers.distributed import (
    AllToShardedLinear,
    QuantizedAllToShardedLinear,
    QuantizedShardedToAllLinear,
    ShardedToAllLinear,
    sum_gradients,
)
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.lora import LoRALinear

from grpo_actors.config import ModelConfig
from grpo_actors.errors import ConfigError, ModelError, first_line

Group = mx.distributed.Group
_OF_OUTPUTS = (AllToShardedLinear, QuantizedAllToShardedLinear)
_OF_INPUTS = (ShardedToAllLinear, QuantizedShardedToAllLinear)


class Sharding:
    """How a model is divided. Making it divides the model, in place and lazily."""

    def __init__(self, model: nn.Module, group: Group) -> None:
        """Divide `model`; its arrays need not be evaluated, and afterwards only the parts are held.

        Raises:
            ModelError: A matrix cannot be divided by the number of ranks.
        """
        self.group = group
        # The modules as they were, with arrays that take no memory: `own` divides others of the same shapes.
        self._whole = _with_arrays(
            model, {id(array): mx.zeros(array.shape, array.dtype) for array in _arrays(model)}
        )
        #: Shapes of the whole arrays, by name.
        self.shapes = {name: array.shape for name, array in tree_flatten(model.parameters())}
        _shard(model, group)
        #: Names of modules that an adapter does not fit: those that hold a part, but whose class does not say of what; and
        #: what stays whole within experts that are divided, of whose gradient each rank computes a part.
        self.unfit: set[str] = set()
        experts = [
            name
            for name, module in model.named_modules()
            if getattr(module, "sharding_group", None) is not None
        ]
        for name, module in model.named_modules():
            if isinstance(module, _OF_OUTPUTS + _OF_INPUTS):
                kind = OutputsLoRA if isinstance(module, _OF_OUTPUTS) else InputsLoRA
                # mlx-lm asks a module for its own kind of adapter.
                module.to_lora = kind.maker(module, group)
            elif "weight" in module and (
                module.weight.shape != self.shapes[f"{name}.weight"]
                or any(name.startswith(f"{each}.") for each in experts)
            ):
                self.unfit.add(name)

    def own(self, arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """Return this rank's parts of arrays of the whole model, lazily; what belongs to no base module stays whole."""
        base = {name: array for name, array in arrays.items() if name in self.shapes}
        if not base:
            return dict(arrays)
        model = _with_arrays(self._whole, {id(array): array for array in _arrays(self._whole)})
        model.update(tree_unflatten(list(base.items())))
        _shard(model, self.group)
        parts = dict(tree_flatten(model.parameters()))
        return {name: parts.get(name, array) if name in base else array for name, array in arrays.items()}


class _ShardedLoRA(LoRALinear):  # type: ignore[misc]
    """An adapter on a layer that is divided: all of its two matrices, of one of which a part is used here."""

    #: Name of that one, and the axis along which it is divided.
    divided: str
    axis: int

    def __init__(self, linear: nn.Module, group: Group, sizes: tuple[int, int], **settings: Any) -> None:
        # Draws the same first values as beside a whole layer.
        super().__init__(*sizes, **settings)
        self.linear = linear
        self.group = group

    @classmethod
    def maker(cls, linear: nn.Module, group: Group) -> Any:
        """Return what mlx-lm calls as ``to_lora`` of the layer."""
        outputs, inputs = linear.weight.shape
        if "scales" in linear:
            inputs = inputs * 32 // linear.bits
        sizes = (
            (inputs * group.size(), outputs) if cls.divided == "lora_a" else (inputs, outputs * group.size())
        )
        return lambda r=8, dropout=0.0, scale=20.0: cls(
            linear, group, sizes, r=r, dropout=dropout, scale=scale
        )

    def __call__(self, x: mx.array) -> mx.array:
        """Map inputs [..., those here] to outputs [..., those here]."""
        a, b = self._parts()
        low = self._joined(self.dropout(x) @ a)
        y: mx.array = self.linear(x) + (self.scale * (low @ b)).astype(x.dtype)
        return y

    def fuse(self, dequantize: bool = False) -> nn.Module:  # noqa: ARG002, FBT001, FBT002 - mlx-lm's signature
        """Return the layer with the adapter added to its unpacked weights."""
        a, b = self._parts()
        merged = copy.copy(self.linear)
        merged.weight = self.linear.weight + ((self.scale * b.T) @ a.T).astype(self.linear.weight.dtype)
        return merged

    def _parts(self) -> tuple[mx.array, mx.array]:
        """Return what is used here of both matrices."""
        whole, rank = self[self.divided], self.group.rank()
        width = whole.shape[self.axis] // self.group.size()
        own = slice(rank * width, (rank + 1) * width)
        # A slice, not an output of `mx.split`: the graph must be the same on all ranks. MLX orders what it evaluates by the
        # graph, and collectives that meet in another order add up the wrong arrays without an error.
        own = whole[own] if self.axis == 0 else whole[:, own]
        return (own, self.lora_b) if self.divided == "lora_a" else (self.lora_a, own)

    def _joined(self, low: mx.array) -> mx.array:
        """Join the products [..., r] of the inputs here and the first matrix with those of the other ranks."""
        raise NotImplementedError


class OutputsLoRA(_ShardedLoRA):
    """An adapter on a layer that gives each rank a part of the outputs."""

    divided, axis = "lora_b", 1

    def _joined(self, low: mx.array) -> mx.array:
        # All have the same product. Each uses it for its own outputs, so the gradients of all of them count.
        joined: mx.array = sum_gradients(self.group)(low)
        return joined


class InputsLoRA(_ShardedLoRA):
    """An adapter on a layer that takes a part of the inputs from each rank."""

    divided, axis = "lora_a", 0

    def _joined(self, low: mx.array) -> mx.array:
        # What follows is the same on all ranks, and so is the gradient of the sum.
        return mx.distributed.all_sum(low, group=self.group)


def check_fit(model: nn.Module, sharding: Sharding, config: ModelConfig) -> None:
    """Check that the adapter on a divided model is on layers whose parts it knows.

    Raises:
        ConfigError: It is not.
    """
    adapted = {name for name, module in model.named_modules() if "lora_a" in module}
    if unfit := sorted(adapted & sharding.unfit):
        raise ConfigError(
            f"model.lora_keys: {unfit[0]} of {config.model_name} is divided among ranks in a way that an adapter does not "
            'fit; name only others, such as "self_attn.q_proj"'
        )


def partial_gradients(model: nn.Module) -> frozenset[str]:
    """Return the names of the matrices of which each rank uses a part, and so computes that part of the gradient."""
    return frozenset(
        f"{name}.{module.divided}"
        for name, module in model.named_modules()
        if isinstance(module, _ShardedLoRA)
    )


def is_unpacked_adapter(module: nn.Module) -> bool:
    """Return whether a module is an adapter on a divided layer with unpacked weights, which `fuse` can merge."""
    return isinstance(module, _ShardedLoRA) and isinstance(
        module.linear, AllToShardedLinear | ShardedToAllLinear
    )


def from_first(array: mx.array, group: Group) -> mx.array:
    """Return the token ids of rank 0, lazily; all ranks give an array of the same shape."""
    # An id is exact in float32, and nccl need not know its type.
    mine = array.astype(mx.float32) if group.rank() == 0 else mx.zeros(array.shape)
    return mx.distributed.all_sum(mine, group=group).astype(array.dtype)


def _shard(model: Any, group: Group) -> None:
    try:
        model.shard(group)
    except (ValueError, AssertionError) as error:
        raise ModelError(
            f"this model cannot be divided among {group.size()} ranks: {first_line(error)}"
        ) from error


def _arrays(model: nn.Module) -> list[mx.array]:
    return [array for _, array in tree_flatten(model.parameters())]


def _with_arrays(model: nn.Module, arrays: dict[int, mx.array]) -> Any:
    """Copy the modules of a model, but not its arrays: `arrays` are those of the copy, by the id of the original."""
    return copy.deepcopy(model, dict(arrays))
