// SPDX-License-Identifier: Apache-2.0
// Where a thread stands in the tile of its CTA.
#pragma once

#include "cuda/sm80/operand.h"
#include "cuda/sm80/tile.h"

namespace moesaic::cuda {

// Its warp's place among the warps of weight rows and of tokens, and where in a stage this lane's
// first fragments of both lie.
template <typename T>
class Sm80Place {
 public:
  using Op = typename T::Op;

  __device__ Sm80Place() : lane_(threadIdx.x % 32) {
    const int warp = threadIdx.x / 32;
    warp_m_ = warp % T::kWarpsM;
    warp_n_ = warp / T::kWarpsM;
    weights_ = warp_m_ * T::kMFrags * 16 * T::kWeightBytes +
               Op::template lane_offset_a<T::kWeightBytes>(lane_);
    tokens_ = T::kActOffset + warp_n_ * T::kNFrags * 8 * T::kActBytes +
              Op::template lane_offset_b<T::kActBytes>(lane_);
  }
  __device__ int warp_m() const { return warp_m_; }
  __device__ int warp_n() const { return warp_n_; }
  __device__ int lane() const { return lane_; }

 protected:
  int lane_, warp_m_, warp_n_;
  int weights_, tokens_;
};

}  // namespace moesaic::cuda
