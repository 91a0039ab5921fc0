"""Products with packed matrices, as every layer of a quantised base computes them."""

import mlx.core as mx
import numpy as np
import pytest


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 10, 100])
def test_a_product_with_a_packed_matrix_is_that_with_the_unpacked_one(rows, bits):
    # MLX has several kernels, for few and for many rows. Rows of a worker's batch: 1 to 100s.
    matrix, x = mx.random.split(mx.random.key(0))
    packed = mx.quantize(mx.random.normal((512, 512), mx.bfloat16, key=matrix), bits=bits)
    x = mx.random.normal((rows, 512), mx.bfloat16, key=x)
    product = np.array(mx.quantized_matmul(x, *packed, bits=bits).astype(mx.float32))
    expected = np.array(x.astype(mx.float32) @ mx.dequantize(*packed, bits=bits).astype(mx.float32).T)
    # Where sums are kept in bfloat16, as on a CPU, each is off by 2 % of their deviation. Foreign ones would be off by 110 %.
    assert np.abs(product - expected).mean() < 0.05 * expected.std()
