// SPDX-License-Identifier: Apache-2.0
// 16-bit values to e4m3, on their way from a product's epilogue to C: the bits of the quantizers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

#include "cuda/eight_bit.h"
#include "cuda/sm90/gemm.h"
#include "cuda/sm90/ptx.h"

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

}  // namespace moesaic::cuda::sm90
