// SPDX-License-Identifier: Apache-2.0
// The level that any machine has: plain C++, what the compiler makes of it.
#include "cpu/strip_unpacking.h"

namespace moesaic {
namespace {

struct Level : UnpackingLevel<Level> {
  template <Compute kCompute>
  static void one(const Panel& p, const std::uint8_t* b, std::int64_t units) {
    using Sum = std::conditional_t<kCompute == Compute::kF32, float, std::int32_t>;
    for (std::int64_t r = 0; r < p.rows; ++r) {
      const Unit* a = p.a + r * p.a_stride;
      Sum sums[kTileCols] = {};
      if (p.begin == Begin::kRaw) std::memcpy(sums, p.raw + r * p.c_stride, sizeof(sums));
      if (kCompute == Compute::kByte && p.begin == Begin::kZero) {
        const std::int32_t begin = p.row_begin[r * p.row_stride];
        for (std::int64_t c = 0; c < kTileCols; ++c)
          sums[c] = p.zero != nullptr ? p.zero[c] * begin : begin;
      }
      for (std::int64_t u = 0; u < units; ++u) {
        if constexpr (kCompute == Compute::kF32) {
          const float* w = reinterpret_cast<const float*>(b) + u * kTileCols;
          const float x = std::bit_cast<float>(a[u]);
          for (std::int64_t c = 0; c < kTileCols; ++c) sums[c] += x * w[c];
        } else {
          const std::uint8_t* w = b + u * 4 * kTileCols;
          std::int8_t x[4];
          std::memcpy(x, a + u, 4);
          for (std::int64_t c = 0; c < kTileCols; ++c)
            sums[c] +=
                w[4 * c] * x[0] + w[4 * c + 1] * x[1] + w[4 * c + 2] * x[2] + w[4 * c + 3] * x[3];
        }
      }
      if (p.end == End::kRaw) {
        std::memcpy(p.raw + r * p.c_stride, sums, sizeof(sums));
        continue;
      }
      float* total = p.total + r * p.c_stride;
      for (std::int64_t c = 0; c < kTileCols; ++c) {
        auto v = static_cast<float>(sums[c]);
        if (p.scale != nullptr) v *= p.scale[c];
        if (p.row_scale != nullptr) v *= p.row_scale[r * p.row_stride];
        total[c] = p.end == End::kFirst ? v : total[c] + v;
      }
    }
  }
};

}  // namespace

const CpuKernels kCpuScalar{"scalar", run_strip<Level>};

}  // namespace moesaic
