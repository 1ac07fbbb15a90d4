// SPDX-License-Identifier: Apache-2.0
// What the levels have in common that unpack weights in scratch and fuse nothing (scalar, AVX2,
// NEON): panels of up to 6 rows, multiplied in blocks of 16 columns.
#pragma once

#include "cpu/strip.h"

namespace moesaic {
namespace {

// A Level says block<kCompute, kRows>(panel, b, units, c): kRows rows x 16 columns from `c` on. One
// that has no such block has `one`, for all rows and columns of a panel.
template <typename Level, bool kHasB16 = false>
struct UnpackingLevel {
  static constexpr bool has_b16() { return kHasB16; }
  template <Compute>
  static constexpr std::int64_t panel_rows(Code) {
    return 6;
  }
  template <Compute>
  static constexpr std::int64_t streamed_rows() {
    return 6;
  }
  template <Compute>
  static constexpr std::int64_t readable_rows() {
    return 1;
  }
  template <Compute>
  static constexpr bool can_fuse() {
    return false;
  }
  static constexpr OddScales odd_scales() { return OddScales::kFloats; }
  template <Compute kCompute>
  static void fused(const Panel&, const Segments&) {}

  template <Compute kCompute>
  static void unpack(const Segments& segment, void* out) {
    if constexpr (kCompute == Compute::kF32)
      unpack_values(segment, static_cast<float*>(out));
    else if constexpr (kCompute == Compute::kB16)
      unpack_values(segment, static_cast<std::uint16_t*>(out));
    else
      unpack_bytes(segment, static_cast<std::uint8_t*>(out));
  }

  template <Compute kCompute>
  static void native(const Panel& panel, const Segments& segments) {
    for (std::int64_t i = 0; i < segments.count; ++i)
      Level::template one<kCompute>(panel.at(i), segments.data + i * segments.data_stride,
                                    segments.steps_of(i));
  }

  template <Compute kCompute>
  static void one(const Panel& p, const std::uint8_t* b, std::int64_t units) {
    for (std::int64_t c = 0; c < kTileCols; c += 16) {
      switch (p.rows) {
        case 1:
          Level::template block<kCompute, 1>(p, b, units, c);
          break;
        case 2:
          Level::template block<kCompute, 2>(p, b, units, c);
          break;
        case 3:
          Level::template block<kCompute, 3>(p, b, units, c);
          break;
        case 4:
          Level::template block<kCompute, 4>(p, b, units, c);
          break;
        case 5:
          Level::template block<kCompute, 5>(p, b, units, c);
          break;
        case 6:
          Level::template block<kCompute, 6>(p, b, units, c);
          break;
      }
    }
  }
};

}  // namespace
}  // namespace moesaic
