// SPDX-License-Identifier: Apache-2.0
// Block-scaled e4m3 with the sides exchanged: tokens on wgmma's 64-row side, 128 weight rows of a
// warpgroup on the other. The bits are the same.
//
// A thread then meets two tokens and two cells of weight scales, so that four products make all
// factors of a batch. Elsewhere it is 32 tokens: 16 loads of scales and 64 multiplications a batch,
// and the loads alone took a third of what shared memory delivers. Worth it even where most of a
// second block of 64 tokens is empty.
#pragma once

#include "cuda/gemm_sm90_loader.h"

namespace moesaic::cuda::sm90 {

__device__ inline bool runs_upright(const Params& p, int rows) { return p.upright && rows > 48; }

// The first of this thread's tokens in block 0.
__device__ inline int upright_token(int thread) { return thread / 32 * 16 + thread % 32 / 4; }

// Scales of a stage of one block of 64 tokens: of this thread's two tokens, and of the cells of the
// first two octets of weight rows (and so of all that follow).
struct UprightScales {
  float low, high;
  float2 cell;
};
// `scale`: of this thread's first token; the second is eight further.
__device__ __forceinline__ UprightScales upright_scales(const Params& p, const float* scale,
                                                        const float* cells) {
  if (!p.block_scaled) return {};
  return {scale[0], scale[8], *reinterpret_cast<const float2*>(cells)};
}

// Adds what a batch made to the block's sums. The host sends only block-scaled stages here; that
// they are is asked once more, and answered for the others, too, because of where the branch
// stands: it keeps the scales' four products behind the wait for the batch. In straight-line code
// ptxas moves them up in front of the batch's last instruction, which then stands still until the
// scales have come: 6% of the product.
__device__ __forceinline__ void promote_upright(const Params& p, float (&sum)[64],
                                                const float (&part)[64],
                                                const UprightScales& scales) {
  if (!p.block_scaled) {
#pragma unroll
    for (int j = 0; j < 64; ++j) sum[j] += part[j];
    return;
  }
  const float4 s{scales.low * scales.cell.x, scales.high * scales.cell.x,
                 scales.low * scales.cell.y, scales.high * scales.cell.y};
#pragma unroll
  for (int j = 0; j < 64; j += 8) {
    sum[j] = fmaf(part[j], s.x, sum[j]);
    sum[j + 1] = fmaf(part[j + 1], s.x, sum[j + 1]);
    sum[j + 2] = fmaf(part[j + 2], s.y, sum[j + 2]);
    sum[j + 3] = fmaf(part[j + 3], s.y, sum[j + 3]);
    sum[j + 4] = fmaf(part[j + 4], s.z, sum[j + 4]);
    sum[j + 5] = fmaf(part[j + 5], s.z, sum[j + 5]);
    sum[j + 6] = fmaf(part[j + 6], s.w, sum[j + 6]);
    sum[j + 7] = fmaf(part[j + 7], s.w, sum[j + 7]);
  }
}

template <typename S>
class UprightEpilogue : public Epilogue<S> {
 public:
  static_assert(S::kBlocks == 2 && S::kTokens == 128 && S::kChunks == 1);
  using Epilogue<S>::Epilogue;

  __device__ void finish(const Task& task, float (&sum)[2][64]) {
    this->sync();
    if (!this->p_.activates) {
      store<Activation::kIdentity>(task, sum, {});
    } else if (this->p_.activation.kind == Activation::kSwiglu) {
      store<Activation::kSwiglu>(task, sum, {});
    } else {
      store<Activation::kSwigluOai>(task, sum, this->p_.activation.terms(task.expert));
    }
  }

 private:
  // A warp has 16 tokens of each block to itself, and stages 64 of their columns at a time.
  template <Activation kKind>
  __device__ void store(const Task& task, float (&sum)[2][64], const ActivationTerms& terms) {
    constexpr bool kGated = is_gated(kKind);
    static_assert(2 * S::kBufferBytes >= 4 * 16 * S::kPitch);
    unsigned char* const out = this->shared_ + this->warp_ * 16 * S::kPitch;
    // Lane l stores row l % 8 of matrix l / 8; matrices: token octets, then column octets.
    const int lane = this->lane_;
    const std::uint32_t at =
        ptx::shared_address(out) + (lane / 8 % 2 * 8 + lane % 8) * S::kPitch + lane / 16 * 16;
    const std::int64_t first = this->column(task, 0), end = this->limit(task);
    const bool swap = this->p_.up_first;
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      if (b * 64 >= task.rows) break;
      const int token = b * 64 + this->warp_ * 16;
      const float2* const factors = this->factors() + token + lane / 4;
      const float2 f[2] = {factors[0], factors[8]};
#pragma unroll
      for (int half = 0; half < (kGated ? 1 : 2); ++half) {
        __syncwarp();  // what was staged before has been read
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
          std::uint32_t packed[4];
#pragma unroll
          for (int octet = 0; octet < 2; ++octet) {
            const int j = kGated ? (pair * 2 + octet) * 2 : half * 8 + pair * 2 + octet;
            const float4 row = column_terms(j);
            const float4 up = kGated ? column_terms(j + 1) : row;
#pragma unroll
            for (int r = 0; r < 2; ++r) {
              float v[2] = {fmaf(sum[b][4 * j + 2 * r], row.x * f[r].x, row.y),
                            fmaf(sum[b][4 * j + 2 * r + 1], row.z * f[r].x, row.w)};
              if constexpr (kGated) {
                const float u[2] = {fmaf(sum[b][4 * j + 4 + 2 * r], up.x * f[r].x, up.y),
                                    fmaf(sum[b][4 * j + 5 + 2 * r], up.z * f[r].x, up.w)};
#pragma unroll
                for (int e = 0; e < 2; ++e)
                  v[e] = activate<kKind>(swap ? u[e] : v[e], swap ? v[e] : u[e], terms);
              }
              packed[octet * 2 + r] = pack16(this->p_.c_type, v[0] * f[r].y, v[1] * f[r].y);
            }
          }
          ptx::store_matrix_x4(at + pair * 32, packed[0], packed[1], packed[2], packed[3]);
        }
        __syncwarp();
        if constexpr (S::kHasGroups && kGated) {
          if (this->p_.quantizer.kind == Quantizes::kGroup) {
            store_groups<S, 4, 4>(
                this->p_, this->staged_groups(task, {.rows = out, .token = token, .more = b}));
            continue;
          }
        }
#pragma unroll
        for (int i = lane; i < 16 * 8; i += 32) {
          const std::uint32_t row = this->rows()[token + i / 8];
          const std::int64_t n = first + half * 64 + i % 8 * 8;
          if (row != kNoRow && n < end) {
            const std::uint64_t offset =
                std::uint64_t{row} * static_cast<std::uint32_t>(this->p_.c_rows.stride);
            *reinterpret_cast<uint4*>(static_cast<char*>(this->p_.c) + 2 * (offset + n)) =
                *reinterpret_cast<const uint4*>(out + i / 8 * S::kPitch + i % 8 * 16);
          }
        }
      }
    }
  }
  // Factor and bias of this thread's two weight rows in octet j.
  __device__ float4 column_terms(int j) const {
    return *reinterpret_cast<const float4*>(this->row_terms() + 8 * j + 2 * (this->lane_ % 4));
  }
};

}  // namespace moesaic::cuda::sm90
