// SPDX-License-Identifier: Apache-2.0
// From a caller's lists to tiles. The lists are data, so anything may be in them: counts are
// clipped, experts outside the layer become filtered, nothing outside the lists is read.
//
// Sorted: neighbouring blocks of one expert are joined up to tile_rows, so that the tile that suits
// the product does not depend on the caller's block size, and padding at a tile's end is cut off.
// Where a tile has room for a block, how many tiles a run of blocks has follows from its length
// alone: any number of thread blocks work at it. Else it depends on the rows of all blocks in
// front, and one thread block walks the list, one block of it per thread.
#include <algorithm>

#include "cuda/device.h"
#include "cuda/element.h"
#include "cuda/expert_scan.h"
#include "cuda/overlap.h"
#include "cuda/stages.h"

namespace moesaic::cuda {
namespace {

constexpr int kManyThreads = 1024, kFewThreads = 256;
constexpr std::int64_t kAtOnceRows = 128;

struct SortedParams {
  const std::int32_t* slots = nullptr;
  const std::int32_t* block_experts = nullptr;
  const std::int32_t* num_padded = nullptr;
  std::int64_t blocks = 0, block_rows = 1, slot_count = 0, experts = 0, tile_rows = 1;
  std::int64_t max_tiles = 0;
  Tile* tiles = nullptr;
  std::int32_t* num_tiles = nullptr;
};

// live[i]: one more than the last row of block first + i that holds a slot; 0: all padding. `rows`
// of the list are looked at, from block `first` on, of which `used` count. All threads read
// neighbouring rows, several at once: a warp for each block waited for memory as often as it had
// blocks, 10 us for 128 of them.
template <int kThreads>
__device__ __forceinline__ void find_live_rows(const SortedParams& p, std::int64_t first,
                                               std::int64_t rows, std::int64_t used,
                                               std::int32_t* live) {
  constexpr int kAtOnce = 8;
  const std::int32_t* const slots = p.slots + first * p.block_rows;
  const auto block_rows = static_cast<std::uint32_t>(p.block_rows);
  const std::uint32_t lane = threadIdx.x % 32;
  for (std::int64_t base = threadIdx.x - lane; base < rows; base += kThreads * kAtOnce) {
    std::int32_t slot[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const std::int64_t row = base + i * kThreads + lane;
      slot[i] = row < rows ? slots[row] : -1;
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const bool is_live =
          slot[i] >= 0 && slot[i] < p.slot_count && base + i * kThreads + lane < used;
      const unsigned mask = __ballot_sync(kAllLanes, is_live);
      if (!is_live) continue;
      const auto row = static_cast<std::uint32_t>(base + i * kThreads + lane);
      const std::uint32_t block = row / block_rows, offset = row - block * block_rows;
      // Only the last live one of a block among these 32 rows.
      const std::uint32_t others = min(31 - lane, block_rows - 1 - offset);  // lanes behind mine
      const unsigned behind = mask >> lane >> 1;
      if ((behind & ((1u << others) - 1)) == 0)
        atomicMax(&live[block], static_cast<std::int32_t>(offset + 1));
    }
  }
}

// Of what the block's threads have: maxima and sums of those in front of this one, and of all.
// Nothing is below -1 (0). `warps` [32] may be written again behind the next barrier.
struct Scanned {
  std::int32_t before, all;
};
__device__ __forceinline__ Scanned scan_maxima(std::int32_t value, std::int32_t* warps) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const std::int32_t other = __shfl_up_sync(kAllLanes, value, offset);
    if (lane >= offset) value = max(value, other);
  }
  if (lane == 31) warps[warp] = value;
  __syncthreads();
  const std::int32_t theirs = lane * 32 < static_cast<int>(blockDim.x) ? warps[lane] : -1;
  const std::int32_t of_warps = __reduce_max_sync(kAllLanes, lane < warp ? theirs : -1);
  const std::int32_t of_lanes = __shfl_up_sync(kAllLanes, value, 1);
  return {lane == 0 ? of_warps : max(of_warps, of_lanes), __reduce_max_sync(kAllLanes, theirs)};
}
__device__ __forceinline__ Scanned scan_sums(std::int32_t value, std::int32_t* warps) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  std::int32_t sum = value;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const std::int32_t other = __shfl_up_sync(kAllLanes, sum, offset);
    if (lane >= offset) sum += other;
  }
  if (lane == 31) warps[warp] = sum;
  __syncthreads();
  const std::int32_t theirs = lane * 32 < static_cast<int>(blockDim.x) ? warps[lane] : 0;
  return {__reduce_add_sync(kAllLanes, lane < warp ? theirs : 0) + sum - value,
          __reduce_add_sync(kAllLanes, theirs)};
}

