"""Measure how evenly a mixture of experts uses its experts on the tokens that train.

A router that sends most tokens to a few experts leaves the others untrained. mlx-lm's models have no auxiliary loss against
that, and none is added here: it would pull the router against the reward. Depends on mlx-lm's layers of experts and on
one micro-batch.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP


class Choice(NamedTuple):
    """The experts that one layer chose."""

    #: Number of the layer's experts, E.
    experts: int
    #: Their numbers [.., k], one row for each token of the micro-batch.
    chosen: mx.array


def has_experts(model: Any) -> bool:
    """Return whether a model has layers of experts."""
    return any(isinstance(module, SwitchGLU | SwitchMLP) for module in model.modules())


@contextlib.contextmanager
def watched_experts() -> Iterator[list[Choice]]:
    """Collect the choices of all layers that are computed within this block.

    This patches mlx-lm's layers of experts, for every thread.
    """
    choices: list[Choice] = []
    originals = {kind: kind.__call__ for kind in (SwitchGLU, SwitchMLP)}

    def watching(original: Any) -> Any:
        def call(layer: Any, x: mx.array, indices: mx.array, *rest: Any) -> mx.array:
            choices.append(Choice(_experts(layer), mx.stop_gradient(indices)))
            outputs: mx.array = original(layer, x, indices, *rest)
            return outputs

        return call

    for kind, original in originals.items():
        kind.__call__ = watching(original)
    try:
        yield choices
    finally:
        for kind, original in originals.items():
            kind.__call__ = original


def largest_load(choices: Sequence[Choice], batch: Mapping[str, mx.array]) -> mx.array:
    """Return, for the layers together, the mean of the largest load of an expert over that of all experts; a scalar.

    Only tokens that train count. 1: all experts are chosen equally often; E / k: the same k are chosen always.

    Args:
        choices: Those of the layers for every token of the micro-batch.
        batch: `MicroBatch.arrays()`.
    """
    trains = mx.zeros(batch["targets"].shape, mx.float32)
    trains = trains.at[batch["target_at"]].add(batch["mask"].astype(mx.float32))  # [K]
    loads = []
    for experts, chosen in choices:
        rows = chosen.reshape(-1, chosen.shape[-1])[batch["inputs_at"]]  # [K, k]
        weights = mx.broadcast_to(trains[:, None], rows.shape)
        load = mx.zeros(experts, mx.float32).at[rows.flatten()].add(weights.flatten())
        loads.append(load.max() * experts / mx.maximum(load.sum(), 1.0))
    return mx.stack(loads).mean()


def _experts(layer: Any) -> int:
    sizes = (array.shape[0] for _, array in tree_flatten(layer.parameters()) if array.ndim == 3)
    return int(next(sizes))
