// SPDX-License-Identifier: Apache-2.0
// The kernel of small tiles: that of sm80/kernel.h in all that concerns results. Two warps
// copy (_small_loader.h) and the others multiply; they pass the stages on by mbarriers, so that a
// warp that multiplies spends its instructions on products.
#pragma once

#include "cuda/sm80/consumer.h"
#include "cuda/sm80/epilogue.h"
#include "cuda/sm80/small_loader.h"

namespace moesaic::cuda {

template <typename T>
__device__ __forceinline__ void multiply_works(const Sm80Params& p, std::uint32_t stages,
                                               Sm80Desk<T>& desk) {
  using Base = typename T::Base;
  const int lane = threadIdx.x % 32;
  Sm80Consumer<Base> sums(p);
  Sm80Cursor<T::kStages> cursor;
  Sm80Cursor<Sm80Desk<T>::kWorks> place;
  const auto wait = [&] {
    ptx::mbarrier_wait(ptx::shared_address(desk.full + cursor.at), cursor.round);
  };
  const auto release = [&] {
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(ptx::shared_address(desk.empty + cursor.at));
    cursor.advance();
  };
  wait_for_earlier_kernels();  // whose rows and scales are read, and whose buffers are written
  for (int parity = 0;;) {
    ptx::mbarrier_wait(ptx::shared_address(desk.posted + place.at), place.round);
    const Sm80Work work = desk.works[place.at];
    if (work.rows == 0) return;
    if (work.expert < 0) {
      write_zeros<Base>(p, work);
      wait();
      release();
      place.advance();
      continue;
    }
    Sm80Table<Base>& table = desk.tables[parity];  // two: a slow warp may still read the last one
    parity ^= 1;
    fill_table<Base>(p, work, table, [&](int i) {
      return Sm80Row{desk.positions[place.at][i], desk.slots[place.at][i]};
    });
    place.advance();
    ptx::meet(T::kThreads);
    sums.begin(work);
#pragma unroll 1
    for (int k = 0; k < p.k; k += T::kDepth) {
      wait();
      sums.consume(stages + cursor.at * T::kStageBytes, k);
      release();
    }
    finish<Base>(p, work, sums, table);
  }
}

template <typename T>
__global__ void __launch_bounds__(T::kAllThreads, T::kCtas)
    gemm_sm80_small(const __grid_constant__ Sm80Params p) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const std::uint32_t stages = ptx::shared_address(shared);
  Sm80Desk<T>& desk = *reinterpret_cast<Sm80Desk<T>*>(shared + T::kStages * T::kStageBytes);
  if (threadIdx.x == 0) desk.begin();
  __syncthreads();
  if (threadIdx.x < T::kThreads) {
    multiply_works<T>(p, stages, desk);
  } else if (threadIdx.x < T::kThreads + 32) {
    Sm80WeightWarp<T>(p, stages, desk).run();
  } else {
    Sm80TokenWarp<T>(p, stages, desk).run();
  }
}

template <typename T>
constexpr Sm80Kernel sm80_small_kernel() {
  constexpr std::size_t kShared = T::kStages * T::kStageBytes + sizeof(Sm80Desk<T>);
  static_assert(T::kCtas * (kShared + 1024) <= 228 * 1024);
  return {T::kTokens,     T::kRows, T::kDepth, T::kStages,
          T::kAllThreads, T::kCtas, kShared,   &gemm_sm80_small<T>};
}

}  // namespace moesaic::cuda
