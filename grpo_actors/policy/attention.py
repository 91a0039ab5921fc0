"""One step of attention over a `window` on CUDA, where MLX has no fused kernel that takes a mask.

MLX computes a decoding step with a mask from its parts: at 256 rows that doubles the whole step (Qwen2.5-0.5B
on an H200: 11.0 ms against 5.3 ms). This kernel reads each row's columns from its start to the window's end,
and needs no mask. It is used where it fits; the mask is what it must agree with.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import mlx.core as mx
from mlx_lm.models import base

#: Warps of a block; each takes every so-many-th column. Their threads are as many as the largest head.
WARPS = 8

#: What a warp can share out evenly.
HEAD_SIZES = (32, 64, 96, 128, 256)

# One block a query head: its warps keep a running softmax over their columns, and the first threads join them.
# A column's keys are read once for each query head that shares them: the second time from the cache.
_SOURCE = """
    const int head = blockIdx.x, row = blockIdx.y;
    const int heads = q_shape[1], kv_heads = k_shape[1], capacity = k_shape[2];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    constexpr int E = D / 32;  // elements of a lane
    const T* query = q + (row * heads + head) * D + lane * E;
    const long first = ((long)row * kv_heads + head / (heads / kv_heads)) * capacity;
    float scaled[E], sum[E];
    for (int e = 0; e < E; e++) {
      scaled[e] = static_cast<float>(query[e]) * scale[0];
      sum[e] = 0.f;
    }
    float top = -1e30f, total = 0.f;
    for (int column = start[row] + warp; column < stop[0]; column += W) {
      const T* key = k + (first + column) * D + lane * E;
      const T* value = v + (first + column) * D + lane * E;
      float score = 0.f;
      for (int e = 0; e < E; e++) score += scaled[e] * static_cast<float>(key[e]);
      for (int o = 16; o > 0; o /= 2) score += __shfl_xor_sync(0xffffffffu, score, o);
      const float higher = fmaxf(top, score);
      const float kept = __expf(top - higher), weight = __expf(score - higher);
      top = higher;
      total = total * kept + weight;
      for (int e = 0; e < E; e++) sum[e] = sum[e] * kept + weight * static_cast<float>(value[e]);
    }
    __shared__ float tops[W], totals[W], sums[W][D];
    if (lane == 0) { tops[warp] = top; totals[warp] = total; }
    for (int e = 0; e < E; e++) sums[warp][lane * E + e] = sum[e];
    __syncthreads();
    if (threadIdx.x < D) {
      float highest = -1e30f, whole = 0.f, result = 0.f;
      for (int w = 0; w < W; w++) highest = fmaxf(highest, tops[w]);
      for (int w = 0; w < W; w++) {
        const float share = __expf(tops[w] - highest);
        whole += share * totals[w];
        result += share * sums[w][threadIdx.x];
      }
      out[(row * heads + head) * D + threadIdx.x] = static_cast<T>(result / whole);
    }
"""


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

    def sizes(self, model: Any) -> list[tuple[int, int]]:
        """(of a query's head, of a value's) of each layer that calls attention this way: tried on one token."""
        sizes = []

        def told(queries: mx.array, keys: mx.array, values: mx.array, *args: Any, **kwargs: Any) -> mx.array:
            sizes.append((queries.shape[-1], values.shape[-1]))
            result: mx.array = base.scaled_dot_product_attention(queries, keys, values, *args, **kwargs)
            return result

        with self.calling(told):
            model(mx.array([[1]]))
        return sizes


def callers(model: Any) -> Callers | bool:
    """Through what a model calls attention, if the kernel can take the place of all of it here; else False."""
    if not (mx.cuda.is_available() and mx.default_device().type == mx.DeviceType.gpu):
        return False
    found = Callers(model)
    sizes = found.sizes(model)
    fit = len(sizes) == len(model.layers) and all(q == v and q in HEAD_SIZES for q, v in sizes)
    return found if fit else False


def attend_rows(
    queries: mx.array, keys: mx.array, values: mx.array, *, starts: mx.array, stop: mx.array, scale: float
) -> mx.array:
    """Softmax attention of one query a row over the row's own columns.

    Args:
        queries: [R, Hq, 1, D].
        keys: [R, Hkv, columns, D], the whole buffer.
        values: The same.
        starts: [R] int32, each row's first column.
        stop: [1] int32, the column after the last, of all rows.
        scale: Of the scores.

    Returns:
        [R, Hq, 1, D], in the type of the queries.
    """
    rows, heads, _, size = queries.shape
    out: mx.array
    (out,) = _kernel()(
        inputs=[queries, keys, values, starts, stop, _scale(scale)],
        template=[("T", queries.dtype), ("D", size), ("W", WARPS)],
        grid=(32 * WARPS * heads, rows, 1),
        threadgroup=(32 * WARPS, 1, 1),
        output_shapes=[queries.shape],
        output_dtypes=[queries.dtype],
    )
    return out


@lru_cache(maxsize=1)
def _kernel() -> Any:
    return mx.fast.cuda_kernel(
        name="window_attention",
        input_names=["q", "k", "v", "start", "stop", "scale"],
        output_names=["out"],
        source=_SOURCE,
    )


@lru_cache(maxsize=8)
def _scale(scale: float) -> mx.array:
    return mx.array([scale], mx.float32)
