// SPDX-License-Identifier: Apache-2.0
// From expert ids to positions: a stable counting sort of the slots by local expert. Slots of one
// expert keep their order, because every rank is a prefix sum over earlier slots. Positions handed
// out by atomics lost: faster to write, but the order then varies from run to run. (Sums of ones,
// which is all that atomics do here, do not.)
//
// Up to kSlotsOfWarp slots one warp does everything. Above, every block places a chunk of its own,
// and must know of each group how many slots lie in front of its chunk, and how many there are. Up
// to kSlotsOfEach each block counts all slots itself: 64 KiB of ids from L2 and as many ones added
// in shared memory take less time than a launch. Beyond, a launch in front counts the chunks.
#include <algorithm>
#include <bit>

#include "cuda/align_few.h"
#include "cuda/device.h"
#include "cuda/element.h"
#include "cuda/expert_scan.h"
#include "cuda/overlap.h"
#include "cuda/stages.h"

namespace moesaic::cuda {
namespace {

constexpr std::int64_t kSlotsOfEach = 16384;
constexpr std::int64_t kOwnChunk = 256;       // where each block counts: scattered stores are few
constexpr std::int64_t kCountedChunk = 1024;  // at least
constexpr std::int64_t kMaxChunks = 256;      // every block reads what the chunks hold
constexpr int kCountThreads = 256;
// One slot a lane, so many warps: a chunk is placed in rounds of 256 slots, or of 1024 where the
// ranks of so many warps are few bytes.
constexpr int kFewRankWarps = 8, kManyRankWarps = 32, kManyRankGroups = 512;

// --- one warp does everything -------------------------------------------------------------------
__global__ void __launch_bounds__(32, 1) align_tiny(AlignParams p) {
  begin_between(p.settled);
  align_few(p);
  if (p.settled) wait_for_earlier_kernels();  // every grid waits: see overlap.h
}

// --- counts -------------------------------------------------------------------------------------
// add(slot, group) for slots begin + thread, begin + thread + threads, ... that have a group. The
// ids of a turn are requested together.
template <typename F>
__device__ __forceinline__ void for_groups(const AlignParams& p, std::int64_t begin,
                                           std::int64_t end, F&& add) {
  const unsigned threads = blockDim.x, last = static_cast<unsigned>(end);
  unsigned slot = static_cast<unsigned>(begin) + threadIdx.x;
  if (p.ids_are_plain) {  // a third of the instructions, which is what the time would go to
    constexpr int kAtOnce = 8;
    const auto* const ids = static_cast<const unsigned*>(p.ids);
#pragma unroll 1
    for (; slot < last; slot += kAtOnce * threads) {
      unsigned id[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
        id[i] = slot + i * threads < last ? __ldcg(ids + slot + i * threads) : ~0u;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const unsigned group = id[i] - p.first_group;
        if (group < static_cast<unsigned>(p.groups))
          add(slot + i * threads, static_cast<int>(group));
      }
    }
    return;
  }
  constexpr int kAtOnce = 4;
#pragma unroll 1
  for (; slot < last; slot += kAtOnce * threads) {
    RawId id[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if (slot + i * threads < last) id[i] = load_id(p, slot + i * threads);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int group = group_of(p, id[i]);
      if (group >= 0) add(slot + i * threads, group);
    }
  }
}

__device__ __forceinline__ void clear(std::int32_t* data, int count) {
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += blockDim.x) data[i] = 0;
}

// counts[chunk][group], a block per chunk.
__global__ void __launch_bounds__(kCountThreads, 1) align_count(AlignParams p) {
  extern __shared__ std::int32_t counts[];
  clear(counts, p.groups);
  __syncthreads();
  begin_between(p.settled);
  const std::int64_t begin = blockIdx.x * p.chunk, end = min(begin + p.chunk, p.slots);
  for_groups(p, begin, end, [&](unsigned, int group) { atomicAdd(counts + group, 1); });
  __syncthreads();
  std::int32_t* const mine = p.counts + static_cast<std::int64_t>(blockIdx.x) * p.groups;
  for (int g = threadIdx.x; g < p.groups; g += blockDim.x) mine[g] = counts[g];
  if (p.settled) wait_for_earlier_kernels();  // every grid waits: see overlap.h
}

// Where a block learns how many slots each group has in front of its chunk, and how many from
// there.
struct CountAll {
  static __device__ void begin(const AlignParams& p) { begin_between(p.settled); }
  static __device__ void end(const AlignParams& p) {
    if (p.settled) wait_for_earlier_kernels();  // every grid waits: see overlap.h
  }
  static __device__ void count(const AlignParams& p, std::int64_t chunk, std::int32_t* before,
                               std::int32_t* from) {
    const auto mine = static_cast<unsigned>(chunk);
    for_groups(p, 0, p.slots, [&](unsigned slot, int group) {
      atomicAdd((slot < mine ? before : from) + group, 1);
    });
  }
};
struct SumChunks {
  static __device__ void begin(const AlignParams&) { begin_kernel(); }
  static __device__ void end(const AlignParams&) {}
  static __device__ void count(const AlignParams& p, std::int64_t, std::int32_t* before,
                               std::int32_t* from) {
    const int chunks = static_cast<int>(p.chunks), mine = static_cast<int>(blockIdx.x);
    const int sharing = max(1, static_cast<int>(blockDim.x) / p.groups);  // threads of a group
    for (int i = threadIdx.x; i < sharing * p.groups; i += blockDim.x) {
      const int g = i % p.groups;
      std::int32_t sum_before = 0, sum_from = 0;
#pragma unroll 8
      for (int c = i / p.groups; c < chunks; c += sharing) {
        const std::int32_t here = __ldcg(p.counts + static_cast<std::int64_t>(c) * p.groups + g);
        (c < mine ? sum_before : sum_from) += here;
      }
      atomicAdd(before + g, sum_before);
      atomicAdd(from + g, sum_from);
    }
  }
};

// --- places -------------------------------------------------------------------------------------
// Of a round's slots, one a lane: rank[warp][group] is how many the warp has of each group, then
// (sum_warps) how many the warps before it have; `taken`: all warps.
struct Round {
  std::uint16_t* rank;
  std::int32_t* taken;
  int warps, groups, group_bits;

