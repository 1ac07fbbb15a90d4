// SPDX-License-Identifier: Apache-2.0
// The epilogue of tokens on the 64-row side: rows of C straight from the sums.
//
// The weight rows lie as sm90/direct.h says, and a thread here has rows s = 2q and 2q + 1 of
// all units of 16 or 32 columns, so eight columns of each unit are neighbours, or four where gated:
// of two tokens of each block. Nothing is exchanged but the largest magnitudes of groups.
#pragma once

#include "cuda/sm90/groups.h"

namespace moesaic::cuda::sm90 {

template <typename S>
class UprightEpilogue : public GroupsEpilogue<S> {
 public:
  using Base = GroupsEpilogue<S>;
  using Base::Base;
  using typename Base::Way;
  using Sums = float[2][64];

  __device__ __forceinline__ void finish(const Task& task, const Sums& sum) {
    this->meet_terms();
    const Activation kind = p_.activates ? p_.activation.kind : Activation::kIdentity;
    if (kind == Activation::kIdentity) {
      store_either<Activation::kIdentity>(task, sum);
    } else if (kind == Activation::kSwiglu) {
      store_either<Activation::kSwiglu>(task, sum);
    } else {
      store_either<Activation::kSwigluOai>(task, sum);
    }
  }

 private:
  using Base::lane_;
  using Base::p_;
  using Base::warp_;
  template <Activation kKind>
  static constexpr int kWords = is_gated(kKind) ? 2 : 4;  // of a unit
  static constexpr int kUnits = 4;

  template <Activation kKind>
  __device__ __forceinline__ void store_either(const Task& task, const Sums& sum) {
    if (p_.direct == Direct::kPlain)
      store<kKind, Way::kPlain>(task, sum);
    else
      store<kKind, Way::kAny>(task, sum);
  }

