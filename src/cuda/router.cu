// SPDX-License-Identifier: Apache-2.0
// The router's product: logits = x W^T, exact products accumulated in fp32 in one order of the
// width for every T, because an expert chosen by a different last bit would be another token's
// doing.
//
// K is cut into kSlices slices, one for each warp of a block: few tokens still occupy many warps,
// and at any T a block has enough bytes in flight without staging them. (One warp per product with
// its lanes' own sums took 7.5 times as long at T = 8192.)
#include "cuda/device.h"
#include "cuda/element.h"
#include "cuda/overlap.h"
#include "cuda/sm80/ptx.h"
#include "cuda/stages.h"

namespace moesaic::cuda {
namespace {

struct LogitsParams {
  const void* x = nullptr;
  const void* w = nullptr;
  std::int64_t x_stride = 0, w_stride = 0;
  std::int64_t tokens = 0, experts = 0, hidden = 0;
  bool x_wide = false, w_wide = false;
  float* logits = nullptr;  // [tokens, experts]
  unsigned expert_blocks = 1;
};

// Eight neighbouring elements of a row, in whole words: elements of 16 bits would be taken apart as
// they arrive.
template <typename T>
struct Eight {
  uint4 word[sizeof(T) / 2] = {};
  __device__ __forceinline__ T element(int i) const { return reinterpret_cast<const T*>(word)[i]; }
  __device__ __forceinline__ std::uint32_t pair(int i) const {
    return reinterpret_cast<const std::uint32_t*>(word)[i];
  }
};
// How they come: together or, where rows do not begin at multiples of 16 bytes, one by one.
struct Together {
  using Offset = int;  // of a row in a tile: 64 bits would be registers that there are not
  template <typename T>
  static __device__ __forceinline__ Eight<T> load(const T* row, std::int64_t column,
                                                  std::int64_t end) {
    Eight<T> eight;
    if (column < end) {
#pragma unroll
      for (unsigned i = 0; i < sizeof(T) / 2; ++i)
        eight.word[i] = reinterpret_cast<const uint4*>(row + column)[i];
    }
    return eight;
  }
};
struct OneByOne {
  using Offset = std::int64_t;
  template <typename T>
  static __device__ __forceinline__ Eight<T> load(const T* row, std::int64_t column,
                                                  std::int64_t end) {
    Eight<T> eight;
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (column + i < end) reinterpret_cast<T*>(eight.word)[i] = row[column + i];
    return eight;
  }
};
template <typename T>
__device__ __forceinline__ Eight<T> load_eight(const T* row, std::int64_t column, std::int64_t end,
                                               bool wide) {
  return wide ? Together::load(row, column, end) : OneByOne::load(row, column, end);
}

// --- 16-bit hidden states: tensor cores ----------------------------------------------------------
constexpr int kSlices = 8, kStepK = 32;

// Eight neighbouring elements of a row are two pairs of each of two mma's: which of the 16 k of an
// mma they are is the same for both operands, so it does not matter.
//
// An f32 weight is three bf16 numbers that add up to it, each the next eight bits: the products
// stay exact.
template <typename X, typename W>
struct Parts {
  static_assert(std::is_same_v<X, W>);
  static constexpr int kParts = 1;
  std::uint32_t pair[1][4];
  Parts() = default;
  __device__ __forceinline__ explicit Parts(const Eight<W>& raw) {
#pragma unroll
    for (int i = 0; i < 4; ++i) pair[0][i] = raw.pair(i);
  }
};
template <>
struct Parts<__nv_bfloat16, float> {
  static constexpr int kParts = 3;
  std::uint32_t pair[3][4];  // the smallest first
  Parts() = default;
  __device__ __forceinline__ explicit Parts(const Eight<float>& raw) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float rest[2] = {raw.element(2 * i), raw.element(2 * i + 1)};
#pragma unroll
      for (int part = 2; part >= 0; --part) {
        std::uint32_t top[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          top[e] = __float_as_uint(rest[e]) & 0xffff0000u;
          if (rest[e] != rest[e]) top[e] = 0x7fc00000u;
          // (Of an infinity nothing is left; a difference would be NaN.)
          rest[e] = fabsf(rest[e]) < INFINITY ? rest[e] - __uint_as_float(top[e]) : 0.0f;
        }
        pair[part][i] = top[0] >> 16 | top[1];
      }
    }
  }
};

