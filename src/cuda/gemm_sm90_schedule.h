// SPDX-License-Identifier: Apache-2.0
// Which task (tile of tokens x tile of weight rows) a persistent CTA runs next. The list of tiles lies
// on the device; the host knows only its capacity.
#pragma once

#include "cuda/gemm_sm90.h"

namespace moesaic::cuda::sm90 {

inline constexpr int kEndOfTasks = -2;
inline constexpr int kFiltered = -1;

struct Task {
  std::int32_t expert, rows;  // expert: kEndOfTasks, kFiltered, or a local expert
  std::int64_t first;         // position
  std::int32_t row_task, unused;
};

// Order: tiles are walked in groups of consecutive tiles, and inside a group the weight rows are the
// slow index. All token tiles of a group pass over the same weight rows at about the same time, so these
// come from L2 but for the first; and a group's tokens fit L2, too. Groups end between experts wherever
// possible: an expert that is split over two groups has its weights read twice.
//
// Wave w of the grid takes tasks w * grid ...; inside a wave CTAs are rotated by a prime, for otherwise
// a grid that is a multiple of the group would give one CTA nothing but full tiles and another nothing
// but remainders. (A counter in memory would balance better, but somebody would have to zero it.)
//
// A full warp runs this together: lane l holds tile l of the group's window.
class Schedule {
 public:
  __device__ Schedule(const Params& p, int tokens)
      : p_(p), tokens_(tokens), lane_(threadIdx.x % 32), rotation_(blockIdx.x) {
    const int capacity = static_cast<int>(p.rows.max_tiles);
    tile_ = load(lane_ < capacity ? lane_ : 0);  // not behind num_tiles: one latency, not two
    const int count = __ldcg(p.rows.num_tiles);
    num_tiles_ = count < capacity ? count : capacity;
    measure();
  }

  __device__ Task next() {
    for (;;) {
      const unsigned wanted = wave_ * gridDim.x + rotation_;
      ++wave_;
      rotation_ += 41 % gridDim.x;
      if (rotation_ >= gridDim.x) rotation_ -= gridDim.x;
      while (wanted - base_ >= tasks()) {
        if (first_ + size_ >= num_tiles_) return {kEndOfTasks, 0, 0, 0, 0};
        base_ += tasks();
        first_ += size_;
        const int index = first_ + lane_;
        tile_ = load(index < num_tiles_ ? index : first_);
        measure();
      }
      const unsigned pieces = static_cast<unsigned>(size_ * p_.sub_tiles);
      const unsigned row_task = (wanted - base_) / pieces;
      const int piece = static_cast<int>((wanted - base_) - row_task * pieces);
      const int source = p_.sub_tiles == 1 ? piece : piece / p_.sub_tiles;
      const int skip = (piece - source * p_.sub_tiles) * tokens_;
      Task task;
      task.expert = __shfl_sync(~0u, tile_.x, source);
      task.rows = __shfl_sync(~0u, tile_.y, source) - skip;
      const unsigned low = __shfl_sync(~0u, static_cast<unsigned>(tile_.z), source);
      const unsigned high = __shfl_sync(~0u, static_cast<unsigned>(tile_.w), source);
      if (task.rows <= 0) continue;
      if (task.rows > tokens_) task.rows = tokens_;
      task.first = static_cast<std::int64_t>(std::uint64_t{high} << 32 | low) + skip;
      task.row_task = static_cast<std::int32_t>(row_task);
      task.unused = 0;
      if (task.expert < 0 || task.expert >= p_.experts) task.expert = kFiltered;
      return task;
    }
  }

 private:
  // Through L2: with a programmatic launch a line of L1 may be older than the list.
  __device__ int4 load(int index) const {
    return __ldcg(reinterpret_cast<const int4*>(p_.rows.tiles) + index);
  }
  __device__ unsigned tasks() const {
    return static_cast<unsigned>(size_) * static_cast<unsigned>(p_.sub_tiles * p_.row_tasks);
  }
  // How many tiles the group that starts at first_ has.
  __device__ void measure() {
    const int before = __shfl_up_sync(~0u, tile_.x, 1);
    const int index = first_ + lane_;
    const bool ends = lane_ > 0 && index <= num_tiles_ && (index == num_tiles_ || tile_.x != before);
    const unsigned mask = __ballot_sync(~0u, ends);
    const int most = p_.group_tiles;  // <= 16
    const unsigned near = mask & ((2u << most) - 1);
    if (near != 0) {
      size_ = 31 - __clz(static_cast<int>(near));
    } else if (mask != 0) {
      size_ = (__ffs(static_cast<int>(mask))) / 2;  // a longer run, whose end is in sight: halve it
      if (size_ > most) size_ = most;
    } else {
      size_ = num_tiles_ > 0 ? most : 0;
    }
  }

  const Params& p_;
  int tokens_, lane_, num_tiles_ = 0;
  int4 tile_;
  int first_ = 0, size_ = 0;
  unsigned base_ = 0, wave_ = 0, rotation_;
};

}  // namespace moesaic::cuda::sm90
