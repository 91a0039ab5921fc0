"""The CUDA kernels over `slots`: one step of attention, and copying prompts into their rows.

On CUDA, MLX has no fused attention with a mask: it composes a masked decoding step from several operations. At 256
rows this doubles the whole step (Qwen2.5-0.5B on an H200: 11.0 ms against 5.3 ms). Both kernels write into an array
that is their input; `slots` explains why this is safe. Their results must agree with the mask of a `window`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from grpo_actors.policy.cuda_kernel import Constant, CudaKernel, constant, cuda_kernel
from grpo_actors.policy.decoding import tensor_attention

#: Warps per block: as many threads as the largest head has elements.
WARPS = 8

#: With at least ENOUGH_BLOCKS blocks, one block handles all queries that share keys, so the keys are read once:
#: reading them dominates a step. Fewer blocks would leave the device idle. More than MOST_TOGETHER queries do not
#: fit a thread's registers.
ENOUGH_BLOCKS, MOST_TOGETHER = 64, 8

#: Head sizes that divide evenly over lanes, eight elements each, so that no lane has elements of both halves.
HEAD_SIZES = (32, 64, 96, 128, 256)

# One block for G query heads with the same keys. One lane handles eight elements of a head, so a column takes LANES
# lanes. A warp reads several columns at a time; each part of it keeps a running softmax over its own columns for each
# query. The first threads join them. The row's new column is read from the step's own arrays, so that no block waits
# for the one that writes it.
_ATTEND = """
    constexpr int LANES = D <= 32 ? 4 : D <= 64 ? 8 : D <= 128 ? 16 : 32;
    constexpr int PARTS = W * 32 / LANES, HALF = D / 2, AHEAD = 2;
    constexpr unsigned ALL = 0xffffffffu;
    const int head = blockIdx.x * G, row = blockIdx.y, kv_head = head / (HQ / HK);
    const int part = threadIdx.x / LANES, at = threadIdx.x % LANES * 8;
    const bool used = at < D;
    const long rows = cache_shape[2], capacity = cache_shape[4];
    const long to_values = rows * HK * capacity * D;
    const T* keys = cache + ((2 * layer[0] * rows + row) * HK + kv_head) * capacity * D;
    const int end = length[row];

    auto read = [&](const T* from, float* to) {
      alignas(16) T raw[8];
      if (used)
        for (int i = 0; i < (int)sizeof(raw) / 16; i++)
          reinterpret_cast<uint4*>(raw)[i] = reinterpret_cast<const uint4*>(from)[i];
      for (int e = 0; e < 8; e++) to[e] = used ? static_cast<float>(raw[e]) : 0.f;
    };
    auto over_lanes = [&](float sum) {
      for (int o = LANES / 2; o > 0; o /= 2) sum += __shfl_xor_sync(ALL, sum, o);
      return sum;
    };
    auto dot = [&](const float* one, const float* other) {
      float sum = 0.f;
      for (int e = 0; e < 8; e++) sum += one[e] * other[e];
      return over_lanes(sum);
    };
    // A head as it is attended to: normalised and rotated here, if that has not been done before.
    auto finish = [&](const T* from, const T* weight, float* to) {
      read(from + at, to);
      if (!JOINED) return;
      const int opposite = (at + HALF) % D, angle = row * D + at % HALF;
      float other[8];
      read(from + opposite, other);
      if (NORMED) {
        const float factor = rsqrtf(dot(to, to) / D + eps[0]);
        if (used)
          for (int e = 0; e < 8; e++) {
            to[e] *= factor * static_cast<float>(weight[at + e]);
            other[e] *= factor * static_cast<float>(weight[opposite + e]);
          }
      }
      for (int e = 0; e < 8; e++) {
        const float turned = other[e] * rotation[angle + HALF + e];
        to[e] = to[e] * rotation[angle + e] + (at < HALF ? -turned : turned);
      }
    };

    float query[G][8], key[8], value[8];
    const int first_head = JOINED ? row * (HQ + 2 * HK) + head : row * HQ + head;
    for (int g = 0; g < G; g++) {
      finish(q + (first_head + g) * D, q_norm, query[g]);
      for (int e = 0; e < 8; e++) query[g][e] *= scale[0];
    }
    finish(k + (JOINED ? row * (HQ + 2 * HK) + HQ + kv_head : row * HK + kv_head) * D, k_norm, key);
    read(v + (JOINED ? row * (HQ + 2 * HK) + HQ + HK + kv_head : row * HK + kv_head) * D + at, value);
    for (int e = 0; e < 8; e++) key[e] = static_cast<float>(static_cast<T>(key[e]));
    if (head % (HQ / HK) == 0 && part == 0 && used) {
      T* slot = const_cast<T*>(keys) + (long)end * D + at;
      for (int e = 0; e < 8; e++) {
        slot[e] = static_cast<T>(key[e]);
        slot[to_values + e] = static_cast<T>(value[e]);
      }
    }

    float top[G], total[G], sum[G][8];
    for (int g = 0; g < G; g++) {
      top[g] = dot(query[g], key);
      total[g] = part == 0 ? 1.f : 0.f;
      for (int e = 0; e < 8; e++) sum[g][e] = part == 0 ? value[e] : 0.f;
    }
    for (int first = threadIdx.x / 32 * (32 / LANES); first < end; first += AHEAD * PARTS) {
      const int mine = first + threadIdx.x % 32 / LANES;
      float some_keys[AHEAD][8], some_values[AHEAD][8];
      for (int a = 0; a < AHEAD; a++) {
        const T* column = keys + (long)min(mine + a * PARTS, end) * D + at;
        read(column, some_keys[a]);
        read(column + to_values, some_values[a]);
      }
      for (int a = 0; a < AHEAD; a++)
        for (int g = 0; g < G; g++) {
          const float score = dot(query[g], some_keys[a]);
          if (mine + a * PARTS < end) {
            const float higher = fmaxf(top[g], score);
            const float kept = __expf(top[g] - higher), weight = __expf(score - higher);
            top[g] = higher;
            total[g] = total[g] * kept + weight;
            for (int e = 0; e < 8; e++) sum[g][e] = sum[g][e] * kept + weight * some_values[a][e];
          }
        }
    }

    __shared__ float tops[PARTS], totals[PARTS], sums[PARTS][D];
    for (int g = 0; g < G; g++) {
      if (at == 0) { tops[part] = top[g]; totals[part] = total[g]; }
      if (used)
        for (int e = 0; e < 8; e++) sums[part][at + e] = sum[g][e];
      __syncthreads();
      if (threadIdx.x < D) {
        float highest = -1e30f, whole = 0.f, result = 0.f;
        for (int p = 0; p < PARTS; p++) highest = fmaxf(highest, tops[p]);
        for (int p = 0; p < PARTS; p++) {
          const float share = __expf(tops[p] - highest);
          whole += share * totals[p];
          result += share * sums[p][threadIdx.x];
        }
        out[(row * HQ + head + g) * D + threadIdx.x] = static_cast<T>(result / whole);
      }
      __syncthreads();
    }
