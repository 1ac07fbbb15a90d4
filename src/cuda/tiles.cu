// SPDX-License-Identifier: Apache-2.0
// From a caller's lists to tiles. The lists are data, so anything may be in them: counts are
// clipped, experts outside the layer become filtered, nothing outside the lists is read.
//
// Sorted: neighbouring blocks of one expert are joined up to tile_rows, so that the tile that suits
// the product does not depend on the caller's block size, and padding at a tile's end is cut off.
// One block walks the list, one block of it per thread: the list is short next to the rows it
// describes. Short lists take few threads, because scans and barriers grow with them.
#include <algorithm>

#include "cuda/device.h"
#include "cuda/element.h"
#include "cuda/expert_scan.h"
#include "cuda/overlap.h"
#include "cuda/stages.h"

namespace moesaic::cuda {
namespace {

constexpr int kManyThreads = 1024, kFewThreads = 256;

struct SortedParams {
  const std::int32_t* slots = nullptr;
  const std::int32_t* block_experts = nullptr;
  const std::int32_t* num_padded = nullptr;
  std::int64_t blocks = 0, block_rows = 1, slot_count = 0, experts = 0, tile_rows = 1;
  std::int64_t max_tiles = 0;
  Tile* tiles = nullptr;
  std::int32_t* num_tiles = nullptr;
};

// One more than the last row of a block that holds a slot; 0: all padding. By one warp.
__device__ __forceinline__ int live_rows(const SortedParams& p, std::int64_t block,
                                         std::int64_t used) {
  const int lane = threadIdx.x % 32;
  int last = 0;
  for (std::int64_t first = 0; first < p.block_rows; first += 32) {
    const std::int64_t row = first + lane;
    bool live = false;
    if (row < p.block_rows && block * p.block_rows + row < used) {
      const std::int32_t slot = p.slots[block * p.block_rows + row];
      live = slot >= 0 && slot < p.slot_count;
    }
    const unsigned mask = __ballot_sync(kAllLanes, live);
    if (mask != 0) last = static_cast<int>(first) + 32 - __clz(mask);
  }
  return last;
}

__device__ __forceinline__ int expert_of(const SortedParams& p, std::int64_t block) {
  const int expert = p.block_experts[block];
  return expert >= 0 && expert < p.experts ? expert : -1;
}

// A chunk is a window of the list: [first, first + kThreads) with a halo behind it, because a tile
// that begins in the window may end in later blocks.
template <int kThreads>
__global__ void __launch_bounds__(kThreads, 1) sorted_tiles(SortedParams p, int halo) {
  begin_kernel();
  extern __shared__ std::int32_t shared[];
  std::int32_t* expert = shared;                  // [kThreads + halo]
  std::int32_t* live = shared + kThreads + halo;  // [kThreads + halo]
  __shared__ std::int32_t run_start[kThreads];    // head of each block's run, from the list's start
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const std::int64_t used_rows = *p.num_padded > 0 ? *p.num_padded : 0;
  const std::int64_t used_blocks = min((used_rows + p.block_rows - 1) / p.block_rows, p.blocks);
  std::int64_t written = 0;
  std::int64_t carried_start = 0;  // of the run that the last window ended in
  int carried_expert = -2;
  for (std::int64_t first = 0; first < used_blocks; first += kThreads) {
    const int window =
        static_cast<int>(min(used_blocks - first, static_cast<std::int64_t>(kThreads + halo)));
    for (int i = threadIdx.x; i < window; i += kThreads) expert[i] = expert_of(p, first + i);
    for (int i = warp; i < window; i += kThreads / 32) {
      const int rows = live_rows(p, first + i, used_rows);
      if (lane == 0) live[i] = rows;
    }
    __syncthreads();
    // Heads of runs: the largest head at or before each block, by a scan for the maximum.
    const int mine = threadIdx.x;
    const int count = min(window, kThreads);
    bool head = false;
    if (mine < count)
      head = mine == 0 ? expert[0] != carried_expert : expert[mine] != expert[mine - 1];
    run_start[mine] = head ? mine : -1;
    __syncthreads();
    for (int offset = 1; offset < kThreads; offset *= 2) {
      const int other = mine >= offset ? run_start[mine - offset] : -1;
      __syncthreads();
      if (other > run_start[mine]) run_start[mine] = other;
      __syncthreads();
    }
    // The tiles that begin in my block: at multiples of tile_rows within the run.
    ScanSums tiles;
    std::int64_t begin = 0, end = 0;
    const std::int64_t start =
        mine < count && run_start[mine] >= 0 ? first + run_start[mine] : carried_start;
    const std::int64_t offset = (first + mine - start) * p.block_rows;
    // Rows of a tile from `row` of my run on: up to the last live one of its blocks.
    const auto tile_length = [&](std::int64_t row) {
      std::int64_t length = 0;
      for (int b = mine; b < window && expert[b] == expert[mine]; ++b) {
        const std::int64_t block_row = offset + (b - mine) * p.block_rows;
        if (block_row >= row + p.tile_rows) break;
        const std::int64_t last = min(block_row + live[b], row + p.tile_rows);
        if (live[b] > 0 && last > row) length = last - row;
      }
      return length;
    };
    if (mine < count) {
      begin = (offset + p.tile_rows - 1) / p.tile_rows;
      end = (offset + p.block_rows + p.tile_rows - 1) / p.tile_rows;
      for (std::int64_t t = begin; t < end; ++t) tiles.tiles += tile_length(t * p.tile_rows) > 0;
    }
    ScanSums total;
    std::int64_t at = written + block_scan(tiles, &total, count).tiles;
    for (std::int64_t t = begin; t < end; ++t) {
      const std::int64_t row = t * p.tile_rows, length = tile_length(row);
      if (length == 0) continue;
      if (at < p.max_tiles)
        p.tiles[at] = {.expert = expert[mine],
                       .rows = static_cast<std::int32_t>(length),
                       .first = start * p.block_rows + row};
      ++at;
    }
    written += total.tiles;
    if (count == kThreads) {
      const int last = run_start[kThreads - 1];
      carried_start = last >= 0 ? first + last : carried_start;
      carried_expert = expert[kThreads - 1];
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) *p.num_tiles = static_cast<std::int32_t>(min(written, p.max_tiles));
}

// --- batched -------------------------------------------------------------------------------------
__global__ void __launch_bounds__(kManyThreads, 1)
    batched_tiles(const std::int32_t* num_tokens, TileWriter writer, std::int32_t* num_tiles) {
  begin_kernel();
  extern __shared__ std::int32_t shared[];
  const GroupTable table = GroupTable::at(shared, writer.groups);
  const int threads = static_cast<int>(blockDim.x);
  const int per_thread = (writer.groups + threads - 1) / threads;
  const int begin = threadIdx.x * per_thread, end = min(begin + per_thread, writer.groups);
  ScanSums mine;
  for (int e = begin; e < end; ++e) {
    const std::int64_t given = num_tokens[e] > 0 ? num_tokens[e] : 0;
    table.live[e] = static_cast<std::int32_t>(min(given, writer.capacity));
    mine.tiles +=
        static_cast<std::int32_t>((table.live[e] + writer.tile_rows - 1) / writer.tile_rows);
  }
  ScanSums total;
  ScanSums at = block_scan(mine, &total, (writer.groups + per_thread - 1) / per_thread);
  for (int e = begin; e < end; ++e) {
    table.start[e] = 0;
    table.first_tile[e] = at.tiles;
    at.tiles +=
        static_cast<std::int32_t>((table.live[e] + writer.tile_rows - 1) / writer.tile_rows);
  }
  __syncthreads();
  write_tiles(writer, table, total.tiles, threadIdx.x, threads);
  if (threadIdx.x == 0)
    *num_tiles =
        static_cast<std::int32_t>(min(static_cast<std::int64_t>(total.tiles), writer.max_tiles));
}

}  // namespace

void run_tiles(const TileStage& stage, const DeviceTraits& device, cudaStream_t stream) {
  const RowMap& rows = stage.rows;
  if (stage.batched.num_tokens.defined()) {
    const TileWriter writer{.tiles = rows.tiles,
                            .max_tiles = rows.max_tiles,
                            .tile_rows = rows.tile_rows,
                            .capacity = stage.capacity,
                            .groups = static_cast<int>(stage.experts)};
    launch("tiles: batched", batched_tiles,
           {.grid = 1,
            .block = dim3(static_cast<unsigned>(
                std::clamp<std::int64_t>(round_up(writer.groups, 32), 128, kManyThreads))),
            .shared_bytes = static_cast<std::size_t>(kTableColumns * writer.groups) * 4,
            .dependency = overlap(device)},
           stream, stage.batched.num_tokens.as<std::int32_t>(), writer, rows.num_tiles);
    return;
  }
  const SortedRows& sorted = stage.sorted;
  const std::int64_t block_rows = sorted.block_rows;
  const int halo = static_cast<int>(ceil_div(rows.tile_rows, block_rows));
  const SortedParams p{
      .slots = sorted.slots.as<std::int32_t>(),
      .block_experts = sorted.block_experts.as<std::int32_t>(),
      .num_padded = sorted.num_padded.as<std::int32_t>(),
      .blocks = std::min(sorted.block_experts.shape[0], sorted.slots.shape[0] / block_rows),
      .block_rows = block_rows,
      .slot_count = rows.slot_count,
      .experts = stage.experts,
      .tile_rows = rows.tile_rows,
      .max_tiles = rows.max_tiles,
      .tiles = rows.tiles,
      .num_tiles = rows.num_tiles};
  const auto go = [&](auto kernel, int threads) {
    launch("tiles: sorted", kernel,
           {.grid = 1,
            .block = dim3(static_cast<unsigned>(threads)),
            .shared_bytes = static_cast<std::size_t>(2 * (threads + halo)) * 4,
            .dependency = overlap(device)},
           stream, p, halo);
  };
  if (p.blocks <= kFewThreads) return go(sorted_tiles<kFewThreads>, kFewThreads);
  go(sorted_tiles<kManyThreads>, kManyThreads);
}

}  // namespace moesaic::cuda
