// SPDX-License-Identifier: Apache-2.0
// Which task (tile of tokens x tile of weight rows) a persistent CTA runs next. The list of tiles
// lies on the device; the host knows only its capacity.
#pragma once

#include "cuda/sm90/deal.h"
#include "cuda/sm90/gemm.h"
#include "cuda/sm90/ptx.h"

namespace moesaic::cuda::sm90 {

inline constexpr int kEndOfTasks = -2;
inline constexpr int kFiltered = -1;

// Or a run of tasks: see Params::run.
struct Task {
  std::int32_t expert, rows;  // expert: kEndOfTasks, kFiltered, or a local expert
  std::int64_t first;  // position; with UnlistedRows::ids a mask that begins with the rows' slots
  std::int32_t weight_task;         // of a run the first
  std::int32_t run;                 // how many, at least 1
  std::int32_t term_place, unused;  // term_place: 0 to S::kTermPlaces - 1 in turn, task by task
};
static_assert(sizeof(Task) == 32);

// kAhead: the tiles behind a group are asked for while the group is worked on, which costs four
// registers. Where tasks are short a wave is about one group, and a trip to L2 for each task would
// hold up every warp that loads.
enum class Walk : unsigned char { kAsNeeded, kAhead };
template <typename S>
inline constexpr Walk kWalk = Walk::kAsNeeded;  // of the kernel with shape S

// What only Order::kFullFirst needs to know.
template <Order kOrder>
struct SecondWalk {};
template <>
struct SecondWalk<Order::kFullFirst> {
  int live_ = 0;         // tiles of the group that are walked now
  bool others_ = false;  // the full tiles are behind us
};

// Order: tiles are walked in groups of consecutive tiles, and inside a group the weight rows are
// the slow index. All token tiles of a group pass over the same weight rows at about the same time,
// so these come from L2 but for the first; and a group's tokens fit L2, too. A group has as many
// tiles as the host says (group_tiles: see grid_size) and no more, and it ends between experts
// wherever possible: an expert that is split over two groups has its weights read twice.
//
// Wave w of the grid takes tasks w * grid ...; inside a wave CTAs are rotated by a prime, for
// otherwise a grid that is a multiple of the group would give one CTA nothing but full tiles and
// another nothing but remainders. Where there is a counter, it gives them to whoever is done with
// others instead (sm90/deal.h).
//
// An expert's rows are divided evenly over its tiles: 257 rows would otherwise be 256 and 1, and
// the CTAs that read the same weights would run apart, so far that L2 has forgotten them.
//
// A full warp runs this together: lane l holds tile l of the group's window.
// kPair CTAs run the same tasks; kTokens is what they can take together.
template <int kTokens, int kPair, Walk kHow = Walk::kAsNeeded, Tiles kTiles = Tiles::kListed,
          Order kOrder = Order::kListed, Deal kDeal = Deal::kInTurn>
class Schedule : private SecondWalk<kOrder>, private DealtTasks<kDeal> {
 public:
  // dealt: see dealt_ring.
  __device__ explicit Schedule(const Params& p, std::uint32_t dealt = 0)
      : DealtTasks<kDeal>(dealt), p_(p), rotation_(blockIdx.x / kPair) {
    if constexpr (kTiles != Tiles::kListed) {
      if (p.unlisted.ids != nullptr)
        make_tiles();
      else
        take_blocks(0);
    } else {
      const int here = lane();
      const int capacity = static_cast<int>(p.rows.max_tiles);
      tile_ = load(here < capacity ? here : 0);  // kTileWindow: one latency, not two
      const int count = __ldcg(p.rows.num_tiles);
      num_tiles_ = count < capacity ? count : capacity;
    }
    measure();
    ask_ahead();
  }

