"""Find the modules through which a model's layers call attention, and replace the function there.

Depends on mlx-lm's modules only, not on what is computed instead.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
from mlx_lm.models import base

from grpo_actors.policy.decoding.slot_kernels import HEAD_SIZES
from grpo_actors.policy.device import on_cuda


class Callers:
    """The modules of mlx-lm through which a model's layers call attention."""

    def __init__(self, model: Any) -> None:
        own = base.scaled_dot_product_attention
        names = {type(module).__module__ for module in model.modules()}
        self._modules: list[Any] = [
            sys.modules[name]
            for name in names
            if getattr(sys.modules[name], "scaled_dot_product_attention", None) is own
        ]

    @contextlib.contextmanager
    def calling(self, attend: Callable[..., mx.array]) -> Iterator[None]:
        """Make the layers call `attend`, with mlx-lm's arguments, within this block.

        This affects every thread: nothing else may run a model of this kind meanwhile.
        """
        for module in self._modules:
            module.scaled_dot_product_attention = attend
        try:
            yield
        finally:
            for module in self._modules:
                module.scaled_dot_product_attention = base.scaled_dot_product_attention

    def sizes(self, model: Any) -> list[tuple[int, int, int]]:
        """Return (key heads, query head size, value head size) of each layer that calls attention; runs one token."""
        sizes = []

        def attend(
            queries: mx.array, keys: mx.array, values: mx.array, *args: Any, **kwargs: Any
        ) -> mx.array:
            sizes.append((keys.shape[1], queries.shape[-1], values.shape[-1]))
            result: mx.array = base.scaled_dot_product_attention(queries, keys, values, *args, **kwargs)
            return result

        with self.calling(attend):
            model(mx.array([[1]]))
        return sizes


def callers(model: Any) -> Callers | bool:
    """Return the modules that call attention, if the kernel can replace all of the calls here; else False."""
    if not on_cuda():
        return False
    found = Callers(model)
    sizes = found.sizes(model)
    alike = (
        len(sizes) == len(model.layers) and len(set(sizes)) == 1
    )  # one array holds the cache of all layers
    fit = alike and sizes[0][1] == sizes[0][2] and sizes[0][1] in HEAD_SIZES
    return found if fit else False
