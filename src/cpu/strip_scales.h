// SPDX-License-Identifier: Apache-2.0
// A piece's weight scales and zero points, from the headers of its segments to one value per column.
#pragma once

#include "cpu/strip_activation.h"

namespace moesaic {
namespace {

inline constexpr std::int64_t kPieceSegments = 128;

struct PieceScales {
  float scales[kPieceSegments * kTileCols];
  std::int32_t zeros[kPieceSegments * kTileCols];

  // [count][64] at *scale_stride; null when there are none.
  const float* read(const PackLayout& layout, const std::uint8_t* header, std::int64_t stride,
                    std::int64_t count, std::int64_t* scale_stride) {
    *scale_stride = kTileCols;
    switch (layout.scale) {
      case ScaleKind::kNone: break;
      case ScaleKind::kColumns:  // as they lie
        *scale_stride = stride / static_cast<std::int64_t>(sizeof(float));
        return reinterpret_cast<const float*>(header);
      case ScaleKind::kHalves:
        for (std::int64_t i = 0; i < count; ++i) {
          float halves[2];
          std::memcpy(halves, header + i * stride, sizeof(halves));
          std::fill_n(scales + i * kTileCols, kTileCols / 2, halves[0]);
          std::fill_n(scales + i * kTileCols + kTileCols / 2, kTileCols / 2, halves[1]);
        }
        return scales;
      case ScaleKind::kE8M0:
        for (std::int64_t i = 0; i < count; ++i)
          for (std::int64_t c = 0; c < kTileCols; c += 16)
            e8m0_to_f32(header + i * stride + c, scales + i * kTileCols + c);
        return scales;
    }
    return nullptr;
  }

  const std::int32_t* read_zeros(const std::uint8_t* zero, std::int64_t stride, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i)
      for (std::int64_t c = 0; c < kTileCols; ++c)
        zeros[i * kTileCols + c] = zero[i * stride + c];
    return zeros;
  }
};

}  // namespace
}  // namespace moesaic
