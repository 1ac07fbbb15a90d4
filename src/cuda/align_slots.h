// SPDX-License-Identifier: Apache-2.0
// Device side of align, by slots and by groups: which group of rows a slot belongs to, its rank
// among the slots before it; where each group begins, and what is written of a slot once that is
// known.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "backend.h"
#include "cuda/element.h"
#include "cuda/expert_scan.h"

namespace moesaic::cuda {

struct AlignParams {
  const void* ids = nullptr;
  bool settled = false;  // the ids are older than the kernel in front
  bool ids_are_64bit = false, ids_are_dense = true;
  bool ids_are_plain = false;  // dense, 32 bits, and groups are ids from first_group on
  unsigned first_group = 0;
  std::int64_t token_stride = 0, slot_stride = 0, top_k = 1;
  std::int64_t slots = 0, experts = 0, local_first = 0, local_count = 0;
  const std::int32_t* expert_map = nullptr;
  bool batched = false;
  std::int64_t capacity = 0, block_rows = 0;
  std::int64_t positions = 0, slot_count = 0, max_tiles = 0, tile_rows = 1;
  TileWriter writer;
  // A group is a local expert; in padded lists it is an expert of the model, in the order of the
  // global ids as in the original, so that filtered blocks lie where their expert would.
  int groups = 0;
  std::int32_t* num_tiles = nullptr;
  std::int32_t* next_task = nullptr;
  std::int32_t* row_slot = nullptr;
  std::int32_t* slot_row = nullptr;
  std::int32_t* block_experts = nullptr;
  std::int32_t* num_padded = nullptr;
  std::int32_t* tokens_per_expert = nullptr;
  std::int32_t* dropped = nullptr;
  std::int32_t* counts = nullptr;  // [chunks, groups] scratch
  std::int64_t chunk = 0, chunks = 0;
};

AlignParams align_params(const AlignStage& stage);

__device__ __forceinline__ int local_of(const AlignParams& p, std::int64_t id) {
  const std::int64_t local = p.expert_map != nullptr ? p.expert_map[id] : id - p.local_first;
  return local >= 0 && local < p.local_count ? static_cast<int>(local) : -1;
}

// An id as it lies in memory. Apart from what it means, and in words that nothing has to be done
// to, because several ids are requested before the first is waited for.
struct RawId {
  unsigned low = ~0u, high = 0;  // that is: no expert
};
__device__ __forceinline__ RawId load_id(const AlignParams& p, std::int64_t slot) {
  std::int64_t at = slot;
  if (!p.ids_are_dense) {  // (lists number slots with 32 bits)
    const auto s = static_cast<unsigned>(slot), top_k = static_cast<unsigned>(p.top_k);
    const unsigned token = s / top_k;
    at = token * p.token_stride + (s - token * top_k) * p.slot_stride;
  }
  const unsigned* const words = static_cast<const unsigned*>(p.ids) + (at << p.ids_are_64bit);
  RawId id{.low = __ldcg(words)};  // through L2: see overlap.h
  if (p.ids_are_64bit) id.high = __ldcg(words + 1);
  return id;
}
// -1: a slot with this id contributes nothing.
__device__ __forceinline__ int group_of(const AlignParams& p, RawId id) {
  if (id.high != 0 || id.low >= p.experts) return -1;  // negative ones are large here
  return p.block_rows > 0 ? static_cast<int>(id.low) : local_of(p, id.low);
}
__device__ __forceinline__ int group_of(const AlignParams& p, std::int64_t slot) {
  return group_of(p, load_id(p, slot));
}

__device__ __forceinline__ int expert_of(const AlignParams& p, int group) {
  return p.block_rows > 0 ? local_of(p, group) : group;
}

// --- groups ---
// From counts (in table.live) to the table and every small output. All threads of a block call it;
// where several blocks do, the first one speaks for all.
__device__ __forceinline__ std::int32_t finish_counts(const AlignParams& p,
                                                      const GroupTable& table) {
  const int per_thread = (p.groups + blockDim.x - 1) / blockDim.x;
  const int begin = threadIdx.x * per_thread;
  const int end = begin + per_thread < p.groups ? begin + per_thread : p.groups;
  const auto padded = [&](int live) {
    const auto block = static_cast<unsigned>(p.block_rows);
    return block > 0 ? static_cast<std::int32_t>((live + block - 1) / block * block) : live;
  };
  const auto tiles_of = [&](int live) {
    const auto rows = static_cast<unsigned>(p.tile_rows);
    return static_cast<std::int32_t>((live + rows - 1) / rows);
  };
  const bool speaks = blockIdx.x == 0, counts = speaks && p.tokens_per_expert != nullptr;
  const bool counts_meet = counts && p.block_rows > 0;
  if (counts_meet) {  // several experts of the model may map to one local expert: their rows add up
    for (int e = threadIdx.x; e < p.local_count; e += blockDim.x) p.tokens_per_expert[e] = 0;
    __syncthreads();
  }
  ScanSums mine;
  std::int32_t lost = 0;
#pragma unroll 1
  for (int g = begin; g < end; ++g) {
    int live = table.live[g];
    if (p.batched && live > p.capacity) {
      lost += live - static_cast<int>(p.capacity);
      live = static_cast<int>(p.capacity);
      table.live[g] = live;
    }
    mine = {mine.rows + padded(live), mine.tiles + tiles_of(live)};
    if (counts_meet) {
      const int expert = expert_of(p, g);
      if (expert >= 0 && live > 0) atomicAdd(p.tokens_per_expert + expert, live);
    } else if (counts) {
      p.tokens_per_expert[g] = live;
    }
  }
  ScanSums total;
  const int holders = (p.groups + per_thread - 1) / per_thread;
  ScanSums at = block_scan(mine, &total, holders);
#pragma unroll 1
  for (int g = begin; g < end; ++g) {
    table.start[g] = at.rows;
    table.first_tile[g] = at.tiles;
    at = {at.rows + padded(table.live[g]), at.tiles + tiles_of(table.live[g])};
  }
  ScanSums lost_total;
  if (p.dropped != nullptr) block_scan({lost, 0}, &lost_total, holders);
  if (speaks && threadIdx.x == 0) {
    if (p.num_tiles != nullptr)
      *p.num_tiles =
          total.tiles < p.max_tiles ? total.tiles : static_cast<std::int32_t>(p.max_tiles);
    if (p.next_task != nullptr) p.next_task[0] = p.next_task[1] = 0;
    if (p.num_padded != nullptr) *p.num_padded = total.rows;
    if (p.dropped != nullptr) *p.dropped = lost_total.rows;
  }
  __syncthreads();
  return total.tiles;
}

// A slot at `rank` within its group (padded and compact: `base` is the group's first position).
__device__ __forceinline__ void place(const AlignParams& p, std::int64_t slot, int group,
                                      std::int64_t base, std::int64_t rank) {
  std::int64_t position = -1;
  if (group >= 0) {
    if (p.batched)
      position = rank < p.capacity ? group * p.capacity + rank : -1;
    else
      position = base + rank;
    if (position >= p.positions) position = -1;
  }
  if (position >= 0 && p.row_slot != nullptr)
    p.row_slot[position] = static_cast<std::int32_t>(slot);
  if (p.slot_row != nullptr) p.slot_row[slot] = static_cast<std::int32_t>(position);
}

// Padded lists: what no slot is placed on.
__device__ __forceinline__ void fill_padding(const AlignParams& p, const GroupTable& table,
                                             std::int64_t begin, std::int64_t stride) {
  if (p.block_rows == 0 || p.row_slot == nullptr) return;
  for (std::int64_t i = begin; i < p.positions; i += stride) {
    const auto position = static_cast<std::int32_t>(i);
    const int g = group_at(table.start, p.groups, position);
    if (position - table.start[g] >= table.live[g])
      p.row_slot[i] = static_cast<std::int32_t>(p.slot_count);
  }
}
__device__ __forceinline__ void write_blocks(const AlignParams& p, const GroupTable& table,
                                             std::int32_t rows_used, std::int64_t begin,
                                             std::int64_t stride) {
  if (p.block_experts == nullptr) return;
  for (std::int64_t b = begin; b < p.positions / p.block_rows; b += stride) {
    const std::int64_t row = b * p.block_rows;
    int expert = -1;
    if (row < rows_used) {
      expert = expert_of(p, group_at(table.start, p.groups, static_cast<std::int32_t>(row)));
    }
    p.block_experts[b] = expert;
  }
}

__device__ __forceinline__ std::int32_t padded_rows(const AlignParams& p, const GroupTable& table) {
  const int last = p.groups - 1;
  const std::int64_t live = table.live[last], block = p.block_rows > 0 ? p.block_rows : 1;
  return table.start[last] + static_cast<std::int32_t>((live + block - 1) / block * block);
}

}  // namespace moesaic::cuda
