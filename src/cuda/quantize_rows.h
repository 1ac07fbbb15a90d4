// SPDX-License-Identifier: Apache-2.0
// Device side of the quantizers: which row an item of work is, what its elements are, where they
// go.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "backend.h"
#include "cuda/align_few.h"
#include "cuda/eight_bit.h"
#include "cuda/element.h"

namespace moesaic::cuda {

inline constexpr int kThreads = 256;  // of every quantizer's block
inline constexpr int kWarps = kThreads / 32;

struct QuantizeParams {
  const void* input = nullptr;
  std::int64_t input_rows = 0, input_stride = 0, columns = 0;
  ActScaleView input_scale;
  // Which rows: all of the input (tiles null), or the live positions of the tiles.
  const Tile* tiles = nullptr;
  const std::int32_t* num_tiles = nullptr;
  const std::int32_t* row_slot = nullptr;
  std::int64_t tile_rows = 1, max_tiles = 0, positions = 0, slot_count = 0, top_k = 1;
  bool settled = false;  // the tiles are older than the kernel in front
  const std::int32_t* slot_row =
      nullptr;  // tiles null: the positions of a row, instead of its own number
  RowOf source = RowOf::kPosition;
  // Factors.
  const float* row_weights = nullptr;
  const void* prequant = nullptr;
  DType prequant_dtype = DType::kF32, round_to = DType::kBF16;
  std::int64_t prequant_expert_stride = 0, prequant_stride = 1;
  // The result.
  void* output = nullptr;
  DType output_dtype = DType::kF8E4M3;
  std::int64_t output_stride = 0;
  ActScale granularity = ActScale::kDefault;
  Int8Rounding int8_rounding = Int8Rounding::kNearest;
  std::int64_t group = 0, groups = 1;
  unsigned parts = 1;  // of a row, each a block's
  const float* static_scale = nullptr;
  std::int64_t static_scales = 0, static_stride = 0;
  float* scale = nullptr;
  std::int64_t scale_row_stride = 0;
  // Dynamic per tensor: one absmax per block of the first pass, or per tile when they are per
  // expert.
  float* partial = nullptr;
  int partials = 0;
  bool per_expert = false;
};

// What else a launch of a quantizer does, in blocks behind its own: nothing, or align of few slots.
struct Nothing {
  static constexpr unsigned kBlocks = 0;
  __device__ void run() const {}
};
struct AlignFew {
  static constexpr unsigned kBlocks = 1;
  AlignParams params;
  __device__ void run() const {
    if (threadIdx.x < 32) align_few(params);
  }
};
template <typename Beside>
__device__ __forceinline__ unsigned own_blocks() {
  return gridDim.x - Beside::kBlocks;
}

struct QuantizeRow {
  std::int64_t position = 0;  // row of the output
  std::int64_t source = 0;    // row of the input
  std::int64_t tile = 0;
  std::int64_t expert = 0;
  float weight = 1.0f;
};

__device__ __forceinline__ std::int64_t item_count(const QuantizeParams& p) {
  if (p.tiles == nullptr) return p.input_rows;
  const std::int64_t tiles = __ldcg(p.num_tiles);
  return (tiles < p.max_tiles ? tiles : p.max_tiles) * p.tile_rows;
}

__device__ __forceinline__ Tile load_tile(const Tile* at) {
  static_assert(sizeof(Tile) == sizeof(int4));
  const int4 raw = __ldcg(reinterpret_cast<const int4*>(at));
  Tile tile;
  tile.expert = raw.x;
  tile.rows = raw.y;
  tile.first =
      static_cast<std::int64_t>(static_cast<std::uint64_t>(static_cast<unsigned>(raw.w)) << 32 |
                                static_cast<unsigned>(raw.z));
  return tile;
}

// False: item `i` is no live row.
__device__ __forceinline__ bool find_row(const QuantizeParams& p, std::int64_t i,
                                         QuantizeRow* row) {
  if (p.tiles == nullptr) {
    *row = {.position = i, .source = i};
    return true;
  }
  // Rows of all tiles together fit 32 bits: positions do, and experts x tile_rows is small.
  row->tile = static_cast<unsigned>(i) / static_cast<unsigned>(p.tile_rows);
  const Tile tile = load_tile(p.tiles + row->tile);
  const std::int64_t r = i - row->tile * p.tile_rows;
  if (r >= tile.rows || tile.expert < 0) return false;
  row->expert = tile.expert;
  row->position = row->source = tile.first + r;
  if (row->position >= p.positions) return false;
  if (p.row_slot != nullptr) {
    const std::int64_t slot = __ldcg(p.row_slot + row->position);
    if (slot < 0 || slot >= p.slot_count) return false;
    if (p.source == RowOf::kSlot) row->source = slot;
    if (p.source == RowOf::kToken) row->source = slot / p.top_k;
    if (p.row_weights != nullptr) row->weight = p.row_weights[slot];
  }
  return row->source < p.input_rows;
}

// The factors on eight (or one) neighbouring elements, rounded once behind both.
template <int kVec>
__device__ __forceinline__ void apply_factors(const QuantizeParams& p, const QuantizeRow& row,
                                              std::int64_t column, float (&v)[kVec]) {
  if (p.row_weights == nullptr && p.prequant == nullptr) return;
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    v[i] *= row.weight;
    if (p.prequant != nullptr)
      v[i] *= load_float(p.prequant, p.prequant_dtype,
                         row.expert * p.prequant_expert_stride + (column + i) * p.prequant_stride);
    v[i] = round_to(p.round_to, v[i]);
  }
}

