// SPDX-License-Identifier: Apache-2.0
// From expert ids to positions: a stable counting sort of the slots by local expert. Slots of one
// expert keep their order, because every rank is a prefix sum over earlier slots. Shared-memory
// counters handed out by atomics lost: faster to write, but the order then varies from run to run.
//
// Up to kSlotsOfWarp slots one warp does everything, up to kSlotsAtOnce one block. Above, each
// block counts a contiguous chunk, one block scans the counts, and each block places its chunk: the
// scattered stores of one multiprocessor would take longer than the two further launches.
#include <algorithm>

#include "cuda/align_few.h"
#include "cuda/device.h"
#include "cuda/element.h"
#include "cuda/expert_scan.h"
#include "cuda/overlap.h"
#include "cuda/stages.h"

namespace moesaic::cuda {
namespace {

constexpr std::int64_t kSlotsAtOnce = 2048;  // 16 warps of kWarpSlots
constexpr std::int64_t kMaxChunks = 256;     // the scan of chunks stays short
constexpr std::int64_t kMinChunk = 1024;
constexpr std::int64_t kMaxChunk = 64512;  // ranks inside a chunk fit 16 bits
constexpr int kChunkWarps = 8;

// --- one warp does everything -------------------------------------------------------------------
__global__ void __launch_bounds__(32, 1) align_tiny(AlignParams p) {
  begin_between(p.settled);
  align_few(p);
  if (p.settled) wait_for_earlier_kernels();  // every grid waits: see overlap.h
}

// --- one block does everything ------------------------------------------------------------------
__global__ void __launch_bounds__(1024, 1)
    align_small(AlignParams p, int warps, std::int64_t per_warp) {
  extern __shared__ std::int32_t shared[];
  const GroupTable table = GroupTable::at(shared, p.groups);
  auto* counters = reinterpret_cast<std::uint16_t*>(shared + kTableColumns * p.groups);
  clear(counters, warps * p.groups);
  begin_between(p.settled);
  const int warp = threadIdx.x / 32;
  const std::int64_t first = warp * per_warp;
  const std::int64_t end = first + per_warp < p.slots ? first + per_warp : p.slots;
  int group[kSteps], rank[kSteps];
  if (warp < warps) {
    load_groups(p, first, end, group);
    rank_groups(group, counters + warp * p.groups, rank);
  }
  fill_padding(p, threadIdx.x, blockDim.x);
  sum_warps(p, warps, counters, [&](int g, int count) { table.live[g] = count; });
  const std::int32_t tiles = finish_counts(p, table);
  if (warp < warps) {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const std::int64_t slot = first + s * 32 + threadIdx.x % 32;
      if (slot >= end) break;
      const bool placed = group[s] >= 0;
      place(p, slot, group[s], placed ? table.start[group[s]] : 0,
            placed ? counters[warp * p.groups + group[s]] + rank[s] : 0);
    }
  }
  write_tiles(p.writer, table, tiles, threadIdx.x, blockDim.x);
  write_blocks(p, table, padded_rows(p, table), threadIdx.x, blockDim.x);
  if (p.settled) wait_for_earlier_kernels();  // every grid waits: see overlap.h
}

// --- many blocks: count, scan, place -------------------------------------------------------------
// What one warp of a block has of its chunk.
struct WarpSlots {
  std::int64_t begin, end;
};
__device__ __forceinline__ WarpSlots warp_slots(const AlignParams& p) {
  const std::int64_t chunk = blockIdx.x * p.chunk, per_warp = p.chunk / kChunkWarps;
  const std::int64_t begin = chunk + threadIdx.x / 32 * per_warp;
  return {begin, begin + per_warp < p.slots ? begin + per_warp : p.slots};
}

// Counts the warp's slots; what is left in `group` and `rank` are those of its last kWarpSlots.
__device__ __forceinline__ void count_warp(const AlignParams& p, const WarpSlots& mine,
                                           std::uint16_t* counter, int (&group)[kSteps],
                                           int (&rank)[kSteps]) {
  for (std::int64_t first = mine.begin; first < mine.end; first += kWarpSlots) {
    load_groups(p, first, mine.end, group);
    rank_groups(group, counter, rank);
  }
}

__global__ void __launch_bounds__(kChunkWarps * 32, 1) align_count(AlignParams p) {
  extern __shared__ std::uint16_t counters[];
  clear(counters, kChunkWarps * p.groups);
  begin_kernel();
  int group[kSteps], rank[kSteps];
  count_warp(p, warp_slots(p), counters + threadIdx.x / 32 * p.groups, group, rank);
  const std::int64_t thread = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  fill_padding(p, thread, static_cast<std::int64_t>(gridDim.x) * blockDim.x);
  sum_warps(p, kChunkWarps, counters, [&](int g, int count) {
    p.counts[static_cast<std::int64_t>(blockIdx.x) * p.groups + g] = count;
  });
}

// counts[chunk][group] becomes the position (batched: the rank) of the chunk's first slot of the
// group. `segments` threads share a group's column of chunks.
__global__ void __launch_bounds__(1024, 1) align_scan(AlignParams p, int segments) {
  begin_kernel();
  extern __shared__ std::int32_t shared[];  // table, then [segments, groups]
  const GroupTable table = GroupTable::at(shared, p.groups);
  std::int32_t* partial = shared + kTableColumns * p.groups;
  const int chunks = static_cast<int>(p.chunks);
  const int per_segment = (chunks + segments - 1) / segments;
  for (int i = threadIdx.x; i < segments * p.groups; i += blockDim.x) {
    const int g = i % p.groups, begin = i / p.groups * per_segment;
    const int end = min(begin + per_segment, chunks);
    std::int32_t sum = 0;
#pragma unroll 8
    for (int c = begin; c < end; ++c) sum += p.counts[static_cast<std::int64_t>(c) * p.groups + g];
    partial[i] = sum;
  }
  __syncthreads();
  for (int g = threadIdx.x; g < p.groups; g += blockDim.x) {
    std::int32_t sum = 0;
    for (int s = 0; s < segments; ++s) {
      const std::int32_t count = partial[s * p.groups + g];
      partial[s * p.groups + g] = sum;
      sum += count;
    }
    table.live[g] = sum;
  }
  __syncthreads();
  const std::int32_t tiles = finish_counts(p, table);
  for (int i = threadIdx.x; i < segments * p.groups; i += blockDim.x) {
    const int g = i % p.groups, begin = i / p.groups * per_segment;
    const int end = min(begin + per_segment, chunks);
    std::int32_t at = partial[i] + (p.batched ? 0 : table.start[g]);
#pragma unroll 8
    for (int c = begin; c < end; ++c) {
      std::int32_t* count = p.counts + static_cast<std::int64_t>(c) * p.groups + g;
      const std::int32_t here = *count;
      *count = at;
      at += here;
    }
  }
  for (int i = threadIdx.x; i < kTableColumns * p.groups; i += blockDim.x) p.table[i] = shared[i];
  if (threadIdx.x == 0) p.table[kTableColumns * p.groups] = tiles;
}

__global__ void __launch_bounds__(kChunkWarps * 32, 1) align_place(AlignParams p) {
  extern __shared__ std::uint16_t counters[];
  clear(counters, kChunkWarps * p.groups);
  begin_kernel();
  const WarpSlots mine = warp_slots(p);
  std::uint16_t* counter = counters + threadIdx.x / 32 * p.groups;
  int group[kSteps], rank[kSteps];
  count_warp(p, mine, counter, group, rank);
  sum_warps(p, kChunkWarps, counters, [](int, int) {});
  const std::int32_t* base = p.counts + static_cast<std::int64_t>(blockIdx.x) * p.groups;
  const bool one_round = mine.end - mine.begin <= kWarpSlots;  // then all ranks are at hand
  for (std::int64_t from = mine.begin; from < mine.end; from += kWarpSlots) {
    int before[kSteps];  // of the group's slots in the chunk
    if (one_round) {
#pragma unroll
      for (int s = 0; s < kSteps; ++s) before[s] = group[s] >= 0 ? counter[group[s]] + rank[s] : 0;
    } else {
      load_groups(p, from, mine.end, group);
      rank_groups(group, counter, before);
    }
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const std::int64_t slot = from + s * 32 + threadIdx.x % 32;
      if (slot >= mine.end) break;
      const std::int64_t first = group[s] >= 0 ? base[group[s]] : 0;
      place(p, slot, group[s], first, p.batched ? first + before[s] : before[s]);
    }
  }
  const GroupTable table = GroupTable::at(p.table, p.groups);
  const std::int64_t thread = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const std::int64_t threads = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  write_tiles(p.writer, table, p.table[kTableColumns * p.groups], thread, threads);
  write_blocks(p, table, padded_rows(p, table), thread, threads);
}

