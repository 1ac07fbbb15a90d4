// SPDX-License-Identifier: Apache-2.0
// The epilogue of pairs of CTAs: rows of C straight from the sums, without shared memory.
//
// Its weight rows lie in shared memory so that what a thread sums up are neighbours in C. Of each
// 64 rows of a block, 16 are a warp's: rows s and s + 8 (s < 8) of both blocks b make
//   ungated  32 columns: column 4 s + 2 b + (row / 8)
//   gated    16 columns: column 2 s + b, gate in the lower eight rows and up in the upper
// (weight_row says so, and the tensor map brings them so: set_weights). A thread has rows s =
// lane/4 of two tokens; movmatrix exchanges these sides within the warp, and then it has s = 2q and
// 2q + 1 (q = lane % 4) of one token: 16 bytes of C, or 8 where gated.
//
// The alternative that lost: through shared memory by stmatrix, 16 tokens at a time, as kernels of
// one block do (store_matrix). Each such chunk was a chain of a meeting, three trips to shared
// memory and a store, 400 cycles long, and a task had 16 to 18 of them: as long as 1 to 1.5 KiB of
// K, in which the tensor cores stood still.
//
// Whatever does not lie so (Params::direct) goes by way of fp32 in shared memory: strided or f32
// rows of C, products of no multiple of 32 rows, experts that are apart, cells of block scales of
// no multiple of 32 rows, activations that leaves_directly refuses.
#pragma once

#include "cuda/sm90/epilogue_staged.h"

namespace moesaic::cuda::sm90 {

template <typename S>
class DirectEpilogue : public StagedEpilogue<S> {
 public:
  static_assert(S::kBlocks == 2 && S::kWarpgroups == 2);
  using Base = StagedEpilogue<S>;
  using Base::Base;
  using Sums = float[2][S::kTokens / 2];

  __device__ __forceinline__ void finish(const Task& task, Sums& sum) {
    this->meet_terms();
    if (p_.direct == Direct::kNo) {
      this->store_staged(task, sum);
    } else {
      const Activation chosen = p_.activates ? p_.activation.kind : Activation::kIdentity;
      with_activation(chosen, [&](auto kind) {
        if constexpr (leaves_directly<S>(decltype(kind)::value))
          store_either<decltype(kind)::value>(task, sum);
      });
    }
  }

 protected:
  using Base::lane_;
  using Base::p_;
  using Base::warp_;

  // Words of two columns that a thread has of a token.
  template <Activation kKind>
  static constexpr int kWords = is_gated(kKind) ? 2 : 4;
  template <Activation kKind>
  static constexpr bool kShort = kKind == Activation::kIdentity || kKind == Activation::kSwiglu ||
                                 kKind == Activation::kSwigluOai;

  // Two ways: Direct::kPlain, and the one on which Params is asked again for each number.
  enum class Way { kAny, kPlain, kPlainQuantized };
  static constexpr OutType kPlainType = plain_type(S::kElement);

  // What does not change from token to token.
  struct Terms {
    float2 row[2][2];  // factor and bias; of blocks, and of their lower and upper eight rows
    bool quantized;
    float inverse;
  };
  __device__ Terms terms_of(bool quantized) const {
    Terms t;
#pragma unroll
    for (int b = 0; b < 2; ++b) {
#pragma unroll
      for (int h = 0; h < 2; ++h)
        t.row[b][h] = this->row_terms()[b * 64 + warp_ * 16 + h * 8 + lane_ / 4];
    }
    if constexpr (Base::kOneTokenScale) {
      if (this->has_one_token_scale()) {
        const float scale = *this->token_scale();
#pragma unroll
        for (int i = 0; i < 4; ++i) t.row[i / 2][i % 2].x *= scale;
      }
    }
    t.quantized = quantized;
    if (quantized) t.inverse = *this->inverse_scale();
    return t;
  }
  // Factors (scale, weight) of two tokens, 8 j + 2 q and the next.
  template <Way kWay>
  __device__ float4 factors_of(int j) const {
    if constexpr (kWay != Way::kAny) return {1.0f, 1.0f, 1.0f, 1.0f};
    return *reinterpret_cast<const float4*>(this->factors() + 8 * j + 2 * (lane_ % 4));
  }

  template <Activation kKind>
  __device__ __forceinline__ void store_either(const Task& task, const Sums& sum) {
    if constexpr (kShort<kKind>) {
      if (p_.direct == Direct::kPlain) {
        if constexpr (S::kPromotes && !S::kHasGroups && is_gated(kKind)) {
          if (this->quantizes()) return store<kKind, Way::kPlainQuantized>(task, sum);
        }
        return store<kKind, Way::kPlain>(task, sum);
      }
    }
    store<kKind, Way::kAny>(task, sum);
  }

