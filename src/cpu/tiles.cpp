// SPDX-License-Identifier: Apache-2.0
// A caller's lists to tiles. Their values are whatever somebody wrote: counts are clipped to what
// the buffers hold, and an expert that is not here becomes a filtered block.
#include "cpu/tiles.h"

#include <algorithm>

namespace moesaic {
namespace {

class TileWriter {
 public:
  explicit TileWriter(const RowMap& map) : map_(map) {}
  void add(std::int64_t expert, std::int64_t first, std::int64_t rows) {
    for (std::int64_t done = 0; done < rows && count_ < map_.max_tiles; done += map_.tile_rows)
      map_.tiles[count_++] = {
          .expert = static_cast<std::int32_t>(expert),
          .rows = static_cast<std::int32_t>(std::min(map_.tile_rows, rows - done)),
          .first = first + done};
  }
  void finish() { *map_.num_tiles = static_cast<std::int32_t>(count_); }

 private:
  const RowMap& map_;
  std::int64_t count_ = 0;
};

// Neighbouring blocks of one expert become one run; padding at its end is cut off, so that a block
// of 128 with one live slot costs one row and not 128.
void sorted_tiles(const TileStage& stage) {
  const SortedRows& lists = stage.sorted;
  const auto* slots = lists.slots.as<const std::int32_t>();
  const auto* experts = lists.block_experts.as<const std::int32_t>();
  const std::int64_t block = lists.block_rows;
  const std::int64_t capacity = std::min(lists.slots.numel(), lists.block_experts.numel() * block);
  const std::int64_t used =
      std::clamp<std::int64_t>(*lists.num_padded.as<const std::int32_t>(), 0, capacity);
  const auto expert_of = [&](std::int64_t b) {
    return experts[b] >= 0 && experts[b] < stage.experts ? std::int64_t{experts[b]} : -1;
  };
  const auto is_padding = [&](std::int64_t p) {
    return slots[p] < 0 || slots[p] >= stage.rows.slot_count;
  };
  TileWriter tiles(stage.rows);
  const std::int64_t blocks = (used + block - 1) / block;
  for (std::int64_t b = 0; b < blocks;) {
    const std::int64_t expert = expert_of(b), first = b * block;
    while (b < blocks && expert_of(b) == expert) ++b;
    std::int64_t end = std::min(b * block, used);
    while (end > first && is_padding(end - 1)) --end;
    tiles.add(expert, first, end - first);
  }
  tiles.finish();
}

void batched_tiles(const TileStage& stage) {
  const Tensor& counts = stage.batched.num_tokens;
  TileWriter tiles(stage.rows);
  for (std::int64_t e = 0; e < std::min(stage.experts, counts.shape[0]); ++e) {
    const std::int64_t count = counts.as<const std::int32_t>()[e * counts.strides[0]];
    tiles.add(e, e * stage.capacity, std::clamp<std::int64_t>(count, 0, stage.capacity));
  }
  tiles.finish();
}

}  // namespace

void tiles_cpu(const TileStage& stage) {
  if (stage.batched.num_tokens.defined())
    batched_tiles(stage);
  else
    sorted_tiles(stage);
}

}  // namespace moesaic