// A pure function of the number of slots, so that the scratch is, too.
std::int64_t chunk_size(std::int64_t slots) {
  const std::int64_t even = ceil_div(slots, kMaxChunks);
  return round_up(std::clamp(even, kMinChunk, kMaxChunk), kChunkWarps * kWarpSlots);
}

}  // namespace

AlignParams align_params(const AlignStage& s) {
  const RowMap& rows = s.rows;
  const bool padded = s.block_rows > 0;
  const std::int64_t slots = s.topk_ids.shape[0] * s.topk_ids.shape[1];
  AlignParams p{.ids = s.topk_ids.data,
                .settled = s.ids_age == ListAge::kSettled,
                .ids_are_64bit = s.topk_ids.dtype == DType::kI64,
                .token_stride = s.topk_ids.strides[0],
                .slot_stride = s.topk_ids.strides[1],
                .top_k = s.topk_ids.shape[1],
                .slots = slots,
                .experts = s.experts,
                .local_first = s.local.first,
                .local_count = s.local.count,
                .expert_map = s.expert_map.defined() ? s.expert_map.as<std::int32_t>() : nullptr,
                // No room at all can only be a batched buffer of no rows: everything is dropped.
                .batched = s.capacity > 0 || (!padded && slots > 0 && rows.positions == 0),
                .capacity = s.capacity,
                .block_rows = s.block_rows,
                .positions = rows.positions,
                .slot_count = rows.slot_count,
                .max_tiles = rows.max_tiles,
                .tile_rows = rows.tile_rows > 0 ? rows.tile_rows : 1,
                .groups = static_cast<int>(padded ? s.experts : s.local.count),
                .num_tiles = rows.num_tiles,
                .row_slot = rows.row_slot,
                .slot_row = s.slot_row,
                .block_experts = s.block_experts,
                .num_padded = s.num_padded,
                .tokens_per_expert = s.tokens_per_expert,
                .dropped = s.dropped};
  p.ids_are_dense = p.slot_stride == 1 && p.token_stride == p.top_k;
  p.writer = {.tiles = rows.tiles,
              .max_tiles = rows.max_tiles,
              .tile_rows = p.tile_rows,
              .capacity = s.capacity,
              .groups = p.groups};
  return p;
}

