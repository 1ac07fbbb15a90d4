// SPDX-License-Identifier: Apache-2.0
// Whether the E8M0 scales of a tile lie near each other in each of its columns (pack.h: kNearScales).
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>

#include "cpu/pack.h"

namespace moesaic {

// The least and the largest of each column's bytes.
class ColumnSpread {
 public:
  void add(const std::byte* header) {
    for (std::size_t c = 0; c < kTileCols; ++c) {
      const auto e = std::to_integer<std::uint8_t>(header[c]);
      least_[c] = std::min(least_[c], e);
      most_[c] = std::max(most_[c], e);
    }
  }
  bool near() const {  // 255 is NaN, and not near anything
    for (std::size_t c = 0; c < kTileCols; ++c)
      if (most_[c] == 255 || most_[c] - least_[c] > kNearScales) return false;
    return true;
  }

 private:
  std::array<std::uint8_t, kTileCols> least_ = all_of(255), most_ = all_of(0);

  static std::array<std::uint8_t, kTileCols> all_of(std::uint8_t value) {
    std::array<std::uint8_t, kTileCols> all;
    all.fill(value);
    return all;
  }
};

}  // namespace moesaic
