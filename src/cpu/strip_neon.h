// SPDX-License-Identifier: Apache-2.0
// The NEON levels: blocks of up to 6 rows x 16 columns, 24 sums in registers; weights are unpacked in
// scratch first. Compiled at two levels: every 64-bit ARM, and with BF16 and I8MM (bfdot, usdot).
#pragma once

#include <arm_neon.h>

#include "cpu/strip_unpacking.h"

namespace moesaic {
namespace {

#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC) && defined(__ARM_FEATURE_MATMUL_INT8)
constexpr bool kHasB16 = true;
#else
constexpr bool kHasB16 = false;
#endif

template <Compute kCompute>
struct Dot;
template <>
struct Dot<Compute::kF32> {
  using Sum = float32x4_t;
  static Sum begin(const Panel& p, std::int64_t r, std::int64_t c) {
    return p.begin == Begin::kRaw ? vld1q_f32(p.raw + r * p.c_stride + c) : vdupq_n_f32(0.0f);
  }
  static Sum add(Sum sum, uint32x4_t b, uint32x4_t a) {
    return vfmaq_f32(sum, vreinterpretq_f32_u32(a), vreinterpretq_f32_u32(b));
  }
  static void store(float* p, Sum sum) { vst1q_f32(p, sum); }
  static float32x4_t value(Sum sum) { return sum; }
};
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
template <>
struct Dot<Compute::kB16> : Dot<Compute::kF32> {
  static Sum add(Sum sum, uint32x4_t b, uint32x4_t a) {
    return vbfdotq_f32(sum, vreinterpretq_bf16_u32(a), vreinterpretq_bf16_u32(b));
  }
};
#endif
template <>
struct Dot<Compute::kByte> {
  using Sum = int32x4_t;
  static Sum begin(const Panel& p, std::int64_t r, std::int64_t c) {
    if (p.begin == Begin::kRaw)
      return vreinterpretq_s32_f32(vld1q_f32(p.raw + r * p.c_stride + c));
    const Sum begin = vdupq_n_s32(p.row_begin[r * p.row_stride]);
    return p.zero == nullptr ? begin : vmulq_s32(vld1q_s32(p.zero + c), begin);
  }
  static Sum add(Sum sum, uint32x4_t b, uint32x4_t a) {
    const uint8x16_t weights = vreinterpretq_u8_u32(b);
    const int8x16_t row = vreinterpretq_s8_u32(a);
#if defined(__ARM_FEATURE_MATMUL_INT8)
    return vusdotq_s32(sum, weights, row);
#else  // through words: two columns of four products each, then their sums
    const int16x8_t x = vmovl_s8(vget_low_s8(row));
    const int16x8_t low = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(weights)));
    const int16x8_t high = vreinterpretq_s16_u16(vmovl_u8(vget_high_u8(weights)));
    const int16x4_t four = vget_low_s16(x);
    const int32x4_t c01 = vpaddq_s32(vmull_s16(vget_low_s16(low), four),
                                     vmull_s16(vget_high_s16(low), four));
    const int32x4_t c23 = vpaddq_s32(vmull_s16(vget_low_s16(high), four),
                                     vmull_s16(vget_high_s16(high), four));
    return vaddq_s32(sum, vpaddq_s32(c01, c23));
#endif
  }
  static void store(float* p, Sum sum) { vst1q_f32(p, vreinterpretq_f32_s32(sum)); }
  static float32x4_t value(Sum sum) { return vcvtq_f32_s32(sum); }
};

struct Level : UnpackingLevel<Level, kHasB16> {
  template <Compute kCompute, int kRows>
  static void block(const Panel& p, const std::uint8_t* b, std::int64_t units, std::int64_t c) {
    using D = Dot<kCompute>;
    typename D::Sum sums[kRows][4];
    for (int r = 0; r < kRows; ++r)
      for (int i = 0; i < 4; ++i) sums[r][i] = D::begin(p, r, c + 4 * i);
    b += 4 * c;
    for (std::int64_t u = 0; u < units; ++u, b += 4 * kTileCols) {
      uint32x4_t w[4];
      for (int i = 0; i < 4; ++i) w[i] = vreinterpretq_u32_u8(vld1q_u8(b + 16 * i));
      for (int r = 0; r < kRows; ++r) {
        const uint32x4_t x = vdupq_n_u32(p.a[r * p.a_stride + u]);
        for (int i = 0; i < 4; ++i) sums[r][i] = D::add(sums[r][i], w[i], x);
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int i = 0; i < 4; ++i) {
        const std::int64_t at = r * p.c_stride + c + 4 * i;
        if (p.end == End::kRaw) {
          D::store(p.raw + at, sums[r][i]);
          continue;
        }
        float32x4_t v = D::value(sums[r][i]);
        if (p.scale != nullptr) v = vmulq_f32(v, vld1q_f32(p.scale + c + 4 * i));
        if (p.row_scale != nullptr) v = vmulq_n_f32(v, p.row_scale[r * p.row_stride]);
        if (p.end == End::kAdd) v = vaddq_f32(v, vld1q_f32(p.total + at));
        vst1q_f32(p.total + at, v);
      }
    }
  }
};

}  // namespace
}  // namespace moesaic
