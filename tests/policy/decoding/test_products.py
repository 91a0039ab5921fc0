"""Our own matrix products of a decoding step, compared with the maths in float32."""

import mlx.core as mx
import numpy as np
import pytest

from grpo_actors.policy.decoding.products import arranged, fits, gated_rows, product, tiled, untiled
from grpo_actors.policy.device import on_cuda

pytestmark = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(not on_cuda(), reason="the products are CUDA kernels")

EPS = 1e-6


def test_rows_of_whole_pieces_and_whole_blocks_of_columns_fit():
    assert fits(1152, 896, mx.bfloat16)
    assert fits(32, 32, mx.float16)
    assert fits(9728, 896, mx.bfloat16, gated=True)
    assert not fits(48, 32, mx.bfloat16)  # columns by 32
    assert not fits(32, 32, mx.bfloat16, gated=True)  # by 64
    assert not fits(64, 48, mx.bfloat16)  # numbers by 32
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


def test_tiled_rows_come_back_and_lie_as_the_tensor_cores_want_them():
    x = mx.arange(20 * 64).reshape(20, 64)
    assert tiled(x).shape == (32, 64)
    np.testing.assert_array_equal(np.array(untiled(tiled(x), 20)), np.array(x))
    # Row 17, number 41: the second tile, the second piece of 32, row 1 of the tile.
    assert tiled(x).flatten()[16 * 64 + 16 * 32 + 32 + 9].item() == 17 * 64 + 41
    # Row 9 of a weight, number 41: the second 8 rows, the second piece, row 1.
    assert arranged(x[:16]).flatten()[8 * 64 + 8 * 32 + 32 + 9].item() == 9 * 64 + 41


@needs_cuda
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("rows", [1, 16, 17, 63, 64, 130])
@pytest.mark.parametrize(("columns", "size"), [(32, 32), (1152, 896), (896, 4864), (4096, 224)])
def test_a_product_with_and_without_norm_bias_and_sum(rows, columns, size, dtype):
    given = arrays(rows, columns, size, dtype)
    x, weight, bias, plus = (numbers(given[name]) for name in ("x", "weight", "bias", "plus"))
    inputs, plus_tiles = (tiled(given["x"]), arranged(given["weight"])), tiled(given["plus"])
    assert_equal_up_to_rounding(untiled(product(*inputs), rows), x @ weight.T)
    got = product(*inputs, bias=given["bias"], norm_eps=EPS, tiles=False)[:rows]
    assert_equal_up_to_rounding(got, normed(x) @ weight.T + bias)
    got = untiled(product(*inputs, plus=plus_tiles), rows)
    assert_equal_up_to_rounding(got, x @ weight.T + plus)
    got = untiled(product(*inputs, bias=given["bias"], plus=plus_tiles), rows)
    assert_equal_up_to_rounding(got, x @ weight.T + bias + plus)


@needs_cuda
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("rows", [3, 64, 100])
@pytest.mark.parametrize(("columns", "size"), [(32, 64), (4864, 896)])
@pytest.mark.parametrize("biased", [False, True])
def test_a_gated_product(rows, columns, size, dtype, biased):
    gate, gated = arrays(rows, columns, size, dtype), arrays(rows, columns, size + 32, dtype)
    gated["weight"] = gated["weight"][:, :size]
    weight = arranged(gated_rows(gate["weight"], gated["weight"]))
    bias = gated_rows(gate["bias"], gated["bias"]) if biased else None
    got = untiled(product(tiled(gate["x"]), weight, bias=bias, norm_eps=EPS, gated=True), rows)
    x = normed(numbers(gate["x"]))
    one, other = (x @ numbers(a["weight"]).T + (numbers(a["bias"]) if biased else 0) for a in (gate, gated))
    assert_equal_up_to_rounding(got, one / (1 + np.exp(-one)) * other)
