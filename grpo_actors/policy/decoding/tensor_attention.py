"""One step of attention over `slots` on the tensor cores of a CUDA device, for the usual sizes of heads.

The same as the kernel of `slot_kernels`, which supports every size and type, in a fifth of its time: there the arithmetic
of the scores takes longer than reading the keys and values.
"""

import mlx.core as mx

#: Warps per block.
WARPS = 8
#: Sizes of heads, and the most queries that share keys: more do not fit a thread's registers.
HEAD_SIZES, MOST_QUERIES = (64, 128), 8
TYPES = (mx.bfloat16, mx.float16)

# One block for the G query heads of a row that share keys. The block's warps divide the columns by 16s. A product of the
# tensor cores has 16 × 8 results from 16 × 16 and 16 × 8 numbers; the queries are half of its 16 rows.
#
# A thread is the t-th of the four of `quad`. It reads 8 adjacent numbers of a head at a time. The tensor cores would
# want numbers 2t, 2t+1, 2t+8, 2t+9 of 16, but the order of a sum does not matter: for queries and keys alike they get
# numbers 8t to 8t+3 of 32, and then 8t+4 to 8t+7. For the values the results are permuted instead: the
# j-th product gets numbers 8·quad + j of the head, and a thread ends with numbers 16t to 16t + 15 of query `quad`.
ATTEND = """
    constexpr unsigned ALL = 0xffffffffu;
    constexpr int PIECES = D / 32, SETS = D / 64, SHARED_BY = HQ / HK;
    const int head = blockIdx.x * G, row = blockIdx.y, kv_head = head / SHARED_BY;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane / 4, t = lane % 4;
    const long rows = cache_shape[2], capacity = cache_shape[4];
    const long to_values = rows * HK * capacity * D / 8;
    uint4* keys = reinterpret_cast<uint4*>(const_cast<T*>(cache)) +
                  ((2 * layer[0] * rows + row) * HK + kv_head) * capacity * D / 8;
    const int end = length[row];

    auto widen = [](uint4 eight, float* to) {
      const unsigned int pairs[4] = {eight.x, eight.y, eight.z, eight.w};
      for (int i = 0; i < 4; i++)
        if constexpr (BRAIN) {
          to[2 * i] = __uint_as_float(pairs[i] << 16), to[2 * i + 1] = __uint_as_float(pairs[i] & 0xffff0000u);
        } else {
          asm("cvt.f32.f16 %0, %1;" : "=f"(to[2 * i]) : "h"((unsigned short)pairs[i]));
          asm("cvt.f32.f16 %0, %1;" : "=f"(to[2 * i + 1]) : "h"((unsigned short)(pairs[i] >> 16)));
        }
    };
    auto pair = [](float low, float high) {
      unsigned int both;
      if constexpr (BRAIN)
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
      else
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
      return both;
    };
    auto narrow = [&](const float* from) {
      return make_uint4(pair(from[0], from[1]), pair(from[2], from[3]), pair(from[4], from[5]), pair(from[6], from[7]));
    };
    // Rows 8 to 15 of the first factor are 0.
    auto multiply = [](float* sum, unsigned int a0, unsigned int a2, unsigned int b0, unsigned int b1) {
      if constexpr (BRAIN)
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
            : "r"(a0), "r"(0), "r"(a2), "r"(0), "r"(b0), "r"(b1));
      else
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
            : "r"(a0), "r"(0), "r"(a2), "r"(0), "r"(b0), "r"(b1));
    };
    // This thread's part of a head, as it is attended to: normalised and rotated here, if that was not done before.
    auto finish = [&](const T* from, const T* weight, float factor, uint4* to) {
      float parts[PIECES][8];
      for (int p = 0; p < PIECES; p++) widen(reinterpret_cast<const uint4*>(from)[4 * p + t], parts[p]);
      if (JOINED && NORMED) {
        float sum = 0.f;
        for (int p = 0; p < PIECES; p++)
          for (int e = 0; e < 8; e++) sum += parts[p][e] * parts[p][e];
        sum += __shfl_xor_sync(ALL, sum, 1);
        sum += __shfl_xor_sync(ALL, sum, 2);
        const float inverse = rsqrtf(sum / D + eps[0]);
        for (int p = 0; p < PIECES; p++) {
          float weights[8];
          widen(reinterpret_cast<const uint4*>(weight)[4 * p + t], weights);
          for (int e = 0; e < 8; e++) parts[p][e] *= inverse * weights[e];
        }
      }
      if (JOINED)
        for (int p = 0; p < PIECES / 2; p++)
          for (int e = 0; e < 8; e++) {
            const float* cosine = rotation + row * D + 32 * p + 8 * t + e;
            const float first = parts[p][e], second = parts[p + PIECES / 2][e];
            parts[p][e] = first * cosine[0] - second * cosine[D / 2];
            parts[p + PIECES / 2][e] = second * cosine[0] + first * cosine[D / 2];
          }
      for (int p = 0; p < PIECES; p++) {
        for (int e = 0; e < 8; e++) parts[p][e] *= factor;
        to[p] = narrow(parts[p]);
      }
    };

    // The new column: every block that needs it has its own copy, and one of them writes it.
    __shared__ uint4 new_key[D / 8], new_value[D / 8];
    const T* q_from = q + (JOINED ? row * (HQ + 2 * HK) + head : row * HQ + head) * D;
    const T* k_from = k + (JOINED ? row * (HQ + 2 * HK) + HQ + kv_head : row * HK + kv_head) * D;
    const T* v_from = v + (JOINED ? row * (HQ + 2 * HK) + HQ + HK + kv_head : row * HK + kv_head) * D;
    uint4 query[PIECES];
    // Scores in powers of 2.
    finish(q_from + (quad < G ? quad : 0) * D, q_norm, scale[0] * 1.4426950408889634f, query);
    if (warp == 0) {
      uint4 key[PIECES];
      finish(k_from, k_norm, 1.f, key);
      if (quad == 0)
        for (int p = 0; p < PIECES; p++) {
          const int unit = 4 * p + t;
          const uint4 value = reinterpret_cast<const uint4*>(v_from)[unit];
          new_key[unit] = key[p];
          new_value[unit] = value;
          if (head % SHARED_BY == 0) {
            keys[(long)end * (D / 8) + unit] = key[p];
            keys[to_values + (long)end * (D / 8) + unit] = value;
          }
        }
    }
    __syncthreads();

    float top = -1e30f, total = 0.f, sums[SETS][8][4] = {};
    for (int first = 16 * warp; first <= end; first += 16 * W) {
      uint4 some_keys[2][PIECES], some_values[4][SETS];
      for (int half = 0; half < 2; half++) {
        const int column = first + 8 * half + quad;
        for (int p = 0; p < PIECES; p++)
          some_keys[half][p] =
              column < end ? keys[(long)column * (D / 8) + 4 * p + t] : new_key[4 * p + t];
      }
      // Columns 2t, 2t + 1, 2t + 8 and 2t + 9 of the 16.
      for (int i = 0; i < 4; i++) {
        const int column = first + 2 * t + i % 2 + i / 2 * 8;
        for (int s = 0; s < SETS; s++)
          some_values[i][s] =
              column < end ? keys[to_values + (long)column * (D / 8) + 8 * s + quad] : new_value[8 * s + quad];
      }
      float scores[2][4] = {};
      for (int half = 0; half < 2; half++)
        for (int p = 0; p < PIECES; p++) {
          multiply(scores[half], query[p].x, query[p].y, some_keys[half][p].x, some_keys[half][p].y);
          multiply(scores[half], query[p].z, query[p].w, some_keys[half][p].z, some_keys[half][p].w);
        }
      float higher = top;
      for (int i = 0; i < 4; i++) {
        const bool seen = first + 2 * t + i % 2 + i / 2 * 8 <= end;
        scores[i / 2][i % 2] = seen ? scores[i / 2][i % 2] : -1e30f;
        higher = fmaxf(higher, scores[i / 2][i % 2]);
      }
      higher = fmaxf(higher, __shfl_xor_sync(ALL, higher, 1));
      higher = fmaxf(higher, __shfl_xor_sync(ALL, higher, 2));
      const float kept = exp2f(top - higher);
      float weights[4];
      total *= kept;
      for (int i = 0; i < 4; i++) {
        weights[i] = exp2f(scores[i / 2][i % 2] - higher);
        total += weights[i];
      }
      top = higher;
      const unsigned int left = pair(weights[0], weights[1]), right = pair(weights[2], weights[3]);
      for (int s = 0; s < SETS; s++) {
        const unsigned int* words[4];
        for (int i = 0; i < 4; i++) words[i] = &some_values[i][s].x;
        for (int j = 0; j < 8; j++) {
          const unsigned int which = j % 2 ? 0x7632 : 0x5410;
          sums[s][j][0] *= kept, sums[s][j][1] *= kept;
          multiply(sums[s][j], left, right, __byte_perm(words[0][j / 2], words[1][j / 2], which),
                   __byte_perm(words[2][j / 2], words[3][j / 2], which));
        }
      }
    }
    total += __shfl_xor_sync(ALL, total, 1);
    total += __shfl_xor_sync(ALL, total, 2);

    __shared__ float tops[W][8], totals[W][8], results[W][G][D];
    if (quad < G) {
      if (t == 0) tops[warp][quad] = top, totals[warp][quad] = total;
      for (int s = 0; s < SETS; s++)
        for (int j = 0; j < 8; j++)
          for (int h = 0; h < 2; h++) results[warp][quad][64 * s + 16 * t + 8 * h + j] = sums[s][j][h];
    }
    __syncthreads();
    for (int unit = threadIdx.x; unit < G * D / 8; unit += 32 * W) {
      const int g = unit / (D / 8), first = unit % (D / 8) * 8;
      float highest = -1e30f, whole = 0.f, result[8] = {};
      for (int w = 0; w < W; w++) highest = fmaxf(highest, tops[w][g]);
      for (int w = 0; w < W; w++) {
        const float share = exp2f(tops[w][g] - highest);
        whole += share * totals[w][g];
        for (int e = 0; e < 8; e++) result[e] += share * results[w][g][first + e];
      }
      for (int e = 0; e < 8; e++) result[e] /= whole;
      const int column = (head + g) * D + first;
      reinterpret_cast<uint4*>(out)[((long)row * HQ * D + column) / 8] = narrow(result);
    }
"""


def fits(size: int, dtype: mx.Dtype) -> bool:
    """Return whether the kernel supports heads of this size and type."""
    return size in HEAD_SIZES and dtype in TYPES
