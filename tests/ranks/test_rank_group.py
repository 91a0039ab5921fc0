"""What ranks give to a sum without changing it, and the names of types that they tell each other."""

import mlx.core as mx
import numpy as np
import pytest

from grpo_actors.ranks.group import dtype_of, name_of, neutral


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_a_sum_with_the_neutral_array_has_the_same_bits(dtype):
    array = mx.array([0.0, -0.0, 1.5, -np.inf], dtype)
    total = array + neutral(array.shape, dtype)
    assert total.dtype == dtype
    kind = mx.uint32 if dtype == mx.float32 else mx.uint16
    assert total.view(kind).tolist() == array.view(kind).tolist()


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.int32])
def test_a_type_is_found_again_by_its_name(dtype):
    assert dtype_of(name_of(dtype)) == dtype
