// SPDX-License-Identifier: Apache-2.0
// The 256-bit levels: AVX2, FMA and F16C, without and with AVX-VNNI. Blocks of up to 6 rows x 16
// columns, 12 sums in registers; weights are unpacked to fp32 (or bytes) in scratch first.
#pragma once

#include <immintrin.h>

#include "cpu/strip_unpacking.h"

namespace moesaic {
namespace {

template <Compute kCompute>
struct Dot;
template <>
struct Dot<Compute::kF32> {
  using Sum = __m256;
  static Sum begin(const Panel& p, std::int64_t r, std::int64_t c) {
    return p.begin == Begin::kRaw ? _mm256_loadu_ps(p.raw + r * p.c_stride + c)
                                  : _mm256_setzero_ps();
  }
  static Sum add(Sum sum, __m256i b, __m256i a) {
    return _mm256_fmadd_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), sum);
  }
  static void store(float* p, Sum sum) { _mm256_storeu_ps(p, sum); }
  static __m256 value(Sum sum) { return sum; }
};
template <>
struct Dot<Compute::kByte> {
  using Sum = __m256i;
  static __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static __m256i begin(const Panel& p, std::int64_t r, std::int64_t c) {
    if (p.begin == Begin::kRaw) return load(p.raw + r * p.c_stride + c);
    const __m256i begin = _mm256_set1_epi32(p.row_begin[r * p.row_stride]);
    return p.zero == nullptr ? begin : _mm256_mullo_epi32(load(p.zero + c), begin);
  }
  static Sum add(Sum sum, __m256i b, __m256i a) {
#if defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(sum, b, a);
#else  // through words: vpmaddubsw would saturate
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256(b, _mm256_set1_epi16(0xff)),
                                           _mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(b, 8), _mm256_srai_epi16(a, 8));
    return _mm256_add_epi32(sum, _mm256_add_epi32(even, odd));
#endif
  }
  static void store(float* p, Sum sum) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), sum); }
  static __m256 value(Sum sum) { return _mm256_cvtepi32_ps(sum); }
};

struct Level : UnpackingLevel<Level> {
  template <Compute kCompute, int kRows>
  static void block(const Panel& p, const std::uint8_t* b, std::int64_t units, std::int64_t c) {
    using D = Dot<kCompute>;
    typename D::Sum sums[kRows][2];
    for (int r = 0; r < kRows; ++r)
      for (int i = 0; i < 2; ++i) sums[r][i] = D::begin(p, r, c + 8 * i);
    b += 4 * c;
    for (std::int64_t u = 0; u < units; ++u, b += 4 * kTileCols) {
      const __m256i b0 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b));
      const __m256i b1 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + 32));
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) {
        const __m256i x = _mm256_set1_epi32(static_cast<int>(p.a[r * p.a_stride + u]));
        sums[r][0] = D::add(sums[r][0], b0, x);
        sums[r][1] = D::add(sums[r][1], b1, x);
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int i = 0; i < 2; ++i) {
        const std::int64_t at = r * p.c_stride + c + 8 * i;
        if (p.end == End::kRaw) {
          D::store(p.raw + at, sums[r][i]);
          continue;
        }
        __m256 v = D::value(sums[r][i]);
        if (p.scale != nullptr) v = _mm256_mul_ps(v, _mm256_loadu_ps(p.scale + c + 8 * i));
        if (p.row_scale != nullptr)
          v = _mm256_mul_ps(v, _mm256_set1_ps(p.row_scale[r * p.row_stride]));
        if (p.end == End::kAdd) v = _mm256_add_ps(v, _mm256_loadu_ps(p.total + at));
        _mm256_storeu_ps(p.total + at, v);
      }
    }
  }
};

}  // namespace
}  // namespace moesaic
