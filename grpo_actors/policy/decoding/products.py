"""The matrix products of a decoding step as kernels of our own, with what surrounds them.

A step's products have few rows: their time is that of reading the weights, and of launching them. A product of cuBLAS
costs the host twice as much as a plain kernel, and leaves norms, gates and sums to further kernels. Here a kernel reads
everything straight into the registers of the tensor cores, so weights and rows lie in memory as these want them:

- *arranged* weights [N, K]: 8 rows × 32 numbers after each other, one thread's 8 numbers together;
- *tiled* rows [R, K]: 16 rows × 32 numbers after each other, likewise. R is a multiple of 16; what the last rows hold
  does not matter, because no row depends on another.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from grpo_actors.policy.cuda_kernel import Constant, constant, cuda_kernel

#: Types that the tensor cores multiply.
TYPES = (mx.bfloat16, mx.float16)
#: Rows of a tile, and numbers of a row that lie together.
TILE, PIECE = 16, 32

# A thread's place in tiled rows, of numbers 8c to 8c + 7 of a row, in units of 8 numbers.
TILED_PLACE = """
    auto tiled_place = [](int row, int c, int size) {
      return ((long)(row / 16) * (size / 32) + c / 4) * 64 + row % 16 * 4 + c % 4;
    };
"""

# One block for 16·MI rows of x and 8·NI columns, i.e. rows of the weight. Its W warps share the sum over K: each takes
# every W-th piece, AHEAD of them at a time, and the block adds their results in the end.
#
# A thread holds 8 adjacent numbers of a row. The tensor cores would want numbers 2t, 2t+1, 2t+8, 2t+9 of 16 from the t-th
# thread of four, but the order of a sum does not matter: for x and weight alike they get numbers 8t to 8t+3 of 32, and
# then 8t+4 to 8t+7.
#
# A norm's weight is part of the product's. Its factor for a row follows from the numbers that are read anyway, and is
# applied to the result.
_PRODUCT = (
    TILED_PLACE
    + """
    constexpr int ROWS = 16 * MI, COLUMNS = 8 * NI, STRIDE = COLUMNS + 8;
    const int tiles = x_shape[0] / 16, size = x_shape[1], width = weight_shape[0], pieces = size / 32;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane / 4, at = lane % 4;
    const int first_tile = blockIdx.y * MI, first_column = blockIdx.x * COLUMNS;
    const uint4* from_x = reinterpret_cast<const uint4*>(x) + (long)first_tile * pieces * 64 + lane;
    const uint4* from_weight = reinterpret_cast<const uint4*>(weight) + (long)first_column / 8 * pieces * 32 + lane;

    float sums[MI][NI][4] = {}, squares[MI][2] = {};
    auto square = [](unsigned int pair) {
      float low, high;
      if constexpr (BRAIN) {
        low = __uint_as_float(pair << 16), high = __uint_as_float(pair & 0xffff0000u);
      } else {
        asm("cvt.f32.f16 %0, %1;" : "=f"(low) : "h"((unsigned short)pair));
        asm("cvt.f32.f16 %0, %1;" : "=f"(high) : "h"((unsigned short)(pair >> 16)));
      }
      return low * low + high * high;
    };
    auto multiply = [](float* sum, unsigned int a0, unsigned int a1, unsigned int a2, unsigned int a3,
                       unsigned int b0, unsigned int b1) {
      if constexpr (BRAIN)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
      else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    };

    for (int first = warp; first < pieces; first += AHEAD * W) {
      uint4 some_x[AHEAD][MI][2], some_weights[AHEAD][NI];
      for (int p = 0; p < AHEAD; p++) {
        const int piece = first + p * W;
        for (int n = 0; n < NI; n++)
          some_weights[p][n] = piece < pieces ? from_weight[(n * pieces + piece) * 32] : make_uint4(0, 0, 0, 0);
        for (int m = 0; m < MI; m++)
          for (int h = 0; h < 2; h++)
            some_x[p][m][h] = piece < pieces && first_tile + m < tiles ? from_x[(m * pieces + piece) * 64 + 32 * h]
                                                                      : make_uint4(0, 0, 0, 0);
      }
      for (int p = 0; p < AHEAD; p++)
        for (int m = 0; m < MI; m++) {
          const uint4 upper = some_x[p][m][0], lower = some_x[p][m][1];
          if (NORMED) {
            squares[m][0] += square(upper.x) + square(upper.y) + square(upper.z) + square(upper.w);
            squares[m][1] += square(lower.x) + square(lower.y) + square(lower.z) + square(lower.w);
          }
          for (int n = 0; n < NI; n++) {
            const uint4 weights = some_weights[p][n];
            multiply(sums[m][n], upper.x, lower.x, upper.y, lower.y, weights.x, weights.y);
            multiply(sums[m][n], upper.z, lower.z, upper.w, lower.w, weights.z, weights.w);
          }
        }
    }

    __shared__ float parts[W][ROWS][STRIDE], lengths[W][ROWS];
    for (int m = 0; m < MI; m++)
      for (int h = 0; h < 2; h++) {
        const int row = 16 * m + 8 * h + quad;
        for (int n = 0; n < NI; n++)
          *reinterpret_cast<float2*>(&parts[warp][row][8 * n + 2 * at]) =
              make_float2(sums[m][n][2 * h], sums[m][n][2 * h + 1]);
        if (NORMED) {
          float length = squares[m][h];
          length += __shfl_xor_sync(0xffffffffu, length, 1);
          length += __shfl_xor_sync(0xffffffffu, length, 2);
          if (at == 0) lengths[warp][row] = length;
        }
      }
    __syncthreads();

    // Each thread has 8 adjacent results of a row.
    constexpr int RESULTS = GATED ? COLUMNS / 2 : COLUMNS, UNITS = RESULTS / 8;
    const int results = GATED ? width / 2 : width;
    for (int unit = threadIdx.x; unit < ROWS * UNITS; unit += 32 * W) {
      const int row = unit / UNITS, column = unit % UNITS * 8;
      if (first_tile + row / 16 >= tiles) break;
      float factor = 1.f;
      if (NORMED) {
        float length = 0.f;
        for (int w = 0; w < W; w++) length += lengths[w][row];
        factor = rsqrtf(length / size + eps[0]);
      }
      auto total = [&](int from, float* sum) {
        for (int e = 0; e < 8; e++) sum[e] = 0.f;
        for (int w = 0; w < W; w++)
          for (int e = 0; e < 8; e++) sum[e] += parts[w][row][from + e];
        for (int e = 0; e < 8; e++)
          sum[e] = sum[e] * factor + (BIASED ? static_cast<float>(bias[first_column + from + e]) : 0.f);
      };
      float result[8];
      total(column, result);
      if (GATED) {
        float gated[8];
        total(RESULTS + column, gated);
        for (int e = 0; e < 8; e++) result[e] = result[e] / (1.f + __expf(-result[e])) * gated[e];
      }
      const int to_row = first_tile * 16 + row, to_column = blockIdx.x * RESULTS + column;
      const long to = TILED ? tiled_place(to_row, to_column / 8, results) : ((long)to_row * results + to_column) / 8;
      alignas(16) T some[8];
      if (ADDED) {
        *reinterpret_cast<uint4*>(some) = reinterpret_cast<const uint4*>(plus)[to];
        for (int e = 0; e < 8; e++) result[e] += static_cast<float>(some[e]);
      }
      for (int e = 0; e < 8; e++) some[e] = static_cast<T>(result[e]);
      reinterpret_cast<uint4*>(out)[to] = *reinterpret_cast<const uint4*>(some);
    }
