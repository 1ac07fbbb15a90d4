// SPDX-License-Identifier: Apache-2.0
// What both loaders of the SM80 family copy in the same way: chunks at the edges, and scales along
// K.
#pragma once

#include "cuda/gemm_sm80_operand.h"
#include "cuda/gemm_sm80_tile.h"

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

// The scales, zero points and token scales that change along K: one row of them per group that a
// stage touches. Each thread follows one weight row and one token.
template <typename T>
class Sm80ScaleCopier {
 public:
  static_assert(T::kRows <= T::kThreads && T::kTokens <= T::kThreads);

  __device__ __forceinline__ void place(std::uint32_t stages) {
    dst_ = stages + T::kScaleOffset + threadIdx.x * 4;
  }

  // The first group of a tile.
  __device__ __forceinline__ void begin(const Sm80Params& p, const Sm80Work& work) {
    if (p.group_blocks == 0) return;
    const int tid = threadIdx.x;
    in_group_ = 0;
    if (tid < T::kRows) {
      int half;
      const std::int32_t column = min(column_of<T>(p, work.column_tile, tid, half), p.n_out - 1);
      const std::int64_t n = weight_row(p, column, half);
      scale_ = p.scale + work.expert * p.scale_expert + n / p.scale_rows * p.scale_row;
      if constexpr (T::kZeros) {
        zero_ = p.zero + work.expert * p.zero_expert + (p.zero_nibbles ? n / 2 : n) * p.zero_row;
      }
    }
    if constexpr (T::kActScales) {
      act_scale_ = nullptr;
      if (p.a_scale_grouped && tid < work.rows) {
        const std::int64_t position = work.first + tid;
        const std::uint32_t slot = slot_of(p, position);
        if (!is_padding(p, slot)) {
          act_scale_ = p.a_scale + work.expert * p.a_scale_expert +
                       row_of(p.a_row, position, slot, p.top_k) * p.a_scale_row;
        }
      }
    }
  }

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
  __device__ __forceinline__ void next_group(const Sm80Params& p) {
    in_group_ = 0;
    scale_ += p.scale_group;
    if constexpr (T::kZeros) zero_ += p.zero_group;
    if constexpr (T::kActScales) {
      if (act_scale_) act_scale_ += p.a_scale_group;
    }
  }
  __device__ __forceinline__ void copy_group(const Sm80Params& p, std::uint32_t cell, int row) {
    if (T::kRows == T::kThreads || threadIdx.x < T::kRows) {
      if constexpr (!T::Op::kE8M0) ptx::cp_async4(cell + row * T::kRows * 4, scale_);
      if constexpr (T::kZeros) {
        if (p.zero) {  // the aligned word that holds the byte, never beyond the tensor
          const auto word = reinterpret_cast<std::uintptr_t>(zero_) & ~std::uintptr_t{3};
          const std::uint32_t dst = cell + T::kZeroOffset - T::kScaleOffset + row * T::kRows * 4;
          if (p.zero_whole) {
            ptx::cp_async4(dst, reinterpret_cast<const void*>(word));
          } else {
            const auto left = reinterpret_cast<std::uintptr_t>(p.zero_end) - word;
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

  std::uint32_t dst_ = 0;
  int in_group_ = 0;
  const float* scale_ = nullptr;  // of the current group
  const std::uint8_t* zero_ = nullptr;
  const float* act_scale_ = nullptr;
};

}  // namespace moesaic::cuda
