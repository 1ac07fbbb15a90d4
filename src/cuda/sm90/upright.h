// SPDX-License-Identifier: Apache-2.0
// Block-scaled e4m3 with the sides exchanged: tokens on wgmma's 64-row side, 128 weight rows of a
// warpgroup on the other. The bits are the same.
//
// A thread then meets two tokens and two cells of weight scales, so that four products make all
// factors of a batch. Elsewhere it is 32 tokens: 16 loads of scales and 64 multiplications a batch,
// and the loads alone took a third of what shared memory delivers. Worth it even where most of a
// second block of 64 tokens is empty.
#pragma once

#include "cuda/sm90/loader.h"

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

}  // namespace moesaic::cuda::sm90