// A block makes the logits of 16 kM tokens and 8 kN experts, each of its warps in its slice of K;
// kAhead steps are requested before the first of them is used.
template <typename X, typename W, typename Load, int kM, int kN, int kAhead>
__global__ void __launch_bounds__(kSlices * 32, 1) router_tiles(LogitsParams p) {
  __shared__ __align__(16) float partial[kSlices][kN][32][4];  // of 16 tokens
  begin_kernel();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, quad = lane / 4;
  const std::int64_t token = std::int64_t{blockIdx.x / p.expert_blocks} * (16 * kM);
  const std::int64_t expert = std::int64_t{blockIdx.x % p.expert_blocks} * (8 * kN);
  using Offset = typename Load::Offset;
  const X* const x_tile = static_cast<const X*>(p.x) + token * p.x_stride;
  const W* const w_tile = static_cast<const W*>(p.w) + expert * p.w_stride;
  const int last_token = static_cast<int>(min(p.tokens - token, std::int64_t{16 * kM})) - 1;
  const int last_expert = static_cast<int>(min(p.experts - expert, std::int64_t{8 * kN})) - 1;
  Offset x_row[2 * kM], w_row[kN];
#pragma unroll
  for (int i = 0; i < 2 * kM; ++i)
    x_row[i] = min(i * 8 + quad, last_token) * static_cast<Offset>(p.x_stride);
#pragma unroll
  for (int i = 0; i < kN; ++i)
    w_row[i] = min(i * 8 + quad, last_expert) * static_cast<Offset>(p.w_stride);
  const std::int64_t slice = (p.hidden + kSlices * kStepK - 1) / (kSlices * kStepK) * kStepK;
  const std::int64_t end = min((warp + 1) * slice, p.hidden);
  std::int64_t column = warp * slice + lane % 4 * 8;
  Eight<X> x[kAhead][2 * kM];
  Eight<W> w[kAhead][kN];
  const auto load = [&](int stage, std::int64_t at) {
#pragma unroll
    for (int i = 0; i < 2 * kM; ++i) x[stage][i] = Load::load(x_tile + x_row[i], at, end);
#pragma unroll
    for (int i = 0; i < kN; ++i) w[stage][i] = Load::load(w_tile + w_row[i], at, end);
  };
  float sum[kM][kN][4] = {};
#pragma unroll
  for (int stage = 0; stage < kAhead; ++stage) load(stage, column + stage * kStepK);
  // (Steps behind the slice's end, up to a multiple of kAhead, add zeros: no bit changes.)
  for (std::int64_t k = 0; k < slice; k += kAhead * kStepK) {
#pragma unroll
    for (int stage = 0; stage < kAhead; ++stage) {
      column += kStepK;
      Parts<X, W> parts[kN];
#pragma unroll
      for (int n = 0; n < kN; ++n) parts[n] = Parts<X, W>(w[stage][n]);
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          const Eight<X>&low = x[stage][2 * m], &high = x[stage][2 * m + 1];
          const std::uint32_t a[4] = {low.pair(2 * half), high.pair(2 * half),
                                      low.pair(2 * half + 1), high.pair(2 * half + 1)};
#pragma unroll
          for (int n = 0; n < kN; ++n)
#pragma unroll
            for (int part = 0; part < Parts<X, W>::kParts; ++part)
              ptx::mma_16816(sum[m][n], a, parts[n].pair[part] + 2 * half, X{});
        }
      load(stage, column + (kAhead - 1) * kStepK);
    }
  }
  // The slices in ascending order, 16 tokens at a time.
#pragma unroll
  for (int m = 0; m < kM; ++m) {
    if (m > 0) __syncthreads();
#pragma unroll
    for (int n = 0; n < kN; ++n)
      *reinterpret_cast<float4*>(partial[warp][n][lane]) =
          make_float4(sum[m][n][0], sum[m][n][1], sum[m][n][2], sum[m][n][3]);
    __syncthreads();
    for (int i = threadIdx.x; i < kN * 128; i += kSlices * 32) {
      const int n = i / 128, owner = i % 128 / 4, part = i % 4;
      float total = 0.0f;
#pragma unroll
      for (int s = 0; s < kSlices; ++s) total += partial[s][n][owner][part];
      const std::int64_t t = token + m * 16 + owner / 4 + part / 2 * 8;
      const std::int64_t e = expert + n * 8 + owner % 4 * 2 + part % 2;
      if (t < p.tokens && e < p.experts) p.logits[t * p.experts + e] = total;
    }
  }
}

template <typename X, typename W>
constexpr bool kOnTensorCores =
    !std::is_same_v<X, float> &&
    (std::is_same_v<X, W> || (std::is_same_v<X, __nv_bfloat16> && std::is_same_v<W, float>));

