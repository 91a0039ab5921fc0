"""Compute the mean logit under the softmax, Σ p·x, which the entropy log Σ exp x − Σ p·x needs.

Spelled out, it takes float32 arrays of the vocabulary's size. On CUDA they would be the largest part of an update: many
parts are submitted before the first is freed. So there the forward pass is a kernel that reads the logits once. The
backward pass (only with an entropy bonus) is spelled out everywhere, part by part.
"""

from collections.abc import Iterator
from typing import Any

import mlx.core as mx

from grpo_actors.policy.cuda_kernel import cuda_kernel
from grpo_actors.policy.device import on_cuda

#: Warps per block; there is one block per position.
WARPS = 8
#: Positions whose float32 logits exist at the same time, where they are spelled out.
AT_ONCE = 1024

_MEAN = """
    const int row = blockIdx.x, lane = threadIdx.x % 32;
    const int size = logits_shape[1];
    const T* x = logits + (long)row * size;
    const float total = log_total[row];
    float sum = 0.f;
    for (int i = threadIdx.x; i < size; i += 32 * W) {
      const float logit = static_cast<float>(x[i]);
      sum += __expf(logit - total) * logit;
    }
    for (int o = 16; o > 0; o /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, o);
    __shared__ float sums[W];
    if (lane == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
      float all = 0.f;
      for (int w = 0; w < W; w++) all += sums[w];
      mean[row] = all;
    }
"""


def mean_logits(logits: mx.array, log_totals: mx.array) -> mx.array:
    """Return the mean logits [K] float32 of logits [K, V] with the log-sum-exps [K] float32."""
    means: mx.array = _mean_logits(logits, log_totals)  # type: ignore[assignment]
    return means


@mx.custom_function
def _mean_logits(logits: mx.array, log_totals: mx.array) -> mx.array:
    if on_cuda():
        return _by_kernel(logits, log_totals)
    return mx.concatenate([_weighted(*part).sum(axis=-1) for part in _parts(logits, log_totals)])


@_mean_logits.vjp
def _gradient(primals: Any, cotangent: mx.array, means: mx.array) -> tuple[mx.array, mx.array]:
    """d/dx_v Σ exp(x − t)·x = exp(x_v − t)·(1 + x_v), and d/dt = −Σ exp(x − t)·x."""
    logits, log_totals = primals
    parts = [
        (wanted[:, None] * (_weighted(part, total) + _probabilities(part, total))).astype(part.dtype)
        for part, total, wanted in _parts(logits, log_totals, cotangent)
    ]
    return mx.concatenate(parts), -cotangent * means


def _parts(*arrays: mx.array) -> Iterator[tuple[mx.array, ...]]:
    for first in range(0, len(arrays[0]), AT_ONCE):
        yield tuple(array[first : first + AT_ONCE] for array in arrays)


def _probabilities(logits: mx.array, log_total: mx.array) -> mx.array:
    return mx.exp(logits.astype(mx.float32) - log_total[:, None])


def _weighted(logits: mx.array, log_total: mx.array) -> mx.array:
    return _probabilities(logits, log_total) * logits.astype(mx.float32)


def _by_kernel(logits: mx.array, log_totals: mx.array) -> mx.array:
    rows = len(logits)
    (means,) = cuda_kernel("mean_logit", ("logits", "log_total"), ("mean",), _MEAN)(
        inputs=[logits, log_totals],
        template=[("T", logits.dtype), ("W", WARPS)],
        grid=(32 * WARPS * rows, 1, 1),
        threadgroup=(32 * WARPS, 1, 1),
        output_shapes=[(rows,)],
        output_dtypes=[mx.float32],
    )
    result: mx.array = means
    return result
