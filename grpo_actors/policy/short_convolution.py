"""Compute convolutions of each channel by itself over a few tokens, as state-space and linear attention layers have.

MLX computes them as general convolutions with as many groups as channels, and their gradient as two more. Here they are what
they are, a sum of a few shifted products:

    y[t] = Σᵢ w[i] x[t + i];   ∂x[t] = Σᵢ w[i] ∂y[t − i];   ∂w[i] = Σₜ x[t + i] ∂y[t]

Depends on MLX's layer, not on models or batches.
"""

import contextlib
from collections.abc import Iterable, Iterator
from functools import reduce
from operator import add
from typing import Any

import mlx.core as mx
from mlx import nn

#: More taps than this are left to MLX: each is another pass over the text.
MOST_TAPS = 8


@contextlib.contextmanager
def convolutions_by_shifts(model: Any) -> Iterator[None]:
    """Compute the short convolutions of a model's layers by shifts within this block; without such layers, do nothing.

    Backward passes must lie within the block too. This patches MLX's layer, for every thread.
    """
    known = {id(layer) for layer in model.modules() if isinstance(layer, nn.Conv1d) and _is_short(layer)}
    original = nn.Conv1d.__call__
    if known and not mx.metal.is_available():  # Metal has a kernel for them
        nn.Conv1d.__call__ = lambda layer, x: _call(layer, x) if id(layer) in known else original(layer, x)
    try:
        yield
    finally:
        nn.Conv1d.__call__ = original


def _is_short(layer: Any) -> bool:
    channels, taps, inputs_of_each = layer.weight.shape
    return (
        inputs_of_each == 1
        and layer.groups == channels
        and taps <= MOST_TAPS
        and (layer.stride, layer.padding, layer.dilation) == (1, 0, 1)
    )


def _call(layer: Any, x: mx.array) -> mx.array:
    y: mx.array = by_shifts(x, layer.weight[..., 0])  # type: ignore[assignment]
    return y + layer.bias if "bias" in layer else y


@mx.custom_function
def by_shifts(x: mx.array, weight: mx.array) -> mx.array:
    """Convolve every channel with its own taps; sums are in float32.

    Args:
        x: [B, T + K - 1, C].
        weight: [C, K].

    Returns:
        [B, T, C] in the type of x.
    """
    taps = weight.shape[1]
    return _sum(_at(x, i, x.shape[1] - taps + 1) * _tap(weight, i) for i in range(taps)).astype(x.dtype)


@by_shifts.vjp
def _gradient(
    primals: tuple[mx.array, mx.array], cotangent: mx.array, _: mx.array
) -> tuple[mx.array, mx.array]:
    x, weight = primals
    taps, length = weight.shape[1], cotangent.shape[1]
    padded = mx.pad(cotangent, [(0, 0), (taps - 1, taps - 1), (0, 0)])
    of_x = _sum(_at(padded, taps - 1 - i, x.shape[1]) * _tap(weight, i) for i in range(taps))
    of_taps = [
        (_at(x, i, length) * cotangent.astype(mx.float32)).sum(axis=1).sum(axis=0) for i in range(taps)
    ]
    return of_x.astype(x.dtype), mx.stack(of_taps, axis=1).astype(weight.dtype)


def _at(x: mx.array, start: int, length: int) -> mx.array:
    return x[:, start : start + length].astype(mx.float32)


def _tap(weight: mx.array, i: int) -> mx.array:
    return weight[:, i].astype(mx.float32)


def _sum(arrays: Iterable[mx.array]) -> mx.array:
    return reduce(add, arrays)
