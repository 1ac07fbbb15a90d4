// SPDX-License-Identifier: Apache-2.0
// From rows per expert to where each expert begins and which tiles it has: what align and tiles
// share. Device side; one block does the scan, any number of threads write the tiles.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/element.h"
#include "cuda/stages.h"

namespace moesaic::cuda {

// One entry per group of rows: an expert.
struct GroupTable {
  std::int32_t* start = nullptr;       // [groups]: rows before the group (batched: not used)
  std::int32_t* live = nullptr;        // [groups]: rows that hold a slot
  std::int32_t* first_tile = nullptr;  // [groups]: tiles before the group
  __host__ __device__ static GroupTable at(std::int32_t* memory, std::int64_t groups) {
    return {memory, memory + groups, memory + 2 * groups};
  }
};
inline constexpr int kTableColumns = 3;

struct ScanSums {
  std::int32_t rows = 0, tiles = 0;
};

// Exclusive sums over the block's threads, of which the first `holders` have something; `total` is
// what they add up to.
__device__ __forceinline__ ScanSums block_scan(ScanSums mine, ScanSums* total, int holders) {
  __shared__ ScanSums warps[32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, count = (holders + 31) / 32;
  ScanSums sum = mine;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const std::int32_t rows = __shfl_up_sync(kAllLanes, sum.rows, offset);
    const std::int32_t tiles = __shfl_up_sync(kAllLanes, sum.tiles, offset);
    if (lane >= offset) sum = {sum.rows + rows, sum.tiles + tiles};
  }
  if (lane == 31) warps[warp] = sum;
  __syncthreads();
  ScanSums before, all;
  for (int w = 0; w < count; ++w) {
    if (w == warp) before = all;
    all = {all.rows + warps[w].rows, all.tiles + warps[w].tiles};
  }
  __syncthreads();  // `warps` may be used again
  *total = all;
  return {before.rows + sum.rows - mine.rows, before.tiles + sum.tiles - mine.tiles};
}

// The group that entry `index` of an exclusive prefix belongs to: the last one that begins at or
// before it. Groups of length 0 begin where the next does and are never found.
__device__ __forceinline__ int group_at(const std::int32_t* prefix, int groups,
                                        std::int32_t index) {
  int low = 0, high = groups;  // prefix[low] <= index
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (prefix[middle] <= index)
      low = middle;
    else
      high = middle;
  }
  return low;
}

struct TileWriter {
  Tile* tiles = nullptr;
  std::int64_t max_tiles = 0, tile_rows = 1;
  std::int64_t capacity = 0;  // batched: rows per expert; else groups follow each other
  int groups = 0;             // local experts
};

// Every thread of `stride` writes the tiles begin, begin + stride, ... of `total`, and what is left
// of the window.
__device__ __forceinline__ void write_tiles(const TileWriter& w, const GroupTable& table,
                                            std::int64_t total, std::int64_t begin,
                                            std::int64_t stride) {
  if (w.tiles == nullptr) return;
  if (total > w.max_tiles) total = w.max_tiles;
  const std::int64_t window = w.max_tiles < kTileWindow ? w.max_tiles : kTileWindow;
  for (std::int64_t i = begin; i < total || i < window; i += stride) {
    if (i >= total) {
      w.tiles[i] = kNoTile;
      continue;
    }
    const int g = group_at(table.first_tile, w.groups, static_cast<std::int32_t>(i));
    const std::int64_t row = (i - table.first_tile[g]) * w.tile_rows;
    const std::int64_t left = table.live[g] - row;
    Tile tile;
    tile.expert = g;
    tile.rows = static_cast<std::int32_t>(left < w.tile_rows ? left : w.tile_rows);
    tile.first = (w.capacity > 0 ? g * w.capacity : table.start[g]) + row;
    w.tiles[i] = tile;
  }
}

}  // namespace moesaic::cuda