  __device__ Task next() {
    for (;;) {
      const unsigned stride = gridDim.x / kPair;
      const unsigned wanted = this->deals() ? this->dealt() : wave_ + rotation_;
      wave_ += stride;
      rotation_ += 41 % stride;
      if (rotation_ >= stride) rotation_ -= stride;
      while (wanted - base_ >= tasks()) {
        if constexpr (kOrder == Order::kFullFirst) {
          const bool ended = first_ + size_ >= num_tiles_;
          if (ended && (!full_first() || this->others_)) return {.expert = kEndOfTasks, .run = 1};
          base_ += tasks();
          first_ += size_;
          if (ended) {
            this->others_ = true;
            first_ = 0;
          }
        } else {
          if (first_ + size_ >= num_tiles_) return {.expert = kEndOfTasks, .run = 1};
          base_ += tasks();
          first_ += size_;
        }
        if constexpr (kTiles == Tiles::kListed) {
          tile_ = kHow == Walk::kAhead ? arrived() : load_from(first_);
        } else if (kTiles == Tiles::kFromIds || p_.unlisted.ids != nullptr) {
          tile_ = {__shfl_down_sync(~0u, tile_.x, size_), __shfl_down_sync(~0u, tile_.y, size_),
                   __shfl_down_sync(~0u, tile_.z, size_), 0};
        } else {
          take_blocks(first_);
        }
        measure();
        ask_ahead();
      }
      const unsigned pieces = static_cast<unsigned>(live() * p_.sub_tiles);
      const unsigned row_run = (wanted - base_) / pieces;
      const int piece = static_cast<int>((wanted - base_) - row_run * pieces);
      const int source = p_.sub_tiles == 1 ? piece : piece / p_.sub_tiles;
      const int skip = (piece - source * p_.sub_tiles) * kTokens;
      Task task{};
      task.expert = __shfl_sync(~0u, tile_.x, source);
      task.rows = __shfl_sync(~0u, tile_.y, source) - skip;
      const unsigned low = __shfl_sync(~0u, static_cast<unsigned>(tile_.z), source);
      const unsigned high = __shfl_sync(~0u, static_cast<unsigned>(tile_.w), source);
      if (task.rows <= 0) {
        if (!this->deals()) continue;
        task.expert = kFiltered;  // it was dealt to this CTA, which says so to all of its warps
        task.rows = 0;
      }
      if (task.rows > kTokens) task.rows = kTokens;
      task.first = static_cast<std::int64_t>(std::uint64_t{high} << 32 | low) + skip;
      task.weight_task = static_cast<std::int32_t>(row_run) * p_.run;
      task.run = p_.weight_tasks - task.weight_task;
      if (task.run > p_.run) task.run = p_.run;
      if (task.expert < 0 || task.expert >= p_.experts) task.expert = kFiltered;
      return task;
    }
  }

