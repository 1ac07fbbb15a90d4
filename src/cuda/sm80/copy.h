// SPDX-License-Identifier: Apache-2.0
// What both loaders of the SM80 family copy in the same way: chunks at the edges, and scales along
// K.
#pragma once

#include "cuda/sm80/operand.h"
#include "cuda/sm80/tile.h"

namespace moesaic::cuda {

// One chunk of 16 bytes of which `left` exist: behind them zeros. `valid`: any address that may be
// read.
__device__ __forceinline__ void copy_partial_chunk(std::uint32_t dst, const char* base,
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

// Scales, zero points and token scales that change along K: one row of them per group that a stage
// touches. Of kThreads threads each follows every kThreads-th weight row and one token.
enum class Sm80Scales : unsigned char { kAll, kOfWeights, kOfTokens };
template <typename T, int kThreads = T::kThreads, Sm80Scales kWhich = Sm80Scales::kAll>
class Sm80ScaleCopier {
  static constexpr bool kWeights = kWhich != Sm80Scales::kOfTokens;
  static constexpr bool kTokens = T::kActScales && kWhich != Sm80Scales::kOfWeights;
  static constexpr int kPer = (T::kRows + kThreads - 1) / kThreads;  // rows of a thread

 public:
  static_assert(T::kTokens <= kThreads && (kPer == 1 || T::kRows % kThreads == 0));

  __device__ __forceinline__ void place(std::uint32_t stages, int thread) {
    thread_ = thread;
    dst_ = stages + T::kScaleOffset + thread * 4;
  }

  // The first group of a tile.
  __device__ __forceinline__ void begin(const Sm80Params& p, const Sm80Work& work) {
    if (p.group_blocks == 0) return;
    in_group_ = 0;
    if constexpr (kWeights) {
#pragma unroll
      for (int i = 0; i < kPer; ++i) {
        if (!has_row(i)) continue;
        int half;
        const std::int32_t column =
            min(column_of<T>(p, work.column_tile, thread_ + i * kThreads, half), p.n_out - 1);
        const std::int64_t n = weight_row(p, column, half);
        // In 64 bits a call; inlined it costs large tiles 20 bytes more of spills.
        const std::int64_t cell =
            kWhich == Sm80Scales::kAll
                ? n / p.scale_rows
                : static_cast<std::uint32_t>(n) / static_cast<std::uint32_t>(p.scale_rows);
        scale_[i] = p.scale + work.expert * p.scale_expert + cell * p.scale_row;
        if constexpr (T::kZeros) {
          zero_[i] =
              p.zero + work.expert * p.zero_expert + (p.zero_nibbles ? n / 2 : n) * p.zero_row;
        }
      }
    }
    if constexpr (kTokens && kWhich == Sm80Scales::kAll) {
      act_scale_ = nullptr;
      if (thread_ < work.rows) {
        const std::int64_t position = work.first + thread_;
        const std::uint32_t slot = slot_of(p, position);
        if (!is_padding(p, slot))
          begin_token(p, work.expert, row_of(p.a_row, position, slot, p.top_k));
      }
    }
  }
  // This thread's token lies in row `a_row` of A.
  __device__ __forceinline__ void begin_token(const Sm80Params& p, std::int32_t expert,
                                              std::uint32_t a_row) {
    if constexpr (kTokens) {
      if (p.a_scale_grouped)
        act_scale_ = p.a_scale + expert * p.a_scale_expert + a_row * p.a_scale_row;
    }
  }
  __device__ __forceinline__ void no_token() { act_scale_ = nullptr; }

  // Of the stage that begins at k, into the slot `slot_offset` behind the first one.
  __device__ __forceinline__ void copy(const Sm80Params& p, std::uint32_t slot_offset, int k) {
    const std::uint32_t cell = dst_ + slot_offset;
    if (in_group_ == p.group_blocks) next_group(p);
    copy_group(p, cell, 0);
    if (p.group_blocks % T::kGroups == 0) {  // whole stages: one group
      in_group_ += T::kGroups;
      return;
    }
    int row = 0;
#pragma unroll 1
    for (int block = 1; block < T::kGroups && k + block * 32 < p.k; ++block) {
      if (++in_group_ == p.group_blocks) {
        next_group(p);
        copy_group(p, cell, ++row);
      }
    }
    ++in_group_;
  }

 private:
  __device__ __forceinline__ bool has_row(int i) const {
    return T::kRows % kThreads == 0 || thread_ + i * kThreads < T::kRows;
  }
  __device__ __forceinline__ void next_group(const Sm80Params& p) {
    in_group_ = 0;
    if constexpr (kWeights) {
#pragma unroll
      for (int i = 0; i < kPer; ++i) {
        scale_[i] += p.scale_group;
        if constexpr (T::kZeros) zero_[i] += p.zero_group;
      }
    }
    if constexpr (kTokens) {
      if (act_scale_) act_scale_ += p.a_scale_group;
    }
  }
  __device__ __forceinline__ void copy_group(const Sm80Params& p, std::uint32_t cell, int row) {
    if constexpr (kWeights) {
#pragma unroll
      for (int i = 0; i < kPer; ++i) {
        if (!has_row(i)) continue;
        const std::uint32_t dst = cell + (row * T::kRows + i * kThreads) * 4;
        if constexpr (!T::Op::kE8M0) ptx::cp_async4(dst, scale_[i]);
        if constexpr (T::kZeros) {
          if (p.zero) copy_zero(p, dst + T::kZeroOffset - T::kScaleOffset, zero_[i]);
        }
      }
    }
    if constexpr (kTokens) {
      if (act_scale_) {
        ptx::cp_async4(cell + T::kActScaleOffset - T::kScaleOffset + row * T::kTokens * 4,
                       act_scale_);
      }
    }
  }
  // The aligned word that holds the byte, never beyond the tensor.
  __device__ __forceinline__ static void copy_zero(const Sm80Params& p, std::uint32_t dst,
                                                   const std::uint8_t* zero) {
    const auto word = reinterpret_cast<std::uintptr_t>(zero) & ~std::uintptr_t{3};
    if (p.zero_whole) {
      ptx::cp_async4(dst, reinterpret_cast<const void*>(word));
    } else {
      const auto left = reinterpret_cast<std::uintptr_t>(p.zero_end) - word;
      ptx::cp_async4(dst, reinterpret_cast<const void*>(word),
                     left < 4 ? static_cast<int>(left) : 4);
    }
  }

  int thread_ = 0;
  std::uint32_t dst_ = 0;
  int in_group_ = 0;
  const float* scale_[kPer];  // of the current group
  const std::uint8_t* zero_[kPer];
  const float* act_scale_ = nullptr;
};

}  // namespace moesaic::cuda
