"""The small CUDA kernels of a recorded step (`recorded_step`): everything but products, attention and the random draw.

Rows are read and written 16 bytes at a time, eight numbers of 16 bits; widths are multiples of eight.
"""

# One block for each row: the token that it is fed, and the rotation at its position.
BEGIN = """
    const int row = blockIdx.x, rows = gridDim.x, position = step[row], given = step[rows + row];
    const long fed = given < 0 ? token[row] : given;
    const uint4* from = reinterpret_cast<const uint4*>(embedding + fed * WIDTH);
    uint4* to = reinterpret_cast<uint4*>(x + (long)row * WIDTH);
    for (int i = threadIdx.x; i < WIDTH / 8; i += blockDim.x) to[i] = from[i];
    for (int i = threadIdx.x; i < D; i += blockDim.x) rotation[row * D + i] = table[(long)position * D + i];
"""
BEGIN_INPUTS, BEGIN_OUTPUTS = ("token", "step", "embedding", "table"), ("x", "rotation")

# One block of W warps for each row.
RMS_NORM = """
    const T* from = x + (long)blockIdx.x * WIDTH;
    T* to = out + (long)blockIdx.x * WIDTH;
    float sum = 0.f;
    for (int i = threadIdx.x * 8; i < WIDTH; i += 32 * W * 8) {
      alignas(16) T some[8];
      *reinterpret_cast<uint4*>(some) = *reinterpret_cast<const uint4*>(from + i);
      for (int e = 0; e < 8; e++) sum += static_cast<float>(some[e]) * static_cast<float>(some[e]);
    }
    for (int o = 16; o > 0; o /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, o);
    __shared__ float sums[W];
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    float all = 0.f;
    for (int w = 0; w < W; w++) all += sums[w];
    const float factor = rsqrtf(all / WIDTH + eps[0]);
    for (int i = threadIdx.x * 8; i < WIDTH; i += 32 * W * 8) {
      alignas(16) T some[8], weights[8];
      *reinterpret_cast<uint4*>(some) = *reinterpret_cast<const uint4*>(from + i);
      *reinterpret_cast<uint4*>(weights) = *reinterpret_cast<const uint4*>(weight + i);
      for (int e = 0; e < 8; e++)
        some[e] = static_cast<T>(static_cast<float>(some[e]) * factor * static_cast<float>(weights[e]));
      *reinterpret_cast<uint4*>(to + i) = *reinterpret_cast<const uint4*>(some);
    }
"""
RMS_NORM_INPUTS = ("x", "weight", "eps")

# Eight numbers for each thread: silu(gate) × up, of a product that holds both side by side.
GATED = """
    const int at = (blockIdx.x * blockDim.x + threadIdx.x) * 8;
    if (at >= WIDTH) return;
    const T* from = gate_up + (long)blockIdx.y * 2 * WIDTH + at;
    alignas(16) T gate[8], up[8];
    *reinterpret_cast<uint4*>(gate) = *reinterpret_cast<const uint4*>(from);
    *reinterpret_cast<uint4*>(up) = *reinterpret_cast<const uint4*>(from + WIDTH);
    for (int e = 0; e < 8; e++) {
      const float g = static_cast<float>(gate[e]);
      gate[e] = static_cast<T>(g / (1.f + __expf(-g)) * static_cast<float>(up[e]));
    }
    *reinterpret_cast<uint4*>(out + (long)blockIdx.y * WIDTH + at) = *reinterpret_cast<const uint4*>(gate);
"""

# One block of W warps for each row: the first of the largest logits, and its log-prob at temperature 1.
LARGEST = """
    constexpr unsigned ALL = 0xffffffffu;
    const int size = logits_shape[1];
    const T* from = logits + (long)blockIdx.x * size;
    float top = -3e38f, total = 0.f;
    int which = 0x7fffffff;
    auto take = [&](float other, float other_total, int at) {
      if (other > top || (other == top && at < which)) which = at;
      const float higher = fmaxf(top, other);
      total = total * __expf(top - higher) + other_total * __expf(other - higher);
      top = higher;
    };
    for (int i = threadIdx.x; i < size; i += 32 * W) take(static_cast<float>(from[i]), 1.f, i);
    for (int o = 16; o > 0; o /= 2)
      take(__shfl_xor_sync(ALL, top, o), __shfl_xor_sync(ALL, total, o), __shfl_xor_sync(ALL, which, o));
    __shared__ float tops[W], totals[W];
    __shared__ int whiches[W];
    if (threadIdx.x % 32 == 0) {
      tops[threadIdx.x / 32] = top;
      totals[threadIdx.x / 32] = total;
      whiches[threadIdx.x / 32] = which;
    }
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (int w = 1; w < W; w++) take(tops[w], totals[w], whiches[w]);
    token[blockIdx.x] = which;
    logprob[blockIdx.x] = -logf(total);
"""
