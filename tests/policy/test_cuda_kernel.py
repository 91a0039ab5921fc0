"""Our CUDA kernels: types, sizes, constants; compiled once for a GPU and all processes."""

import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from grpo_actors.backend import KERNELS
from grpo_actors.policy.cuda_kernel import cuda_kernel
from grpo_actors.policy.device import on_cuda

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not on_cuda(), reason="needs CUDA")]

_COPY = """
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < x_shape[0] * x_shape[1]) y[i] = static_cast<T>(static_cast<float>(x[i]));
"""


def converted(x, dtype):
    (y,) = cuda_kernel("test_copy", ("x",), ("y",), _COPY)(
        [x],
        template=[("T", dtype)],
        grid=(x.size, 1, 1),
        threadgroup=(32, 1, 1),
        output_shapes=[x.shape],
        output_dtypes=[dtype],
    )
    return y


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
def test_numbers_of_16_bits_are_rounded_as_mlx_rounds_them(dtype):
    # In bfloat16, 1 + 2⁻⁸ and 1 + 3·2⁻⁸ are halfway between two numbers, and 3.4e38 rounds to infinity.
    numbers = [
        0.0,
        -0.0,
        1 + 2**-8,
        1 + 3 * 2**-8,
        1 + 2**-11,
        65519.0,
        65520.0,
        3.4e38,
        np.inf,
        -np.inf,
        np.nan,
    ]
    random = np.random.default_rng(0).standard_normal(501).astype(np.float32)
    x = mx.array(np.concatenate([np.array(numbers, np.float32), random])).reshape(2, -1)
    ours, theirs = (np.array(y.astype(mx.float32)) for y in (converted(x, dtype), x.astype(dtype)))
    np.testing.assert_array_equal(ours, theirs)
    back = np.array(converted(x.astype(dtype), mx.float32))
    np.testing.assert_array_equal(back, theirs)


def test_an_array_that_is_not_contiguous_is_copied_first():
    x = mx.arange(12, dtype=mx.float32).reshape(3, 4)
    np.testing.assert_array_equal(np.array(converted(x.T, mx.float32)).ravel(), np.array(x.T).ravel())


def test_the_code_is_kept_for_the_next_process(tmp_path):
    code = """
import grpo_actors, mlx.core as mx
from grpo_actors.policy import cuda_kernel, nvrtc
body = "y[0] = x[0] + 1;"
(y,) = cuda_kernel.cuda_kernel("plus_one", ("x",), ("y",), body)([mx.array([41])], grid=(1, 1, 1),
    threadgroup=(1, 1, 1), output_shapes=[(1,)], output_dtypes=[mx.int32])
print(y.item(), nvrtc._library.cache_info().currsize)
"""
    environment = os.environ | {KERNELS: str(tmp_path)}
    printed = [
        subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
        ).stdout
        for _ in range(2)
    ]
    assert printed == ["42 1\n", "42 0\n"], "the second process opens no compiler"
    [kept] = {Path(path.name).stem for path in tmp_path.iterdir()}
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"{kept}{end}" for end in (".cu", ".ptx", ".txt")
    ]


def test_a_kernel_that_does_not_compile_says_why():
    kernel = cuda_kernel("test_broken", ("x",), ("y",), "y[0] = no_such_name;")
    with pytest.raises(OSError, match=r'test_broken: (.|\n)*"no_such_name" is undefined'):
        kernel(
            [mx.array([1])],
            grid=(1, 1, 1),
            threadgroup=(1, 1, 1),
            output_shapes=[(1,)],
            output_dtypes=[mx.int32],
        )
