// SPDX-License-Identifier: Apache-2.0
// The level that any machine has: plain C++, what the compiler makes of it.
#include "cpu/strip.h"

namespace moesaic {
namespace {

struct Level {
  static constexpr bool has_b16() { return false; }

  template <Compute kCompute>
  static void unpack(const Segment& segment, void* out) {
    if constexpr (kCompute == Compute::kF32)
      unpack_f32(segment, static_cast<float*>(out));
    else
      unpack_bytes(segment, static_cast<std::uint8_t*>(out));
  }

  template <Compute kCompute>
  static bool fused(const Panel&, const Segment&) {
    return false;
  }

  template <Compute kCompute>
  static void native(const Panel& p, const void* b, std::int64_t units) {
    using Sum = std::conditional_t<kCompute == Compute::kF32, float, std::int32_t>;
    for (std::int64_t r = 0; r < p.rows; ++r) {
      const std::uint32_t* a = p.a + r * p.a_stride;
      Sum sums[kTileCols] = {};
      if (p.begin == Begin::kRaw) std::memcpy(sums, p.raw + r * p.c_stride, sizeof(sums));
      for (std::int64_t u = 0; u < units; ++u) {
        if constexpr (kCompute == Compute::kF32) {
          const float* w = static_cast<const float*>(b) + u * kTileCols;
          const float x = std::bit_cast<float>(a[u]);
          for (std::int64_t c = 0; c < kTileCols; ++c) sums[c] += x * w[c];
        } else {
          const std::uint8_t* w = static_cast<const std::uint8_t*>(b) + u * 4 * kTileCols;
          std::int8_t x[4];
          std::memcpy(x, a + u, 4);
          for (std::int64_t c = 0; c < kTileCols; ++c)
            sums[c] += w[4 * c] * x[0] + w[4 * c + 1] * x[1] + w[4 * c + 2] * x[2] +
                       w[4 * c + 3] * x[3];
        }
      }
      if (p.end == End::kRaw) {
        std::memcpy(p.raw + r * p.c_stride, sums, sizeof(sums));
        continue;
      }
      float* total = p.total + r * p.c_stride;
      const float row = p.row_scale != nullptr ? p.row_scale[r][p.row_scale_at] : 1.0f;
      for (std::int64_t c = 0; c < kTileCols; ++c) {
        float v;
        if constexpr (kCompute == Compute::kByte)
          v = static_cast<float>(sums[c] - p.zero[c] * p.row_sum[r * p.row_sum_stride]);
        else
          v = sums[c];
        if (p.scale != nullptr) v *= p.scale[c];
        if (p.row_scale != nullptr) v *= row;
        total[c] = p.end == End::kFirst ? v : total[c] + v;
      }
    }
  }
};

}  // namespace

const CpuKernels kCpuScalar{"scalar", run_strip<Level>};

}  // namespace moesaic