  __device__ __forceinline__ void clear() const {
    auto* const words = reinterpret_cast<std::int32_t*>(rank);  // warps are even in number
    cuda::clear(words, warps * groups / 2);
  }
  // The slot's rank among its own warp's.
  __device__ __forceinline__ int count(int group) const {
    const unsigned same = lanes_of(group), earlier = (1u << threadIdx.x % 32) - 1;
    const int before = __popc(same & earlier);
    if (group >= 0 && before == 0)
      rank[threadIdx.x / 32 * groups + group] = static_cast<std::uint16_t>(__popc(same));
    return before;
  }
  __device__ __forceinline__ void sum_warps() const {
    constexpr int kAtOnce = 8;
#pragma unroll 1
    for (int g = threadIdx.x; g < groups; g += blockDim.x) {
      int sum = 0;
#pragma unroll 1
      for (int first = 0; first < warps; first += kAtOnce) {
        std::uint16_t* const at = rank + first * groups + g;
        int count[kAtOnce];
#pragma unroll
        for (int w = 0; w < kAtOnce; ++w) count[w] = at[w * groups];
#pragma unroll
        for (int w = 0; w < kAtOnce; ++w) {
          at[w * groups] = static_cast<std::uint16_t>(sum);
          sum += count[w];
        }
      }
      taken[g] = sum;
    }
  }

