"""Cast a model's floats to another type, except those that the model keeps exact."""

from collections.abc import Callable

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten, tree_map_with_path


def cast(model: nn.Module, dtype: mx.Dtype, check: Callable[[str, mx.array], None] | None = None) -> None:
    """Cast the floats of `model` in place, lazily.

    A model's ``cast_predicate`` names arrays, such as the biases of a router, that lose too much in half precision. They
    are never rounded; a type that holds their every value takes them too.

    Args:
        model: A model without adapter: its predicate knows the plain names.
        dtype: The new type.
        check: Called with the name and the cast array of each array that was cast.
    """
    may_round: Callable[[str], bool] = getattr(model, "cast_predicate", lambda _name: True)

    def changed(name: str, array: mx.array) -> mx.array:
        if not mx.issubdtype(array.dtype, mx.floating):
            return array
        if dtype.size <= array.dtype.size and not may_round(name):
            return array
        result = array.astype(dtype)
        if check is not None:
            check(name, result)
        return result

    model.update(tree_map_with_path(changed, model.parameters()))


def float_dtype(model: nn.Module) -> str:
    """Return the name of the type that most of the model's floats have."""
    sizes: dict[mx.Dtype, int] = {}
    for _, array in tree_flatten(model.parameters()):
        if mx.issubdtype(array.dtype, mx.floating):
            sizes[array.dtype] = sizes.get(array.dtype, 0) + array.size
    return str(max(sizes, key=lambda dtype: sizes[dtype])).removeprefix("mlx.core.")
