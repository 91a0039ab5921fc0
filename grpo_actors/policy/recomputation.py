"""Recompute activations in the backward pass instead of keeping them in memory (1604.06174).

`recomputed_blocks` recomputes whole transformer blocks, at the cost of another forward pass (gradient
checkpointing). `recomputed_layers` does the same for layers of some classes. `recomputed_gates` recomputes only the product
of gate and up in each MLP; this costs next to nothing on a GPU, and the product is a quarter of what a block keeps.

Depends on modules and their dropout only, not on what is trained.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_map
from mlx_lm.models.activations import swiglu

from grpo_actors.policy.architectures import architecture_of


def recomputed_blocks(model: Any) -> contextlib.AbstractContextManager[None]:
    """Recompute each transformer block in backward passes within this block, instead of keeping its activations."""
    return recomputed_layers({type(block) for block in model.layers})


@contextlib.contextmanager
def recomputed_layers(kinds: Iterable[Any]) -> Iterator[None]:
    """Recompute each layer of these classes in backward passes within this block, instead of keeping its activations.

    This patches the classes, for every thread: nothing else may run the model meanwhile.
    """
    with _called_instead({kind: recomputed(kind.__call__) for kind in kinds}):
        yield


@contextlib.contextmanager
def recomputed_gates(model: Any) -> Iterator[None]:
    """Recompute the products of gate and up in backward passes within this block; without such MLPs, do nothing.

    This patches the class of the MLPs, for every thread, like `recomputed_layers`.
    """
    gated = {type(module) for module in model.modules() if _is_gated(module)}
    with _called_instead(dict.fromkeys(gated, _gated)):
        yield


def recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return `forward` (module, arguments -> arrays) as a function that a backward pass computes again.

    It keeps its arguments and the module's weights, and nothing that it computes.
    """

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        key = _random_key()

        def pure(parameters: Any, *args: Any, **kwargs: Any) -> Any:
            module.update(parameters)
            # `mx.checkpoint` needs the gradient of every argument, and CUDA's attention has no gradient of a mask.
            args, kwargs = tree_map(_constant, (args, kwargs))
            with _dropout_from(key):
                return forward(module, *args, **kwargs)

        return mx.checkpoint(pure)(module.trainable_parameters(), *args, **kwargs)

    return call


@contextlib.contextmanager
def _called_instead(calls: Mapping[Any, Callable[..., Any]]) -> Iterator[None]:
    """Replace `__call__` of these classes within this block."""
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
    """Compute an MLP [.., H] -> [.., H] that keeps gate and up, but not their product."""
    key = _random_key()

    def pure(parameters: Any, gate: mx.array, up: mx.array) -> Any:
        mlp.down_proj.update(parameters)
        with _dropout_from(key):
            return mlp.down_proj(swiglu(gate, up))

    down: mx.array = mx.checkpoint(pure)(
        mlp.down_proj.trainable_parameters(), mlp.gate_proj(x), mlp.up_proj(x)
    )
    return down


def _random_key() -> mx.array:
    """Return a key [2], drawn from MLX's global state."""
    return mx.random.randint(0, 2**31 - 1, (2,)).astype(mx.uint32)


def _constant(argument: Any) -> Any:
    """Stop the gradient of an array that is not of floats; return any other argument unchanged."""
    is_mask = isinstance(argument, mx.array) and not mx.issubdtype(argument.dtype, mx.floating)
    return mx.stop_gradient(argument) if is_mask else argument


@contextlib.contextmanager
def _dropout_from(key: mx.array) -> Iterator[None]:
    """Draw dropout from `key` within this block.

    MLX's global state advances with every draw. From it, the second computation would drop other inputs, and its
    gradient would belong to no forward pass.
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