std::size_t align_scratch(std::int64_t slots, std::int64_t experts) {
  if (slots <= kSlotsAtOnce) return 0;
  const std::int64_t chunks = ceil_div(slots, chunk_size(slots));
  return static_cast<std::size_t>((chunks + kTableColumns) * experts + 1) * sizeof(std::int32_t);
}

void run_align(const AlignStage& stage, const DeviceTraits& device, cudaStream_t stream) {
  AlignParams p = align_params(stage);
  const std::size_t table_bytes = static_cast<std::size_t>(kTableColumns * p.groups) * 4;
  if (is_few(p)) {
    launch("align", align_tiny, {.grid = 1, .block = dim3(32), .dependency = overlap(device)},
           stream, p);
    return;
  }
  if (p.slots <= kSlotsAtOnce) {
    // Few slots: a warp each 32, the shortest way. More: full warps, so that fewer are summed.
    const std::int64_t per_warp = p.slots <= 512 ? 32 : p.slots <= 1024 ? 64 : kWarpSlots;
    const std::int64_t warps = ceil_div(p.slots, per_warp);
    const std::int64_t wanted = std::max({warps * 32, std::int64_t{p.groups}, std::int64_t{128}});
    launch(
        "align", align_small,
        {.grid = 1,
         .block = dim3(static_cast<unsigned>(std::min<std::int64_t>(1024, round_up(wanted, 32)))),
         .shared_bytes = table_bytes + static_cast<std::size_t>(warps * p.groups) * 2,
         .dependency = overlap(device)},
        stream, p, static_cast<int>(warps), per_warp);
    return;
  }
  p.chunk = chunk_size(p.slots);
  p.chunks = ceil_div(p.slots, p.chunk);
  p.counts = static_cast<std::int32_t*>(stage.scratch);
  p.table = p.counts + p.chunks * p.groups;
  const LaunchShape chunks{.grid = dim3(static_cast<unsigned>(p.chunks)),
                           .block = dim3(kChunkWarps * 32),
                           .shared_bytes = static_cast<std::size_t>(kChunkWarps * p.groups) * 2,
                           .dependency = overlap(device)};
  const int segments = std::clamp(1024 / p.groups, 1, static_cast<int>(p.chunks));
  launch("align: count", align_count, chunks, stream, p);
  launch("align: scan", align_scan,
         {.grid = 1,
          .block = dim3(1024),
          .shared_bytes = table_bytes + static_cast<std::size_t>(segments * p.groups) * 4,
          .dependency = overlap(device)},
         stream, p, segments);
  launch("align: place", align_place, chunks, stream, p);
}

}  // namespace moesaic::cuda