"""
)
_INPUTS = ("x", "weight", "bias", "plus", "eps")


@dataclass(frozen=True, slots=True)
class Tiling:
    """The part of a product that a block computes."""

    #: Rows in 16s and columns in 8s.
    row_tiles: int
    column_tiles: int
    warps: int
    #: Pieces that a warp reads ahead.
    ahead: int


#: With many columns a block takes many of them, so that x is read rarely; with few there must be many blocks. Of the nine
#: that were tried for each product of a model with 0.5 billion parameters, these take the least time of the GPU.
_WIDE, _NARROW, _FEW_ROWS = Tiling(2, 8, 4, 2), Tiling(2, 4, 8, 2), Tiling(1, 4, 8, 4)
#: Columns from which a product is wide, so that the device is busy; a gated one always is.
_WIDE_FROM = 4096
#: In a gated product, so many columns of the gate alternate with as many of what it gates: a block has both.
_GATE_COLUMNS = 8 * _WIDE.column_tiles // 2


def fits(columns: int, size: int, dtype: mx.Dtype, *, gated: bool = False) -> bool:
    """Return whether the kernel supports products with a weight [columns, size]; `gated`: with both kinds of columns."""
    multiple = 8 * _tiling(TILE + 1, columns, gated=gated).column_tiles
    return dtype in TYPES and size % PIECE == 0 and columns % multiple == 0


def tiled(x: mx.array) -> mx.array:
    """Return rows [R, K] as tiled rows, R rounded up to a multiple of 16."""
    rows, size = x.shape
    x = mx.pad(x, [(0, -rows % TILE), (0, 0)])
    return x.reshape(-1, TILE, size // PIECE, PIECE).transpose(0, 2, 1, 3).reshape(-1, size)


def untiled(x: mx.array, rows: int) -> mx.array:
    """Return the first `rows` of tiled rows [R, K]."""
    size = x.shape[1]
    return x.reshape(-1, size // PIECE, TILE, PIECE).transpose(0, 2, 1, 3).reshape(-1, size)[:rows]


def arranged(weight: mx.array) -> mx.array:
    """Return an arranged copy of a weight [N, K]."""
    columns, size = weight.shape
    return weight.reshape(columns // 8, 8, size // PIECE, PIECE).transpose(0, 2, 1, 3).reshape(columns, size)


def gated_rows(gate: mx.array, gated: mx.array) -> mx.array:
    """Join weights [N, …] of a gate and of what it gates to [2 N, …], as a gated `product` expects them."""
    pairs = [array.reshape(-1, _GATE_COLUMNS, *array.shape[1:]) for array in (gate, gated)]
    return mx.concatenate(pairs, axis=1).reshape(-1, *gate.shape[1:])


def product(
    x: mx.array,
    weight: mx.array,
    *,
    bias: mx.array | None = None,
    plus: mx.array | None = None,
    norm_eps: float | None = None,
    gated: bool = False,
    tiles: bool = True,
) -> mx.array:
    """Compute x Wᵀ + b + `plus`.

    Args:
        x: [R, K], tiled.
        weight: [N, K] for which `fits` is true, arranged.
        bias: [N].
        plus: Tiled, like the result.
        norm_eps: Divide each row of x by its root mean square first, with this epsilon; a norm's weight must have been
            multiplied into `weight`.
        gated: `weight` and `bias` come from `gated_rows`; the result is silu(gate) · gated.
        tiles: Whether the result is tiled.

    Returns:
        [R, N], or [R, N/2] if `gated`, in the type of x.
    """
    rows, columns = len(x), len(weight)
    tiling = _tiling(rows, columns, gated=gated)
    constants: Sequence[Constant] = [
        *(("T", x.dtype), ("BRAIN", x.dtype == mx.bfloat16)),
        *(
            ("MI", tiling.row_tiles),
            ("NI", tiling.column_tiles),
            ("W", tiling.warps),
            ("AHEAD", tiling.ahead),
        ),
        *(("NORMED", norm_eps is not None), ("GATED", gated), ("TILED", tiles)),
        *(("BIASED", bias is not None), ("ADDED", plus is not None)),
    ]
    threads = 32 * tiling.warps
    out: mx.array
    (out,) = cuda_kernel("product", _INPUTS, ("out",), _PRODUCT, all_registers=True)(
        [
            *(x, weight, x if bias is None else bias, x if plus is None else plus),
            constant(norm_eps or 0.0),
        ],
        template=constants,
        grid=(columns // (8 * tiling.column_tiles) * threads, -(-rows // (16 * tiling.row_tiles)), 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(rows, columns // 2 if gated else columns)],
        output_dtypes=[x.dtype],
    )
    return out


def _tiling(rows: int, columns: int, *, gated: bool) -> Tiling:
    if gated or columns >= _WIDE_FROM:
        return _WIDE
    return _NARROW if rows > TILE else _FEW_ROWS
