// SPDX-License-Identifier: Apache-2.0
// The kernel of large tiles: that of sm80/kernel.h in all that concerns results, with the
// tiles prepared ahead of time (_large_tile.h, _large_loader.h), and for 16-bit weights, fragments
// that are read during the products before (_ahead.h).
#pragma once

#include "cuda/overlap.h"
#include "cuda/sm80/ahead.h"
#include "cuda/sm80/consumer.h"
#include "cuda/sm80/epilogue.h"

namespace moesaic::cuda {

// Rows of filtered tiles become zero.
template <typename T>
__device__ __noinline__ void write_filtered(const Sm80Params& p, const Sm80Extent& extent) {
  for (std::uint32_t index = blockIdx.x; index < extent.total; index += gridDim.x) {
    Sm80Work work;
    if (locate(p, index, extent.token_tiles, T::kTokens, work) && work.expert < 0)
      write_zeros<T>(p, work);
  }
}

template <typename T>
__global__ void __launch_bounds__(T::kThreads, T::kCtas)
    gemm_sm80_large(const __grid_constant__ Sm80Params p) {
  constexpr bool kAhead = !T::Op::kPromote;
  using Sums =
      std::conditional_t<kAhead, Sm80AheadConsumer<T>, Sm80Consumer<T, Sm80LargeLoader<T>>>;
  using Board = Sm80Board<typename T::Base>;
  extern __shared__ __align__(1024) unsigned char shared[];
  const std::uint32_t stages = ptx::shared_address(shared);
  Board& board = *reinterpret_cast<Board*>(shared + T::kStages * T::kStageBytes);

  begin_kernel();
  if (threadIdx.x == 0) {
    board.extent.token_tiles = min(*p.num_tiles, p.max_tiles) * p.parts;
    board.extent.total = board.extent.token_tiles * p.column_tiles;
    board.index = blockIdx.x;
    board.filtered = 0;
  }
  Sm80LargeLoader<T> loader(p, stages, board);
#pragma unroll 1
  for (int i = 0; i < Sums::kIssued; ++i) {
    loader.issue();
    __syncthreads();  // before the next call: see the loader
  }
  ptx::cp_async_wait<Sums::kIssued - 1>();
  __syncthreads();

  Sums sums(p);
#pragma unroll 1
  for (std::uint32_t tile = 0;; ++tile) {
    const Sm80Work& work = board.works[tile % Board::kWorks];
    if (work.rows == 0) break;
    Sm80Table<typename T::Base>& table = board.tables[tile % 2];
    if (!T::prepares(p)) {
      fill_table<typename T::Base>(p, work, table, [&](int i) {
        return Sm80Row{work.first + i, slot_of(p, work.first + i)};
      });
    }
    if constexpr (kAhead) {
      sums.begin(loader);
#pragma unroll 1
      for (int k = 0; k < p.k; k += T::kDepth) sums.consume(loader);
    } else {
      sums.begin(work);
#pragma unroll 1
      for (int k = 0; k < p.k; k += T::kDepth) {
        ptx::cp_async_wait<T::kStages - 2>();
        __syncthreads();
        sums.consume(loader.template slot<1>(), k, loader);
      }
    }
    finish<T>(p, work, sums, table);
  }
  ptx::cp_async_wait<0>();
  if (board.filtered) write_filtered<T>(p, board.extent);
}

template <typename T>
constexpr Sm80Kernel sm80_large_kernel() {
  return {T::kTokens,  T::kRows, T::kDepth,       T::kStages,
          T::kThreads, T::kCtas, T::kSharedBytes, &gemm_sm80_large<T>};
}

}  // namespace moesaic::cuda
