// SPDX-License-Identifier: Apache-2.0
// A list of tiles on both backends: the same tiles, and on a device kNoTile behind them, as far as a
// warp looks without knowing how many there are (cuda/stages.h).
#pragma once

#include <cstring>
#include <string>

#include "cuda/stages.h"
#include "tests/cuda/twin.h"

namespace moesaic {

// Writes behind the CPU's `count` tiles what a device has there.
inline void fill_window(Twin<std::int64_t>& tiles, std::int32_t count) {
  const std::size_t words = sizeof(Tile) / sizeof(std::int64_t);
  for (std::size_t i = static_cast<std::size_t>(count);
       i < cuda::kTileWindow && i < tiles.size() / words; ++i)
    std::memcpy(tiles.cpu() + i * words, &cuda::kNoTile, sizeof(Tile));
}
inline std::string tile_differences(Twin<std::int64_t>& tiles, std::int32_t count) {
  fill_window(tiles, count);
  return tiles.differences();
}

}  // namespace moesaic
