"""Through what a model's layers call attention, so that another way of computing it can take its place.

Knows mlx-lm's modules; refuses to know what is computed instead.
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
        """Within this block the layers call `attend` instead, with mlx-lm's arguments.

        For every thread: nothing else may run a model of this kind meanwhile.
        """
        for module in self._modules:
            module.scaled_dot_product_attention = attend
        try:
            yield
        finally:
            for module in self._modules:
                module.scaled_dot_product_attention = base.scaled_dot_product_attention

    def sizes(self, model: Any) -> list[tuple[int, int, int]]:
        """(heads of keys, size of a query's head, of a value's) of each layer that calls it so: tried on one token."""
        sizes = []

        def told(queries: mx.array, keys: mx.array, values: mx.array, *args: Any, **kwargs: Any) -> mx.array:
            sizes.append((keys.shape[1], queries.shape[-1], values.shape[-1]))
            result: mx.array = base.scaled_dot_product_attention(queries, keys, values, *args, **kwargs)
            return result

        with self.calling(told):
            model(mx.array([[1]]))
        return sizes


def callers(model: Any) -> Callers | bool:
    """Through what a model calls attention, if the kernel can take the place of all of it here; else False."""
    if not on_cuda():
        return False
    found = Callers(model)
    sizes = found.sizes(model)
    alike = len(sizes) == len(model.layers) and len(set(sizes)) == 1  # as one array holds the cache of all
    fit = alike and sizes[0][1] == sizes[0][2] and sizes[0][1] in HEAD_SIZES
    return found if fit else False
