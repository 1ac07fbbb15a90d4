// SPDX-License-Identifier: Apache-2.0
// From fp32 accumulators to rows of C: scale, bias, activation, row weight, cast, in this order,
// and the transposition (an accumulator has weight rows across lanes, C has them along a row).
#pragma once

#include "cuda/sm90/epilogue_staged.h"

namespace moesaic::cuda::sm90 {

template <typename S>
class Epilogue : public StagedEpilogue<S> {
 public:
  using Base = StagedEpilogue<S>;
  using Base::Base;

  using Base::kBlocks;
  using Base::kTokens;

  __device__ void finish(const Task& task, float (&sum)[kBlocks][kTokens / 2]) {
    this->meet_terms();
    const bool fused = p_.activates;
    if (p_.store == StorePath::kMatrix && !fused) {
      store_matrix<Activation::kIdentity>(task, sum, {});
    } else if (p_.store == StorePath::kMatrix && p_.activation.kind == Activation::kSwiglu) {
      store_matrix<Activation::kSwiglu>(task, sum, {});
    } else if (p_.store == StorePath::kMatrix && has_terms(p_.activation.kind)) {
      store_matrix<Activation::kSwigluOai>(task, sum, p_.activation.terms(task.expert));
    } else {
      store_staged(task, sum);
    }
  }

 protected:
  using Base::buffer;
  using Base::column;
  using Base::element;
  using Base::inverse_scale;
  using Base::lane_;
  using Base::limit;
  using Base::p_;
  using Base::quantizes;
  using Base::row_terms;
  using Base::rows;
  using Base::scaled;
  using Base::store_staged;
  using Base::sync;
  using Base::thread_;
  using Base::warp_;
  using typename Base::Quad;

