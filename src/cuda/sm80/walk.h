// SPDX-License-Identifier: Apache-2.0
// Which work a CTA of small tiles takes next, asked by a whole warp: a lane per tile. The tiles
// come from the list, or (UnlistedRows) are made of few slots' ids, or of a caller's few blocks.
#pragma once

#include "cuda/sm80/tile.h"

namespace moesaic::cuda {

template <typename T>
class Sm80Walk {
 public:
  __device__ explicit Sm80Walk(const Sm80Params& p) : p_(p), index_(blockIdx.x) {
    lane_ = threadIdx.x % 32;
    if (p.unlisted.ids != nullptr) {
      make_tiles();
    } else if (p.unlisted.block_experts != nullptr) {
      take_blocks();
    } else {
      tile_ = load(0);  // not behind num_tiles: one latency, not two
      tiles_ = static_cast<std::uint32_t>(min(__ldcg(p.num_tiles), p.max_tiles) * p.parts);
    }
    total_ = tiles_ * p.column_tiles;
  }

  // False behind the end.
  __device__ __forceinline__ bool next(Sm80Work& work) {
    for (; index_ < total_;) {
      const std::uint32_t index = index_;
      index_ += gridDim.x;
      // In strips, as locate() has them.
      const std::uint32_t per_strip = kStrip * p_.column_tiles;
      const std::uint32_t strip = index / per_strip, rest = index - strip * per_strip;
      const std::uint32_t width = min(kStrip, tiles_ - strip * kStrip);
      const std::uint32_t column_tile = rest / width;
      const std::uint32_t token_tile = strip * kStrip + (rest - column_tile * width);
      const std::uint32_t tile = p_.parts == 1 ? token_tile : token_tile / p_.parts;
      if (tile - window_ >= 32) {  // of a list only
        window_ = tile / 16 * 16;
        tile_ = load(window_);
      }
      const int begin = static_cast<int>(token_tile - tile * p_.parts) * T::kTokens;
      const int holder = static_cast<int>(tile - window_);
      work.expert = __shfl_sync(~0u, tile_.x, holder);
      work.rows = min(__shfl_sync(~0u, tile_.y, holder) - begin, T::kTokens);
      const auto low = static_cast<std::uint32_t>(__shfl_sync(~0u, tile_.z, holder));
      const auto high = static_cast<std::uint32_t>(__shfl_sync(~0u, tile_.w, holder));
      work.first = static_cast<std::int64_t>(std::uint64_t{high} << 32 | low) + begin;
      work.column_tile = static_cast<std::int32_t>(column_tile);
      if (work.expert >= p_.experts) work.expert = -1;
      if (work.rows > 0) return true;
    }
    work.rows = 0;
    return false;
  }

  // The work's i-th row, i < rows.
  __device__ __forceinline__ Sm80Row row(const Sm80Work& work, int i) const {
    if (p_.unlisted.ids != nullptr) {  // a mask of slots, and positions are slots
      const auto slot = static_cast<std::uint32_t>(
          set_bit(static_cast<std::uint32_t>(work.first), static_cast<std::uint32_t>(i)));
      return {slot, slot};
    }
    const std::int64_t position = work.first + i;
    return {position, p_.row_slot ? static_cast<std::uint32_t>(__ldcg(p_.row_slot + position))
                                  : static_cast<std::uint32_t>(position)};
  }

 private:
  static constexpr std::uint32_t kStrip = 16;  // as in locate()

  // Where the mask's n-th set bit is, counted from 0; 31 where it has fewer.
  __device__ static int set_bit(std::uint32_t mask, std::uint32_t n) {
    int at = 0;
#pragma unroll
    for (int half = 16; half > 0; half /= 2) {
      const auto low = static_cast<std::uint32_t>(__popc(mask >> at & ((1u << half) - 1)));
      if (n >= low) n -= low, at += half;
    }
    return at;
  }
  // Through L2: see overlap.h.
  __device__ int4 load(std::uint32_t first) const {
    const std::uint32_t index = first + lane_;
    return __ldcg(reinterpret_cast<const int4*>(p_.tiles) +
                  (index < static_cast<std::uint32_t>(p_.max_tiles) ? index : 0));
  }
  // Nothing is sorted: a tile's rows are the slots of a mask, and tiles come in the order of their
  // first slots.
  __device__ void make_tiles() {
    unsigned expert = ~0u;
    if (lane_ < p_.slot_count)
      expert = static_cast<unsigned>(__ldcg(p_.unlisted.ids + lane_)) -
               static_cast<unsigned>(p_.unlisted.first_expert);
    const unsigned alike = __match_any_sync(~0u, expert);
    const unsigned before = (1u << lane_) - 1, from_me = alike & ~before;
    const bool begins =
        expert < static_cast<unsigned>(p_.experts) && __popc(alike & before) % T::kTokens == 0;
    const unsigned all = __ballot_sync(~0u, begins);
    tiles_ = static_cast<std::uint32_t>(__popc(all));
    // Lane l takes the l-th of them from the lane where it begins.
    const int holder = set_bit(all, lane_);
    tile_ = {__shfl_sync(~0u, static_cast<int>(expert), holder),
             min(__popc(__shfl_sync(~0u, from_me, holder)), T::kTokens),
             static_cast<int>(__shfl_sync(~0u, from_me, holder)), 0};
  }
  __device__ void take_blocks() {
    const int lane = static_cast<int>(lane_);
    const int expert = lane < p_.max_tiles ? __ldcg(p_.unlisted.block_experts + lane) : -1;
    const int padded = max(__ldcg(p_.unlisted.num_padded), 0), rows = p_.tile_rows;
    const int used = padded < p_.max_tiles * rows ? (padded + rows - 1) / rows : p_.max_tiles;
    tiles_ = static_cast<std::uint32_t>(used);
    tile_ = {expert, min(padded - lane * rows, rows), lane * rows, 0};
  }

  const Sm80Params& p_;
  std::uint32_t lane_, index_, tiles_, total_, window_ = 0;
  int4 tile_;  // lane l's: window_ + l
};

}  // namespace moesaic::cuda
