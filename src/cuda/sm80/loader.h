// SPDX-License-Identifier: Apache-2.0
// Global memory -> the stages in shared memory: weights, tokens and what is scaled along K.
#pragma once

#include "cuda/sm80/copy.h"

namespace moesaic::cuda {

// Issues the copies of one stage after another, running ahead of the products. All that a stage
// costs is kept in pointers that move along K: at decode a warp has one stage's bytes to hide these
// instructions.
template <typename T>
class Sm80Loader {
 public:
  __device__ Sm80Loader(const Sm80Params& p, std::uint32_t stages, const Sm80Extent& extent)
      : p_(p), extent_(extent), index_(blockIdx.x) {
    const int tid = threadIdx.x;
    stages_ = stages;
    weight_dst_ = stages + WeightSwizzle::offset(tid / kWeightChunks, tid % kWeightChunks);
    act_dst_ = stages + T::kActOffset + ActSwizzle::offset(tid / kActChunks, tid % kActChunks);
    if constexpr (T::kScales) scales_.place(stages, threadIdx.x);
    k_ = p.k;  // "a tile has ended": the first issue looks for one
    index_ -= gridDim.x;
  }

  // The next stage's copies, as one group (empty behind the end, so that the count of groups
  // holds).
  __device__ __forceinline__ void issue() {
    if (k_ >= p_.k) {
      index_ += gridDim.x;
      seek();
    }
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
    }
    ptx::cp_async_commit();
    slot_offset_ = next_offset();
  }

  // Where the slot behind the one that is filled next begins. kStages - 1 stages ahead, that is the
  // one to read.
  __device__ __forceinline__ std::uint32_t next_slot() const { return stages_ + next_offset(); }

 private:
  __device__ __forceinline__ std::uint32_t next_offset() const {
    return slot_offset_ == (T::kStages - 1) * T::kStageBytes ? 0 : slot_offset_ + T::kStageBytes;
  }
  static constexpr int kWeightChunks = T::kWeightBytes / 16, kActChunks = T::kActBytes / 16;
  static constexpr int kWeightStep = T::kThreads / kWeightChunks,
                       kActStep = T::kThreads / kActChunks;
  static constexpr int kWeightCount = T::kRows / kWeightStep;
  static constexpr int kActCount = (T::kTokens + kActStep - 1) / kActStep;
  static constexpr std::uint32_t kNone = 0xffffffffu;
  using WeightSwizzle = Swizzle<T::kWeightBytes, T::Op::kWeightUnit>;
  using ActSwizzle = Swizzle<T::kActBytes, T::Op::kActUnit>;
  static_assert(T::kThreads % kWeightChunks == 0 && T::kThreads % kActChunks == 0);
  static_assert(T::kRows % kWeightStep == 0 && kWeightCount > 0);

  // Moves to the next work item that has a product to compute.
  __device__ __forceinline__ void seek() {
    Sm80Work work;
    for (; index_ < extent_.total; index_ += gridDim.x) {
      if (locate(p_, index_, extent_.token_tiles, T::kTokens, work) && work.expert >= 0) break;
    }
    if (index_ >= extent_.total) {
      k_ = -1;  // nothing more
      return;
    }
    k_ = 0;
    const int tid = threadIdx.x;
    w_ = p_.w + work.expert * p_.w_expert + tid % kWeightChunks * 16;
    a_ = p_.a + tid % kActChunks * 16;
#pragma unroll
    for (int i = 0; i < kWeightCount;
         ++i) {  // rows behind the last one: any row, the result is dropped
      int half;
      const std::int32_t column =
          min(column_of<T>(p_, work.column_tile, tid / kWeightChunks + i * kWeightStep, half),
              p_.n_out - 1);
      weight_[i] = static_cast<std::uint32_t>(weight_row(p_, column, half) * p_.w_row);
    }
#pragma unroll
    for (int i = 0; i < kActCount; ++i) {  // tokens that are not there: nothing, columns do not mix
      const int row = tid / kActChunks + i * kActStep;
      act_[i] = kNone;
      if (row < work.rows) {
        const std::int64_t position = work.first + row;
        const std::uint32_t slot = slot_of(p_, position);
        if (!is_padding(p_, slot)) {
          act_[i] =
              static_cast<std::uint32_t>(p_.a_rows(row_of(p_.a_row, position, slot, p_.top_k)));
        }
      }
    }
    if constexpr (T::kScales) scales_.begin(p_, work);
  }

  // Shared address of this thread's i-th chunk: rows a multiple of 8 apart are swizzled alike.
  __device__ __forceinline__ std::uint32_t weight_dst(int i) const {
    if constexpr (kWeightStep % 8 == 0)
      return weight_dst_ + slot_offset_ + i * kWeightStep * T::kWeightBytes;
    const int tid = threadIdx.x;
    return weight_dst_ - WeightSwizzle::offset(tid / kWeightChunks, tid % kWeightChunks) +
           slot_offset_ +
           WeightSwizzle::offset(tid / kWeightChunks + i * kWeightStep, tid % kWeightChunks);
  }
  __device__ __forceinline__ std::uint32_t act_dst(int i) const {
    if constexpr (kActStep % 8 == 0) return act_dst_ + slot_offset_ + i * kActStep * T::kActBytes;
    const int tid = threadIdx.x;
    return act_dst_ - ActSwizzle::offset(tid / kActChunks, tid % kActChunks) + slot_offset_ +
           ActSwizzle::offset(tid / kActChunks + i * kActStep, tid % kActChunks);
  }

  __device__ __forceinline__ void copy_whole() {
#pragma unroll
    for (int i = 0; i < kWeightCount; ++i) {
      ptx::cp_async16(weight_dst(i), w_ + static_cast<std::uint64_t>(weight_[i]) * 16);
    }
#pragma unroll
    for (int i = 0; i < kActCount; ++i) {
      if (act_[i] != kNone)
        ptx::cp_async16(act_dst(i), a_ + static_cast<std::uint64_t>(act_[i]) * 16);
    }
  }

  // K's tail (zeros behind its end, of weights and tokens both), or rows that are not aligned to 16
  // bytes.
  __device__ __forceinline__ void copy_partial() {
    const int tid = threadIdx.x;
    const int w_left = (p_.k - k_) * T::Op::kWeightBits / 8 - tid % kWeightChunks * 16;
    const int a_left = (p_.k - k_) * T::Op::kActBits / 8 - tid % kActChunks * 16;
#pragma unroll
    for (int i = 0; i < kWeightCount; ++i) {
      copy_partial_chunk(weight_dst(i), w_, static_cast<std::uint64_t>(weight_[i]) << p_.w_shift,
                         w_left, p_.w_shift, p_.w);
    }
#pragma unroll
    for (int i = 0; i < kActCount; ++i) {
      if (act_[i] == kNone) continue;
      copy_partial_chunk(act_dst(i), a_, static_cast<std::uint64_t>(act_[i]) << p_.a_shift, a_left,
                         p_.a_shift, p_.a);
    }
  }
  const Sm80Params& p_;
  const Sm80Extent& extent_;
  std::uint32_t index_;
  std::uint32_t stages_, weight_dst_, act_dst_, slot_offset_ = 0;
  int k_ = 0;
  const char* w_ = nullptr;  // this thread's chunk of row 0, and of A's row 0, at k_
  const char* a_ = nullptr;
  std::uint32_t weight_[kWeightCount], act_[kActCount];  // rows, in units of the row's alignment
  Sm80ScaleCopier<T> scales_;
};

}  // namespace moesaic::cuda
