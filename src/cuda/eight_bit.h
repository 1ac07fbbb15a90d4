// SPDX-License-Identifier: Apache-2.0
// What an 8-bit number is, for the quantizers and for products that quantize what they write. The
// formulas are numeric.h's: element for element the bits of the CPU backend.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "moesaic/types.h"

namespace moesaic::cuda {

// Magnitudes compare as integers, and a NaN is the largest of them.
__device__ __forceinline__ unsigned magnitude(float v) { return __float_as_uint(v) & 0x7fffffffu; }
__device__ __forceinline__ unsigned finite_magnitude(float v) {
  const unsigned m = magnitude(v);
  return m < 0x7f800000u ? m : 0u;
}

// The largest magnitude of eight f16 or bf16, as their bits: they compare as integers in pairs.
__device__ __forceinline__ unsigned largest_of_eight(const uint4& raw) {
  constexpr unsigned kNoSigns = 0x7fff7fffu;
  const unsigned both = __vmaxu2(__vmaxu2(raw.x & kNoSigns, raw.y & kNoSigns),
                                 __vmaxu2(raw.z & kNoSigns, raw.w & kNoSigns));
  return max(both & 0xffffu, both >> 16);
}

// absmax / 448 or / 127, rounded once as by a division (checked for every float from 1e-10 on): the
// product with the reciprocal is off by one ulp at most, and the remainder, which an fma finds
// exactly, says by how much.
__device__ __forceinline__ float scale_of(DType to, unsigned absmax) {
  const bool e4m3 = to == DType::kF8E4M3;
  const float most = e4m3 ? 448.0f : 127.0f, reciprocal = e4m3 ? 1.0f / 448.0f : 1.0f / 127.0f;
  float a = __uint_as_float(absmax);
  a = a < 1e-10f ? 1e-10f : a;
  const float near = a * reciprocal;
  const float exact = fmaf(fmaf(-near, most, a), reciprocal, near);
  return absmax < 0x7f800000u ? exact : near;  // infinities and NaN have no remainder
}
__device__ __forceinline__ float inverse_of(float scale) {
  if (scale == 0.0f) return 0.0f;
  const float inverse = 1.0f / scale;
  constexpr float kMax = 3.402823466e38f;
  return inverse > kMax ? kMax : inverse < -kMax ? -kMax : inverse;
}

// To the nearest, halves away from zero; saturated; NaN becomes 0.
__device__ __forceinline__ std::int8_t to_i8(float scaled) {
  if (!(scaled > -128.0f)) return scaled == scaled ? -128 : 0;
  if (scaled >= 127.0f) return 127;
  const float whole = truncf(scaled), rest = scaled - whole;
  return static_cast<std::int8_t>(static_cast<int>(whole) + (rest >= 0.5f) - (rest <= -0.5f));
}
__device__ __forceinline__ std::int8_t to_i8_truncated(float x, float scale) {
  const float quotient = scale == 0.0f ? 0.0f : x / scale;
  if (!(quotient > -128.0f)) return quotient == quotient ? -128 : 0;
  return quotient >= 127.0f ? 127 : static_cast<std::int8_t>(static_cast<int>(quotient));
}

}  // namespace moesaic::cuda