 private:
  __device__ static int lane() { return ptx::thread_index() % 32; }
  // --- of few rows, or blocks
  // All tiles are in the window: lane l holds tile first_ + l. What align would do, by every warp
  // that walks the tiles, a slot per lane. Nothing is sorted, for this is cold code in front of the
  // first product: a position is a slot, a tile's rows are the slots of a mask (Task::first), and
  // tiles come in the order of their first slots.
  __device__ void make_tiles() {
    const int here = lane();
    unsigned expert = ~0u;
    if (here < p_.rows.slot_count)
      expert = static_cast<unsigned>(__ldcg(p_.unlisted.ids + here)) -
               static_cast<unsigned>(p_.unlisted.first_expert);
    const unsigned alike = __match_any_sync(~0u, expert);
    const unsigned before_me = (1u << here) - 1, from_me = alike & ~before_me;
    const bool begins =
        expert < static_cast<unsigned>(p_.experts) && __popc(alike & before_me) % kTokens == 0;
    const unsigned tiles = __ballot_sync(~0u, begins);
    const int rows = __popc(from_me) < kTokens ? __popc(from_me) : kTokens;
    num_tiles_ = __popc(tiles);
    tile_ = {static_cast<int>(expert), rows, static_cast<int>(from_me), 0};
    if ((tiles & (tiles + 1)) == 0) return;  // every slot up to the last begins a tile
    const int holder = lane_with(__popc(tiles & before_me), tiles);
    tile_ = {__shfl_sync(~0u, tile_.x, holder), __shfl_sync(~0u, tile_.y, holder),
             __shfl_sync(~0u, tile_.z, holder), 0};
  }
  // The lane among `holders` whose value (below 32, no two alike) is this lane's number.
  __device__ static int lane_with(int value, unsigned holders) {
    const int here = lane();
#pragma unroll
    for (int bit = 0; bit < 5; ++bit) {
      const unsigned set = __ballot_sync(~0u, value >> bit & 1);
      holders &= here >> bit & 1 ? set : ~set;
    }
    return (__ffs(static_cast<int>(holders)) - 1) & 31;
  }
  // A caller's blocks from `first` on: a tile for each, up to where its list ends.
  __device__ void take_blocks(int first) {
    const int index = first + lane(), capacity = static_cast<int>(p_.rows.max_tiles);
    const int rows = static_cast<int>(p_.rows.tile_rows);
    const int expert = index < capacity ? __ldcg(p_.unlisted.block_experts + index) : -1;
    const int listed = __ldcg(p_.unlisted.num_padded), padded = listed > 0 ? listed : 0;
    const int left = padded - index * rows;  // not positive: no task
    num_tiles_ = padded < capacity * rows ? (padded + rows - 1) / rows : capacity;
    tile_ = {expert, left < rows ? left : rows, index * rows, 0};
  }

