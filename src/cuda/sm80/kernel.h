// SPDX-License-Identifier: Apache-2.0
// The grouped product of the SM80 family: one kernel template for every scheme and format.
//
// Weights stand on the 16-row side of mma.sync, tokens on the 8-column side: token tiles of 8 to
// 128 without padding to 64, and a dequantized weight goes from registers straight into the
// product, where it is reused for every token of the tile. A persistent CTA walks the tile list;
// its cp.async pipeline runs across tiles and experts and is never drained. Each sum lives in one
// fp32 accumulator (promoting operands: partial sums of 64 of K, or 32, scaled and added in fp32),
// K ascending, whatever the tile: the same bits from every tactic.
//
// Which weight row a CTA puts into which row of an mma is free, and chosen so that a lane ends up
// with neighbouring columns of C (16-byte stores without a detour through shared memory), and,
// behind a gated activation, with a gate and its up in the same lane.
//
// Tiles of 8 tokens (_small.h) and of 128 (_large.h) have kernels of their own.
// In the order of the data: _tile.h (a CTA's share), _loader.h, _operand.h and _consumer.h,
// _epilogue.h, and here who calls whom.
#pragma once

#include "cuda/overlap.h"
#include "cuda/sm80/consumer.h"
#include "cuda/sm80/epilogue.h"

namespace moesaic::cuda {

template <typename T>
__global__ void __launch_bounds__(T::kThreads, T::kCtas)
    gemm_sm80(const __grid_constant__ Sm80Params p) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const std::uint32_t stages = ptx::shared_address(shared);
  Sm80Table<T>* tables = reinterpret_cast<Sm80Table<T>*>(shared + T::kStages * T::kStageBytes);
  Sm80Extent& extent = *reinterpret_cast<Sm80Extent*>(tables + 2);

  begin_kernel();
  if (threadIdx.x == 0) {
    extent.token_tiles = min(*p.num_tiles, p.max_tiles) * p.parts;
    extent.total = extent.token_tiles * p.column_tiles;
  }
  __syncthreads();

  Sm80Loader<T> loader(p, stages, extent);
#pragma unroll 1
  for (int i = 0; i < T::kStages - 1; ++i) loader.issue();

  Sm80Consumer<T> sums(p);
  int parity = 0;
#pragma unroll 1
  for (std::uint32_t index = blockIdx.x; index < extent.total; index += gridDim.x) {
    Sm80Work work;
    if (!locate(p, index, extent.token_tiles, T::kTokens, work)) continue;
    if (work.expert < 0) {
      write_zeros<T>(p, work);
      continue;
    }
    Sm80Table<T>& table = tables[parity];  // two: a slow warp may still read the last one
    parity ^= 1;
    fill_table<T>(p, work, table,
                  [&](int i) { return Sm80Row{work.first + i, slot_of(p, work.first + i)}; });
    sums.begin(work);
#pragma unroll 1
    for (int k = 0; k < p.k; k += T::kDepth) {
      ptx::cp_async_wait<T::kStages - 2>();
      __syncthreads();  // this stage has landed, and everyone is done with the one that is refilled
                        // next
      sums.consume(loader.next_slot(), k, loader);
    }
    finish<T>(p, work, sums, table);
  }
  ptx::cp_async_wait<0>();
}

template <typename T>
constexpr Sm80Kernel sm80_kernel() {
  return {T::kTokens,  T::kRows, T::kDepth,       T::kStages,
          T::kThreads, T::kCtas, T::kSharedBytes, &gemm_sm80<T>};
}

}  // namespace moesaic::cuda
