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
// K, in which the tensor cores stood still. (Where groups are quantized this way lost: what waits
// for its scale does not fit the registers beside the sums. So block scales keep the other.)
//
// Whatever does not lie so (Params::direct) goes by way of fp32 in shared memory: strided or f32
// rows of C, products of no multiple of 32 rows, experts that are apart.
#pragma once

#include "cuda/gemm_sm90_epilogue_staged.h"

namespace moesaic::cuda::sm90 {

template <typename S>
class DirectEpilogue : public StagedEpilogue<S> {
 public:
  static_assert(S::kBlocks == 2 && S::kWarpgroups == 2 && !S::kHasBlockScales);
  using Base = StagedEpilogue<S>;
  using Base::Base;
  using Sums = float[2][S::kTokens / 2];

  __device__ __forceinline__ void finish(const Task& task, Sums& sum) {
    this->sync();  // the rows' terms are there
    if (!p_.direct) {
      this->store_staged(task, sum);
    } else if (!p_.activates) {
      store<Activation::kIdentity>(task, sum, {});
    } else {
      with_activation(p_.activation.kind, [&](auto kind) {
        if constexpr (leaves_directly<S>(decltype(kind)::value))
          store<decltype(kind)::value>(task, sum, p_.activation.terms(task.expert));
      });
    }
  }

 private:
  using Base::lane_;
  using Base::p_;
  using Base::warp_;

  // Words of two columns that a thread has of a token.
  template <Activation kKind>
  static constexpr int kWords = is_gated(kKind) ? 2 : 4;

  template <Activation kKind>
  __device__ __forceinline__ void store(const Task& task, const Sums& sum,
                                        const ActivationTerms& terms) {
    constexpr int kColumns = is_gated(kKind) ? 16 : 32;  // of a warp
    const RowTerms rows = row_terms_of_lane();
    const std::int64_t n = this->column(task, 0) + warp_ * kColumns + lane_ % 4 * 2 * kWords<kKind>;
    const bool inside = n < this->limit(task);
    // In batches without a branch inside, so that the steps of one octet fill the waits of another.
    // What lies behind the last row is made, too, and not stored: its row of C is kNoRow.
    // (Of the long functions one at a time: registers.)
    constexpr bool kShort = kKind == Activation::kIdentity || kKind == Activation::kSwiglu ||
                            kKind == Activation::kSwigluOai;
    constexpr int kBatch = kShort ? 3 : 1;
    static_assert(S::kTokens % (8 * kBatch) == 0);
#pragma unroll
    for (int first = 0; first < S::kTokens / 8; first += kBatch) {
      if (8 * first >= task.rows) break;
      std::uint32_t row[kBatch];
      float4 f[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        row[i] = this->rows()[8 * (first + i) + lane_ / 4];
        f[i] = factors_of(first + i);
      }
      std::uint32_t words[kBatch][kWords<kKind>];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) words_of<kKind>(sum, first + i, rows, f[i], terms, words[i]);
#pragma unroll
      for (int i = 0; i < kBatch; ++i) put<kKind>(row[i] != kNoRow && inside, row[i], n, words[i]);
    }
  }

  struct RowTerms {
    float2 row[2][2];  // factor and bias; of blocks, and of their lower and upper eight rows
  };
  __device__ RowTerms row_terms_of_lane() const {
    RowTerms t;
#pragma unroll
    for (int b = 0; b < 2; ++b) {
#pragma unroll
      for (int h = 0; h < 2; ++h)
        t.row[b][h] = this->row_terms()[b * 64 + warp_ * 16 + h * 8 + lane_ / 4];
    }
    return t;
  }
  // Factors (scale, weight) of two tokens, 8 j + 2 q and the next.
  __device__ float4 factors_of(int j) const {
    return *reinterpret_cast<const float4*>(this->factors() + 8 * j + 2 * (lane_ % 4));
  }

  // What this thread has of token 8 j + lane / 4: neighbouring columns, two in a word.
  template <Activation kKind>
  __device__ __forceinline__ void words_of(const Sums& sum, int j, const RowTerms& rows,
                                           const float4& f, const ActivationTerms& terms,
                                           std::uint32_t (&words)[kWords<kKind>]) const {
    std::uint32_t part[2][2];  // of blocks and halves; gated: [b][0]
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      float v[2][2];  // [half][token]
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float2 row = rows.row[b][h];
        v[h][0] = fmaf(sum[b][4 * j + 2 * h], row.x * f.x, row.y);
        v[h][1] = fmaf(sum[b][4 * j + 2 * h + 1], row.x * f.z, row.y);
      }
      if constexpr (is_gated(kKind)) {
        const int gate = p_.up_first ? 1 : 0;
        float done[2];
#pragma unroll
        for (int t = 0; t < 2; ++t) {
          done[t] = activate<kKind>(gate ? v[1][t] : v[0][t], gate ? v[0][t] : v[1][t], terms);
        }
        part[b][0] = ptx::transposed(pack16(p_.c_type, done[0] * f.y, done[1] * f.w));
      } else {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float even = activate<kKind>(v[h][0], v[h][0], terms);
          const float odd = activate<kKind>(v[h][1], v[h][1], terms);
          part[b][h] = ptx::transposed(pack16(p_.c_type, even * f.y, odd * f.w));
        }
      }
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

  // Eight neighbouring columns of a row of C, or four.
  template <Activation kKind>
  __device__ __forceinline__ void put(bool stored, std::uint32_t row, std::int64_t n,
                                      const std::uint32_t (&words)[kWords<kKind>]) const {
    const std::uint64_t element = this->element(row, n);
    char* const at = static_cast<char*>(p_.c) + (this->quantizes() ? element : 2 * element);
    if constexpr (is_gated(kKind)) {
      if (!this->quantizes()) return ptx::store_if(stored, at, words[0], words[1]);
      if (stored)
        *reinterpret_cast<std::uint32_t*>(at) =
            to_e4m3(p_.c_type, uint2{words[0], words[1]}, *this->inverse_scale());
    } else {
      if (!this->quantizes())
        return ptx::store_if(stored, at, words[0], words[1], words[2], words[3]);
      if (stored)
        *reinterpret_cast<uint2*>(at) = to_e4m3(
            p_.c_type, uint4{words[0], words[1], words[2], words[3]}, *this->inverse_scale());
    }
  }
};

}  // namespace moesaic::cuda::sm90