template <int kVec, typename In>
__device__ __forceinline__ void unpack(const Pack<In, kVec>& pack, float (&v)[kVec]) {
#pragma unroll
  for (int i = 0; i < kVec; ++i) v[i] = to_float(pack.element[i]);
}

// Calls f(column, values) for the packs of one row that thread `lane` of `threads` owns. The loads
// of a batch are issued together: a row is read at the speed of the memory, not of its latency.
template <typename In, int kVec, typename F>
__device__ __forceinline__ void for_row(const QuantizeParams& p, const QuantizeRow& row, int lane,
                                        int threads, F&& f) {
  constexpr int kBatch = 4;
  const In* in = static_cast<const In*>(p.input) + row.source * p.input_stride;
  const std::int64_t step = static_cast<std::int64_t>(threads) * kVec;
  for (std::int64_t first = static_cast<std::int64_t>(lane) * kVec; first < p.columns;
       first += step * kBatch) {
    Pack<In, kVec> raw[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b)
      if (first + b * step < p.columns) raw[b] = load_pack<kVec>(in + first + b * step);
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const std::int64_t column = first + b * step;
      if (column >= p.columns) break;
      float v[kVec];
      unpack<kVec>(raw[b], v);
      apply_factors<kVec>(p, row, column, v);
      f(column, v);
    }
  }
}

// Of a block. All of its threads call it.
__device__ __forceinline__ unsigned block_max(unsigned v) {
  __shared__ unsigned warps[kWarps];
  v = __reduce_max_sync(kAllLanes, v);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = v;
  __syncthreads();
  unsigned top = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) top = max(top, warps[w]);
  __syncthreads();  // `warps` may be used again
  return top;
}

// --- the result ----------------------------------------------------------------------------------
// Calls f(position) for every row of the output that is this row's.
template <typename F>
__device__ __forceinline__ void for_positions(const QuantizeParams& p, const QuantizeRow& row,
                                              F&& f) {
  if (p.slot_row == nullptr) return f(row.position);
#pragma unroll 4
  for (std::int64_t j = 0; j < p.top_k; ++j) {
    const std::int64_t position = __ldcg(p.slot_row + row.source * p.top_k + j);
    if (position >= 0 && position < p.positions) f(position);
  }
}

template <int kVec>
__device__ __forceinline__ void store_quantized(const QuantizeParams& p, const QuantizeRow& row,
                                                std::int64_t column, const float (&v)[kVec],
                                                float scale, float inverse) {
  Pack<std::int8_t, kVec> pack;
  if (p.output_dtype == DType::kF8E4M3) {
    float scaled[kVec];
#pragma unroll
    for (int i = 0; i < kVec; ++i) scaled[i] = v[i] * inverse;
    store_pack<kVec>(reinterpret_cast<__nv_fp8_e4m3*>(&pack), scaled);
  } else {
#pragma unroll
    for (int i = 0; i < kVec; ++i)
      pack.element[i] = p.int8_rounding == Int8Rounding::kTruncate ? to_i8_truncated(v[i], scale)
                                                                   : to_i8(v[i] * inverse);
  }
  for_positions(p, row, [&](std::int64_t position) {
    *reinterpret_cast<Pack<std::int8_t, kVec>*>(static_cast<std::int8_t*>(p.output) +
                                                position * p.output_stride + column) = pack;
  });
}

}  // namespace moesaic::cuda
