// SPDX-License-Identifier: Apache-2.0
// Warp 0 of the SM90 product's loading warpgroup: weights, by TMA, and what the task is.
#pragma once

#include "cuda/overlap.h"
#include "cuda/sm90/ring.h"

namespace moesaic::cuda::sm90 {

// Where a box of weight rows begins in the tensor map, whose first row is `row` of the matrix: see
// set_weights.
struct WeightCorner {
  int y, u;
};
__device__ inline WeightCorner weight_corner(const Params& p, std::int64_t row) {
  return {p.gated ? 0 : static_cast<int>(row), p.gated ? static_cast<int>(row / 16) : 0};
}
// This CTA's half of a pair's weight rows, into both CTAs.
template <typename S>
__device__ __forceinline__ void load_half(const Params& p, std::uint32_t to, std::uint32_t full,
                                          int x, std::int64_t row, int expert) {
  if (!S::kDirect || p.direct == Direct::kNo) {
    const WeightCorner corner = weight_corner(p, row);
    ptx::tma_load_5d_pair(to, &p.weights, full, x, corner.y, 0, corner.u, expert);
    return;
  }
  const int unit = static_cast<int>(row / 32);
  const bool halves = p.gated && !p.interleaved;
#pragma unroll
  for (int b = 0; b < S::kBlocks; ++b) {
    ptx::tma_load_5d_pair(to + b * 8192, &p.weights, full, x, 0, halves ? 2 * expert : 2 * b, unit,
                          halves ? b : expert);
  }
}

template <typename S>
__device__ void load_weights(const Params& p, const SharedMemory<S>& shared) {
  if (!p.settled) wait_for_earlier_kernels();
  const std::uint32_t rank = S::kPair == 2 ? ptx::cluster_rank() : 0;
  Schedule<S::kTokens * S::kPair, S::kPair, Walk::kAsNeeded, S::kTiles, S::kOrder, S::kDeal>
      schedule(p, dealt_ring<S>(p, shared));
  Dealer<S::kDeal> dealer(p, dealt_ring<S>(p, shared));
  Cursor<S::kStages> cursor;
  const std::uint64_t once = ptx::read_once_policy();
  int ring = 0, term_place = 0;
  for (;;) {
    Task task = part_of<S::kPair>(schedule.next(), rank);
    task.term_place = term_place;
    // Tasks without products (filtered, or without rows in this half of a pair) take no turn: of
    // those that meet for their groups two in succession must differ.
    if ((!S::kBringsTerms || brings_terms(p)) && task.expert >= 0 && task.rows > 0)
      term_place = (term_place + loaded_run<S>(task)) % S::kTermPlaces;
    if (threadIdx.x == 0) {
      const int stages = stages_of<S>(p, task), run = loaded_run<S>(task);
      if (task.expert != kEndOfTasks) dealer.ask();
      for (int r = 0; r < run; ++r) {
        const std::int64_t row =
            static_cast<std::int64_t>(task.weight_task + r) * p.task_weight_rows;
        const std::int64_t mine = row + rank * (S::kWeightRows / S::kPair);
        const WeightCorner corner = weight_corner(p, mine);
        for (int i = 0; i < stages; ++i) {
          ptx::barrier_wait(shared.empty(cursor.stage), cursor.round ^ 1);
          if (r + i == 0) shared.tasks()[ring] = task;
          const std::uint32_t full = shared.full(cursor.stage);
          if (task.expert < 0) {
            ptx::barrier_arrive(full);
          } else {
            // A last chunk behind the end of K arrives as zeros, too: so the multiplying loop needs
            // no condition (one inside it makes ptxas serialize the whole batch).
            ptx::barrier_arrive_expect(
                full, static_cast<std::uint32_t>(S::kChunks * p.task_weight_rows * 128));
#pragma unroll
            for (int c = 0; c < S::kChunks; ++c) {
              const std::uint32_t to =
                  ptx::shared_address(shared.weights(cursor.stage)) + c * S::kWeightBytes;
              const int x = (i * S::kChunks + c) * S::kChunkK;
              if constexpr (S::kPair == 2) {
                load_half<S>(p, to + rank * (S::kWeightBytes / 2), full, x, mine, task.expert);
              } else if (p.weights_once) {
                ptx::tma_load_5d(to, &p.weights, full, once, x, corner.y, 0, corner.u, task.expert);
              } else {
                ptx::tma_load_5d(to, &p.weights, full, x, corner.y, 0, corner.u, task.expert);
              }
            }
          }
          cursor.advance();
          dealer.hand_on((run - r) * stages - i - 1);
        }
      }
    }
    __syncwarp();
    if (++ring == S::kRing) ring = 0;
    if (task.expert == kEndOfTasks) return;
  }
}

}  // namespace moesaic::cuda::sm90
