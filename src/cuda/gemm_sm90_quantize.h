// SPDX-License-Identifier: Apache-2.0
// 16-bit values to e4m3, on their way from a product's epilogue to C: the bits of the quantizers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

#include "cuda/eight_bit.h"
#include "cuda/gemm_sm90.h"
#include "cuda/ptx_sm90.h"

namespace moesaic::cuda::sm90 {

// A pair; the first of both is in the low half.
__device__ __forceinline__ std::uint32_t to_e4m3(OutType from, std::uint32_t pair, float inverse) {
  float2 v;
  if (from == OutType::kBF16) {
    v = {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
  } else {
    v = __half22float2(*reinterpret_cast<const __half2*>(&pair));
  }
  return __nv_cvt_float2_to_fp8x2({v.x * inverse, v.y * inverse}, __NV_SATFINITE, __NV_E4M3);
}
__device__ __forceinline__ std::uint32_t to_e4m3(OutType from, uint2 four, float inverse) {
  return to_e4m3(from, four.x, inverse) | to_e4m3(from, four.y, inverse) << 16;
}
__device__ __forceinline__ uint2 to_e4m3(OutType from, const uint4& eight, float inverse) {
  return {to_e4m3(from, uint2{eight.x, eight.y}, inverse),
          to_e4m3(from, uint2{eight.z, eight.w}, inverse)};
}

// Rows that a warp has staged: 64 columns of 16 bits, S::kPitch apart. Eight lanes share a row.
struct StagedGroups {
  unsigned char* rows;
  std::ptrdiff_t other;        // from there to the same rows in the other warpgroup
  int slot;                    // 0 to 3: another than in the exchange before
  const std::uint32_t* c_row;  // of the first
  std::int64_t first, end;     // columns of this warpgroup's half; behind the last of C
  std::int64_t group;
};

// The two warpgroups of a CTA each have 64 of the 128 columns of a group. Warp w of one and warp w
// of the other hold the same tokens, so these two alone meet to tell each other what their largest
// is: in the 16 bytes behind a staged row. Once is enough: that no largest is overwritten before it
// has been read follows from the next meeting, which uses another slot or another buffer. (Every
// task that takes a turn of Task::flip has a meeting, so none is skipped.)
// kRows staged rows for each lane, kStep apart.
template <typename S, int kRows, int kStep>
__device__ __forceinline__ void store_groups(const Params& p, const StagedGroups& staged) {
  static_assert(S::kPitch == 144 && S::kHasGroups);
  const int thread = ptx::thread_index(), lane = thread % 32, warp = thread / 32 % 4;
  const std::int64_t n = staged.first + lane % 8 * 8;
  const bool inside = n < staged.end;
  unsigned char* const mine = staged.rows + lane / 8 * S::kPitch;
  uint4 v[kRows];
  unsigned top[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    unsigned char* const row = mine + i * kStep * S::kPitch;
    v[i] = inside ? *reinterpret_cast<const uint4*>(row + lane % 8 * 16) : uint4{};
    top[i] = largest_of_eight(v[i]);
#pragma unroll
    for (int offset = 4; offset > 0; offset /= 2)
      top[i] = max(top[i], __shfl_xor_sync(~0u, top[i], offset));
    if (lane % 8 == 0) reinterpret_cast<unsigned*>(row + 128)[staged.slot] = top[i];
  }
  ptx::pair_of_warps_sync(3 + warp);
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    const unsigned char* const row = mine + i * kStep * S::kPitch + staged.other;
    const auto half = static_cast<unsigned short>(
        max(top[i], reinterpret_cast<const unsigned*>(row + 128)[staged.slot]));
    const unsigned absmax =
        p.c_type == OutType::kBF16
            ? unsigned{half} << 16
            : __float_as_uint(__half2float(*reinterpret_cast<const __half*>(&half)));
    const float scale = scale_of(DType::kF8E4M3, absmax);
    const std::uint32_t c_row = staged.c_row[lane / 8 + i * kStep];
    if (c_row == kNoRow) continue;
    if (thread < 256 && lane % 8 == 0)
      p.quantizer.scale[c_row * p.quantizer.row_stride + staged.group] = scale;
    if (inside) {
      const std::uint64_t at =
          std::uint64_t{c_row} * static_cast<std::uint32_t>(p.c_rows.stride) + n;
      *reinterpret_cast<uint2*>(static_cast<char*>(p.c) + at) =
          to_e4m3(p.c_type, v[i], inverse_of(scale));
    }
  }
}

}  // namespace moesaic::cuda::sm90
