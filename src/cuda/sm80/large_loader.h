// SPDX-License-Identifier: Apache-2.0
// Global memory -> the stages in shared memory, for large tiles: the rows to copy come from the
// board, where they were listed while the tile before was multiplied.
#pragma once

#include "cuda/sm80/copy.h"
#include "cuda/sm80/large_tile.h"

namespace moesaic::cuda {

// Called by all threads of a CTA together, behind a barrier each time: what one call writes to the
// board, the next one reads.
template <typename T>
class Sm80LargeLoader {
 public:
  using Board = Sm80Board<typename T::Base>;

  __device__ Sm80LargeLoader(const Sm80Params& p, std::uint32_t stages, Board& board)
      : p_(p), board_(board), stages_(stages), k_(p.k) {
    const int tid = threadIdx.x;
    weight_dst_ = stages + WeightSwizzle::offset(tid / kWeightChunks, tid % kWeightChunks);
    act_dst_ = stages + T::kActOffset + ActSwizzle::offset(tid / kActChunks, tid % kActChunks);
    if constexpr (T::kScales) scales_.place(stages, threadIdx.x);
  }

  // The next stage's copies, as one group (empty behind the end, so that the count of groups
  // holds).
  __device__ __forceinline__ void issue() {
    if (k_ >= p_.k) next_tile();
    if (k_ >= 0) {
      if (k_ + T::kDepth <= p_.k && p_.aligned) {
        copy_whole();
      } else {
        copy_partial();
      }
      if constexpr (T::kScales) {
        if (p_.group_blocks != 0) scales_.copy(p_, slot_offset_, k_);
      }
      w_ += T::kWeightBytes;
      a_ += T::kActBytes;
      k_ += T::kDepth;
      const int left = p_.k - k_;
      if (left <= (T::kStages + 1) * T::kDepth && T::prepares(p_)) prepare(left);
    }
    ptx::cp_async_commit();
    slot_offset_ = behind(slot_offset_);
  }

  // Where the slot begins that is filled `ahead` calls from now; the slots form a ring.
  template <int kAhead>
  __device__ __forceinline__ std::uint32_t slot() const {
    std::uint32_t offset = slot_offset_;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) offset = behind(offset);
    return stages_ + offset;
  }

 private:
  static constexpr int kWeightChunks = T::kWeightBytes / 16, kActChunks = T::kActBytes / 16;
  static constexpr int kWeightStep = T::kThreads / kWeightChunks,
                       kActStep = T::kThreads / kActChunks;
  static constexpr int kWeightCount = T::kRows / kWeightStep, kActCount = T::kTokens / kActStep;
  static constexpr std::uint32_t kNone = 0xffffffffu;
  using WeightSwizzle = Swizzle<T::kWeightBytes, T::Op::kWeightUnit>;
  using ActSwizzle = Swizzle<T::kActBytes, T::Op::kActUnit>;
  static_assert(T::kThreads % kWeightChunks == 0 && T::kThreads % kActChunks == 0);
  static_assert(T::kRows % kWeightStep == 0 && T::kTokens % kActStep == 0);
  static_assert(kWeightStep % 8 == 0 && kActStep % 8 == 0,
                "rows a multiple of 8 apart are swizzled alike");

  __device__ static constexpr std::uint32_t behind(std::uint32_t offset) {
    return offset == (T::kStages - 1) * T::kStageBytes ? 0 : offset + T::kStageBytes;
  }

  // One piece of preparing the next tile, by what is left of this one. The slots arrive with the
  // stage that is issued kStages - 1 calls before they are read.
  __device__ __forceinline__ void prepare(int left) {
    if (left > T::kStages * T::kDepth) {
      find();
    } else if (left > (T::kStages - 1) * T::kDepth) {
      copy_slots();
    } else if (left > 0 && left <= T::kDepth) {
      list_rows([&](int i, std::int64_t position) {
        return p_.row_slot ? board_.slots[i] : static_cast<std::uint32_t>(position);
      });
    }
  }

  // The next work item that has a product to compute. By one warp: all others go on.
  __device__ __forceinline__ void find() {
    if (threadIdx.x >= 32) return;
    Sm80Work work{};
    bool filtered = false;
    std::uint32_t index = board_.index;
    for (; index < board_.extent.total; index += gridDim.x) {
      if (!locate(p_, index, board_.extent.token_tiles, T::kTokens, work)) continue;
      if (work.expert >= 0) break;
      filtered = true;
    }
    if (index >= board_.extent.total) work.rows = 0;
    __syncwarp();
    if (threadIdx.x == 0) {
      board_.works[(tile_ + 1) % Board::kWorks] = work;
      board_.index = index + gridDim.x;
      if (filtered) board_.filtered = 1;
    }
  }
  __device__ __forceinline__ void copy_slots() {
    if (p_.row_slot == nullptr) return;
    const Sm80Work& work = board_.works[(tile_ + 1) % Board::kWorks];
    for (int i = threadIdx.x; i < T::kTokens; i += T::kThreads) {
      if (i < work.rows)
        ptx::cp_async4(ptx::shared_address(&board_.slots[i]), p_.row_slot + work.first + i);
    }
  }
  template <typename SlotAt>
  __device__ __forceinline__ void list_rows(const SlotAt& slot_at) {
    const Sm80Work work = board_.works[(tile_ + 1) % Board::kWorks];
    if (work.rows == 0) return;
    const std::uint32_t parity = (tile_ + 1) % 2;
    for (int row = threadIdx.x; row < T::kRows; row += T::kThreads) {
      int half;  // rows behind the last one: any row, the result is dropped
      const std::int32_t column = min(column_of<T>(p_, work.column_tile, row, half), p_.n_out - 1);
      board_.weight[parity][row % kWeightStep * kWeightCount + row / kWeightStep] =
          static_cast<std::uint32_t>(weight_row(p_, column, half) * p_.w_row);
    }
    for (int row = threadIdx.x; row < T::kTokens; row += T::kThreads) {
      std::uint32_t at = kNone;  // tokens that are not there: nothing, columns do not mix
      if (row < work.rows) {
        const std::int64_t position = work.first + row;
        const std::uint32_t slot = slot_at(row, position);
        if (!is_padding(p_, slot)) {
          at = static_cast<std::uint32_t>(p_.a_rows(row_of(p_.a_row, position, slot, p_.top_k)));
        }
      }
      board_.act[parity][row % kActStep * kActCount + row / kActStep] = at;
    }
    if (T::prepares(p_)) {
      fill_table<typename T::Base>(p_, work, board_.tables[parity], [&](int i) {
        const std::int64_t position = work.first + i;
        return Sm80Row{position, slot_at(i, position)};
      });
    }
  }

