// SPDX-License-Identifier: Apache-2.0
// Rows that are moved and not quantized: by position, with factors on the way, or each once to all
// positions of its slots.
#pragma once

#include <type_traits>

#include "cuda/overlap.h"
#include "cuda/quantize_rows.h"

namespace moesaic::cuda {

template <typename In, int kVec>
__device__ __forceinline__ void store_moved(const QuantizeParams& p, std::int64_t at,
                                            const float (&v)[kVec]) {
  if constexpr (std::is_same_v<In, std::int8_t>) {  // bytes, whatever they mean
    Pack<std::int8_t, kVec> pack;
#pragma unroll
    for (int i = 0; i < kVec; ++i)
      pack.element[i] = static_cast<std::int8_t>(static_cast<int>(v[i]));
    *reinterpret_cast<Pack<std::int8_t, kVec>*>(static_cast<std::int8_t*>(p.output) + at) = pack;
  } else {
    store_float<kVec>(p.output, p.output_dtype, at, v);
  }
}

// The scales of 8-bit rows move along, in the granularity they have.
__device__ __forceinline__ void move_scales(const QuantizeParams& p, const QuantizeRow& row,
                                            int lane, int threads) {
  if (p.scale == nullptr || p.input_scale.data == nullptr || p.granularity == ActScale::kDefault)
    return;
  const float* given = p.input_scale.data + row.expert * p.input_scale.expert_stride;
  if (p.granularity == ActScale::kToken || p.granularity == ActScale::kGroup) {
    given += row.source * p.input_scale.row_stride;
    for (std::int64_t g = lane; g < p.groups; g += threads) {
      const float scale = given[g * p.input_scale.group_stride];
      for_positions(p, row, [&](std::int64_t position) {
        p.scale[position * p.scale_row_stride + g] = scale;
      });
    }
  } else if (lane == 0) {  // one for all, or for the expert: every row writes the same
    p.scale[p.per_expert || p.input_scale.expert_stride != 0 ? row.expert : 0] = *given;
  }
}

// `row_threads` is 32 or all of a block. Input and output may be the same rows: element by element.
template <typename In, int kVec>
__global__ void __launch_bounds__(kThreads, 1) move_rows(QuantizeParams p, int row_threads) {
  begin_kernel();
  const int rows = kThreads / row_threads, lane = threadIdx.x % row_threads;
  const std::int64_t items = item_count(p);
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * rows + threadIdx.x / row_threads;
       i < items; i += static_cast<std::int64_t>(gridDim.x) * rows) {
    QuantizeRow row;
    if (!find_row(p, i, &row)) continue;
    for_row<In, kVec>(p, row, lane, row_threads, [&](std::int64_t column, float(&v)[kVec]) {
      for_positions(p, row, [&](std::int64_t position) {
        store_moved<In, kVec>(p, position * p.output_stride + column, v);
      });
    });
    move_scales(p, row, lane, row_threads);
  }
}

// --- as they are, to all positions of their slots -------------------------------------------------
inline constexpr int kScatterBlocksPerSm = 8;
inline constexpr std::int64_t kWordBytes = sizeof(uint4);

// Of rows that are copied through slot_row 16 bytes at a time, so many; 0: move_rows has to.
inline std::int64_t words_of_row(const QuantizeStage& s, const QuantizeParams& p) {
  const auto bytes = static_cast<std::int64_t>(size_of(s.input.dtype));
  const auto by_words = [](const void* data, std::int64_t row) {
    return reinterpret_cast<std::uintptr_t>(data) % kWordBytes == 0 && row % kWordBytes == 0;
  };
  // (Rows of more than 32 slots do not occur: a lane holds each.)
  const bool copied = p.slot_row != nullptr && p.row_weights == nullptr && p.prequant == nullptr &&
                      s.input.dtype == s.output.dtype && p.top_k <= 32;
  return copied && p.columns * bytes % kWordBytes == 0 &&
                 by_words(p.input, p.input_stride * bytes) &&
                 by_words(p.output, p.output_stride * bytes)
             ? p.columns * bytes / kWordBytes
             : 0;
}

// A thread has one word of a row, a lane of its warp one of the row's positions: both are asked for
// together, and then nothing is waited for any more. (Each position's row by a warp that looked its
// slot up, tile, slot and token one behind the other, took 50 us for 33 MB.)
__global__ void __launch_bounds__(kThreads, kScatterBlocksPerSm)
    scatter_rows(QuantizeParams p, std::int64_t words, std::int64_t pieces) {
  begin_kernel();
  const int lane = threadIdx.x % 32, slots = static_cast<int>(p.top_k);
  const std::int64_t bytes = p.columns == 0 ? 0 : words * kWordBytes / p.columns;
  const std::int64_t items = p.input_rows * pieces;
  for (std::int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const std::int64_t row = item / pieces, piece = item - row * pieces;
    const std::int64_t word = piece * kThreads + threadIdx.x;
    std::int64_t mine = -1;
    uint4 value{};
    if (lane < slots) mine = __ldcg(p.slot_row + row * slots + lane);
    if (word < words)
      value = reinterpret_cast<const uint4*>(static_cast<const char*>(p.input) +
                                             row * p.input_stride * bytes)[word];
    for (int j = 0; j < slots; ++j) {
      const std::int64_t position = __shfl_sync(kAllLanes, mine, j);
      if (position < 0 || position >= p.positions || word >= words) continue;
      reinterpret_cast<uint4*>(static_cast<char*>(p.output) +
                               position * p.output_stride * bytes)[word] = value;
    }
    if (piece == 0) move_scales(p, {.position = row, .source = row}, threadIdx.x, kThreads);
  }
}

}  // namespace moesaic::cuda
