"""Our own matrix products of a decoding step, compared with the maths in float32."""

import mlx.core as mx
import numpy as np
import pytest

from grpo_actors.policy.decoding.products import fits, gated_rows, product
from grpo_actors.policy.device import on_cuda

pytestmark = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(not on_cuda(), reason="the products are CUDA kernels")

EPS = 1e-6


def test_rows_of_whole_pieces_and_whole_blocks_of_columns_fit():
    assert fits(1152, 896, mx.bfloat16)
    assert fits(32, 32, mx.float16)
    assert not fits(48, 32, mx.bfloat16)
    assert not fits(64, 48, mx.bfloat16)
    assert not fits(64, 64, mx.float32)


def arrays(rows, columns, size, dtype):
    random = np.random.default_rng(rows + columns + size)
    shapes = {"x": (rows, size), "weight": (columns, size), "bias": (columns,), "plus": (rows, columns)}
    return {
        name: mx.array(random.standard_normal(shape) / (size**0.5 if name == "weight" else 1)).astype(dtype)
        for name, shape in shapes.items()
    }


def numbers(array):
    return np.array(array.astype(mx.float32))


def normed(x):
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + EPS)


def assert_equal_up_to_rounding(got, expected):
    bits = 8 if got.dtype == mx.bfloat16 else 11
    np.testing.assert_allclose(numbers(got), expected, atol=np.abs(expected).max() * 2.0 ** (-bits + 1))


@needs_cuda
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("rows", [1, 16, 17, 63, 64, 130])
@pytest.mark.parametrize(("columns", "size"), [(32, 32), (1152, 896), (896, 4864), (4096, 224)])
def test_a_product_with_and_without_norm_bias_and_sum(rows, columns, size, dtype):
    given = arrays(rows, columns, size, dtype)
    x, weight, bias, plus = (numbers(given[name]) for name in ("x", "weight", "bias", "plus"))
    assert_equal_up_to_rounding(product(given["x"], given["weight"]), x @ weight.T)
    got = product(given["x"], given["weight"], bias=given["bias"], norm_eps=EPS)
    assert_equal_up_to_rounding(got, normed(x) @ weight.T + bias)
    assert_equal_up_to_rounding(product(given["x"], given["weight"], plus=given["plus"]), x @ weight.T + plus)
    assert_equal_up_to_rounding(product(**given), x @ weight.T + bias + plus)


@needs_cuda
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("rows", [3, 64, 100])
@pytest.mark.parametrize(("columns", "size"), [(16, 64), (4864, 896)])
@pytest.mark.parametrize("biased", [False, True])
def test_a_gated_product(rows, columns, size, dtype, biased):
    gate, gated = arrays(rows, columns, size, dtype), arrays(rows, columns, size + 32, dtype)
    gated["weight"] = gated["weight"][:, :size]
    weight = gated_rows(gate["weight"], gated["weight"])
    bias = gated_rows(gate["bias"], gated["bias"]) if biased else None
    got = product(gate["x"], weight, bias=bias, norm_eps=EPS, gated=True)
    x = normed(numbers(gate["x"]))
    one, other = (x @ numbers(a["weight"]).T + (numbers(a["bias"]) if biased else 0) for a in (gate, gated))
    assert_equal_up_to_rounding(got, one / (1 + np.exp(-one)) * other)