  __device__ __forceinline__ void next_tile() {
    if (tile_ == kBeforeFirst || !T::prepares(p_)) {
      __syncthreads();
      find();
      __syncthreads();
      list_rows([&](int, std::int64_t position) { return slot_of(p_, position); });
      __syncthreads();
    }
    ++tile_;
    const Sm80Work& work = board_.works[tile_ % Board::kWorks];
    if (work.rows == 0) {
      k_ = -1;  // nothing more
      return;
    }
    k_ = 0;
    const int tid = threadIdx.x;
    w_ = p_.w + work.expert * p_.w_expert + tid % kWeightChunks * 16;
    a_ = p_.a + tid % kActChunks * 16;
    if constexpr (T::kScales) scales_.begin(p_, work);
  }

  template <int kCount>
  __device__ __forceinline__ static void read_rows(std::uint32_t (&rows)[kCount],
                                                   const std::uint32_t* at) {
    if constexpr (kCount % 4 == 0) {
#pragma unroll
      for (int i = 0; i < kCount; i += 4) {
        const uint4 four = *reinterpret_cast<const uint4*>(at + i);
        rows[i] = four.x, rows[i + 1] = four.y, rows[i + 2] = four.z, rows[i + 3] = four.w;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) rows[i] = at[i];
    }
  }
  __device__ __forceinline__ void read_weight_rows(std::uint32_t (&rows)[kWeightCount]) const {
    read_rows(rows, board_.weight[tile_ % 2] + threadIdx.x / kWeightChunks * kWeightCount);
  }
  __device__ __forceinline__ void read_act_rows(std::uint32_t (&rows)[kActCount]) const {
    read_rows(rows, board_.act[tile_ % 2] + threadIdx.x / kActChunks * kActCount);
  }
  __device__ __forceinline__ std::uint32_t weight_dst(int i) const {
    return weight_dst_ + slot_offset_ + i * kWeightStep * T::kWeightBytes;
  }
  __device__ __forceinline__ std::uint32_t act_dst(int i) const {
    return act_dst_ + slot_offset_ + i * kActStep * T::kActBytes;
  }

  __device__ __forceinline__ void copy_whole() {
    std::uint32_t weight[kWeightCount], act[kActCount];
    read_weight_rows(weight);
    read_act_rows(act);
#pragma unroll
    for (int i = 0; i < kWeightCount; ++i) {
      ptx::cp_async16(weight_dst(i), w_ + static_cast<std::uint64_t>(weight[i]) * 16);
    }
#pragma unroll
    for (int i = 0; i < kActCount; ++i) {
      if (act[i] != kNone)
        ptx::cp_async16(act_dst(i), a_ + static_cast<std::uint64_t>(act[i]) * 16);
    }
  }

  // K's tail (zeros behind its end, of weights and tokens both), or rows that are not aligned to 16
  // bytes.
  __device__ __forceinline__ void copy_partial() {
    const int tid = threadIdx.x;
    const int w_left = (p_.k - k_) * T::Op::kWeightBits / 8 - tid % kWeightChunks * 16;
    const int a_left = (p_.k - k_) * T::Op::kActBits / 8 - tid % kActChunks * 16;
#pragma unroll 1
    for (int i = 0; i < kWeightCount; ++i) {
      const std::uint32_t row = board_.weight[tile_ % 2][tid / kWeightChunks * kWeightCount + i];
      copy_partial_chunk(weight_dst(i), w_, static_cast<std::uint64_t>(row) << p_.w_shift, w_left,
                         p_.w_shift, p_.w);
    }
#pragma unroll 1
    for (int i = 0; i < kActCount; ++i) {
      const std::uint32_t row = board_.act[tile_ % 2][tid / kActChunks * kActCount + i];
      if (row == kNone) continue;
      copy_partial_chunk(act_dst(i), a_, static_cast<std::uint64_t>(row) << p_.a_shift, a_left,
                         p_.a_shift, p_.a);
    }
  }

  static constexpr std::uint32_t kBeforeFirst = 0xffffffffu;
  const Sm80Params& p_;
  Board& board_;
  std::uint32_t stages_, weight_dst_, act_dst_, slot_offset_ = 0;
  std::uint32_t tile_ = kBeforeFirst;  // counts this CTA's tiles; + 1 is the first
  int k_;                    // of the next stage; p.k: "a tile has ended", -1: there are no more
  const char* w_ = nullptr;  // this thread's chunk of row 0, and of A's row 0, at k_
  const char* a_ = nullptr;
  Sm80ScaleCopier<T> scales_;
};

}  // namespace moesaic::cuda
