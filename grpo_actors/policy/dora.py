"""DoRA layers with fixed weights, as during a batch of samples.

At every call, mlx-lm's layers unpack the base, add the adapter and compute the norm of each row. This costs
little compared with a training batch, but many times as much as a decoding step itself. Here the norms are
computed once, and the packed base is multiplied directly; the rest is the same as in mlx-lm.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx_lm.tuner.dora import DoRALinear


@contextlib.contextmanager
def fixed_norms(model: nn.Module) -> Iterator[None]:
    """Compute the norms of all DoRA layers once, and use them within this block.

    The model must be in evaluation mode, and its weights must not change. The block patches the layers' class,
    for every thread: nothing may train meanwhile.
    """
    factors = {id(module): _factor(module) for module in model.modules() if isinstance(module, DoRALinear)}
    original = DoRALinear.__call__
    if factors:
        DoRALinear.__call__ = lambda module, x: _forward(module, factors[id(module)], x)
    try:
        yield
    finally:
        DoRALinear.__call__ = original


def has_dora(model: nn.Module) -> bool:
    """Return whether the model has a DoRA layer, whose norms lie outside the model: a compiled step would keep them."""
    return any(isinstance(module, DoRALinear) for module in model.modules())


def _factor(module: Any) -> mx.array:
    """Return [out]: each row's magnitude divided by its norm. 2402.09353, equation 5."""
    adapted = module._dequantized_weight() + (module.scale * module.lora_b.T) @ module.lora_a.T  # noqa: SLF001
    factor: mx.array = module.m / mx.linalg.norm(adapted, axis=1)
    mx.eval(factor)  # layer by layer: the adapted matrices of all layers at once would not fit
    return factor


def _forward(module: Any, factor: mx.array, x: mx.array) -> Any:
    linear = module.linear
    if isinstance(linear, nn.QuantizedLinear):
        settings = {"group_size": linear.group_size, "bits": linear.bits, "mode": linear.mode}
        y = mx.quantized_matmul(x, linear.weight, linear.scales, linear.get("biases"), **settings)
    else:
        y = x @ linear.weight.T
    z = (x @ module.lora_a) @ module.lora_b
    y = factor.astype(x.dtype) * (y + (module.scale * z).astype(x.dtype))
    return y + linear.bias if "bias" in linear else y