  // 16-bit C whose rows are contiguous and aligned. Everything happens in registers, two tokens are
  // packed and transposed by stmatrix; then 64 or 128 bytes of each token leave in 16-byte stores.
  template <Activation kKind>
  __device__ void store_matrix(const Task& task, float (&sum)[kBlocks][kTokens / 2],
                               const ActivationTerms& terms) {
    constexpr bool kGated = is_gated(kKind);
    constexpr int kChunk = kTokens < 32 ? kTokens : S::kEpilogueTokens;
    // Blocks that leave together: gated, two of them are 128 bytes of a token.
    constexpr int kTogether = kGated ? kBlocks : 1;
    static_assert(kTogether * (kGated ? 64 : 128) < S::kPitch);
    constexpr int kUnits = kGated ? 4 * kTogether : 8;  // of 16 bytes, per token
    const std::int64_t end = limit(task);
    const int g = lane_ / 4;
    const bool swap = p_.up_first;
    // Lane l stores row l % 8 of matrix l / 8; matrices: token octets (and, ungated, rows + 8).
    const int octet = kGated ? lane_ / 8 % 2 : lane_ / 16;
    const int unit = kGated ? warp_ : warp_ * 2 + lane_ / 8 % 2;
    const std::uint32_t mine = (octet * 8 + lane_ % 8) * S::kPitch + unit * 16;
    // Buffers alternate over the chunks that really come, so that no chunk is written where the one
    // before it may still be read: only one sync lies between them.
    const int chunks = (task.rows + kChunk - 1) / kChunk;
    // Scaled, activated and packed, transposed by stmatrix.
    const auto stage = [&](int first_block, int chunk, unsigned char* out) {
#pragma unroll
      for (int b = first_block; b < first_block + kTogether; ++b) {
        const float2 low = row_terms()[b * 64 + warp_ * 16 + g];
        const float2 high = row_terms()[b * 64 + warp_ * 16 + g + 8];
        const std::uint32_t at = ptx::shared_address(out) + mine + (b - first_block) * 64;
#pragma unroll
        for (int pair = 0; pair < kChunk / 16; ++pair) {
          std::uint32_t packed[4];
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const Quad x = scaled(sum[b], chunk * (kChunk / 8) + pair * 2 + half, low, high);
            if constexpr (kGated) {
              const float even =
                  activate<kKind>(swap ? x.v[2] : x.v[0], swap ? x.v[0] : x.v[2], terms);
              const float odd =
                  activate<kKind>(swap ? x.v[3] : x.v[1], swap ? x.v[1] : x.v[3], terms);
              packed[half] = pack16(p_.c_type, even * x.post[0], odd * x.post[1]);
            } else {
              packed[2 * half] = pack16(p_.c_type, x.v[0] * x.post[0], x.v[1] * x.post[1]);
              packed[2 * half + 1] = pack16(p_.c_type, x.v[2] * x.post[0], x.v[3] * x.post[1]);
            }
          }
          const std::uint32_t dst = at + pair * 16 * S::kPitch;
          if constexpr (kGated) {
            ptx::store_matrix_x2_transposed(dst, packed[0], packed[1]);
          } else {
            ptx::store_matrix_x4_transposed(dst, packed[0], packed[1], packed[2], packed[3]);
          }
        }
      }
    };
    // What a thread stores of a chunk.
    constexpr int kAll = kChunk * kUnits, kMine = (kAll + 127) / 128;
    const auto is_mine = [&](int i) { return kAll % 128 == 0 || thread_ + i * 128 < kAll; };
#pragma unroll
    for (int first_block = 0; first_block < kBlocks; first_block += kTogether) {
      const std::int64_t first = column(task, first_block);
      const int before = first_block / kTogether * chunks;
      stage(first_block, 0, buffer(before & 1));
      if constexpr (kTokens == kChunk) {  // nothing to hide behind: fewer registers
        sync();
#pragma unroll
        for (int i = thread_; i < kAll; i += 128) {
          const std::uint32_t row = rows()[i / kUnits];
          const std::int64_t n = first + i % kUnits * 8;
          if (row != kNoRow && n < end)
            store_eight(row, n,
                        *reinterpret_cast<const uint4*>(buffer(before & 1) +
                                                        i / kUnits * S::kPitch + i % kUnits * 16));
        }
      } else {
#pragma unroll
        for (int chunk = 0; chunk < kTokens / kChunk; ++chunk) {
          if (chunk * kChunk < task.rows) {
            unsigned char* const out = buffer((before + chunk) & 1);
            const bool more = (chunk + 1) * kChunk < kTokens && (chunk + 1) * kChunk < task.rows;
            std::uint32_t row[kMine];
#pragma unroll
            for (int i = 0; i < kMine; ++i) {
              const int token = (thread_ + i * 128) / kUnits;
              row[i] = is_mine(i) ? rows()[chunk * kChunk + token] : kNoRow;
            }
            sync();
            // Read, and on its way to memory when the next chunk is staged: nothing waits for it.
            uint4 v[kMine];
#pragma unroll
            for (int i = 0; i < kMine; ++i) {
              const int at = thread_ + i * 128;
              if (is_mine(i))
                v[i] = *reinterpret_cast<const uint4*>(out + at / kUnits * S::kPitch +
                                                       at % kUnits * 16);
            }
            if (more) stage(first_block, chunk + 1, buffer((before + chunk + 1) & 1));
#pragma unroll
            for (int i = 0; i < kMine; ++i) {
              const std::int64_t n = first + (thread_ + i * 128) % kUnits * 8;
              if (row[i] != kNoRow && n < end) store_eight(row[i], n, v[i]);
            }
          }
        }
      }
    }
  }

  // Eight neighbouring values of a row of C whose rows are contiguous and aligned.
  __device__ void store_eight(std::uint32_t row, std::int64_t n, const uint4& v) const {
    const std::uint64_t at = element(row, n);
    if (quantizes()) {
      *reinterpret_cast<uint2*>(static_cast<char*>(p_.c) + at) =
          to_e4m3(p_.c_type, v, *inverse_scale());
    } else {
      *reinterpret_cast<uint4*>(static_cast<char*>(p_.c) + 2 * at) = v;
    }
  }
};

}  // namespace moesaic::cuda::sm90
