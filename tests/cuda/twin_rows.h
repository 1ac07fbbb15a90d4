// SPDX-License-Identifier: Apache-2.0
// Random rows of experts, on the host and on the device: what the stages that touch rows are tested
// on.
#pragma once

#include <vector>

#include "tests/cuda/twin.h"

namespace moesaic {

// Rows of a compact or batched format: tiles, slots, and (twin) what they point to.
struct Rows {
  std::vector<Tile> tiles;
  std::vector<std::int32_t> row_slot;
  std::int64_t positions = 0, slot_count = 0, tile_rows = 16, experts = 0;
};
inline Rows random_rows(std::int64_t tokens, std::int64_t top_k, std::int64_t experts,
                        std::int64_t capacity, std::uint64_t seed) {
  harness::Rng rng(seed);
  Rows rows{.tiles = {}, .row_slot = {}, .slot_count = tokens * top_k, .experts = experts};
  std::vector<std::vector<std::int32_t>> of(static_cast<std::size_t>(experts));
  for (std::int32_t s = 0; s < rows.slot_count; ++s)
    if (rng.below(8) > 0) of[static_cast<std::size_t>(rng.below(experts))].push_back(s);
  rows.positions = capacity > 0 ? experts * capacity : rows.slot_count;
  rows.row_slot.assign(static_cast<std::size_t>(rows.positions), 0x7fffffff);
  std::int64_t first = 0;
  for (std::int64_t e = 0; e < experts; ++e) {
    const auto& mine = of[static_cast<std::size_t>(e)];
    std::int64_t live = static_cast<std::int64_t>(mine.size());
    if (capacity > 0) first = e * capacity, live = std::min(live, capacity);
    for (std::int64_t r = 0; r < live; ++r)
      rows.row_slot[static_cast<std::size_t>(first + r)] = mine[static_cast<std::size_t>(r)];
    for (std::int64_t r = 0; r < live; r += rows.tile_rows)
      rows.tiles.push_back({static_cast<std::int32_t>(e),
                            static_cast<std::int32_t>(std::min(rows.tile_rows, live - r)),
                            first + r});
    first += live;
  }
  return rows;
}

struct TwinRows {
  explicit TwinRows(const Rows& rows)
      : given(rows),
        tiles(rows.tiles.size() * 2),
        row_slot(rows.row_slot),
        count(std::vector<std::int32_t>{static_cast<std::int32_t>(rows.tiles.size())}) {
    std::memcpy(tiles.cpu(), rows.tiles.data(), rows.tiles.size() * sizeof(Tile));
    tiles.upload();
  }
  RowMap on(Device device) {
    return {.tiles = reinterpret_cast<Tile*>(tiles.on(device)),
            .num_tiles = count.on(device),
            .row_slot = row_slot.on(device),
            .max_tiles = static_cast<std::int64_t>(given.tiles.size()) + 3,
            .tile_rows = given.tile_rows,
            .positions = given.positions,
            .slot_count = given.slot_count};
  }
  const Rows& given;
  Twin<std::int64_t> tiles;
  Twin<std::int32_t> row_slot, count;
};

}  // namespace moesaic