__device__ __forceinline__ int expert_of(const SortedParams& p, std::int64_t block) {
  const int expert = p.block_experts[block];
  return expert >= 0 && expert < p.experts ? expert : -1;
}

// By one block, behind its last tile.
__device__ __forceinline__ void end_list(const SortedParams& p, std::int64_t tiles) {
  if (threadIdx.x == 0) *p.num_tiles = static_cast<std::int32_t>(min(tiles, p.max_tiles));
  const std::int64_t place = tiles + threadIdx.x;
  if (place < kTileWindow && place < p.max_tiles) p.tiles[place] = kNoTile;
}

// --- tiles smaller than blocks
// A chunk is a window of the list: [first, first + kThreads) with a halo behind it, because a tile
// that begins in the window may end in later blocks.
template <int kThreads>
__global__ void __launch_bounds__(kThreads, 1) sorted_tiles(SortedParams p, int halo) {
  begin_kernel();
  extern __shared__ std::int32_t shared[];
  std::int32_t* expert = shared;                  // [kThreads + halo]
  std::int32_t* live = shared + kThreads + halo;  // [kThreads + halo]
  __shared__ std::int32_t warps[2][32];
  const std::int64_t used_rows = *p.num_padded > 0 ? *p.num_padded : 0;
  const std::int64_t used_blocks = min((used_rows + p.block_rows - 1) / p.block_rows, p.blocks);
  std::int64_t written = 0;
  std::int64_t carried_start = 0;  // of the run that the last window ended in
  int carried_expert = -2;
  for (std::int64_t first = 0; first < used_blocks; first += kThreads) {
    const int window =
        static_cast<int>(min(used_blocks - first, static_cast<std::int64_t>(kThreads + halo)));
    for (int i = threadIdx.x; i < window; i += kThreads) {
      live[i] = 0;
      expert[i] = expert_of(p, first + i);
    }
    __syncthreads();
    const std::int64_t rows = min(window * p.block_rows, used_rows - first * p.block_rows);
    find_live_rows<kThreads>(p, first, rows, rows, live);
    __syncthreads();
    // Heads of runs: the largest head at or before each block, by a scan for the maximum.
    const int mine = threadIdx.x;
    const int count = min(window, kThreads);
    bool head = false;
    if (mine < count)
      head = mine == 0 ? expert[0] != carried_expert : expert[mine] != expert[mine - 1];
    const Scanned heads = scan_maxima(head ? mine : -1, warps[0]);
    const std::int32_t head_of_mine = head ? mine : heads.before;
    // The tiles that begin in my block: at multiples of tile_rows within the run.
    std::int32_t tiles = 0;
    std::int64_t begin = 0, end = 0;
    const std::int64_t start =
        mine < count && head_of_mine >= 0 ? first + head_of_mine : carried_start;
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
      for (std::int64_t t = begin; t < end; ++t) tiles += tile_length(t * p.tile_rows) > 0;
    }
    const Scanned sums = scan_sums(tiles, warps[1]);
    std::int64_t at = written + sums.before;
    for (std::int64_t t = begin; t < end; ++t) {
      const std::int64_t row = t * p.tile_rows, length = tile_length(row);
      if (length == 0) continue;
      if (at < p.max_tiles)
        p.tiles[at] = {.expert = expert[mine],
                       .rows = static_cast<std::int32_t>(length),
                       .first = start * p.block_rows + row};
      ++at;
    }
    written += sums.all;
    if (count == kThreads) {
      carried_start = heads.all >= 0 ? first + heads.all : carried_start;
      carried_expert = expert[kThreads - 1];
    }
    __syncthreads();
  }
  end_list(p, written);
}

