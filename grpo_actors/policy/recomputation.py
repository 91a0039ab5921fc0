"""A backward pass that computes again what it would else keep in memory (1604.06174).

Whole transformer blocks, which costs another forward pass (gradient checkpointing); or of each MLP the product of gate and
up alone, which costs next to nothing on a GPU and is a quarter of what a block keeps.

Knows modules and their dropout; refuses to know what is trained.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_map
from mlx_lm.models.activations import swiglu

from grpo_actors.policy.architectures import architecture_of
from grpo_actors.policy.shared_prompts import Layer


@contextlib.contextmanager
def recomputed_blocks(model: Any) -> Iterator[None]:
    """Within this block, a backward pass computes each transformer block again instead of keeping its activations.

    It changes the blocks' class, for this thread and every other: nothing else may run the model meanwhile.
    """
    with _called_instead(
        {kind: _recomputed(kind.__call__) for kind in {type(block) for block in model.layers}}
    ):
        yield


@contextlib.contextmanager
def recomputed_gates(model: Any) -> Iterator[None]:
    """Within this block, a backward pass computes the products of gate and up again; a model without any is as it is.

    It changes the MLPs' class, as `recomputed_blocks` does the blocks'.
    """
    gated = {type(module) for module in model.modules() if _is_gated(module)}
    with _called_instead(dict.fromkeys(gated, _gated)):
        yield


@contextlib.contextmanager
def _called_instead(calls: Mapping[Any, Callable[..., Any]]) -> Iterator[None]:
    """Within this block, modules of these classes are called so."""
    originals = {kind: kind.__call__ for kind in calls}
    for kind, call in calls.items():
        kind.__call__ = call
    try:
        yield
    finally:
        for kind, original in originals.items():
            kind.__call__ = original


def _is_gated(module: Any) -> bool:
    return type(module).__name__ == "MLP" and architecture_of(module).gated_mlp


def _gated(mlp: Any, x: mx.array) -> mx.array:
    """[.., H] -> [.., H]."""
    key = _random_key()

    def pure(parameters: Any, gate: mx.array, up: mx.array) -> Any:
        mlp.down_proj.update(parameters)
        with _dropout_from(key):
            return mlp.down_proj(swiglu(gate, up))

    down: mx.array = mx.checkpoint(pure)(
        mlp.down_proj.trainable_parameters(), mlp.gate_proj(x), mlp.up_proj(x)
    )
    return down


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def call(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        key = _random_key()
        cache = next((each for each in (*args, *kwargs.values()) if isinstance(each, Layer)), Layer([]))

        # The cache's arrays go in and out by name: what a function merely holds on to gets no gradient.
        def pure(parameters: Any, given: list[mx.array], *args: Any, **kwargs: Any) -> Any:
            block.update(parameters)
            cache.given = given
            # `mx.checkpoint` asks for the gradient of every array it is given, and CUDA's attention has none of a mask.
            args, kwargs = tree_map(_constant, (args, kwargs))
            with _dropout_from(key):
                return forward(block, *args, **kwargs), cache.kept

        outputs, cache.kept = mx.checkpoint(pure)(block.trainable_parameters(), cache.given, *args, **kwargs)
        return outputs

    return call


def _random_key() -> mx.array:
    """[2], from MLX's global state."""
    return mx.random.randint(0, 2**31 - 1, (2,)).astype(mx.uint32)


def _constant(argument: Any) -> Any:
    """What is no number of the kind that has a gradient, without one; anything else as it is."""
    is_mask = isinstance(argument, mx.array) and not mx.issubdtype(argument.dtype, mx.floating)
    return mx.stop_gradient(argument) if is_mask else argument


@contextlib.contextmanager
def _dropout_from(key: mx.array) -> Iterator[None]:
    """Within this block dropout draws from `key`: drawn from MLX's global state, which moves on with every
    draw, the second computation would drop other inputs, and its gradient belong to no forward pass.
    """
    original = nn.Dropout.__call__

    def call(dropout: Any, x: mx.array) -> mx.array:
        nonlocal key
        share: float = dropout._p_1  # noqa: SLF001 - of the inputs that are kept
        if not dropout.training or share == 1:
            return x
        key, own = mx.random.split(key)
        return mx.random.bernoulli(share, x.shape, key=own) * x / share

    nn.Dropout.__call__ = call
    try:
        yield
    finally:
        nn.Dropout.__call__ = original
