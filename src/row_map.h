// SPDX-License-Identifier: Apache-2.0
// "Format is data": each of the three formats becomes one RowMap, and one kernel serves them all.
#pragma once

#include <cstdint>

namespace moesaic {

// `rows` consecutive positions (none: no work), from `first` on, that belong to one local expert.
// expert < 0: a filtered block whose output rows are zero.
struct Tile {
  std::int32_t expert = 0;
  std::int32_t rows = 0;
  std::int64_t first = 0;
};

// A position is a row of the buffers between the stages. Pointers are device memory; only the
// capacities are known to the host. Tiles are written by the backend's align or tiles; with
// UnlistedRows by nobody.
//   standard: positions = live slots grouped by expert, no padding; row_slot lists the slot of each
//   sorted (caller's lists): positions = indices of `slots`; row_slot = `slots`, pad >= slot_count
//   batched: position = expert * capacity + i; no row_slot
struct RowMap {
  Tile* tiles = nullptr;                 // [max_tiles], ascending expert
  std::int32_t* num_tiles = nullptr;     // [1]
  std::int32_t* row_slot = nullptr;      // [positions], or null
  std::int64_t max_tiles = 0;
  std::int64_t tile_rows = 0;            // no tile has more rows
  std::int64_t positions = 0;            // capacity of the buffers
  std::int64_t slot_count = 0;           // T * top_k; entries of row_slot at or above it are padding. Without
                                         // a list (batched) what the caller expects, for policies alone
};

// Rows of which a product makes the tiles itself (Backend::makes_tiles): then nobody has written
// RowMap's tiles and num_tiles. One of these says which rows there are.
struct UnlistedRows {
  const std::int32_t* ids = nullptr;  // [slot_count]: the slots' experts; position = slot, no row_slot
  std::int32_t first_expert = 0;      // of the local ones among ids
  const std::int32_t* block_experts = nullptr;  // [max_tiles]: of a caller's blocks, tile_rows positions each,
  const std::int32_t* num_padded = nullptr;     // of which the first num_padded[0] positions are used

  bool any() const { return ids != nullptr || block_experts != nullptr; }
};

// Which row of a tensor belongs to position p.
enum class RowOf : std::uint8_t {
  kPosition,  // p
  kSlot,      // row_slot[p]
  kToken,     // row_slot[p] / top_k
};

// Tiles that suffice for `slots` live rows over `experts` experts.
constexpr std::int64_t max_tiles(std::int64_t slots, std::int64_t experts, std::int64_t tile_rows) {
  const std::int64_t partial = slots < experts ? slots : experts;  // each expert's last tile
  return slots / tile_rows + partial;
}

// Tiles that are worth reckoning with: a caller's buffers may have room for many more rows (batched)
// than the slots that he expects.
constexpr std::int64_t likely_tiles(const RowMap& rows, std::int64_t experts) {
  const std::int64_t tiles = max_tiles(rows.slot_count, experts, rows.tile_rows);
  return rows.max_tiles < tiles ? rows.max_tiles : tiles;
}

}  // namespace moesaic
