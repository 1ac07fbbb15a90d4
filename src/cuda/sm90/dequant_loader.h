// SPDX-License-Identifier: Apache-2.0
// The loading warps that only the weight-only product has: packed weights (warp 0), scales and zero
// points (warp 3). Tokens come by the SM90 family's TokenLoader.
#pragma once

#include "cuda/overlap.h"
#include "cuda/sm90/dequant.h"
#include "cuda/sm90/loader.h"

namespace moesaic::cuda::sm90 {

template <typename S>
inline constexpr int kStageBlocks = S::kStageK / 32;

// The scale group that contains block `block` (32 of K). Behind the end of K the last one.
__device__ __forceinline__ std::uint32_t group_of(const DequantParams& p, int block) {
  const std::uint32_t group = static_cast<std::uint32_t>(block) / p.group_blocks;
  return group < p.groups ? group : p.groups - 1;
}
// A weight row's zero points: offset of the first one's byte.
__device__ __forceinline__ std::uint32_t zero_offset(const DequantParams& p, int expert,
                                                     std::uint32_t row) {
  return static_cast<std::uint32_t>(expert) * p.zero_expert + (row >> p.zero_nibbles) * p.zero_row;
}
// The weight row behind row i of a task, as the tensor map arranges them, or any existing one where
// there is none. (Epilogue's weight_row in 32 bits: the scales' warp has few registers.)
__device__ __forceinline__ std::uint32_t existing_row(const Params& p, int weight_task, int i) {
  const auto columns = static_cast<std::uint32_t>(p.columns);
  const auto row = static_cast<std::uint32_t>(weight_task * p.task_weight_rows + i);
  if (!p.gated) return row < columns ? row : columns - 1;
  std::uint32_t output = row / 16 * 8 + row % 8;
  if (output >= columns) output = columns - 1;
  const std::uint32_t half = row / 8 % 2;
  return p.interleaved ? 2 * output + half : output + half * columns;
}

template <typename S>
using DequantSchedule = Schedule<S::kTokens, 1, kWalk<S>, S::kTiles, S::kOrder, S::kDeal>;

// --- warp 0
template <typename S>
__device__ void load_packed_weights(const DequantParams& p, const SharedMemory<S>& shared) {
  if (!p.settled) wait_for_earlier_kernels();
  DequantSchedule<S> schedule(p, dealt_ring<S>(p, shared));
  Cursor<S::kStages> cursor;
  Dealer<S::kDeal> dealer(p, dealt_ring<S>(p, shared));
  int ring = 0, term_place = 0;
  for (;;) {
    Task task = schedule.next();
    task.term_place = term_place;
    term_place = (term_place + loaded_run<S>(task)) % 2;
    if (threadIdx.x == 0) {
      const int stages = stages_of<S>(p, task), run = loaded_run<S>(task);
      if (task.expert != kEndOfTasks) dealer.ask();
      for (int r = 0; r < run; ++r) {
        const std::int64_t row =
            static_cast<std::int64_t>(task.weight_task + r) * p.task_weight_rows;
        const int y = p.gated ? 0 : static_cast<int>(row);
        const int u = p.gated ? static_cast<int>(row / 16) : 0;
#pragma unroll 1
        for (int i = 0; i < stages; ++i) {
          ptx::barrier_wait(shared.empty(cursor.stage), cursor.round ^ 1);
          if (r + i == 0) shared.tasks()[ring] = task;
          const std::uint32_t full = shared.full(cursor.stage);
          if (task.expert < 0) {
            ptx::barrier_arrive(full);
          } else {
            ptx::barrier_arrive_expect(
                full, static_cast<std::uint32_t>(p.task_weight_rows * S::kRowBytes));
            ptx::tma_load_5d(ptx::shared_address(shared.weights(cursor.stage)), &p.weights, full,
                             i * S::kRowBytes, y, 0, u, task.expert);
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

// Where the scales of a task's stages lie: with those of the first of kScaleStages, in a ring of as
// many places as there are stages. Each place serves at least one stage, so whoever comes round to
// it again fills a stage behind which all those have been given back.
template <typename S>
struct ScaleSlot {
  int index = S::kScaleStages == 1 ? 0 : S::kStages - 1;
  // Stage `stage` of a task, which lies at `ring`.
  __device__ void enter(int stage, int ring) {
    if constexpr (S::kScaleStages == 1)
      index = ring;
    else if (stage % S::kScaleStages == 0)
      index = index == S::kStages - 1 ? 0 : index + 1;
  }
};

// --- warp 3
// Scales and zero points lie anywhere, four bytes at a time. A zero point comes as the aligned word
// that contains it, and the multiplying threads know which part they want.
template <typename S>
__device__ void load_scales(const DequantParams& p, const SharedMemory<S>& shared) {
  constexpr int kMine = S::kWeightRows / 32;
  const int lane = ptx::thread_index() % 32;
  if (!p.settled) wait_for_earlier_kernels();
  DequantSchedule<S> schedule(p, dealt_ring<S>(p, shared));
  Cursor<S::kStages> cursor;
  ScaleSlot<S> slot;
  for (;;) {
    const Task task = schedule.next();
    const int stages = stages_of<S>(p, task), run = loaded_run<S>(task);
    const std::uint32_t first = static_cast<std::uint32_t>(task.expert) * p.cell_expert;
    for (int r = 0; r < run; ++r) {
      // Rows of cells. With zero points every row has its own, which saves the registers of a
      // second list.
      std::uint32_t rows[kMine];
      if (task.expert >= 0) {
#pragma unroll
        for (int i = 0; i < kMine; ++i) {
          rows[i] = existing_row(p, task.weight_task + r, lane + 32 * i);
          if constexpr (!S::Weight::kZeros) rows[i] = first + rows[i] / p.cell_rows * p.cell_row;
        }
      }
      for (int stage = 0; stage < stages; ++stage) {
        ptx::barrier_wait(shared.empty(cursor.stage), cursor.round ^ 1);
        if (task.expert >= 0) {
          slot.enter(stage, cursor.stage);
          const bool begins = S::kScaleStages == 1 || stage % S::kScaleStages == 0;
          const std::uint32_t to =
              ptx::shared_address(shared.scales(slot.index)) + lane * S::kScalePitch * 4;
          const std::uint32_t words =
              ptx::shared_address(shared.scales(cursor.stage)) + (S::kScales + lane) * 4;
          // With zero points every row has its own cells, and the second list is spared.
          const auto cell = [&](std::uint32_t row) {
            return S::Weight::kZeros ? first + row * p.cell_row : row;
          };
          if (p.scales_together && begins) {
#pragma unroll
            for (int g = 0; g < S::kScalePitch; g += S::kScalesAtOnce) {
              const std::uint32_t group = stage * S::kGroups + g;
              const std::uint32_t left = group < p.groups ? p.groups - group : 0;
              const std::uint32_t bytes = 4 * (left < S::kScalesAtOnce ? left : S::kScalesAtOnce);
#pragma unroll
              for (int i = 0; i < kMine; ++i) {
                ptx::copy_async_part<4 * S::kScalesAtOnce>(to + (i * 32 * S::kScalePitch + g) * 4,
                                                           p.scale + (cell(rows[i]) + group),
                                                           bytes);
              }
            }
          }
#pragma unroll
          for (int g = 0; g < S::kGroups; ++g) {
            const std::uint32_t group = group_of(p, stage * kStageBlocks<S> + g * (S::kSteps / 2));
#pragma unroll
            for (int i = 0; i < kMine; ++i) {
              if (!p.scales_together) {
                ptx::copy_async_4(to + (i * 32 * S::kScalePitch + g + stage % S::kScaleStages) * 4,
                                  p.scale + (cell(rows[i]) + group * p.cell_group));
              }
              if constexpr (S::Weight::kZeros) {
                const std::uint32_t word =
                    (zero_offset(p, task.expert, rows[i]) + group * p.zero_group) & ~3u;
                const std::uint32_t left = p.zero_bytes - word;
                ptx::copy_async_part<4>(words + (g * S::kWeightRows + i * 32) * 4, p.zero + word,
                                        left < 4 ? left : 4);
              }
            }
          }
        }
        ptx::copy_async_arrive(shared.full(cursor.stage));
        cursor.advance();
      }
    }
    if (task.expert == kEndOfTasks) return;
  }
}

}  // namespace moesaic::cuda::sm90