  template <Activation kKind, Way kWay>
  __device__ __forceinline__ void store(const Task& task, const Sums& sum) {
    constexpr int kColumns = is_gated(kKind) ? 16 : 32;  // of a warp: inside of C all or none
    const std::int64_t n = this->column(task, 0) + warp_ * kColumns;
    if (n >= this->limit(task)) return;
    const bool quantized = kWay == Way::kAny ? this->quantizes() : kWay == Way::kPlainQuantized;
    const Terms terms = terms_of(quantized);
    // One multiplication for each row of C, whose bytes fit 32 bits, as the host has seen.
    int shift = quantized ? 0 : 1;
    ptx::opaque(shift);
    char* c = static_cast<char*>(p_.c) + ((n + lane_ % 4 * 2 * kWords<kKind>) << shift);
    ptx::opaque(c);
    const std::uint32_t stride = static_cast<std::uint32_t>(p_.c_rows.stride) << shift;
    // In batches without a branch inside, so that the steps of one octet fill the waits of another.
    // What lies behind the last row is made, too, and not stored: its row of C is kNoRow.
    // (Of the long functions one at a time: registers.)
    constexpr int kOctets = S::kTokens / 8;
    constexpr int kBatch = !kShort<kKind> ? 1 : kWay == Way::kAny ? 2 : kOctets % 3 == 0 ? 3 : 4;
    static_assert(kOctets % kBatch == 0);
#pragma unroll
    for (int first = 0; first < kOctets; first += kBatch) {
      if (8 * first >= task.rows) break;
      std::uint32_t row[kBatch];
      float4 f[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        row[i] = this->rows()[8 * (first + i) + lane_ / 4];
        f[i] = factors_of<kWay>(first + i);
      }
      std::uint32_t words[kBatch][kWords<kKind>];
#pragma unroll
      for (int i = 0; i < kBatch; ++i)
        words_of<kKind, kWay>({sum, first + i}, f[i], terms, words[i]);
#pragma unroll
      for (int i = 0; i < kBatch; ++i)
        put<kKind, kWay>(row[i], c + std::uint64_t{row[i]} * stride, terms, words[i]);
    }
  }

  // Tokens 8 j to 8 j + 7.
  struct Octet {
    const Sums& sum;
    int j;
    // Of block b, its lower or upper eight rows, and one of this thread's two tokens.
    __device__ float operator()(int b, int half, int token) const {
      return sum[b][4 * j + 2 * half + token];
    }
  };

  // What this thread has of token 8 j + lane / 4: neighbouring columns, two in a word. Quantized on
  // the plain way: four, in words[0].
  template <Activation kKind, Way kWay>
  __device__ __forceinline__ void words_of(const Octet& octet, const float4& f, const Terms& terms,
                                           std::uint32_t (&words)[kWords<kKind>]) const {
    constexpr bool kAny = kWay == Way::kAny;
    const OutType type = kAny ? p_.c_type : kPlainType;
    const ActivationTerms activation = this->template terms_now<kKind>();
    float done[2][2][2];  // [block][half; gated: 0][token]
#pragma unroll
    for (int b = 0; b < 2; ++b) {
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        float v[2];  // of both halves
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float2 row = terms.row[b][h];
          const float scale = kAny ? row.x * (t ? f.z : f.x) : row.x;
          v[h] = fmaf(octet(b, h, t), scale, row.y);
        }
        const float weight = t ? f.w : f.y;
        if constexpr (is_gated(kKind)) {
          const bool swap = kAny && p_.up_first;
          done[b][0][t] = activate<kKind>(swap ? v[1] : v[0], swap ? v[0] : v[1], activation);
          if constexpr (kAny) done[b][0][t] *= weight;
        } else {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            done[b][h][t] = activate<kKind>(v[h], v[h], activation);
            if constexpr (kAny) done[b][h][t] *= weight;
          }
        }
      }
    }
    if constexpr (kWay == Way::kPlainQuantized) {
      // A token's columns of both blocks are neighbours: as one element of 16 bits they change
      // sides together.
      std::uint32_t pair[2];
#pragma unroll
      for (int t = 0; t < 2; ++t)
        pair[t] = to_e4m3(type, pack16(type, done[0][0][t], done[1][0][t]), terms.inverse);
      words[0] = ptx::transposed(pair[0] | pair[1] << 16);
    } else {
      std::uint32_t part[2][2];
#pragma unroll
      for (int b = 0; b < 2; ++b) {
#pragma unroll
        for (int h = 0; h < (is_gated(kKind) ? 1 : 2); ++h)
          part[b][h] = ptx::transposed(pack16(type, done[b][h][0], done[b][h][1]));
      }
      if constexpr (is_gated(kKind)) {
        words[0] = __byte_perm(part[0][0], part[1][0], 0x5410);
        words[1] = __byte_perm(part[0][0], part[1][0], 0x7632);
      } else {
#pragma unroll
        for (int b = 0; b < 2; ++b) {
          words[b] = __byte_perm(part[b][0], part[b][1], 0x5410);
          words[2 + b] = __byte_perm(part[b][0], part[b][1], 0x7632);
        }
      }
    }
  }

  // Eight neighbouring columns of a row of C, or four.
  template <Activation kKind, Way kWay>
  __device__ __forceinline__ void put(std::uint32_t row, char* at, const Terms& terms,
                                      const std::uint32_t (&words)[kWords<kKind>]) const {
    static_assert(kNoRow == ptx::kNowhere);
    if constexpr (kWay == Way::kPlainQuantized) {
      ptx::store_row(row, at, words[0]);
    } else if constexpr (is_gated(kKind)) {
      if (kWay == Way::kPlain || !terms.quantized)
        ptx::store_row(row, at, words[0], words[1]);
      else
        ptx::store_row(row, at, to_e4m3(p_.c_type, uint2{words[0], words[1]}, terms.inverse));
    } else if (kWay == Way::kPlain || !terms.quantized) {
      ptx::store_row(row, at, words[0], words[1], words[2], words[3]);
    } else {
      const uint2 eight =
          to_e4m3(p_.c_type, uint4{words[0], words[1], words[2], words[3]}, terms.inverse);
      ptx::store_row(row, at, eight.x, eight.y);
    }
  }
};

}  // namespace moesaic::cuda::sm90