 private:
  // The lanes that ask for the same group, bit by bit of its number: __match_any_sync takes twice
  // as long when all differ.
  __device__ __forceinline__ unsigned lanes_of(int group) const {
    unsigned same = kAllLanes;
#pragma unroll 4
    for (int bit = 0; bit < group_bits; ++bit) {
      const bool set = (group >> bit & 1) != 0;
      const unsigned with = __ballot_sync(kAllLanes, set);
      same &= set ? with : ~with;
    }
    return same;
  }
};

template <typename Counts>
__global__ void __launch_bounds__(1024, 1) align_place(AlignParams p, int warps, int group_bits) {
  extern __shared__ std::int32_t shared[];  // table, before [groups], taken [groups], ranks
  const GroupTable table = GroupTable::at(shared, p.groups);
  std::int32_t* const before = shared + kTableColumns * p.groups;
  const Round round{.rank = reinterpret_cast<std::uint16_t*>(before + 2 * p.groups),
                    .taken = before + p.groups,
                    .warps = warps,
                    .groups = p.groups,
                    .group_bits = group_bits};
  clear(before, p.groups);
  clear(table.live, p.groups);
  round.clear();
  __syncthreads();
  Counts::begin(p);
  const int lane_of_round = static_cast<int>(threadIdx.x);
  const bool ranks = lane_of_round < warps * 32;
  const std::int64_t chunk = blockIdx.x * p.chunk, end = min(chunk + p.chunk, p.slots);
  std::int64_t slot = chunk + lane_of_round;
  RawId id;
  if (ranks && slot < end) id = load_id(p, slot);  // together with the others
  Counts::count(p, chunk, before, table.live);
  int group = group_of(p, id), rank = 0;
  if (ranks) rank = round.count(group);
  __syncthreads();
  round.sum_warps();
  for (int g = threadIdx.x; g < p.groups; g += blockDim.x) table.live[g] += before[g];
  if (p.groups > static_cast<int>(blockDim.x)) __syncthreads();  // else a thread reads its own
  const std::int32_t tiles = finish_counts(p, table);
  for (std::int64_t first = chunk;;) {
    if (ranks && slot < end) {
      const bool placed = group >= 0;
      place(p, slot, group, placed && !p.batched ? table.start[group] : 0,
            placed ? before[group] + round.rank[threadIdx.x / 32 * p.groups + group] + rank : 0);
    }
    first += warps * 32;
    if (first >= end) break;
    slot += warps * 32;
    group = ranks && slot < end ? group_of(p, slot) : -1;
    __syncthreads();
    for (int g = threadIdx.x; g < p.groups; g += blockDim.x) before[g] += round.taken[g];
    round.clear();
    __syncthreads();
    if (ranks) rank = round.count(group);
    __syncthreads();
    round.sum_warps();
    __syncthreads();
  }
  const std::int64_t thread = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const std::int64_t threads = static_cast<std::int64_t>(gridDim.x) * blockDim.x;
  write_tiles(p.writer, table, tiles, thread, threads);
  fill_padding(p, table, thread, threads);
  write_blocks(p, table, padded_rows(p, table), thread, threads);
  Counts::end(p);
}

// A pure function of the number of slots, so that the scratch is, too.
std::int64_t chunk_size(std::int64_t slots) {
  return slots <= kSlotsOfEach ? kOwnChunk : round_up(ceil_div(slots, kMaxChunks), kCountedChunk);
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
                .next_task = s.next_task,
                .row_slot = rows.row_slot,
                .slot_row = s.slot_row,
                .block_experts = s.block_experts,
                .num_padded = s.num_padded,
                .tokens_per_expert = s.tokens_per_expert,
                .dropped = s.dropped};
  p.ids_are_dense = p.slot_stride == 1 && p.token_stride == p.top_k;
  p.ids_are_plain = p.ids_are_dense && !p.ids_are_64bit && (padded || p.expert_map == nullptr);
  p.first_group = padded ? 0 : static_cast<unsigned>(s.local.first);
  p.writer = {.tiles = rows.tiles,
              .max_tiles = rows.max_tiles,
              .tile_rows = p.tile_rows,
              .capacity = s.capacity,
              .groups = p.groups};
  return p;
}

std::size_t align_scratch(std::int64_t slots, std::int64_t experts) {
  if (slots <= kSlotsOfEach) return 0;
  // Not by chunk_size, whose steps would give some more slots fewer chunks: a workspace for more
  // tokens serves fewer.
  const std::int64_t most = std::min(ceil_div(slots, kCountedChunk), std::int64_t{kMaxChunks});
  return static_cast<std::size_t>(most * experts) * sizeof(std::int32_t);
}

void run_align(const AlignStage& stage, const DeviceTraits& device, cudaStream_t stream) {
  AlignParams p = align_params(stage);
  if (is_few(p)) {
    launch("align", align_tiny, {.grid = 1, .block = dim3(32), .dependency = overlap(device)},
           stream, p);
    return;
  }
  p.chunk = chunk_size(p.slots);
  p.chunks = std::max<std::int64_t>(ceil_div(p.slots, p.chunk), 1);
  const bool counted = p.slots > kSlotsOfEach;
  const int warps = counted && p.groups <= kManyRankGroups ? kManyRankWarps : kFewRankWarps;
  // A thread has four slots to count, where they are few, and a group.
  const std::int64_t wanted = std::max({p.slots / 4, std::int64_t{p.groups}, warps * INT64_C(32)});
  const LaunchShape places{
      .grid = dim3(static_cast<unsigned>(p.chunks)),
      .block = dim3(static_cast<unsigned>(std::min<std::int64_t>(1024, round_up(wanted, 32)))),
      .shared_bytes = static_cast<std::size_t>(p.groups) *
                      static_cast<std::size_t>((kTableColumns + 2) * 4 + warps * 2),
      .dependency = overlap(device)};
  const int group_bits = std::bit_width(static_cast<unsigned>(p.groups));  // all ones: no group
  if (!counted) {
    launch("align", align_place<CountAll>, places, stream, p, warps, group_bits);
    return;
  }
  p.counts = static_cast<std::int32_t*>(stage.scratch);
  launch("align: count", align_count,
         {.grid = places.grid,
          .block = dim3(kCountThreads),
          .shared_bytes = static_cast<std::size_t>(p.groups) * 4,
          .dependency = overlap(device)},
         stream, p);
  launch("align: place", align_place<SumChunks>, places, stream, p, warps, group_bits);
}

}  // namespace moesaic::cuda
