"""What runs over `slots` on CUDA: one step of attention, and prompts put into their rows.

MLX has no fused attention there that takes a mask, and computes a decoding step with one from its parts: at 256 rows
that doubles the whole step (Qwen2.5-0.5B on an H200: 11.0 ms against 5.3 ms). Both kernels write into arrays
that they are given: `slots` argues when that is right. The mask of a `window` is what they must agree with.
"""

from functools import lru_cache
from typing import Any

import mlx.core as mx

#: Keys and values.
Pair = tuple[mx.array, mx.array]

#: Warps of a block; each takes every so-many-th column. Their threads are as many as the largest head.
WARPS = 8

#: What a warp can share out evenly.
HEAD_SIZES = (32, 64, 96, 128, 256)

# One block a query head: its warps keep a running softmax over their columns, and the first threads join them.
# A column's keys are read once for each query head that shares them: the second time from the cache. The row's
# new column is read from the step's own arrays, so that no block waits for the one that writes it.
_ATTEND = """
    const int head = blockIdx.x, row = blockIdx.y;
    const int heads = q_shape[1], kv_heads = k_shape[1], capacity = keys_shape[2];
    const int shared_by = heads / kv_heads, kv_head = row * kv_heads + head / shared_by;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    constexpr int E = D / 32;  // elements of a lane
    const long first = (long)kv_head * capacity;
    const int end = length[row];
    const T* new_key = k + kv_head * D;
    const T* new_value = v + kv_head * D;
    if (head % shared_by == 0 && threadIdx.x < D) {
      const_cast<T*>(keys)[(first + end) * D + threadIdx.x] = new_key[threadIdx.x];
      const_cast<T*>(values)[(first + end) * D + threadIdx.x] = new_value[threadIdx.x];
    }
    const T* query = q + (row * heads + head) * D + lane * E;
    float scaled[E], sum[E];
    for (int e = 0; e < E; e++) {
      scaled[e] = static_cast<float>(query[e]) * scale[0];
      sum[e] = 0.f;
    }
    float top = -1e30f, total = 0.f;
    for (int column = warp; column <= end; column += W) {
      const T* key = (column == end ? new_key : keys + (first + column) * D) + lane * E;
      const T* value = (column == end ? new_value : values + (first + column) * D) + lane * E;
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

# A thread an element of a row's head: the columns of a prompt lie together in both arrays.
_PLACE = """
    const int at = blockIdx.x * blockDim.x + threadIdx.x, head = blockIdx.y, i = blockIdx.z;
    const int heads = keys_shape[1];
    if (at < width[0] * D) {
      const long from = ((long)chosen[i] * heads + head) * prompt_keys_shape[2] * D + at;
      const long to = ((long)row[i] * heads + head) * keys_shape[2] * D + at;
      const_cast<T*>(keys)[to] = prompt_keys[from];
      const_cast<T*>(values)[to] = prompt_values[from];
    }
    if (at == 0 && head == 0 && i == 0) done[0] = 1;
"""


def attend_rows(queries: mx.array, new: Pair, held: Pair, lengths: mx.array, scale: float) -> mx.array:
    """Softmax attention of one query a row over what the row holds and its new token; writes that token.

    Args:
        queries: [R, Hq, 1, D].
        new: Keys and values [R, Hkv, 1, D] of the tokens fed now.
        held: Keys and values [R, Hkv, columns, D] of those before; both CHANGE, in column `lengths` of each row.
        lengths: [R] int32, tokens that each row holds, below the number of columns.
        scale: Of the scores.

    Returns:
        [R, Hq, 1, D], in the type of the queries.
    """
    rows, heads, _, size = queries.shape
    out: mx.array
    (out,) = _attend()(
        inputs=[queries, *new, *held, lengths, _scale(scale)],
        template=[("T", queries.dtype), ("D", size), ("W", WARPS)],
        grid=(32 * WARPS * heads, rows, 1),
        threadgroup=(32 * WARPS, 1, 1),
        output_shapes=[queries.shape],
        output_dtypes=[queries.dtype],
    )
    return out


def place_prompts(prompts: Pair, chosen: mx.array, held: Pair, rows: mx.array, width: mx.array) -> mx.array:
    """Copy prompts into the first columns of rows.

    Args:
        prompts: Keys and values [P, H, columns, D].
        chosen: [n] int32, which prompt each row gets.
        held: Keys and values [R, H, columns, D]; both CHANGE.
        rows: [n] int32, which rows.
        width: [1] int32, columns to copy.

    Returns:
        An array to evaluate: until then nothing is copied.
    """
    keys, _ = held
    heads, size = keys.shape[1], keys.shape[3]
    columns = min(prompts[0].shape[2], keys.shape[2])
    done: mx.array
    (done,) = _place()(
        inputs=[*prompts, chosen, *held, rows, width],
        template=[("T", keys.dtype), ("D", size)],
        grid=(-(-columns * size // 256) * 256, heads, rows.size),
        threadgroup=(256, 1, 1),
        output_shapes=[(1,)],
        output_dtypes=[mx.uint8],
    )
    return done


@lru_cache(maxsize=1)
def _place() -> Any:
    return mx.fast.cuda_kernel(
        name="slot_place",
        input_names=["prompt_keys", "prompt_values", "chosen", "keys", "values", "row", "width"],
        output_names=["done"],
        source=_PLACE,
    )


@lru_cache(maxsize=1)
def _attend() -> Any:
    return mx.fast.cuda_kernel(
        name="slot_attention",
        input_names=["q", "k", "v", "keys", "values", "length", "scale"],
        output_names=["out"],
        source=_ATTEND,
    )


@lru_cache(maxsize=8)
def _scale(scale: float) -> mx.array:
    return mx.array([scale], mx.float32)
