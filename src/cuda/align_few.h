// SPDX-License-Identifier: Apache-2.0
// Align of few slots by one warp, a slot per lane: what a block finds with counters and scans, 32
// lanes find by asking each other. No barrier, no shared memory; what is left is one trip to memory
// for the ids and one for the results. A kernel of its own (align.cu), or a block of the kernel
// that quantizes x (quantize.cu).
#pragma once

#include "cuda/align_slots.h"

namespace moesaic::cuda {

constexpr std::int64_t kSlotsOfWarp = 32;
inline bool is_few(const AlignParams& p) { return p.slots <= kSlotsOfWarp && p.block_rows == 0; }

// By the first warp of a block.
__device__ __forceinline__ void align_few(const AlignParams& p) {
  const int lane = threadIdx.x, slots = static_cast<int>(p.slots);
  const int group = lane < slots ? group_of(p, lane) : -1;
  const unsigned same = __match_any_sync(kAllLanes, group), earlier = (1u << lane) - 1;
  const int rank = __popc(same & earlier);
  const bool heads = group >= 0 && rank == 0;  // the first slot of its group speaks for it
  int live = __popc(same), lost = 0;
  if (p.batched && live > p.capacity) {
    lost = heads ? live - static_cast<int>(p.capacity) : 0;
    live = static_cast<int>(p.capacity);
  }
  const auto tile_rows = static_cast<unsigned>(p.tile_rows);
  const unsigned tiles = heads ? (live + tile_rows - 1) / tile_rows : 0;
  const unsigned mine = heads ? static_cast<unsigned>(live) << 16 | tiles : 0;
  unsigned before = 0;  // of smaller groups: rows and tiles
  for (int j = 0; j < slots; ++j) {
    const int other = __shfl_sync(kAllLanes, group, j);
    const unsigned theirs = __shfl_sync(kAllLanes, mine, j);
    if (other < group) before += theirs;
  }
  const std::int64_t base = before >> 16;
  if (p.tokens_per_expert != nullptr) {
    for (int e = lane; e < p.groups; e += 32) p.tokens_per_expert[e] = 0;
    __syncwarp();
    if (heads) p.tokens_per_expert[group] = live;
  }
  if (lane < slots) place(p, lane, group, base, rank);
  if (heads && p.writer.tiles != nullptr) {
    const std::int64_t start = p.writer.capacity > 0 ? group * p.writer.capacity : base;
    for (unsigned t = 0; t < tiles; ++t) {
      const unsigned at = (before & 0xffffu) + t;
      const int row = static_cast<int>(t * tile_rows), left = live - row;
      if (at < p.writer.max_tiles)
        p.writer.tiles[at] = {
            .expert = group,
            .rows = left < static_cast<int>(tile_rows) ? left : static_cast<int>(tile_rows),
            .first = start + row};
    }
  }
  const unsigned all_tiles = __reduce_add_sync(kAllLanes, tiles);
  static_assert(kTileWindow == 32);  // a lane each
  if (p.writer.tiles != nullptr && lane >= static_cast<int>(all_tiles) && lane < p.writer.max_tiles)
    p.writer.tiles[lane] = kNoTile;
  const int all_lost = __reduce_add_sync(kAllLanes, lost);
  if (lane == 0) {
    if (p.num_tiles != nullptr)
      *p.num_tiles = static_cast<std::int32_t>(all_tiles < p.max_tiles ? all_tiles : p.max_tiles);
    if (p.next_task != nullptr) p.next_task[0] = p.next_task[1] = 0;
    if (p.dropped != nullptr) *p.dropped = all_lost;
  }
}

}  // namespace moesaic::cuda
