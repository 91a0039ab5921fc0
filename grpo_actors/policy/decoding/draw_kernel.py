"""`draw` on CUDA as one kernel, for sampling without filters.

It draws and records the same as `draw`, up to the rounding of sums. `draw` itself takes about twenty kernels, which
costs a decoding step as much as a whole layer.
"""

import mlx.core as mx

from grpo_actors.policy.cuda_kernel import Constant, CudaKernel, cuda_kernel
from grpo_actors.policy.decoding.draw import SamplingParams

#: Warps per block.
WARPS = 16

# One block per row, one stretch of the vocabulary per warp. All warps read the logits once, for the sums of their
# stretches. Then the one warp whose stretch contains the token reads it again, N elements per lane at a time.
_DRAW = """
    constexpr unsigned ALL = 0xffffffffu;
    const int row = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int size = logits_shape[1], pass = 32 * N;
    const int stretch = (size + W * pass - 1) / (W * pass) * pass;
    const int begin = warp * stretch, stop = min(begin + stretch, size);
    const T* x = logits + (long)row * size;
    const float inverse = 1.f / temperature[0];

    auto read = [&](int from, float* to) {
      alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) T raw[N];
      if constexpr (N * sizeof(T) % 16 == 0) {
        for (int i = 0; i < (int)(N * sizeof(T)) / 16; i++)
          reinterpret_cast<uint4*>(raw)[i] = reinterpret_cast<const uint4*>(x + from)[i];
      } else {
        for (int e = 0; e < N; e++) raw[e] = x[from + e];
      }
      for (int e = 0; e < N; e++) to[e] = static_cast<float>(raw[e]) * inverse;
    };
    auto up_to_lane = [&](float sum) {
      for (int o = 1; o < 32; o *= 2) {
        const float before = __shfl_up_sync(ALL, sum, o);
        if (lane >= o) sum += before;
      }
      return sum;
    };

    float top = -3e38f, total = 0.f, some[N];
    for (int i = begin + lane * N; i < stop; i += pass) {
      read(i, some);
      float higher = top;
      for (int e = 0; e < N; e++) higher = fmaxf(higher, some[e]);
      total *= __expf(top - higher);
      for (int e = 0; e < N; e++) total += __expf(some[e] - higher);
      top = higher;
    }
    for (int o = 16; o > 0; o /= 2) {
      const float other_top = __shfl_xor_sync(ALL, top, o), other_total = __shfl_xor_sync(ALL, total, o);
      const float higher = fmaxf(top, other_top);
      total = total * __expf(top - higher) + other_total * __expf(other_top - higher);
      top = higher;
    }
    __shared__ float tops[W], totals[W];
    if (lane == 0) { tops[warp] = top; totals[warp] = total; }
    __syncthreads();

    // Each lane stands for a warp now.
    const float its_top = lane < W ? tops[lane] : -3e38f;
    float highest = its_top;
    for (int o = 16; o > 0; o /= 2) highest = fmaxf(highest, __shfl_xor_sync(ALL, highest, o));
    const float weight = lane < W ? totals[lane] * __expf(its_top - highest) : 0.f;
    const float reached = up_to_lane(weight), whole = __shfl_sync(ALL, reached, 31);
    const float wanted = uniform[row] * whole;
    // What has no weight must not be drawn, and rounding may leave the sum just below what is wanted: then the last
    // token that has some is taken.
    const unsigned over = __ballot_sync(ALL, reached > wanted && weight > 0), heavy = __ballot_sync(ALL, weight > 0);
    const int chosen = over ? __ffs(over) - 1 : heavy ? 31 - __clz(heavy) : 0;
    if (warp != chosen) return;

    float before = __shfl_sync(ALL, reached - weight, chosen);
    int drawn = -1, last = 0;
    for (int first = begin; first < stop && drawn < 0; first += pass) {
      const int i = first + lane * N;
      float own = 0.f;
      for (int e = 0; e < N; e++) some[e] = 0.f;
      if (i < stop) {
        read(i, some);
        for (int e = 0; e < N; e++) {
          some[e] = __expf(some[e] - highest);
          own += some[e];
          if (some[e] > 0) last = i + e;
        }
      }
      const float sum = up_to_lane(own);
      const unsigned here = __ballot_sync(ALL, before + sum > wanted && own > 0);
      if (here) {
        float running = before + sum - own;
        int mine = last;
        for (int e = N - 1; e >= 0; e--) {
          float up_to = running;
          for (int f = 0; f <= e; f++) up_to += some[f];
          if (up_to > wanted && some[e] > 0) mine = i + e;
        }
        drawn = __shfl_sync(ALL, mine, __ffs(here) - 1);
      }
      before += __shfl_sync(ALL, sum, 31);
    }
    for (int o = 16; o > 0; o /= 2) last = max(last, __shfl_xor_sync(ALL, last, o));
    if (lane == 0) {
      drawn = drawn < 0 ? last : drawn;
      token[row] = drawn;
      logprob[row] = static_cast<float>(x[drawn]) * inverse - highest - logf(whole);
    }
"""


def kernel() -> CudaKernel:
    """Return the kernel: one block of 32 × `WARPS` threads for each row."""
    return cuda_kernel("draw", ("logits", "uniform", "temperature"), ("token", "logprob"), _DRAW)


def constants(dtype: mx.Dtype, vocabulary: int) -> list[Constant]:
    """Return the kernel's constants for logits of this type."""
    return [("T", dtype), ("N", 1 if vocabulary % 8 else 8), ("W", WARPS)]


def fits(params: SamplingParams) -> bool:
    """Return whether the kernel supports these parameters."""
    return params.temperature > 0 and not params.filters and params.repetition_penalty == 1


def draw(logits: mx.array, uniform: mx.array, temperature: float) -> tuple[mx.array, mx.array]:
    """Draw one token for each row, and return it with its log-prob.

    Args:
        logits: [R, V], any float type.
        uniform: [R] float32 in [0, 1).
        temperature: Temperature, above 0.

    Returns:
        Token ids [R] (uint32) and log-probs [R] (float32).
    """
    rows, vocabulary = logits.shape
    token, logprob = kernel()(
        inputs=[logits, uniform, mx.array([temperature], mx.float32)],
        template=constants(logits.dtype, vocabulary),
        grid=(32 * WARPS * rows, 1, 1),
        threadgroup=(32 * WARPS, 1, 1),
        output_shapes=[(rows,), (rows,)],
        output_dtypes=[mx.uint32, mx.float32],
    )
    return token, logprob
