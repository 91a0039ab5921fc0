"""DoRA while weights stand still, as they do for the length of a batch of samples.

mlx-lm's layers unpack the base, add the adapter and take the norm of each row at every call. That is little
beside the tokens of a training batch, and many times a decoding step's own work. Here the norms are taken
once, and the base is multiplied as it is packed; everything else is as there.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx_lm.tuner.dora import DoRALinear


@contextlib.contextmanager
def fixed_norms(model: nn.Module) -> Iterator[None]:
    """Within this block the model is in evaluation mode, and its weights do not change.

    It changes the layers' class, for this thread and every other: nothing may train meanwhile.
    """
    factors = {id(module): _factor(module) for module in model.modules() if isinstance(module, DoRALinear)}
    original = DoRALinear.__call__
    if factors:
        DoRALinear.__call__ = lambda module, x: _forward(module, factors[id(module)], x)
    try:
        yield
    finally:
        DoRALinear.__call__ = original


def takes_norms(model: nn.Module) -> bool:
    """Whether a DoRA layer is left whose norms are taken outside of the model: what is compiled would keep them."""
    return any(isinstance(module, DoRALinear) for module in model.modules())


def _factor(module: Any) -> mx.array:
    """[out]: the magnitude of each row over its norm. 2402.09353, equation 5."""
    adapted = module._dequantized_weight() + (module.scale * module.lora_b.T) @ module.lora_a.T  # noqa: SLF001
    factor: mx.array = module.m / mx.linalg.norm(adapted, axis=1)
    mx.eval(factor)  # here: the adapted matrices of all layers at once would not fit
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