// --- all other pairs -----------------------------------------------------------------------------
// One warp per kTokens x kExperts products. Lane l adds the elements of eights l, l + 32, ... in
// ascending order, then the lanes are added in a fixed tree: the same bits for every tile and T.
template <typename X, typename W, int kTokens, int kExperts>
__global__ void __launch_bounds__(128, 1) router_logits(LogitsParams p) {
  begin_kernel();
  const int lane = threadIdx.x % 32;
  const std::int64_t warp = static_cast<std::int64_t>(blockIdx.x) * 4 + threadIdx.x / 32;
  const std::int64_t columns = (p.experts + kExperts - 1) / kExperts;
  const std::int64_t token = warp / columns * kTokens, expert = warp % columns * kExperts;
  if (token >= p.tokens) return;
  const X* x_row[kTokens];
  const W* w_row[kExperts];
#pragma unroll
  for (int t = 0; t < kTokens; ++t)
    x_row[t] = static_cast<const X*>(p.x) + min(token + t, p.tokens - 1) * p.x_stride;
#pragma unroll
  for (int e = 0; e < kExperts; ++e)
    w_row[e] = static_cast<const W*>(p.w) + min(expert + e, p.experts - 1) * p.w_stride;
  float sum[kTokens][kExperts] = {};
#pragma unroll 2
  for (std::int64_t h = lane * 8; h < p.hidden; h += 256) {
    Eight<X> x[kTokens];
    Eight<W> w[kExperts];
#pragma unroll
    for (int t = 0; t < kTokens; ++t) x[t] = load_eight(x_row[t], h, p.hidden, p.x_wide);
#pragma unroll
    for (int e = 0; e < kExperts; ++e) w[e] = load_eight(w_row[e], h, p.hidden, p.w_wide);
#pragma unroll
    for (int t = 0; t < kTokens; ++t)
#pragma unroll
      for (int e = 0; e < kExperts; ++e)
#pragma unroll
        for (int i = 0; i < 8; ++i)
          sum[t][e] = fmaf(to_float(x[t].element(i)), to_float(w[e].element(i)), sum[t][e]);
  }
#pragma unroll
  for (int t = 0; t < kTokens; ++t)
#pragma unroll
    for (int e = 0; e < kExperts; ++e) {
      const float total = warp_sum(sum[t][e]);
      if (lane == 0 && token + t < p.tokens && expert + e < p.experts)
        p.logits[(token + t) * p.experts + expert + e] = total;
    }
}

}  // namespace

void run_router(const RouteStage& s, const DeviceTraits& device, cudaStream_t stream) {
  const Tensor &x = s.hidden_states, &w = s.router.weight;
  LogitsParams p{.x = x.data,
                 .w = w.data,
                 .x_stride = x.strides[0],
                 .w_stride = w.strides[0],
                 .tokens = x.shape[0],
                 .experts = w.shape[0],
                 .hidden = x.shape[1],
                 .x_wide = eight_wide(x.data, x.shape[1], x.strides[0], size_of(x.dtype)),
                 .w_wide = eight_wide(w.data, w.shape[1], w.strides[0], size_of(w.dtype)),
                 .logits = s.logits_scratch.as<float>()};
  const auto go = [&](auto kernel, std::int64_t blocks, unsigned threads) {
    launch("route: logits", kernel,
           {.grid = dim3(static_cast<unsigned>(blocks)),
            .block = dim3(threads),
            .dependency = overlap(device)},
           stream, p);
  };
  const auto tiles = [&](auto kernel, int tokens, int experts) {
    p.expert_blocks = static_cast<unsigned>(ceil_div(p.experts, experts));
    go(kernel, ceil_div(p.tokens, tokens) * p.expert_blocks, kSlices * 32);
  };
  const auto warps = [&](auto kernel, int tokens, int experts) {
    go(kernel, ceil_div(ceil_div(p.tokens, tokens) * ceil_div(p.experts, experts), 4), 128);
  };
  for_float_type(x.dtype, [&](auto x_tag) {
    for_float_type(w.dtype, [&](auto w_tag) {
      using X = decltype(x_tag);
      using W = decltype(w_tag);
      constexpr std::int64_t kMostStride = 0x7fffffff / 64;
      // Larger tiles read each row fewer times, once there are enough of them.
      if constexpr (kOnTensorCores<X, W>) {
        if (!p.x_wide || !p.w_wide || std::abs(p.x_stride) > kMostStride ||
            std::abs(p.w_stride) > kMostStride)
          return tiles(router_tiles<X, W, OneByOne, 1, 1, 1>, 16, 8);
        constexpr bool kInParts = sizeof(W) == 4;  // which take more registers
        if constexpr (!kInParts) {
          const std::int64_t wide = ceil_div(p.tokens, 64) * ceil_div(p.experts, 32);
          if (wide * 10 >= device.sm_count * 9)
            return tiles(router_tiles<X, W, Together, 4, 4, 2>, 64, 32);
        }
        const std::int64_t middle = ceil_div(p.tokens, 32) * ceil_div(p.experts, 32);
        constexpr int kN = kInParts ? 2 : 4;
        if (middle * 4 >= device.sm_count)
          return tiles(router_tiles<X, W, Together, 2, kN, 2>, 32, 8 * kN);
        constexpr int kAhead = kInParts ? 4 : 8;
        tiles(router_tiles<X, W, Together, 1, 1, kAhead>, 16, 8);
      } else {
        if (p.tokens * p.experts <= 32 * device.sm_count)
          return warps(router_logits<X, W, 1, 1>, 1, 1);
        warps(router_logits<X, W, 4, 4>, 4, 4);
      }
    });
  });
}

}  // namespace moesaic::cuda
