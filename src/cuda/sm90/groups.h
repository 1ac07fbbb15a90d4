// SPDX-License-Identifier: Apache-2.0
// Groups of 128 columns quantized to e4m3 by a pair's epilogue, out of registers: what a group's
// largest magnitude is, the two warpgroups of a CTA, with 64 of the columns each, tell each other
// in shared memory.
#pragma once

#include "cuda/sm90/direct.h"

namespace moesaic::cuda::sm90 {

// Both scales of a group from its largest magnitude, as the bits of a 16-bit number.
struct GroupScale {
  float scale, inverse;
};
__device__ __forceinline__ GroupScale group_scale(OutType type, unsigned largest) {
  const auto half = static_cast<unsigned short>(largest);
  const unsigned absmax =
      type == OutType::kBF16
          ? unsigned{half} << 16
          : __float_as_uint(__half2float(*reinterpret_cast<const __half*>(&half)));
  const float scale = scale_of(DType::kF8E4M3, absmax);
  return {scale, inverse_of(scale)};
}

// The larger of both halves of a word, of all its words.
template <int kWords>
__device__ __forceinline__ unsigned largest_of(const std::uint32_t (&words)[kWords]) {
  constexpr unsigned kNoSigns = 0x7fff7fffu;
  unsigned both = words[0] & kNoSigns;
#pragma unroll
  for (int i = 1; i < kWords; ++i) both = __vmaxu2(both, words[i] & kNoSigns);
  return max(both & 0xffffu, both >> 16);
}

// Of the four lanes of a quad, each of which has two numbers: lane q gets the largest of all the
// (q % 2)-th ones.
__device__ __forceinline__ unsigned largest_of_quad(int lane, unsigned even, unsigned odd) {
  const bool second = lane % 2 != 0;
  unsigned mine = second ? odd : even;
  mine = max(mine, __shfl_xor_sync(~0u, second ? even : odd, 1));
  return max(mine, __shfl_xor_sync(~0u, mine, 2));
}
// The same of four numbers: lane q gets the largest of the q-th.
__device__ __forceinline__ unsigned largest_of_quad(int lane, const unsigned (&of)[4]) {
  const bool odd = lane % 2 != 0, high = lane % 4 >= 2;
  unsigned low = odd ? of[1] : of[0], up = odd ? of[3] : of[2];
  low = max(low, __shfl_xor_sync(~0u, odd ? of[0] : of[1], 1));
  up = max(up, __shfl_xor_sync(~0u, odd ? of[2] : of[3], 1));
  return max(high ? up : low, __shfl_xor_sync(~0u, high ? low : up, 2));
}

// Tokens on the 8-row side: a warp has 16 of a group's columns of every token.
template <typename S>
class GroupsEpilogue : public DirectEpilogue<S> {
 public:
  using Base = DirectEpilogue<S>;
  using Base::Base;
  using typename Base::Sums;
  using typename Base::Way;

  __device__ __forceinline__ void finish(const Task& task, Sums& sum) {
    if (p_.quantizer.kind == Quantizes::kNo) return Base::finish(task, sum);
    this->meet_terms();
    if (p_.activation.kind == Activation::kSwiglu) {
      store_either<Activation::kSwiglu>(task, sum);
    } else {
      store_either<Activation::kSwigluOai>(task, sum);
    }
  }

 protected:
  using Base::lane_;
  using Base::p_;
  using Base::warp_;
  // Of a task's group in a row of C.
  __device__ void put_scale(std::uint32_t row, const Task& task, float scale) const {
    if (row != kNoRow) p_.quantizer.scale[row * p_.quantizer.row_stride + task.weight_task] = scale;
  }

 private:
  static constexpr int kOctets = S::kTokens / 8, kFours = kOctets / 4;
  static_assert(S::kHasGroups && S::kTokens % 32 == 0);
  static_assert(2 * S::kBufferBytes >= (8 * S::kTokens + 4 * 64) * 4);

  template <Activation kKind>
  __device__ __forceinline__ void store_either(const Task& task, const Sums& sum) {
    if (p_.direct == Direct::kPlain)
      store<kKind, Way::kPlain>(task, sum);
    else
      store<kKind, Way::kAny>(task, sum);
  }

  template <Activation kKind, Way kWay>
  __device__ __forceinline__ void store(const Task& task, const Sums& sum) {
    const auto terms = this->terms_of(/*quantized=*/false);
    const std::int64_t n = this->column(task, 0) + warp_ * 16;
    const bool inside = n < this->limit(task);  // all of a warp's columns, or none
    std::uint32_t words[kOctets][2];
#pragma unroll
    for (int j = 0; j < kOctets; ++j) words[j][0] = words[j][1] = 0;
#pragma unroll
    for (int first = 0; first < kOctets; first += 4) {
      if (8 * first >= task.rows || !inside) break;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        this->template words_of<kKind, kWay>(
            {sum, first + i}, this->template factors_of<kWay>(first + i), terms, words[first + i]);
      }
    }
    // Lane q of a quad takes every fourth octet's token, and tells what is the largest of it.
    unsigned* const mine = tops();
#pragma unroll
    for (int i = 0; i < kFours; ++i) {
      unsigned of[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) of[k] = largest_of(words[4 * i + k]);
      mine[warp_ * S::kTokens + token_of(i)] = largest_of_quad(lane_, of);
    }
    ptx::both_warpgroups_sync();
    const unsigned* const other = reinterpret_cast<const unsigned*>(
        reinterpret_cast<const unsigned char*>(mine) + this->to_other());
    float inverse[kFours];
#pragma unroll
    for (int i = 0; i < kFours; ++i) {
      const int token = token_of(i);
      unsigned top = 0;
#pragma unroll
      for (int w = 0; w < 4; ++w)
        top = max(top, max(mine[w * S::kTokens + token], other[w * S::kTokens + token]));
      const GroupScale s = group_scale(p_.c_type, top);
      inverse[i] = s.inverse;
      if (this->warpgroup_ == 0 && warp_ == i) this->put_scale(this->rows()[token], task, s.scale);
    }
    if (!inside) return;
    char* c = static_cast<char*>(p_.c) + n + lane_ % 4 * 4;
    ptx::opaque(c);
    const auto stride = static_cast<std::uint32_t>(p_.c_rows.stride);
#pragma unroll
    for (int j = 0; j < kOctets; ++j) {
      if (j % 4 == 0 && 8 * j >= task.rows) break;
      const std::uint32_t row = this->rows()[8 * j + lane_ / 4];
      const float by = __shfl_sync(~0u, inverse[j / 4], lane_ / 4 * 4 + j % 4);
      ptx::store_row(row, c + std::uint64_t{row} * stride,
                     to_e4m3(p_.c_type, uint2{words[j][0], words[j][1]}, by));
    }
  }

  __device__ int token_of(int i) const { return 8 * (4 * i + lane_ % 4) + lane_ / 4; }
  // Of this warpgroup: [warp][token]. Tasks alternate between two of them, and every task has a
  // meeting of each two warps that write and read here, so nobody still reads what is overwritten.
  __device__ unsigned* tops() const {
    return reinterpret_cast<unsigned*>(this->shared_) + this->term_place_ * 4 * S::kTokens;
  }
};

}  // namespace moesaic::cuda::sm90
