// SPDX-License-Identifier: Apache-2.0
// Rows of A into units of 32 bits. Every conversion here is exact.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "cpu/strip_types.h"

namespace moesaic {
namespace {

constexpr float exact_e4m3(std::uint8_t b) {
  const std::uint32_t magnitude = b & 0x7fu;
  // No subnormal fp32 on the way: a host may have told its threads to flush them.
  const float small = static_cast<float>(static_cast<int>(magnitude)) * 0x1p-9f;
  std::uint32_t bits = magnitude < 8 ? std::bit_cast<std::uint32_t>(small)
                                     : (magnitude << 20) + (120u << 23);
  bits = magnitude == 0x7f ? 0x7fc00000u : bits;
  return std::bit_cast<float>(bits | std::uint32_t{b & 0x80u} << 24);
}

#if defined(__AVX512BW__)
// 32 e4m3 in the low bytes of words -> bf16.
inline __m512i e4m3_words_to_bf16(__m512i words) {
  const __m512i magnitude = _mm512_and_si512(words, _mm512_set1_epi16(0x7f));
  const __m512i sign = _mm512_slli_epi16(_mm512_and_si512(words, _mm512_set1_epi16(0x80)), 8);
  // bf16 of 0 .. 7 times 2^-9.
  const __m512i small = _mm512_permutexvar_epi16(
      magnitude, _mm512_broadcast_i32x4(_mm_setr_epi16(0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20,
                                                       0x3c40, 0x3c60)));
  const __m512i normal =
      _mm512_add_epi16(_mm512_slli_epi16(magnitude, 4), _mm512_set1_epi16(0x3c00));
  __m512i bits = _mm512_mask_mov_epi16(
      normal, _mm512_cmplt_epu16_mask(magnitude, _mm512_set1_epi16(8)), small);
  bits = _mm512_mask_mov_epi16(
      bits, _mm512_cmpeq_epi16_mask(magnitude, _mm512_set1_epi16(0x7f)), _mm512_set1_epi16(0x7fc0));
  return _mm512_or_si512(bits, sign);
}
#endif

inline void row_to_f32(DType dtype, const std::byte* in, std::int64_t count, float* out) {
  const auto* halves = reinterpret_cast<const std::uint16_t*>(in);
  std::int64_t k = 0;
  switch (dtype) {
    case DType::kF16:
#if defined(__AVX512F__)
      for (; k + 16 <= count; k += 16)
        _mm512_storeu_ps(out + k, _mm512_cvtph_ps(_mm256_loadu_si256(
                                      reinterpret_cast<const __m256i*>(halves + k))));
#elif defined(__F16C__)
      for (; k + 8 <= count; k += 8)
        _mm256_storeu_ps(
            out + k, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves + k))));
#endif
      for (; k < count; ++k) out[k] = f16_to_float(halves[k]);
      return;
    case DType::kBF16:
      for (; k < count; ++k) out[k] = std::bit_cast<float>(std::uint32_t{halves[k]} << 16);
      return;
    case DType::kF8E4M3:
      for (; k < count; ++k) out[k] = exact_e4m3(static_cast<std::uint8_t>(in[k]));
      return;
    default: std::memcpy(out, in, static_cast<std::size_t>(count) * 4);
  }
}

inline void row_to_bf16(DType dtype, const std::byte* in, std::int64_t count, std::uint16_t* out) {
  if (dtype == DType::kBF16) {
    std::memcpy(out, in, static_cast<std::size_t>(count) * 2);
    return;
  }
  std::int64_t k = 0;
#if defined(__AVX512BW__)
  for (; k + 32 <= count; k += 32) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + k));
    _mm512_storeu_si512(out + k, e4m3_words_to_bf16(_mm512_cvtepu8_epi16(bytes)));
  }
#endif
  for (; k < count; ++k)
    out[k] = static_cast<std::uint16_t>(
        std::bit_cast<std::uint32_t>(exact_e4m3(static_cast<std::uint8_t>(in[k]))) >> 16);
}

inline std::int32_t sum_of_bytes(const std::byte* in, std::int64_t count) {
  const auto* bytes = reinterpret_cast<const std::int8_t*>(in);
  std::int32_t sum = 0;
  std::int64_t k = 0;
#if defined(__AVX512BW__)
  __m512i sums = _mm512_setzero_si512();
  for (; k + 64 <= count; k += 64)  // of x + 128, eight bytes at a time
    sums = _mm512_add_epi64(sums, _mm512_sad_epu8(_mm512_xor_si512(_mm512_loadu_si512(in + k),
                                                                   _mm512_set1_epi8(-128)),
                                                  _mm512_setzero_si512()));
  sum = static_cast<std::int32_t>(_mm512_reduce_add_epi64(sums) - 128 * k);
#endif
  for (; k < count; ++k) sum += bytes[k];
  return sum;
}

// `count` elements into units, zeros behind them up to `units`.
template <Compute kCompute>
void convert_row(DType dtype, const std::byte* in, std::int64_t count, std::int64_t units,
                 Unit* out) {
  constexpr std::int64_t kPer = kCompute == Compute::kF32 ? 1 : kCompute == Compute::kB16 ? 2 : 4;
  for (std::int64_t u = count / kPer; u < units; ++u) out[u] = 0;
  if constexpr (kCompute == Compute::kF32)
    row_to_f32(dtype, in, count, reinterpret_cast<float*>(out));
  else if constexpr (kCompute == Compute::kB16)
    row_to_bf16(dtype, in, count, reinterpret_cast<std::uint16_t*>(out));
  else
    std::memcpy(out, in, static_cast<std::size_t>(count));
}

}  // namespace
}  // namespace moesaic