"""
_ATTEND_INPUTS = ("q", "k", "v", "cache", "layer", "length", "scale", "rotation", "q_norm", "k_norm", "eps")

# Eight elements per thread: the columns of a prompt are contiguous in both arrays.
_PLACE = """
    const int at = (blockIdx.x * blockDim.x + threadIdx.x) * 8, i = blockIdx.z;
    const int heads = cache_shape[3], head = blockIdx.y % heads;
    const long plane = blockIdx.y / heads;  // keys or values of a layer
    if (at < width[0] * D) {
      const T* from = prompts + ((plane * prompts_shape[2] + chosen[i]) * heads + head) * prompts_shape[4] * D + at;
      T* to = const_cast<T*>(cache) + ((plane * cache_shape[2] + row[i]) * heads + head) * cache_shape[4] * D + at;
      for (int j = 0; j < (int)sizeof(T) / 2; j++)
        reinterpret_cast<uint4*>(to)[j] = reinterpret_cast<const uint4*>(from)[j];
    }
    if (at == 0 && blockIdx.y == 0 && i == 0) done[0] = 1;
"""


@dataclass(frozen=True, slots=True)
class Heads:
    """The sizes and constants of attention, the same in all layers."""

    #: Query heads.
    queries: int
    #: Key heads.
    keys: int
    #: Elements of a head.
    size: int
    #: Factor of the scores.
    scale: float
    #: Epsilon of the norms of queries and keys, if there are any; used by `attend_joined` only.
    eps: float = 0.0


@dataclass(slots=True)
class Past:
    """The keys and values of all rows in one layer; a step reads them and adds its own."""

    #: [L, 2, R, H, columns, D], keys and values; CHANGES, in column `lengths` of each row.
    cache: mx.array
    layer: int
    #: [R] int32, tokens of each row; less than the number of columns.
    lengths: mx.array


@dataclass(frozen=True, slots=True)
class Attention:
    """The kernel of a step's attention. Its inputs are those of `_attend`, its output [R, Hq × D]."""

    kernel: CudaKernel
    constants: Sequence[Constant]
    #: Blocks for each row, and threads of a block.
    blocks: int
    threads: int


