"""Compute the mean logit under the softmax, Σ p·x, which the entropy log Σ exp x − Σ p·x needs.

Spelled out, it takes float32 arrays of the vocabulary's size. On CUDA they would be the largest part of an update: many
rows are submitted before the first is freed. So there the forward pass is a kernel that reads the logits once. The
backward pass (only with an entropy bonus) is spelled out everywhere, row by row.
"""

from typing import Any

import mlx.core as mx

from grpo_actors.policy.cuda_kernel import cuda_kernel
from grpo_actors.policy.device import on_cuda

#: Warps per block; there is one block per position.
WARPS = 8

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
    """Return the mean logits [N, C] float32 of logits [N, C, V] with the log-sum-exps [N, C] float32."""
    means: mx.array = _mean_logits(logits, log_totals)  # type: ignore[assignment]
    return means


@mx.custom_function
def _mean_logits(logits: mx.array, log_totals: mx.array) -> mx.array:
    if on_cuda():
        return _by_kernel(logits, log_totals)
    return mx.stack([_weighted(*row).sum(axis=-1) for row in zip(logits, log_totals, strict=True)])


@_mean_logits.vjp
def _gradient(primals: Any, cotangent: mx.array, means: mx.array) -> tuple[mx.array, mx.array]:
    """d/dx_v Σ exp(x − t)·x = exp(x_v − t)·(1 + x_v), and d/dt = −Σ exp(x − t)·x."""
    logits, log_totals = primals
    rows = [
        (wanted[:, None] * (_weighted(row, total) + _probabilities(row, total))).astype(row.dtype)
        for row, total, wanted in zip(logits, log_totals, cotangent, strict=True)
    ]
    return mx.stack(rows), -cotangent * means


def _probabilities(logits: mx.array, log_total: mx.array) -> mx.array:
    return mx.exp(logits.astype(mx.float32) - log_total[:, None])


def _weighted(logits: mx.array, log_total: mx.array) -> mx.array:
    return _probabilities(logits, log_total) * logits.astype(mx.float32)


def _by_kernel(logits: mx.array, log_totals: mx.array) -> mx.array:
    vocabulary = logits.shape[-1]
    rows = log_totals.size
    (mean,) = cuda_kernel("mean_logit", ("logits", "log_total"), ("mean",), _MEAN)(
        inputs=[logits.reshape(rows, vocabulary), log_totals.reshape(rows)],
        template=[("T", logits.dtype), ("W", WARPS)],
        grid=(32 * WARPS * rows, 1, 1),
        threadgroup=(32 * WARPS, 1, 1),
        output_shapes=[(rows,)],
        output_dtypes=[mx.float32],
    )
    means: mx.array = mean.reshape(log_totals.shape)
    return means
