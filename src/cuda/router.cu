// SPDX-License-Identifier: Apache-2.0
// The router's product: logits = x W^T, accumulated in fp32 in one order of the width for every T,
// because an expert chosen by a different last bit would be another token's doing.
#include "cuda/device.h"
#include "cuda/element.h"
#include "cuda/overlap.h"
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
};

template <typename T>
__device__ __forceinline__ void load_eight(const T* at, std::int64_t left, bool wide,
                                           float (&v)[8]) {
  if (wide) {
    const Pack<T, 8> pack = load_pack<8>(at);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = to_float(pack.element[i]);
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = i < left ? to_float(at[i]) : 0.0f;
}

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
    float x[kTokens][8], w[kExperts][8];
#pragma unroll
    for (int t = 0; t < kTokens; ++t) load_eight(x_row[t] + h, p.hidden - h, p.x_wide, x[t]);
#pragma unroll
    for (int e = 0; e < kExperts; ++e) load_eight(w_row[e] + h, p.hidden - h, p.w_wide, w[e]);
#pragma unroll
    for (int t = 0; t < kTokens; ++t)
#pragma unroll
      for (int e = 0; e < kExperts; ++e)
#pragma unroll
        for (int i = 0; i < 8; ++i) sum[t][e] = fmaf(x[t][i], w[e][i], sum[t][e]);
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
  const LogitsParams p{.x = x.data,
                       .w = w.data,
                       .x_stride = x.strides[0],
                       .w_stride = w.strides[0],
                       .tokens = x.shape[0],
                       .experts = w.shape[0],
                       .hidden = x.shape[1],
                       .x_wide = eight_wide(x.data, x.shape[1], x.strides[0], size_of(x.dtype)),
                       .w_wide = eight_wide(w.data, w.shape[1], w.strides[0], size_of(w.dtype)),
                       .logits = s.logits_scratch.as<float>()};
  const auto go = [&](auto kernel, int tokens, int experts) {
    const std::int64_t warps = ceil_div(p.tokens, tokens) * ceil_div(p.experts, experts);
    launch("route: logits", kernel,
           {.grid = dim3(static_cast<unsigned>(ceil_div(warps, 4))),
            .block = dim3(128),
            .dependency = overlap(device)},
           stream, p);
  };
  for_float_type(x.dtype, [&](auto x_tag) {
    for_float_type(w.dtype, [&](auto w_tag) {
      using X = decltype(x_tag);
      using W = decltype(w_tag);
      // One product a warp until those fill the machine; then tiles that read each row four times
      // less.
      if (p.tokens * p.experts <= 32 * device.sm_count) return go(router_logits<X, W, 1, 1>, 1, 1);
      go(router_logits<X, W, 4, 4>, 4, 4);
    });
  });
}

}  // namespace moesaic::cuda