// --- tiles of whole blocks and more
// A thread block takes the tiles that begin in a window of the list, again with a halo behind it,
// and counts those in front. What of the list is in use is not waited for: all is asked for at
// once.
__global__ void __launch_bounds__(kFewThreads) joined_tiles(SortedParams p, int window, int halo) {
  extern __shared__ std::int32_t shared[];
  std::int32_t* const expert = shared;                // [window + halo]
  std::int32_t* const live = shared + window + halo;  // [window + halo]
  __shared__ std::int32_t warps[2][32];
  // Rule 3 of overlap.h: who follows waits for our list before he touches anything (kNew).
  // Not in front of large tiles: with those T = 8192 took 1% longer.
  if (p.tile_rows <= kAtOnceRows) let_next_kernel_start();
  for (int i = threadIdx.x; i < window + halo; i += kFewThreads) live[i] = 0;
  __syncthreads();
  begin_kernel();
  const int blocks = static_cast<int>(p.blocks), first = static_cast<int>(blockIdx.x) * window;
  const int listed = *p.num_padded, there = min(window + halo, blocks - first);
  for (int i = threadIdx.x; i < there; i += kFewThreads) expert[i] = expert_of(p, first + i);
  // My blocks of all up to the window's last, and the last of them that begins a run.
  const int seen = min(first + window, blocks), each = (seen + kFewThreads - 1) / kFewThreads;
  const int begin = min(static_cast<int>(threadIdx.x) * each, seen), end = min(begin + each, seen);
  const int in_front = begin > 0 ? expert_of(p, begin - 1) : -2;
  int head = -1;
  for (int b = begin, before = in_front; b < end; ++b) {
    const int now = expert_of(p, b);
    if (now != before) head = b;
    before = now;
  }
  const std::int64_t used_rows = listed > 0 ? listed : 0;
  find_live_rows<kFewThreads>(p, first, there * p.block_rows, used_rows - first * p.block_rows,
                              live);
  const int used = static_cast<int>(min((used_rows + p.block_rows - 1) / p.block_rows, p.blocks));
  const int start_of_mine = scan_maxima(head, warps[0]).before;
  // Of so many blocks of a run; the list's rows are fewer than 2^31.
  const auto block_rows = static_cast<unsigned>(p.block_rows);
  const auto tile_rows = static_cast<unsigned>(p.tile_rows);
  const auto tiles_of = [&](int count) {
    return static_cast<int>((count * block_rows + tile_rows - 1) / tile_rows);
  };
  // f(block, where its run begins) for those of my blocks in which a tile begins: one, for it has
  // room for a block.
  const auto for_tiles = [&](auto&& f) {
    int start = start_of_mine;
    for (int b = begin, before = in_front; b < min(end, used); ++b) {
      const int now = expert_of(p, b);
      if (now != before) start = b;
      before = now;
      if (tiles_of(b - start) != tiles_of(b - start + 1)) f(b, start);
    }
  };
  std::int32_t count = 0;
  for_tiles([&](int, int) { ++count; });
  const Scanned sums = scan_sums(count, warps[1]);
  std::int64_t at = sums.before;
  for_tiles([&](int b, int start) {
    if (b >= first && at < p.max_tiles) {
      const std::int64_t row = std::int64_t{tiles_of(b - start)} * tile_rows;
      const std::int64_t offset = std::int64_t{b - start} * block_rows;
      std::int64_t length =
          0;  // up to the last live row of its blocks; of padding alone it has none
      for (int i = b - first; i < min(there, used - first) && expert[i] == expert[b - first]; ++i) {
        const std::int64_t block_row = offset + (i - (b - first)) * p.block_rows;
        if (block_row >= row + tile_rows) break;
        const std::int64_t last = min(block_row + live[i], row + tile_rows);
        if (live[i] > 0 && last > row) length = last - row;
      }
      p.tiles[at] = {.expert = expert[b - first],
                     .rows = static_cast<std::int32_t>(length),
                     .first = start * p.block_rows + row};
    }
    ++at;
  });
  if (blockIdx.x == gridDim.x - 1) end_list(p, sums.all);
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
  if (rows.tile_rows >= block_rows) {
    // So many blocks that a thread has a few rows of them, and so many windows that all run at
    // once.
    constexpr std::int64_t kWindowRows = 4 * kFewThreads, kWindows = 256;
    const int window = static_cast<int>(std::clamp<std::int64_t>(
        std::max(kWindowRows / block_rows, ceil_div(p.blocks, kWindows)), 1, kFewThreads));
    launch(
        "tiles: joined", joined_tiles,
        {.grid = dim3(static_cast<unsigned>(std::max<std::int64_t>(ceil_div(p.blocks, window), 1))),
         .block = dim3(kFewThreads),
         .shared_bytes = static_cast<std::size_t>(2 * (window + halo)) * 4,
         .dependency = overlap(device)},
        stream, p, window, halo);
    return;
  }
  const auto go = [&](auto kernel, int threads) {
    launch("tiles: sorted", kernel,
           {.grid = 1,
            .block = dim3(static_cast<unsigned>(threads)),
            .shared_bytes = static_cast<std::size_t>(2 * (threads + halo)) * 4,
            .dependency = overlap(device)},
           stream, p, halo);
  };
  constexpr std::int64_t kFewRows = 16 * kFewThreads;
  if (p.blocks <= kFewThreads && p.blocks * block_rows <= kFewRows)
    return go(sorted_tiles<kFewThreads>, kFewThreads);
  go(sorted_tiles<kManyThreads>, kManyThreads);
}

}  // namespace moesaic::cuda
