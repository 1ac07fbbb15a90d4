// SPDX-License-Identifier: Apache-2.0
// Global memory -> the stages in shared memory: weights, tokens and what is scaled along K.
#pragma once

#include "cuda/gemm_sm80_tile.h"
#include "cuda/gemm_sm80_operand.h"

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
    weight_dst_ = stages + WeightSwizzle::offset(tid / kWeightChunks, tid % kWeightChunks);
    act_dst_ = stages + T::kActOffset + ActSwizzle::offset(tid / kActChunks, tid % kActChunks);
    scale_dst_ = stages + T::kScaleOffset + tid * 4;
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
        if (p_.group_blocks != 0) copy_scales();
      }
      w_ += T::kWeightBytes;
      a_ += T::kActBytes;
      k_ += T::kDepth;
    }
    ptx::cp_async_commit();
    slot_offset_ = next_slot();
  }

  // Where the slot behind the one that is filled next begins. kStages - 1 stages ahead, that is the
  // one to read.
  __device__ __forceinline__ std::uint32_t next_slot() const {
    return slot_offset_ == (T::kStages - 1) * T::kStageBytes ? 0 : slot_offset_ + T::kStageBytes;
  }

 private:
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
  static_assert(!T::kScales || T::kRows <= T::kThreads);

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
    if constexpr (T::kScales) {
      if (p_.group_blocks == 0) return;
      in_group_ = 0;
      if (tid < T::kRows) {
        int half;
        const std::int32_t column =
            min(column_of<T>(p_, work.column_tile, tid, half), p_.n_out - 1);
        const std::int64_t n = weight_row(p_, column, half);
        scale_ = p_.scale + work.expert * p_.scale_expert + n / p_.scale_rows * p_.scale_row;
        if constexpr (T::kZeros) {
          zero_ =
              p_.zero + work.expert * p_.zero_expert + (p_.zero_nibbles ? n / 2 : n) * p_.zero_row;
        }
      }
      if constexpr (T::kActScales) {
        act_scale_ = nullptr;
        if (p_.a_scale_grouped && tid < work.rows) {
          const std::int64_t position = work.first + tid;
          const std::uint32_t slot = slot_of(p_, position);
          if (!is_padding(p_, slot)) {
            act_scale_ = p_.a_scale + work.expert * p_.a_scale_expert +
                         row_of(p_.a_row, position, slot, p_.top_k) * p_.a_scale_row;
          }
        }
      }
    }
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
      copy_chunk(weight_dst(i), w_, static_cast<std::uint64_t>(weight_[i]) << p_.w_shift, w_left,
                 p_.w_shift, p_.w);
    }
#pragma unroll
    for (int i = 0; i < kActCount; ++i) {
      if (act_[i] == kNone) continue;
      copy_chunk(act_dst(i), a_, static_cast<std::uint64_t>(act_[i]) << p_.a_shift, a_left,
                 p_.a_shift, p_.a);
    }
  }
  __device__ __forceinline__ static void copy_chunk(std::uint32_t dst, const char* base,
                                                    std::uint64_t offset, int left, int shift,
                                                    const char* valid) {
    const char* src = base + offset;
    if (shift == 4) {
      ptx::cp_async16(dst, left > 0 ? src : valid, left > 16 ? 16 : (left > 0 ? left : 0));
    } else {
#pragma unroll
      for (int i = 0; i < 16; i += 4) {
        ptx::cp_async4(dst + i, left > i ? src + i : valid, left > i ? 4 : 0);
      }
    }
  }

  // One row of scales (zero points, token scales) per group that the stage touches.
  __device__ __forceinline__ void copy_scales() {
    const std::uint32_t cell = scale_dst_ + slot_offset_;
    if (in_group_ == p_.group_blocks) next_group();
    copy_group(cell, 0);
    if (p_.group_blocks % T::kGroups == 0) {  // whole stages: one group
      in_group_ += T::kGroups;
      return;
    }
    int row = 0;
#pragma unroll 1
    for (int block = 1; block < T::kGroups && k_ + block * 32 < p_.k; ++block) {
      if (++in_group_ == p_.group_blocks) {
        next_group();
        copy_group(cell, ++row);
      }
    }
    ++in_group_;
  }
  __device__ __forceinline__ void next_group() {
    in_group_ = 0;
    scale_ += p_.scale_group;
    if constexpr (T::kZeros) zero_ += p_.zero_group;
    if constexpr (T::kActScales) {
      if (act_scale_) act_scale_ += p_.a_scale_group;
    }
  }
  __device__ __forceinline__ void copy_group(std::uint32_t cell, int row) {
    if (T::kRows == T::kThreads || threadIdx.x < T::kRows) {
      if constexpr (!T::Op::kE8M0) ptx::cp_async4(cell + row * T::kRows * 4, scale_);
      if constexpr (T::kZeros) {
        if (p_.zero) {  // the aligned word that holds the byte, never beyond the tensor
          const auto word = reinterpret_cast<std::uintptr_t>(zero_) & ~std::uintptr_t{3};
          const std::uint32_t dst = cell + T::kZeroOffset - T::kScaleOffset + row * T::kRows * 4;
          if (p_.zero_whole) {
            ptx::cp_async4(dst, reinterpret_cast<const void*>(word));
          } else {
            const auto left = reinterpret_cast<std::uintptr_t>(p_.zero_end) - word;
            ptx::cp_async4(dst, reinterpret_cast<const void*>(word),
                           left < 4 ? static_cast<int>(left) : 4);
          }
        }
      }
    }
    if constexpr (T::kActScales) {
      if (act_scale_ && threadIdx.x < T::kTokens) {
        ptx::cp_async4(cell + T::kActScaleOffset - T::kScaleOffset + row * T::kTokens * 4,
                       act_scale_);
      }
    }
  }

  const Sm80Params& p_;
  const Sm80Extent& extent_;
  std::uint32_t index_;
  std::uint32_t weight_dst_, act_dst_, scale_dst_, slot_offset_ = 0;
  int k_ = 0, in_group_ = 0;
  const char* w_ = nullptr;  // this thread's chunk of row 0, and of A's row 0, at k_
  const char* a_ = nullptr;
  std::uint32_t weight_[kWeightCount], act_[kActCount];  // rows, in units of the row's alignment
  const float* scale_ = nullptr;                         // of the current group
  const std::uint8_t* zero_ = nullptr;
  const float* act_scale_ = nullptr;
};

}  // namespace moesaic::cuda
