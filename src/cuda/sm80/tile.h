// SPDX-License-Identifier: Apache-2.0
// A kernel of the SM80 family by its numbers, what they make of a stage in shared memory, and which
// rows and columns a CTA's share of the work has.
#pragma once

#include "cuda/sm80/gemm.h"

namespace moesaic::cuda {

template <typename Op_, int kWarpsM_, int kWarpsN_, int kMFrags_, int kNFrags_, int kDepth_,
          int kStages_, int kCtas_>
struct Sm80Tile {
  using Op = Op_;
  static constexpr int kWarpsM = kWarpsM_, kWarpsN = kWarpsN_, kMFrags = kMFrags_,
                       kNFrags = kNFrags_;
  static constexpr int kDepth = kDepth_, kStages = kStages_, kCtas = kCtas_;
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int kRows = 16 * kWarpsM * kMFrags;  // of weights
  static constexpr int kTokens = 8 * kWarpsN * kNFrags;
  static constexpr int kWeightBytes = kDepth * Op::kWeightBits / 8;  // of one row in a stage
  static constexpr int kActBytes = kDepth * Op::kActBits / 8;
  static constexpr int kGroups = kDepth / 32;  // scale groups that a stage may touch
  static constexpr bool kScales = Op::kPromote;
  static constexpr bool kZeros = Op::kZeros || Op::kE8M0;
  static constexpr bool kActScales = Op::kPromote && Op::kActBits == 8;
  // Layout of a stage.
  // Everything that is addressed by XOR begins at a multiple of the longest row.
  static constexpr int kAlign = kActBytes > kWeightBytes ? kActBytes : kWeightBytes;
  static constexpr int kActOffset = (kRows * kWeightBytes + kAlign - 1) / kAlign * kAlign;
  static constexpr int kScaleOffset = kActOffset + kTokens * kActBytes;
  static constexpr int kZeroOffset = kScaleOffset + (kScales ? kGroups * kRows * 4 : 0);
  static constexpr int kActScaleOffset = kZeroOffset + (kZeros ? kGroups * kRows * 4 : 0);
  static constexpr int kStageBytes =
      (kActScaleOffset + (kActScales ? kGroups * kTokens * 4 : 0) + kAlign - 1) / kAlign * kAlign;
  // Behind the stages: two tables of the tokens and columns of a tile.
  static constexpr int kTableBytes = kTokens * 16 + kRows * 8;
  static constexpr int kSharedBytes = kStages * kStageBytes + 2 * kTableBytes + 16;
  static_assert(kWeightBytes % 16 == 0 && kActBytes % 16 == 0 && kAlign <= 1024);
  static_assert(kCtas * (kSharedBytes + 1024) <= 228 * 1024);  // of an SM90; others hold fewer CTAs
};

// Small tiles, those of decode: two warps more, which copy. What a stage costs the others is the
// products alone, and the copies are ahead of them by the whole ring.
template <typename Op_, int kWarps, int kMFrags, int kNFrags, int kDepth, int kStages, int kCtas>
struct Sm80SmallTile : Sm80Tile<Op_, kWarps, 1, kMFrags, kNFrags, kDepth, kStages, kCtas> {
  using Base = Sm80Tile<Op_, kWarps, 1, kMFrags, kNFrags, kDepth, kStages, kCtas>;
  static constexpr int kAllThreads = Base::kThreads + 64;
  static_assert(Base::kTokens <= 32, "a lane per token");
};

// How much there is to do. In shared memory: read once per tile, no register kept.
struct Sm80Extent {
  std::uint32_t token_tiles, total;
};

// A CTA's share of work: `rows` tokens from position `first`, one tile of columns.
struct Sm80Work {
  std::int64_t first;
  std::int32_t expert, rows, column_tile;
};

// A row of it.
struct Sm80Row {
  std::int64_t position;
  std::uint32_t slot;
};

// Work is counted in strips of 16 token tiles x all columns, token tiles fastest: the CTAs that run
// at one time share both weights and tokens in L2. Returns false for a part behind the tile's last
// row. Fewer than 2^31 items: checked on the host.
__device__ __forceinline__ bool locate(const Sm80Params& p, std::uint32_t index,
                                       std::uint32_t token_tiles, int tokens, Sm80Work& work) {
  constexpr std::uint32_t kStrip = 16;
  const std::uint32_t per_strip = kStrip * p.column_tiles;
  const std::uint32_t strip = index / per_strip, rest = index % per_strip;
  const std::uint32_t width = min(kStrip, token_tiles - strip * kStrip);
  const std::uint32_t token_tile = strip * kStrip + rest % width;
  work.column_tile = rest / width;
  const Tile tile = p.tiles[token_tile / p.parts];
  const int begin = static_cast<int>(token_tile % p.parts) * tokens;
  work.first = tile.first + begin;
  work.rows = min(tile.rows - begin, tokens);
  work.expert = tile.expert >= p.experts ? -1 : tile.expert;
  return work.rows > 0;
}

__device__ __forceinline__ std::uint32_t slot_of(const Sm80Params& p, std::int64_t position) {
  return p.row_slot ? static_cast<std::uint32_t>(p.row_slot[position])
                    : static_cast<std::uint32_t>(position);
}
__device__ __forceinline__ bool is_padding(const Sm80Params& p, std::uint32_t slot) {
  return p.row_slot && slot >= p.slot_count;
}
__device__ __forceinline__ std::uint32_t row_of(RowOf row, std::int64_t position,
                                                std::uint32_t slot, std::uint32_t top_k) {
  if (row == RowOf::kPosition) return static_cast<std::uint32_t>(position);
  return row == RowOf::kSlot ? slot : slot / top_k;
}

// Weight row r (0 .. kRows-1) of a CTA -> column of C and which of gate (0) / up (1).
template <typename T>
__device__ __forceinline__ std::int32_t column_of(const Sm80Params& p, std::int32_t column_tile,
                                                  int r, int& half) {
  constexpr int kPerWarp = 16 * T::kMFrags;
  const int warp = r / kPerWarp, fragment = r % kPerWarp / 16, q = r % 8;
  half = r / 8 % 2;
  if (p.gated)
    return column_tile * (T::kRows / 2) + warp * (kPerWarp / 2) + q * T::kMFrags + fragment;
  return column_tile * T::kRows + warp * kPerWarp + q * 2 * T::kMFrags + fragment * 2 + half;
}
__device__ __forceinline__ std::int64_t weight_row(const Sm80Params& p, std::int32_t column,
                                                   int half) {
  return p.gated ? static_cast<std::int64_t>(column) * p.row_multiple + p.row_offset[half] : column;
}

}  // namespace moesaic::cuda
