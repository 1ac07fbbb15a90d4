// SPDX-License-Identifier: Apache-2.0
// One register of floats at a time, in the compiler's generic vectors: one body that every ISA
// level compiles for itself (src/cpu/isa/). Sums are kept in sixteen lanes on every level, and
// there are no fused multiply-adds: a stage gives the same bits on scalar and on AVX-512.
// Intrinsics lost here: three bodies to keep equal, for stages that wait for memory. (Sixteen-lane
// vectors everywhere lost, too: GCC 12 takes their selects apart element by element below AVX-512,
// 3 to 6 times slower.)
//
// Everything has internal linkage and calls no inline function of another header: the linker must
// never pick an AVX-512 copy of a shared function for a machine without it.
#pragma once

#include <cstdint>
#include <cstring>

#pragma GCC diagnostic ignored "-Wpsabi"  // vectors passed between always_inline functions only

namespace moesaic {
namespace {

#define MOESAIC_LANE static inline __attribute__((always_inline))

#if defined(__AVX512F__)
constexpr std::int64_t kWidth = 16;  // floats in a register
#elif defined(__AVX2__)
constexpr std::int64_t kWidth = 8;
#else
constexpr std::int64_t kWidth = 4;
#endif
constexpr std::int64_t kLanes = 16;               // of a sum, on every level
constexpr std::int64_t kParts = kLanes / kWidth;  // registers that hold them

using F = float __attribute__((vector_size(kWidth * 4)));
using I = std::int32_t __attribute__((vector_size(kWidth * 4)));
using U = std::uint32_t __attribute__((vector_size(kWidth * 4)));
using U16 = std::uint16_t __attribute__((vector_size(kWidth * 2)));
using U8 = std::uint8_t __attribute__((vector_size(kWidth)));
using I8 = std::int8_t __attribute__((vector_size(kWidth)));

MOESAIC_LANE F splat(float x) { return F{} + x; }
MOESAIC_LANE U bits(F x) { return reinterpret_cast<U>(x); }
MOESAIC_LANE F from_bits(U x) { return reinterpret_cast<F>(x); }
MOESAIC_LANE F absolute(F x) { return from_bits(bits(x) & 0x7fffffffu); }
MOESAIC_LANE F maximum(F a, F b) { return a > b ? a : b; }  // NaN in b wins, NaN in a is dropped
MOESAIC_LANE F minimum(F a, F b) { return a < b ? a : b; }

// --- 16-bit and 8-bit storage, as numeric.h defines it but without branches ----------------------
MOESAIC_LANE F widen_bf16(U16 h) { return from_bits(__builtin_convertvector(h, U) << 16); }
MOESAIC_LANE U16 narrow_bf16(F f) {
  const U u = bits(f);
  const U rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const U nan = (u >> 16) | 0x40u;
  return __builtin_convertvector((u & 0x7fffffffu) > 0x7f800000u ? nan : rounded, U16);
}

MOESAIC_LANE F widen_f16(U16 h) {
  const U u = __builtin_convertvector(h, U);
  const U sign = (u & 0x8000u) << 16, magnitude = u & 0x7fffu;
  // Subnormals through the FPU: mantissa * 2^-24.
  const U small = bits(__builtin_convertvector(reinterpret_cast<I>(magnitude), F) * 0x1p-24f);
  const U normal = (magnitude << 13) + 0x38000000u;
  const U special = (magnitude << 13) | 0x7f800000u;
  return from_bits(sign | (magnitude < 0x400u ? small : magnitude >= 0x7c00u ? special : normal));
}
MOESAIC_LANE U16 narrow_f16(F f) {
  const U u = bits(f), sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
  const U normal = (a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13;
  const U small = bits(from_bits(a) + 0.5f) - 0x3f000000u;
  const U infinite = U{} + 0x7c00u, nan = U{} + 0x7e00u;
  const U magnitude = a > 0x7f800000u    ? nan
                      : a >= 0x477ff000u ? infinite
                      : a < 0x38800000u  ? small
                                         : normal;
  return __builtin_convertvector(sign | magnitude, U16);
}

MOESAIC_LANE F widen_e4m3(U8 b) {
  const U u = __builtin_convertvector(b, U);
  const U sign = (u & 0x80u) << 24, magnitude = u & 0x7fu;
  const U small = bits(__builtin_convertvector(reinterpret_cast<I>(magnitude), F) * 0x1p-9f);
  const U normal = (magnitude << 20) + 0x3c000000u, nan = U{} + 0x7fc00000u;
  return from_bits(magnitude == 0x7fu ? nan : sign | (magnitude < 8u ? small : normal));
}
MOESAIC_LANE U8 narrow_e4m3(F f) {  // saturates; NaN stays NaN
  const U u = bits(f), sign = (u >> 24) & 0x80u, a = u & 0x7fffffffu;
  U normal = (a - 0x3c000000u + 0x7ffffu + ((a >> 20) & 1u)) >> 20;
  normal = normal > 0x7eu ? U{} + 0x7eu : normal;
  const U small = bits(from_bits(a) + 0x1p14f) & 0xfu;
  const U largest = U{} + 0x7eu, nan = U{} + 0x7fu;
  const U magnitude = a > 0x7f800000u    ? nan
                      : a >= 0x43e00000u ? largest
                      : a < 0x3c800000u  ? small
                                         : normal;
  return __builtin_convertvector(sign | magnitude, U8);
}

// --- loads and stores ----------------------------------------------------------------------------
template <typename V>
MOESAIC_LANE V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <typename V>
MOESAIC_LANE void store(void* p, const V& v) {
  std::memcpy(p, &v, sizeof v);
}

// A storage type: how a register of elements comes in and goes out.
struct F32Storage {
  using Element = float;
  MOESAIC_LANE F get(const float* p) { return load<F>(p); }
  MOESAIC_LANE void put(float* p, F v) { store(p, v); }
};
struct F16Storage {
  using Element = std::uint16_t;
  MOESAIC_LANE F get(const std::uint16_t* p) { return widen_f16(load<U16>(p)); }
  MOESAIC_LANE void put(std::uint16_t* p, F v) { store(p, narrow_f16(v)); }
};
struct BF16Storage {
  using Element = std::uint16_t;
  MOESAIC_LANE F get(const std::uint16_t* p) { return widen_bf16(load<U16>(p)); }
  MOESAIC_LANE void put(std::uint16_t* p, F v) { store(p, narrow_bf16(v)); }
};

// A tail goes through a zeroed buffer of a register's width: no read or write beyond the row.
template <typename S>
MOESAIC_LANE F get_tail(const typename S::Element* p, std::int64_t n) {
  typename S::Element buffer[kWidth] = {};
  std::memcpy(buffer, p, static_cast<std::size_t>(n) * sizeof(*p));
  return S::get(buffer);
}
template <typename S>
MOESAIC_LANE void put_tail(typename S::Element* p, F v, std::int64_t n) {
  typename S::Element buffer[kWidth];
  S::put(buffer, v);
  std::memcpy(p, buffer, static_cast<std::size_t>(n) * sizeof(*p));
}

// --- sums in one fixed order ---------------------------------------------------------------------
struct Sum {
  F part[kParts] = {};
};
MOESAIC_LANE float total(const Sum& sum) {  // halves, then halves of halves
  float lane[kLanes];
  std::memcpy(lane, sum.part, sizeof lane);
  for (int width = 8; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  return lane[0];
}
MOESAIC_LANE float largest(const F& v) {  // of numbers that are not NaN
  float lane[kWidth];
  store(lane, v);
  for (int i = 1; i < kWidth; ++i) lane[0] = lane[i] > lane[0] ? lane[i] : lane[0];
  return lane[0];
}

// --- elementary functions, within 2 ulp ----------------------------------------------------------
// e^x: x = n ln2 + r, a polynomial in r, and 2^n in two factors so that subnormal results are
// right.
MOESAIC_LANE F exponential(F x) {
  const F clamped = minimum(maximum(x, splat(-110.0f)), splat(90.0f));
  const F shifted = clamped * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer
  const F whole = shifted - 12582912.0f;
  const F r = (clamped - whole * 0.693145752f) - whole * 1.42860677e-6f;
  F p = splat(1.98412698e-4f);
  p = p * r + 1.38888889e-3f;
  p = p * r + 8.33333333e-3f;
  p = p * r + 4.16666667e-2f;
  p = p * r + 1.66666667e-1f;
  p = p * r + 0.5f;
  p = (p * (r * r) + r) + 1.0f;
  const I n = __builtin_convertvector(whole, I), half = n >> 1;
  const F first = from_bits(reinterpret_cast<U>((half + 127) << 23));
  const F second = from_bits(reinterpret_cast<U>((n - half + 127) << 23));
  const F result = p * first * second;
  return x == x ? result : x;
}
MOESAIC_LANE F sigmoid(F x) { return 1.0f / (1.0f + exponential(-x)); }
// ln(1 + e^x) = max(x, 0) + ln(1 + u), u = e^-|x| in (0, 1]; ln(1 + u) = 2 atanh(u / (2 + u)).
MOESAIC_LANE F softplus(F x) {
  const F u = exponential(-absolute(x));
  const F s = u / (2.0f + u), q = s * s;  // q <= 1/9: ten terms of the series
  F p = splat(1.0f / 19.0f);
  p = p * q + 1.0f / 17.0f;
  p = p * q + 1.0f / 15.0f;
  p = p * q + 1.0f / 13.0f;
  p = p * q + 1.0f / 11.0f;
  p = p * q + 1.0f / 9.0f;
  p = p * q + 1.0f / 7.0f;
  p = p * q + 1.0f / 5.0f;
  p = p * q + 1.0f / 3.0f;
  p = (p * q) * s + s;
  const F result = maximum(x, splat(0.0f)) + 2.0f * p;
  return x == x ? result : x;
}

}  // namespace
}  // namespace moesaic