def attention_of(heads: Heads, dtype: mx.Dtype, rows: int, *, joined: bool, normed: bool) -> Attention:
    """Return the best kernel for these heads.

    Args:
        heads: The sizes.
        dtype: The type of the cache.
        rows: R.
        joined: Whether heads are rotated in the kernel (`attend_joined`).
        normed: Whether they are normalised there, too.
    """
    shared_by = heads.queries // heads.keys
    constants: list[Constant] = [
        *(("T", dtype), ("D", heads.size), ("HQ", heads.queries), ("HK", heads.keys)),
        *(("JOINED", joined), ("NORMED", normed)),
    ]
    if tensor_attention.fits(heads.size, dtype):
        together = max(n for n in range(1, tensor_attention.MOST_QUERIES + 1) if shared_by % n == 0)
        kernel = cuda_kernel("tensor_attention", _ATTEND_INPUTS, ("out",), tensor_attention.ATTEND)
        warps = tensor_attention.WARPS
        constants.append(("BRAIN", dtype == mx.bfloat16))
    else:
        is_many = rows * heads.keys >= ENOUGH_BLOCKS and shared_by <= MOST_TOGETHER
        together = shared_by if is_many else 1
        kernel = cuda_kernel("slot_attention", _ATTEND_INPUTS, ("out",), _ATTEND)
        warps = WARPS
    constants += [("W", warps), ("G", together)]
    return Attention(kernel, constants, heads.queries // together, 32 * warps)


def attend_rows(queries: mx.array, keys: mx.array, values: mx.array, past: Past, scale: float) -> mx.array:
    """Compute softmax attention of one query per row over the row's past and its new token; write that token.

    Args:
        queries: [R, Hq, 1, D].
        keys: [R, H, 1, D], of the tokens fed now.
        values: [R, H, 1, D], of the tokens fed now.
        past: The rows' past; CHANGES.
        scale: Factor of the scores.

    Returns:
        [R, Hq, 1, D], in the type of the cache.
    """
    heads = Heads(queries.shape[1], keys.shape[1], queries.shape[3], scale)
    return _attend((queries, keys, values), past, heads).reshape(queries.shape)


def attend_joined(
    joined: mx.array,
    past: Past,
    heads: Heads,
    rotation: mx.array,
    norms: tuple[mx.array, mx.array] | None = None,
) -> mx.array:
    """Compute `attend_rows` on the output of one joined product, and normalise and rotate the heads too.

    Args:
        joined: [R, (Hq + 2 H) × D]: queries, keys and values, neither normalised nor rotated.
        past: The rows' past; CHANGES.
        heads: The division of `joined`.
        rotation: [R, D] float32: cosines of the row's D/2 angles, then their sines. Element i rotates with i + D/2.
        norms: Weights [D] of the RMS norms of queries and of keys; None without norms.

    Returns:
        [R, Hq × D].
    """
    return _attend((joined,) * 3, past, heads, rotation, norms)


def _attend(
    new: tuple[mx.array, mx.array, mx.array],
    past: Past,
    heads: Heads,
    rotation: mx.array | None = None,
    norms: tuple[mx.array, mx.array] | None = None,
) -> mx.array:
    rows, dtype = past.lengths.size, past.cache.dtype
    attention = attention_of(heads, dtype, rows, joined=rotation is not None, normed=norms is not None)
    out: mx.array
    (out,) = attention.kernel(
        inputs=[
            *new,
            *(past.cache, constant(past.layer), past.lengths),
            constant(heads.scale),
            constant(0.0) if rotation is None else rotation,
            *(norms or new[:2]),
            constant(heads.eps),
        ],
        template=attention.constants,
        grid=(attention.threads * attention.blocks, rows, 1),
        threadgroup=(attention.threads, 1, 1),
        output_shapes=[(rows, heads.queries * heads.size)],
        output_dtypes=[dtype],
    )
    return out


def place_prompts(
    prompts: mx.array, chosen: mx.array, cache: mx.array, rows: mx.array, width: mx.array
) -> mx.array:
    """Copy prompts into the first columns of their rows.

    Args:
        prompts: Keys and values [L, 2, P, H, columns, D].
        chosen: [n] int32, which prompt each row gets.
        cache: Keys and values [L, 2, R, H, columns, D]; CHANGES.
        rows: [n] int32, which rows.
        width: [1] int32, columns to copy.

    Returns:
        An array; the copy happens when the caller evaluates it.
    """
    layers, two, _, heads, _, size = cache.shape
    columns = min(prompts.shape[4], cache.shape[4])
    done: mx.array
    (done,) = cuda_kernel("slot_place", ("prompts", "chosen", "cache", "row", "width"), ("done",), _PLACE)(
        inputs=[prompts, chosen, cache, rows, width],
        template=[("T", cache.dtype), ("D", size)],
        grid=(-(-columns * size // 2048) * 256, layers * two * heads, rows.size),
        threadgroup=(256, 1, 1),
        output_shapes=[(1,)],
        output_dtypes=[mx.uint8],
    )
    return done
