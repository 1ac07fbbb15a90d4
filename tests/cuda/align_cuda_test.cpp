// SPDX-License-Identifier: Apache-2.0
// align and tiles on the device against the CPU backend, entry by entry: every list, count and
// tile.
#include "tests/cuda/tile_list.h"
#include "tests/cuda/twin.h"

namespace moesaic {
namespace {

struct AlignCase {
  std::int64_t tokens, top_k, experts;
  ExpertRange local;
  std::int64_t capacity = 0, block_rows = 0, tile_rows = 16;
  bool mapped = false, wide_ids = false, skewed = false;
};

std::ostream& operator<<(std::ostream& out, const AlignCase& c) {
  return out << "T " << c.tokens << " k " << c.top_k << " E " << c.experts << " local "
             << c.local.first << "+" << c.local.count << " capacity " << c.capacity << " block "
             << c.block_rows << " tile " << c.tile_rows << (c.mapped ? " map" : "")
             << (c.wide_ids ? " i64" : "") << (c.skewed ? " skewed" : "");
}

std::vector<std::int64_t> random_ids(const AlignCase& c, std::uint64_t seed) {
  harness::Rng rng(seed);
  std::vector<std::int64_t> ids(static_cast<std::size_t>(c.tokens * c.top_k));
  for (std::int64_t& id : ids) {
    id = c.skewed && rng.below(10) > 0 ? c.local.first : rng.below(c.experts);
    const std::int64_t odd = rng.below(40);
    if (odd == 0) id = -1;
    if (odd == 1) id = c.experts + rng.below(3);
    if (odd == 2) id = c.wide_ids ? INT64_C(0x7fffffff00000000) : INT64_C(0x7fffffff);
  }
  return ids;
}

void check_align(const AlignCase& c, std::uint64_t seed) {
  SCOPED_TRACE(testing::Message() << c);
  const std::vector<std::int64_t> ids = random_ids(c, seed);
  const std::int64_t slots = c.tokens * c.top_k;
  const bool padded = c.block_rows > 0;
  const std::int64_t positions = padded           ? align_capacity(slots, c.experts, c.block_rows)
                                 : c.capacity > 0 ? c.local.count * c.capacity
                                                  : slots;
  Twin<std::int64_t> ids64(ids);
  Twin<std::int32_t> ids32(std::vector<std::int32_t>(ids.begin(), ids.end()));
  harness::Rng rng(seed + 1);
  std::vector<std::int32_t> to_local(static_cast<std::size_t>(c.experts));
  for (std::int32_t& local : to_local)
    local = static_cast<std::int32_t>(rng.below(c.local.count + 2)) - 1;
  Twin<std::int32_t> map(to_local);
  const std::int64_t tiles_max = max_tiles(positions, c.local.count, c.tile_rows);
  const std::size_t n = static_cast<std::size_t>(positions);
  Twin<std::int32_t> row_slot(n), slot_row(static_cast<std::size_t>(slots)),
      counts(static_cast<std::size_t>(c.local.count)), num_tiles(1), dropped(1), num_padded(1),
      next_task(2), blocks(padded ? n / static_cast<std::size_t>(c.block_rows) : 1);
  Twin<std::int64_t> tiles(static_cast<std::size_t>(tiles_max) * sizeof(Tile) / 8);
  for (const Device device : kBoth) {
    const Scratch scratch(device, of(device).align_scratch_bytes(slots, c.experts));
    RowMap rows{.row_slot = row_slot.on(device),
                .tile_rows = c.tile_rows,
                .positions = positions,
                .slot_count = slots};
    if (!padded) {
      rows.tiles = reinterpret_cast<Tile*>(tiles.on(device));
      rows.num_tiles = num_tiles.on(device);
      rows.max_tiles = tiles_max;
    }
    of(device).align(
        {.topk_ids =
             c.wide_ids
                 ? Tensor::contiguous(ids64.on(device), DType::kI64, {c.tokens, c.top_k}, device)
                 : Tensor::contiguous(ids32.on(device), DType::kI32, {c.tokens, c.top_k}, device),
         .experts = c.experts,
         .local = c.local,
         .expert_map = c.mapped
                           ? Tensor::contiguous(map.on(device), DType::kI32, {c.experts}, device)
                           : Tensor{},
         .capacity = c.capacity,
         .block_rows = c.block_rows,
         .rows = rows,
         .block_experts = padded ? blocks.on(device) : nullptr,
         .num_padded = padded ? num_padded.on(device) : nullptr,
         .next_task = next_task.on(device),
         .slot_row = slot_row.on(device),
         .tokens_per_expert = counts.on(device),
         .dropped = dropped.on(device),
         .scratch = scratch.get()},
        {});
  }
  EXPECT_EQ(row_slot.differences(), "") << "row_slot";
  EXPECT_EQ(slot_row.differences(), "") << "slot_row";
  EXPECT_EQ(counts.differences(), "") << "tokens_per_expert";
  EXPECT_EQ(dropped.differences(), "") << "dropped";
  EXPECT_EQ(next_task.differences(), "") << "next_task";
  if (padded) {
    EXPECT_EQ(blocks.differences(), "") << "block_experts";
    EXPECT_EQ(num_padded.differences(), "") << "num_padded";
  } else {
    EXPECT_EQ(num_tiles.differences(), "") << "num_tiles";
    EXPECT_EQ(tile_differences(tiles, *num_tiles.cpu()), "") << "tiles";
  }
}

TEST(AlignCuda, CompactLikeTheCpu) {
  MOESAIC_NEEDS_CUDA();
  std::uint64_t seed = 1;
  for (const std::int64_t tokens : {0, 1, 2, 5, 16, 32, 33, 100, 128, 700, 1024, 2048, 2049, 5000})
    for (const std::int64_t experts : {1, 8, 60, 128, 512, 2048})
      for (const bool skewed : {false, true})
        check_align({.tokens = tokens,
                     .top_k = 8,
                     .experts = experts,
                     .local = {0, experts},
                     .tile_rows = tokens > 100 ? 64 : 16,
                     .skewed = skewed},
                    ++seed);
}

TEST(AlignCuda, LocalRangesMapsAndWideIds) {
  MOESAIC_NEEDS_CUDA();
  std::uint64_t seed = 100;
  for (const std::int64_t tokens : {0, 1, 33, 3000})
    for (const bool mapped : {false, true})
      for (const bool wide : {false, true})
        for (const std::int64_t block : {0, 16, 64})
          check_align({.tokens = tokens,
                       .top_k = 5,
                       .experts = 64,
                       .local = {24, 20},
                       .block_rows = block,
                       .mapped = mapped,
                       .wide_ids = wide},
                      ++seed);
}

TEST(AlignCuda, PaddedLists) {
  MOESAIC_NEEDS_CUDA();
  std::uint64_t seed = 200;
  for (const std::int64_t tokens : {1, 7, 300, 4000})
    for (const std::int64_t experts : {4, 128, 2048})
      for (const std::int64_t block : {1, 16, 128})
        check_align({.tokens = tokens,
                     .top_k = 6,
                     .experts = experts,
                     .local = {0, experts},
                     .block_rows = block},
                    ++seed);
}

TEST(AlignCuda, BatchedDropsBeyondCapacityAndCounts) {
  MOESAIC_NEEDS_CUDA();
  std::uint64_t seed = 300;
  for (const std::int64_t tokens : {0, 1, 40, 2500})
    for (const std::int64_t capacity : {1, 7, 300})
      for (const bool skewed : {false, true})
        check_align({.tokens = tokens,
                     .top_k = 4,
                     .experts = 48,
                     .local = {8, 32},
                     .capacity = capacity,
                     .skewed = skewed},
                    ++seed);
}

TEST(AlignCuda, ManySlots) {
  MOESAIC_NEEDS_CUDA();
  check_align({.tokens = 60000, .top_k = 22, .experts = 512, .local = {0, 512}, .tile_rows = 128},
              400);
  check_align(
      {.tokens = 60000, .top_k = 22, .experts = 2048, .local = {100, 1900}, .block_rows = 16}, 401);
  check_align({.tokens = 305000,
               .top_k = 8,
               .experts = 64,
               .local = {0, 64},
               .tile_rows = 256,
               .skewed = true},
              402);
}

TEST(AlignCuda, CountsAlone) {
  MOESAIC_NEEDS_CUDA();
  for (const std::int64_t tokens : {3, 4000}) {
    const AlignCase c{.tokens = tokens, .top_k = 4, .experts = 32, .local = {0, 32}};
    const std::vector<std::int64_t> ids = random_ids(c, 500);
    Twin<std::int32_t> ids32(std::vector<std::int32_t>(ids.begin(), ids.end())), counts(32);
    for (const Device device : kBoth) {
      const Scratch scratch(device, of(device).align_scratch_bytes(tokens * 4, 32));
      of(device).align(
          {.topk_ids = Tensor::contiguous(ids32.on(device), DType::kI32, {tokens, 4}, device),
           .experts = 32,
           .local = {0, 32},
           .rows = {.positions = tokens * 4, .slot_count = tokens * 4},
           .tokens_per_expert = counts.on(device),
           .scratch = scratch.get()},
          {});
    }
    EXPECT_EQ(counts.differences(), "");
  }
}

// --- tiles from lists ----------------------------------------------------------------------------
struct Lists {
  std::vector<std::int32_t> slots, block_experts;
  std::int32_t num_padded;
  std::int64_t slot_count;
};

// Tiles are right when every live position in use lies in exactly one tile, of its block's expert.
void check_sorted(const Lists& lists, std::int64_t block_rows, std::int64_t experts,
                  std::int64_t tile_rows) {
  SCOPED_TRACE(testing::Message() << "block " << block_rows << " tile " << tile_rows << " padded "
                                  << lists.num_padded);
  Twin<std::int32_t> slots(lists.slots), blocks(lists.block_experts),
      used(std::vector<std::int32_t>{lists.num_padded});
  const std::int64_t positions = static_cast<std::int64_t>(lists.slots.size());
  const std::int64_t most = static_cast<std::int64_t>(lists.block_experts.size()) *
                            ((block_rows + tile_rows - 1) / tile_rows);
  Twin<std::int64_t> tiles(static_cast<std::size_t>(most) * 2);
  Twin<std::int32_t> count(1);
  const std::int64_t block_count = static_cast<std::int64_t>(lists.block_experts.size());
  device_backend()->tiles(
      {.sorted = {.slots = Tensor::contiguous(slots.gpu(), DType::kI32, {positions}, kGpu),
                  .block_experts =
                      Tensor::contiguous(blocks.gpu(), DType::kI32, {block_count}, kGpu),
                  .num_padded = Tensor::contiguous(used.gpu(), DType::kI32, {1}, kGpu),
                  .block_rows = block_rows},
       .experts = experts,
       .rows = {.tiles = reinterpret_cast<Tile*>(tiles.gpu()),
                .num_tiles = count.gpu(),
                .row_slot = slots.gpu(),
                .max_tiles = most,
                .tile_rows = tile_rows,
                .positions = positions,
                .slot_count = lists.slot_count}},
      {});
  const std::vector<std::int64_t> raw = tiles.download();
  const std::int32_t n = count.download()[0];
  ASSERT_GE(n, 0);
  ASSERT_LE(n, most);
  for (std::int64_t i = n; i < cuda::kTileWindow && i < most; ++i)
    EXPECT_EQ(std::memcmp(&raw[static_cast<std::size_t>(i) * 2], &cuda::kNoTile, sizeof(Tile)), 0)
        << "behind " << n << " tiles, " << i;
  const auto is_live = [&](std::int64_t p) {
    const std::int32_t slot = lists.slots[static_cast<std::size_t>(p)];
    return slot >= 0 && slot < lists.slot_count && p < lists.num_padded &&
           p / block_rows < block_count;
  };
  bool gaps = false;  // in a block, in front of a live row
  for (std::int64_t p = 1; p < positions; ++p)
    gaps |= p % block_rows != 0 && is_live(p) && !is_live(p - 1);
  std::vector<int> covered(lists.slots.size(), -2);
  for (std::int32_t i = 0; i < n; ++i) {
    Tile tile;
    std::memcpy(static_cast<void*>(&tile), &raw[static_cast<std::size_t>(i) * 2], sizeof tile);
    ASSERT_GE(tile.rows, 0);
    ASSERT_LE(tile.rows, tile_rows);
    ASSERT_GE(tile.first, 0);
    ASSERT_LE(tile.first + tile.rows, positions);
    if (tile.rows == 0) {  // of padding alone, where tiles have room for whole blocks
      EXPECT_GE(tile_rows, block_rows) << "tile " << i;
      continue;
    }
    EXPECT_TRUE(gaps || is_live(tile.first + tile.rows - 1))
        << "tile " << i << " ends with padding";
    for (std::int64_t p = tile.first; p < tile.first + tile.rows; ++p) {
      EXPECT_EQ(covered[static_cast<std::size_t>(p)], -2) << "position " << p << " in two tiles";
      covered[static_cast<std::size_t>(p)] = tile.expert;
    }
  }
  for (std::int64_t p = 0; p < positions; ++p) {
    const int found = covered[static_cast<std::size_t>(p)];
    if (!is_live(p)) continue;
    const std::int32_t given = lists.block_experts[static_cast<std::size_t>(p / block_rows)];
    ASSERT_EQ(found, given >= 0 && given < experts ? given : -1) << "position " << p;
  }
}

TEST(TilesCuda, SortedLists) {
  MOESAIC_NEEDS_CUDA();
  harness::Rng rng(7);
  for (const std::int64_t block_rows : {1, 5, 8, 16, 48, 64, 128})
    for (const std::int64_t tile_rows : {16, 64, 112, 256, 288})
      for (const std::int64_t blocks : {1, 3, 40, 1500, 4000}) {
        Lists lists{.slots = {},
                    .block_experts = {},
                    .num_padded = static_cast<std::int32_t>(blocks * block_rows),
                    .slot_count = 1000};
        std::int32_t expert = -1;
        while (static_cast<std::int64_t>(lists.block_experts.size()) < blocks) {
          expert = static_cast<std::int32_t>(rng.below(40)) - 2;  // some remote, some beyond
          std::int64_t rows = 1 + rng.below(rng.below(4) == 0 ? 40 * block_rows : 2 * block_rows);
          for (; rows > 0 && static_cast<std::int64_t>(lists.block_experts.size()) < blocks;
               rows -= block_rows) {
            lists.block_experts.push_back(expert);
            for (std::int64_t r = 0; r < block_rows; ++r)
              lists.slots.push_back(r < rows ? static_cast<std::int32_t>(rng.below(1000)) : 1000);
          }
        }
        check_sorted(lists, block_rows, 36, tile_rows);
        for (const std::int32_t padded : {0, -5, 17, 0x7fffffff}) {  // whatever the counter says
          lists.num_padded = padded;
          check_sorted(lists, block_rows, 36, tile_rows);
        }
        for (std::int32_t& s : lists.slots)  // padding, negative and huge ids anywhere
          if (rng.below(3) == 0) s = rng.below(2) ? -3 : 0x7ffffff0;
        lists.num_padded = static_cast<std::int32_t>(lists.slots.size());
        check_sorted(lists, block_rows, 36, tile_rows);
      }
}

TEST(TilesCuda, BatchedCountsAreClipped) {
  MOESAIC_NEEDS_CUDA();
  harness::Rng rng(8);
  for (const std::int64_t experts : {1, 33, 128, 2048})
    for (const std::int64_t capacity : {0, 1, 64, 1000}) {
      std::vector<std::int32_t> tokens(static_cast<std::size_t>(experts));
      for (std::int32_t& t : tokens) t = static_cast<std::int32_t>(rng.below(capacity + 50)) - 20;
      tokens[0] = 0x7fffffff;
      Twin<std::int32_t> counts(tokens), num_tiles(1);
      const std::int64_t most = max_tiles(experts * capacity, experts, 16);
      Twin<std::int64_t> tiles(static_cast<std::size_t>(most) * 2);
      for (const Device device : kBoth)
        of(device).tiles(
            {.batched = {Tensor::contiguous(counts.on(device), DType::kI32, {experts}, device)},
             .capacity = capacity,
             .experts = experts,
             .rows = {.tiles = reinterpret_cast<Tile*>(tiles.on(device)),
                      .num_tiles = num_tiles.on(device),
                      .max_tiles = most,
                      .tile_rows = 16,
                      .positions = experts * capacity,
                      .slot_count = experts * capacity}},
            {});
      EXPECT_EQ(num_tiles.differences(), "");
      EXPECT_EQ(tile_differences(tiles, *num_tiles.cpu()), "");
    }
}

}  // namespace
}  // namespace moesaic
