// SPDX-License-Identifier: Apache-2.0
// The grouped product of weight-only schemes on SM90a: the persistent CTAs, ring of stages, token
// loader and epilogue of sm90/kernel.h, with one more loading warp (scales and zero points)
// and a multiplying warpgroup that widens its weights itself.
#pragma once

#include "cuda/launch.h"
#include "cuda/overlap.h"
#include "cuda/sm90/dequant_warps.h"

namespace moesaic::cuda::sm90 {

template <typename S>
__global__ void __launch_bounds__(S::kThreads, S::kPerSm)
    dequant_kernel(const __grid_constant__ DequantParams p) {
  const SharedMemory<S> shared;
  if (threadIdx.x == 0) {
    ptx::tensor_map_prefetch(&p.weights);
    const bool gather = p.token_load == TokenLoad::kGather;
    if (!gather) ptx::tensor_map_prefetch(&p.tokens);
    for (int i = 0; i < S::kStages; ++i) {
      // Weights, two token warps, their copies, the copies of the scales.
      ptx::barrier_init(shared.full(i), 3 + (gather ? kLoaders<S> : 0) + 32);
      ptx::barrier_init(shared.empty(i), 4 * S::kWarpgroups);
    }
    ptx::barrier_init_fence();
  }
  clear_dealt<S>(shared);
  __syncthreads();
  if (threadIdx.x < 128) {
    if constexpr (S::kWarpgroups >= 2 && !S::kWarpwise)
      ptx::give_registers<56>();  // with 224: what 384 times 168 leaves
    if (threadIdx.x < 32) {
      load_packed_weights<S>(p, shared);
    } else if (threadIdx.x < 32 + kLoaders<S>) {
      TokenLoader<S>(p, shared).run();
    } else {
      load_scales<S>(p, shared);
    }
  } else {
    if constexpr (S::kLoop != Loop::kAligned) {
      DequantWarps<S>(p, shared).run();
    } else {
      if constexpr (S::kWarpgroups == 2) ptx::take_registers<224>();
      if constexpr (S::kWarpgroups == 3) ptx::take_registers<152>();
      DequantMultiplier<S>(p, shared).run();
    }
  }
}

template <typename S>
void launch_dequant(const DequantParams& params, int grid, cudaStream_t stream) {
  launch("grouped product (SM90, weight-only)", dequant_kernel<S>,
         {.grid = dim3(static_cast<unsigned>(grid)),
          .block = dim3(S::kThreads),
          .shared_bytes = shared_size<S>(params),
          .most_shared_bytes = S::kPerSm == 2 ? kSpreadBytes : 0,
          .dependency = Dependency::kOverlap},
         stream, params);
}

}  // namespace moesaic::cuda::sm90
