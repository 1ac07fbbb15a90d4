// SPDX-License-Identifier: Apache-2.0
// The activations on 16 columns of fp32 at a time. Written in GCC's vector types, so that one source
// serves every level and a column's bits depend on its value alone.
#pragma once

#include "cpu/strip_types.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace moesaic {
namespace {

typedef float Floats __attribute__((vector_size(64)));
typedef std::int32_t Ints __attribute__((vector_size(64)));
typedef std::uint32_t Words __attribute__((vector_size(64)));
typedef std::uint16_t Halves __attribute__((vector_size(32)));

#define MOESAIC_INLINE inline __attribute__((always_inline))

MOESAIC_INLINE Floats all(float x) { return x - Floats{}; }
MOESAIC_INLINE Floats load16(const float* p) {
  Floats v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
MOESAIC_INLINE Words bits(Floats x) { return (Words)x; }
MOESAIC_INLINE Floats from_bits(Words x) { return (Floats)x; }

// --- functions: NaN goes through each (comparisons with it are false, and what they guard is chosen
// --- so that it stays)
// e^x, within 2 ulp; 0 and infinity where fp32 ends.
MOESAIC_INLINE Floats exp16(Floats x) {
  x = x > 89.0f ? all(89.0f) : x;
  x = x < -104.0f ? all(-104.0f) : x;
  const Floats magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Floats shifted = x * 1.44269504088896f + magic;
  const Floats n = shifted - magic;
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts, the first exact
  Floats p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // 2^n in two factors, since n reaches beyond either end of the exponent.
  const Ints i = (Ints)bits(shifted) - (Ints)bits(magic);
  const Ints half = i >> 1;
  return p * from_bits((Words)((half + 127) << 23)) * from_bits((Words)((i - half + 127) << 23));
}
MOESAIC_INLINE Floats sigmoid16(Floats x) { return 1.0f / (1.0f + exp16(-x)); }
MOESAIC_INLINE Floats silu16(Floats x) { return x / (1.0f + exp16(-x)); }
// x * Phi(x). Phi's tail by the rational-exponential fit of erfc with relative error 1.2e-7.
MOESAIC_INLINE Floats gelu16(Floats x) {
  const Floats z = (x < 0.0f ? -x : x) * 0.70710678118654752f;
  const Floats t = 1.0f / (1.0f + 0.5f * z);
  Floats p = all(0.17087277f);
  p = p * t - 0.82215223f;
  p = p * t + 1.48851587f;
  p = p * t - 1.13520398f;
  p = p * t + 0.27886807f;
  p = p * t - 0.18628806f;
  p = p * t + 0.09678418f;
  p = p * t + 0.37409196f;
  p = p * t + 1.00002368f;
  const Floats tail = 0.5f * t * exp16(p * t - 1.26551223f - z * z);
  return x * (x < 0.0f ? tail : 1.0f - tail);
}
// 0.5 (1 + tanh y) = sigmoid(2 y): without the cancellation that 1 + tanh has for negative x.
MOESAIC_INLINE Floats gelu_tanh16(Floats x) {
  return x * sigmoid16(1.59576912160573f * (x + 0.044715f * x * x * x));
}
MOESAIC_INLINE Floats at_most16(Floats x, float limit) { return x > limit ? all(limit) : x; }
MOESAIC_INLINE Floats clamp16(Floats x, float limit) {
  x = x > limit ? all(limit) : x;
  return x < -limit ? all(-limit) : x;
}

struct ActivationValues {
  float alpha = 0, beta = 0, limit = 0;
};

MOESAIC_INLINE Floats plain16(Activation kind, Floats x) {
  switch (kind) {
    case Activation::kSilu: return silu16(x);
    case Activation::kGelu: return gelu16(x);
    case Activation::kGeluTanh: return gelu_tanh16(x);
    case Activation::kRelu: return x < 0.0f ? Floats{} : x;
    case Activation::kRelu2: return x < 0.0f ? Floats{} : x * x;
    default: return x;
  }
}
MOESAIC_INLINE Floats gated16(Activation kind, Floats gate, Floats up, const ActivationValues& v) {
  switch (kind) {
    case Activation::kGeglu: return gelu16(gate) * up;
    case Activation::kGegluTanh: return gelu_tanh16(gate) * up;
    case Activation::kSwigluOai: {
      const Floats g = at_most16(gate, v.limit);
      return g * sigmoid16(v.alpha * g) * (clamp16(up, v.limit) + v.beta);
    }
    case Activation::kSwigluClamp: return silu16(at_most16(gate, v.limit)) * clamp16(up, v.limit);
    case Activation::kSwigluStep: return at_most16(silu16(gate), v.limit) * clamp16(up, v.limit);
    default: return silu16(gate) * up;
  }
}

// 16 exponents of E8M0. 0 is 2^-127, which only a subnormal can hold.
MOESAIC_INLINE void e8m0_to_f32(const std::uint8_t* in, float* out) {
  typedef std::uint8_t Bytes __attribute__((vector_size(16)));
  Bytes bytes;
  std::memcpy(&bytes, in, sizeof(bytes));
  const Words e = __builtin_convertvector(bytes, Words);
  Words x = e << 23;
  x = e == 0u ? Words{} + 0x400000u : x;
  x = e == 255u ? Words{} + 0x7fc00000u : x;
  std::memcpy(out, &x, sizeof(x));
}

// --- storing --------------------------------------------------------------------------------------
MOESAIC_INLINE Halves to_bf16(Floats x) {
  const Words u = bits(x);
  const Words rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const Words nan = (u >> 16) | 0x40u;
  return __builtin_convertvector((u & 0x7fffffffu) > 0x7f800000u ? nan : rounded, Halves);
}
MOESAIC_INLINE Halves to_f16(Floats x) {
#if defined(__AVX512F__)
  return (Halves)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  Halves out;
  for (int i = 0; i < 16; ++i) out[i] = float_to_f16(x[i]);
  return out;
#endif
}

}  // namespace
}  // namespace moesaic
