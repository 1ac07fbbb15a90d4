// SPDX-License-Identifier: Apache-2.0
// Scalar conversions between float and the storage types, round to nearest even: the one host-side
// owner of what a bit pattern means. (CUDA code uses the toolkit's own types.)
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

namespace moesaic {

// --- bf16 ---------------------------------------------------------------------------------------
inline float bf16_to_float(std::uint16_t h) { return std::bit_cast<float>(std::uint32_t{h} << 16); }
inline std::uint16_t float_to_bf16(float f) {
  const auto u = std::bit_cast<std::uint32_t>(f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<std::uint16_t>((u >> 16) | 0x40u);  // NaN
  return static_cast<std::uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

// --- f16 ----------------------------------------------------------------------------------------
inline float f16_to_float(std::uint16_t h) {
  const std::uint32_t sign = std::uint32_t{h & 0x8000u} << 16;
  const std::uint32_t exponent = (h >> 10) & 0x1fu, mantissa = h & 0x3ffu;
  if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24
    const float v = static_cast<float>(mantissa) * 0x1p-24f;
    return std::bit_cast<float>(std::bit_cast<std::uint32_t>(v) | sign);
  }
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000u | (mantissa << 13));
  return std::bit_cast<float>(sign | ((exponent + 112u) << 23) | (mantissa << 13));
}
inline std::uint16_t float_to_f16(float f) {
  const auto u = std::bit_cast<std::uint32_t>(f);
  const auto sign = static_cast<std::uint16_t>((u >> 16) & 0x8000u);
  const std::uint32_t a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return static_cast<std::uint16_t>(sign | 0x7e00u);
  if (a >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7c00u);  // rounds to infinity
  if (a < 0x38800000u) {  // below 2^-14: the FPU rounds to a multiple of 2^-24 for us
    const float magic = std::bit_cast<float>(a) + 0.5f;
    return static_cast<std::uint16_t>(sign | (std::bit_cast<std::uint32_t>(magic) - 0x3f000000u));
  }
  return static_cast<std::uint16_t>(sign | ((a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13));
}

// --- fp8 e4m3 (finite, 448 max, 0x7f/0xff NaN) ---------------------------------------------------
inline constexpr float kE4M3Max = 448.0f;
inline float e4m3_to_float(std::uint8_t b) {
  const std::uint32_t sign = std::uint32_t{b & 0x80u} << 24;
  const std::uint32_t exponent = (b >> 3) & 0xfu, mantissa = b & 7u;
  if (exponent == 15 && mantissa == 7) return std::numeric_limits<float>::quiet_NaN();
  if (exponent == 0) {
    const float v = static_cast<float>(mantissa) * 0x1p-9f;
    return std::bit_cast<float>(std::bit_cast<std::uint32_t>(v) | sign);
  }
  return std::bit_cast<float>(sign | ((exponent + 120u) << 23) | (mantissa << 20));
}
// Saturates: what is beyond 448 becomes 448; NaN stays NaN.
inline std::uint8_t float_to_e4m3(float f) {
  const auto u = std::bit_cast<std::uint32_t>(f);
  const auto sign = static_cast<std::uint8_t>((u >> 24) & 0x80u);
  const std::uint32_t a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return static_cast<std::uint8_t>(sign | 0x7fu);
  if (a >= 0x43e00000u) return static_cast<std::uint8_t>(sign | 0x7eu);
  if (a < 0x3c800000u) {  // below 2^-6: round to a multiple of 2^-9
    const float magic = std::bit_cast<float>(a) + 0x1p14f;
    return static_cast<std::uint8_t>(sign | (std::bit_cast<std::uint32_t>(magic) & 0xfu));
  }
  const std::uint32_t rounded = (a - 0x3c000000u + 0x7ffffu + ((a >> 20) & 1u)) >> 20;
  return static_cast<std::uint8_t>(sign | (rounded > 0x7eu ? 0x7eu : rounded));
}

// --- 8-bit activations: how a scale and its numbers are made (contracts, "Quantizers") ------------
// One rule for every granularity: scale = max(absmax, 1e-10) / (448 or 127), q = round(x * (1/scale)).
// e4m3 rounds to nearest even; int8 to nearest, halves away from zero. The floor under absmax keeps
// 1/scale finite (a naive 448/absmax overflows for tiny rows); a NaN absmax gives a NaN scale.
inline constexpr float kI8Max = 127.0f;
inline constexpr float kMinAbsmax = 1e-10f;
inline float activation_scale(float absmax, float largest) {
  return (absmax < kMinAbsmax ? kMinAbsmax : absmax) / largest;
}
// Of a caller's static scale, too: 0 (an expert nobody calibrated) gives 0, so that it yields zeros
// instead of 0 * inf; a subnormal scale saturates.
inline float inverse_scale(float scale) {
  if (scale == 0.0f) return 0.0f;
  const float inverse = 1.0f / scale;
  constexpr float kMax = std::numeric_limits<float>::max();
  return inverse > kMax ? kMax : inverse < -kMax ? -kMax : inverse;
}
// `scaled` is x * inverse_scale(scale). Saturates to [-128, 127]; NaN becomes 0.
inline std::int8_t float_to_i8(float scaled) {
  if (!(scaled > -128.0f)) return scaled == scaled ? std::int8_t{-128} : std::int8_t{0};
  if (scaled >= 127.0f) return 127;
  const float whole = std::trunc(scaled);  // scaled - whole is exact; adding 0.5 first would not be
  const float rest = scaled - whole;
  return static_cast<std::int8_t>(whole + (rest >= 0.5f ? 1.0f : rest <= -0.5f ? -1.0f : 0.0f));
}
// Int8Rounding::kTruncate, the original's group quantizer: a true division, then toward zero.
inline std::int8_t float_to_i8_truncate(float x, float scale) {
  const float quotient = scale == 0.0f ? 0.0f : x / scale;
  if (!(quotient > -128.0f)) return quotient == quotient ? std::int8_t{-128} : std::int8_t{0};
  return quotient >= 127.0f ? std::int8_t{127} : static_cast<std::int8_t>(std::trunc(quotient));
}

// --- MX: e2m1 values, E8M0 scales ----------------------------------------------------------------
inline constexpr float kE2M1[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                                    -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};
inline float e8m0_to_float(std::uint8_t b) {
  if (b == 0xff) return std::numeric_limits<float>::quiet_NaN();
  return std::ldexp(1.0f, static_cast<int>(b) - 127);
}

}  // namespace moesaic