  // --- of a list
  static constexpr int kLongest = 12;         // tiles of one expert in a group
  static constexpr int kBlocks = 64 * kPair;  // rows of which each CTA has a block
  static constexpr int kLongTask = 48;        // chunks of K: see Order
  // Through L2: see overlap.h.
  __device__ int4 load(int index) const {
    return __ldcg(reinterpret_cast<const int4*>(p_.rows.tiles) + index);
  }
  __device__ int4 load_from(int first) const {
    const int index = first + lane();
    return load(index < num_tiles_ ? index : 0);
  }
  // In four pieces, and taken by shuffles from a lane to itself: else ptxas moves what it asked for
  // to other registers right behind the load, and waits for it there.
  __device__ void ask_ahead() {
    if constexpr (kHow == Walk::kAhead) {
      const int index = first_ + size_ + lane();
      const int* const at =
          reinterpret_cast<const int*>(p_.rows.tiles + (index < num_tiles_ ? index : 0));
      ahead_ = {__ldcg(at), __ldcg(at + 1), __ldcg(at + 2), __ldcg(at + 3)};
    }
  }
  __device__ int4 arrived() const {
    const int here = lane();
    return {__shfl_sync(~0u, ahead_.x, here), __shfl_sync(~0u, ahead_.y, here),
            __shfl_sync(~0u, ahead_.z, here), __shfl_sync(~0u, ahead_.w, here)};
  }
  __device__ unsigned tasks() const {
    return static_cast<unsigned>(live()) * static_cast<unsigned>(p_.sub_tiles * p_.weight_runs);
  }
  __device__ bool full_first() const {
    return kOrder == Order::kFullFirst && p_.upright && p_.even_tiles && p_.k_chunks >= kLongTask;
  }
  // Tiles of the group that are walked now.
  __device__ int live() const {
    if constexpr (kOrder == Order::kFullFirst)
      return this->live_;
    else
      return size_;
  }
  // How many tiles the group that starts at first_ has.
  __device__ void measure() {
    const int here = lane();
    const int before = __shfl_up_sync(~0u, tile_.x, 1);
    const int index = first_ + here;
    const bool ends = here > 0 && index <= num_tiles_ && (index == num_tiles_ || tile_.x != before);
    const unsigned mask = __ballot_sync(~0u, ends);
    const int run = mask ? __ffs(static_cast<int>(mask)) - 1 : 32;  // tiles of the first expert
    if (run <= kLongest) {
      const unsigned near = mask & ((2u << p_.group_tiles) - 1);  // of 31: all
      size_ = near ? 31 - __clz(static_cast<int>(near)) : run;
    } else if (num_tiles_ > 0) {
      size_ = mask ? (run + 1) / 2 : kLongest;  // with its end in sight, halve it
      if (size_ > kLongest) size_ = kLongest;
    }
    if (kTokens > 16 && p_.even_tiles) divide();
    if constexpr (kOrder == Order::kFullFirst) select();
  }
  // Leaves the tiles of this walk in the first lanes.
  __device__ void select() {
    this->live_ = size_;
    if (!full_first()) return;
    const int here = lane();
    const bool wanted = here < size_ && tile_.y > 0 && (tile_.y <= kBlocks) == this->others_;
    const unsigned mask = __ballot_sync(~0u, wanted);
    this->live_ = __popc(mask);
    const int holder = lane_with(__popc(mask & ((1u << here) - 1)), mask);
    tile_ = {__shfl_sync(~0u, tile_.x, holder), __shfl_sync(~0u, tile_.y, holder),
             __shfl_sync(~0u, tile_.z, holder), __shfl_sync(~0u, tile_.w, holder)};
  }
  // Runs of adjacent tiles of one expert inside the group: equal shares, in units of 16 rows or
  // of two blocks.
  __device__ void divide() {
    const int here = lane();
    const long long first = static_cast<long long>(
        std::uint64_t{static_cast<unsigned>(tile_.w)} << 32 | static_cast<unsigned>(tile_.z));
    const long long end = first + tile_.y;
    const int expert_before = __shfl_up_sync(~0u, tile_.x, 1);
    const long long end_before = __shfl_up_sync(~0u, end, 1);
    const bool starts =
        here == 0 || here >= size_ || tile_.x != expert_before || first != end_before;
    const unsigned heads = __ballot_sync(~0u, starts);
    const unsigned up_to_me = (2u << here) - 1;
    const int head = 31 - __clz(static_cast<int>(heads & up_to_me));
    const unsigned later = heads & ~up_to_me;
    const int last = later ? __ffs(static_cast<int>(later)) - 2 : 31;
    const long long run_first = __shfl_sync(~0u, first, head);
    const int rows = static_cast<int>(__shfl_sync(~0u, end, last) - run_first);
    const int count = last - head + 1, index = here - head;
    int unit = 16;
    if constexpr (kOrder == Order::kFullFirst) {
      if (full_first()) unit = kBlocks;
    }
    const int units = (rows + unit - 1) / unit, each = units / count, more = units % count;
    const int before = (index * each + (index < more ? index : more)) * unit;
    const int share = (each + (index < more ? 1 : 0)) * unit;
    tile_.y = rows - before < share ? rows - before : share;  // not positive: no task
    tile_.z = static_cast<int>(static_cast<unsigned long long>(run_first + before));
    tile_.w = static_cast<int>(static_cast<unsigned long long>(run_first + before) >> 32);
  }

  const Params& p_;
  int num_tiles_ = 0;
  int4 tile_, ahead_;  // ahead_: Walk::kAhead only
  int first_ = 0, size_ = 0;
  unsigned base_ = 0, wave_ = 0, rotation_;  // wave_: its first task
};

// The part of a pair's task that CTA `rank` takes.
template <int kPair>
__device__ Task part_of(Task task, std::uint32_t rank) {
  if constexpr (kPair == 2) {
    const int half = (task.rows + 15) / 16 * 8;
    task.first += rank ? half : 0;
    task.rows = rank ? task.rows - half : (task.rows < half ? task.rows : half);
    if (task.rows < 0) task.rows = 0;
  }
  return task;
}

}  // namespace moesaic::cuda::sm90
