"""Replace the function that a model's layers call for attention.

Depends on mlx-lm's modules only, not on what is computed instead.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
from mlx_lm.models import base
from mlx_lm.models.cache import KVCache, make_prompt_cache


def _attention(queries: mx.array, keys: mx.array, values: mx.array, *args: Any, **kwargs: Any) -> mx.array:
    """Compute attention as mlx-lm does, or let the cache do it, if it has a method `attend`."""
    cache = kwargs["cache"] if "cache" in kwargs else args[0]
    attend = getattr(cache, "attend", base.scaled_dot_product_attention)
    result: mx.array = attend(queries, keys, values, *args, **kwargs)
    return result


def keeps_all_positions(model: Any) -> bool:
    """Return whether all layers cache the keys and values of every position, so that attention could be computed elsewhere."""
    return all(type(cache) is KVCache for cache in make_prompt_cache(model))


class Callers:
    """The modules of mlx-lm through which a model's layers call attention.

    From then on a cache with a method `attend` computes attention itself, also in backward passes that run a layer again.
    """

    def __init__(self, model: Any) -> None:
        names = {type(module).__module__ for module in model.modules()}
        known = (base.scaled_dot_product_attention, _attention)
        self._modules: list[Any] = [
            sys.modules[name]
            for name in names
            if getattr(sys.modules[name], "scaled_dot_product_attention", None) in known
        ]
        self._set(_attention)

    def _set(self, attend: Callable[..., mx.array]) -> None:
        for module in self._modules:
            module.scaled_dot_product_attention = attend

    @contextlib.contextmanager
    def calling(self, attend: Callable[..., mx.array]) -> Iterator[None]:
        """Make the layers call `attend`, with mlx-lm's arguments, within this block.

        This affects every thread: nothing else may run a model of this kind meanwhile.
        """
        self._set(attend)
        try:
            yield
        finally:
            self._set(_attention)

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
