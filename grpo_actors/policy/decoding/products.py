"""The matrix products of a decoding step as kernels of our own, with what surrounds them.

A step's products have few rows: their time is that of reading the weights, and of launching them. cuBLAS costs the host
three times as much per product as a plain kernel, and leaves norms, gates and sums to further kernels. Here a kernel
reads each weight once, straight into the registers of the tensor cores.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from grpo_actors.policy.cuda_kernel import Constant, constant, cuda_kernel

#: Types that the tensor cores multiply.
TYPES = (mx.bfloat16, mx.float16)
#: Numbers of a weight's row that a warp reads at a time; rows must consist of them.
PIECE = 32
#: In a gated product, so many columns of the gate alternate with as many of what it gates.
GATE_COLUMNS = 16

# One block for 16·MI rows of x and 8·NI columns, i.e. rows of the weight. Its W warps share the sum over K: each takes
# every W-th piece of 32 numbers, AHEAD of them at a time, and the block adds their results in the end.
#
# A thread reads 8 adjacent numbers of a row at a time. The tensor cores would want numbers 2t, 2t+1, 2t+8, 2t+9 of 16 from
# the t-th thread of four, but the order of a sum does not matter: for x and weight alike it gives them numbers 8t to 8t+3
# of 32, and then 8t+4 to 8t+7.
#
# A norm's weight is part of the product's. Its factor for a row follows from the numbers that are read anyway, and is
# applied to the result.
_PRODUCT = """
    constexpr int ROWS = 16 * MI, COLUMNS = 8 * NI, STRIDE = COLUMNS + 8;
    const int rows = x_shape[0], size = x_shape[1], width = weight_shape[0];
    const int warp = threadIdx.x / 32, quad = threadIdx.x % 32 / 4, at = threadIdx.x % 4 * 8;
    const int first_row = blockIdx.y * ROWS, first_column = blockIdx.x * COLUMNS;
    const T* from_x = x + (long)(first_row + quad) * size + at;
    const T* from_weight = weight + (long)(first_column + quad) * size + at;

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

    for (int first = warp * 32; first < size; first += AHEAD * W * 32) {
      uint4 some_x[AHEAD][MI][2], some_weights[AHEAD][NI];
      for (int p = 0; p < AHEAD; p++) {
        const int k = first + p * W * 32;
        for (int n = 0; n < NI; n++)
          some_weights[p][n] = k < size ? *reinterpret_cast<const uint4*>(from_weight + (long)(8 * n) * size + k)
                                        : make_uint4(0, 0, 0, 0);
        for (int m = 0; m < MI; m++)
          for (int h = 0; h < 2; h++) {
            const int row = 16 * m + 8 * h;
            some_x[p][m][h] = k < size && first_row + quad + row < rows
                                  ? *reinterpret_cast<const uint4*>(from_x + (long)row * size + k)
                                  : make_uint4(0, 0, 0, 0);
          }
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
        for (int n = 0; n < NI; n++) {
          parts[warp][row][8 * n + at / 4] = sums[m][n][2 * h];
          parts[warp][row][8 * n + at / 4 + 1] = sums[m][n][2 * h + 1];
        }
        if (NORMED) {
          float length = squares[m][h];
          length += __shfl_xor_sync(0xffffffffu, length, 1);
          length += __shfl_xor_sync(0xffffffffu, length, 2);
          if (at == 0) lengths[warp][row] = length;
        }
      }
    __syncthreads();

    constexpr int RESULTS = GATED ? COLUMNS / 2 : COLUMNS;
    const int results = GATED ? width / 2 : width;
    for (int i = threadIdx.x; i < ROWS * RESULTS; i += 32 * W) {
      const int row = i / RESULTS, column = i % RESULTS;
      if (first_row + row >= rows) break;
      float factor = 1.f;
      if (NORMED) {
        float length = 0.f;
        for (int w = 0; w < W; w++) length += lengths[w][row];
        factor = rsqrtf(length / size + eps[0]);
      }
      auto total = [&](int from) {
        float sum = 0.f;
        for (int w = 0; w < W; w++) sum += parts[w][row][from];
        sum *= factor;
        return BIASED ? sum + static_cast<float>(bias[first_column + from]) : sum;
      };
      float result = total(column);
      if (GATED) result = result / (1.f + __expf(-result)) * total(RESULTS + column);
      const long to = (long)(first_row + row) * results + blockIdx.x * RESULTS + column;
      if (ADDED) result += static_cast<float>(plus[to]);
      out[to] = static_cast<T>(result);
    }
"""
_INPUTS = ("x", "weight", "bias", "plus", "eps")


@dataclass(frozen=True, slots=True)
class Tiling:
    """The part of a product that a block computes."""

    #: Rows in 16s and columns in 8s.
    row_tiles: int
    column_tiles: int
    warps: int
    #: Pieces of K that a warp reads ahead.
    ahead: int


#: With many columns a block reads x rarely enough if it takes many of them; with few there must be many blocks.
_WIDE, _NARROW, _FEW_ROWS = Tiling(4, 4, 4, 2), Tiling(2, 2, 8, 4), Tiling(1, 2, 8, 4)
#: Columns from which a product is wide, so that the device is busy.
_WIDE_FROM = 4096


def fits(columns: int, size: int, dtype: mx.Dtype) -> bool:
    """Return whether the kernel supports products with a weight [columns, size] of this type."""
    return dtype in TYPES and size % PIECE == 0 and columns % (2 * GATE_COLUMNS) == 0


def gated_rows(gate: mx.array, gated: mx.array) -> mx.array:
    """Join weights [N, …] of a gate and of what it gates to [2 N, …], as `product` expects them."""
    pairs = [array.reshape(-1, GATE_COLUMNS, *array.shape[1:]) for array in (gate, gated)]
    return mx.concatenate(pairs, axis=1).reshape(-1, *gate.shape[1:])


def product(
    x: mx.array,
    weight: mx.array,
    *,
    bias: mx.array | None = None,
    plus: mx.array | None = None,
    norm_eps: float | None = None,
    gated: bool = False,
) -> mx.array:
    """Compute x Wᵀ + b + `plus`.

    Args:
        x: [R, K].
        weight: [N, K], for which `fits` is true.
        bias: [N].
        plus: Like the result.
        norm_eps: Divide each row of x by its root mean square first, with this epsilon; a norm's weight must have been
            multiplied into `weight`.
        gated: `weight` and `bias` come from `gated_rows`; the result is silu(gate) · gated.

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
        *(("NORMED", norm_eps is not None), ("GATED", gated)),
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
    return _NARROW if rows > 16 else _FEW_ROWS