  template <Activation kKind, Way kWay>
  __device__ __forceinline__ void store(const Task& task, const Sums& sum) {
    constexpr int kColumns = is_gated(kKind) ? 16 : 32;  // of a unit: inside of C all or none
    const bool groups = is_gated(kKind) && p_.quantizer.kind == Quantizes::kGroup;
    const std::int64_t n = this->column(task, 0), end = this->limit(task);
    int shift = groups ? 0 : 1;
    ptx::opaque(shift);
    char* c = static_cast<char*>(p_.c) + ((n + lane_ % 4 * 2 * kWords<kKind>) << shift);
    ptx::opaque(c);
    const std::uint32_t stride = static_cast<std::uint32_t>(p_.c_rows.stride) << shift;
    const int units = end - n >= kUnits * kColumns
                          ? kUnits
                          : (end > n ? static_cast<int>(end - n) / kColumns : 0);
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      if (b * 64 >= task.rows) break;
      const int token = b * 64 + warp_ * 16 + lane_ / 4;
      float2 f[2] = {{1.0f, 1.0f}, {1.0f, 1.0f}};
      if constexpr (kWay == Way::kAny) {
        f[0] = this->factors()[token];
        f[1] = this->factors()[token + 8];
      }
      std::uint32_t words[2][kUnits][kWords<kKind>];  // of two tokens
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
#pragma unroll
        for (int r = 0; r < 2; ++r) words_of<kKind, kWay>({sum[b], u, r}, f[r], words[r][u]);
      }
      const std::uint32_t row[2] = {this->rows()[token], this->rows()[token + 8]};
      char* const at[2] = {c + std::uint64_t{row[0]} * stride, c + std::uint64_t{row[1]} * stride};
      if constexpr (is_gated(kKind)) {
        if (groups) {
          float inverse[2];
          meet(task, {b, units}, words, inverse);
#pragma unroll
          for (int r = 0; r < 2; ++r) {
#pragma unroll
            for (int u = 0; u < kUnits; ++u) {
              ptx::store_row(u < units ? row[r] : kNoRow, at[r] + u * kColumns,
                             to_e4m3(p_.c_type, uint2{words[r][u][0], words[r][u][1]}, inverse[r]));
            }
          }
          continue;
        }
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (int u = 0; u < kUnits; ++u) {
          const std::uint32_t (&w)[kWords<kKind>] = words[r][u];
          char* const to = at[r] + 2 * u * kColumns;
          if constexpr (is_gated(kKind))
            ptx::store_row(u < units ? row[r] : kNoRow, to, w[0], w[1]);
          else
            ptx::store_row(u < units ? row[r] : kNoRow, to, w[0], w[1], w[2], w[3]);
        }
      }
    }
  }

  // Unit u of the (r)-th of this thread's tokens of a block.
  struct Unit {
    const float (&sum)[64];
    int u, r;
    // Of one half of the unit's block b: column octet 8 b + 2 u + half, row 2q + e of it.
    __device__ float operator()(int b, int half, int e) const {
      return sum[4 * (8 * b + 2 * u + half) + 2 * r + e];
    }
  };
  // Neighbouring columns, two in a word.
  template <Activation kKind, Way kWay>
  __device__ __forceinline__ void words_of(const Unit& unit, float2 f,
                                           std::uint32_t (&words)[kWords<kKind>]) const {
    constexpr bool kAny = kWay == Way::kAny;
    const OutType type = kAny ? p_.c_type : Base::kPlainType;
    const ActivationTerms terms = this->template terms_now<kKind>();
    float done[2][2][2];  // [block][half; gated: 0][e]
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      float v[2][2];  // [half][e]
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float4 term = column_terms(8 * b + 2 * unit.u + h);
        v[h][0] = fmaf(unit(b, h, 0), kAny ? term.x * f.x : term.x, term.y);
        v[h][1] = fmaf(unit(b, h, 1), kAny ? term.z * f.x : term.z, term.w);
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if constexpr (is_gated(kKind)) {
          const bool swap = kAny && p_.up_first;
          done[b][0][e] =
              activate<kKind>(swap ? v[1][e] : v[0][e], swap ? v[0][e] : v[1][e], terms);
          if constexpr (kAny) done[b][0][e] *= f.y;
        } else {
#pragma unroll
          for (int h = 0; h < 2; ++h) done[b][h][e] = kAny ? v[h][e] * f.y : v[h][e];
        }
      }
    }
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      if constexpr (is_gated(kKind)) {
        words[e] = pack16(type, done[0][0][e], done[1][0][e]);
      } else {
#pragma unroll
        for (int b = 0; b < 2; ++b) words[2 * e + b] = pack16(type, done[b][0][e], done[b][1][e]);
      }
    }
  }
  // Factor and bias of this thread's two weight rows in octet j.
  __device__ float4 column_terms(int j) const {
    return *reinterpret_cast<const float4*>(this->row_terms() + 8 * j + 2 * (lane_ % 4));
  }

  // The scales of the groups of block b. Warp w of one warpgroup and warp w of the other hold the
  // same tokens, so these two alone meet, and once is enough: that no largest is overwritten before
  // it has been read follows from the next meeting, which uses another place. (Every task that
  // takes a turn of Task::term_place has a meeting, so none is skipped.)
  struct Part {
    int b, units;  // units inside of C
  };
  __device__ __forceinline__ void meet(const Task& task, const Part& part,
                                       const std::uint32_t (&words)[2][kUnits][2],
                                       float (&inverse)[2]) const {
    unsigned top[2] = {0, 0};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int u = 0; u < kUnits; ++u)
        top[r] = max(top[r], u < part.units ? largest_of(words[r][u]) : 0u);
    }
    const unsigned mine = largest_of_quad(lane_, top[0], top[1]);  // of token r = lane % 2
    const int token = warp_ * 16 + lane_ % 2 * 8 + lane_ / 4;
    unsigned* const slot = reinterpret_cast<unsigned*>(this->shared_) + 8 * S::kTokens +
                           (this->term_place_ * 2 + part.b) * 64 + token;
    if (lane_ % 4 < 2) *slot = mine;
    ptx::pair_of_warps_sync(3 + warp_);
    const unsigned other = *reinterpret_cast<const unsigned*>(
        reinterpret_cast<const unsigned char*>(slot) + this->to_other());
    const GroupScale s = group_scale(p_.c_type, max(mine, other));
    if (this->warpgroup_ == 0 && lane_ % 4 < 2)
      this->put_scale(this->rows()[part.b * 64 + token], task, s.scale);
#pragma unroll
    for (int r = 0; r < 2; ++r) inverse[r] = __shfl_sync(~0u, s.inverse, lane_ / 4 * 4 + r);
  }
};

}  // namespace moesaic::cuda::sm90
