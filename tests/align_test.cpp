// SPDX-License-Identifier: Apache-2.0
// Ids to positions and callers' lists to tiles, against naive models, on random and hostile values.
#include "reference/align.h"

#include <algorithm>
#include <limits>
#include <map>
#include <numeric>

#include "backend.h"
#include "stage_testing.h"

namespace moesaic {
namespace {

using harness::HostTensor;
using harness::Rng;
using testing::for_each_thread_count;
using testing::poisoned;

struct Problem {
  std::int64_t tokens = 0, top_k = 1, experts = 1;
  ExpertRange local{};  // count resolved
  HostTensor ids;       // [T, k] i32 or i64
  HostTensor map;       // optional
  std::int64_t slots() const { return tokens * top_k; }
};

// Some skew, some ids nobody has, duplicates inside a token, and numbers that overflow naive code.
Problem random_problem(Rng& rng, std::int64_t max_tokens) {
  Problem p{
      .tokens = rng.below(max_tokens + 1), .top_k = 1 + rng.below(8), .experts = 1 + rng.below(70)};
  p.local.first = rng.below(p.experts);
  p.local.count = 1 + rng.below(p.experts - p.local.first);
  if (rng.below(3) == 0) p.local = {0, p.experts};
  const bool wide = rng.below(2) == 0;
  p.ids = HostTensor(wide ? DType::kI64 : DType::kI32, {p.tokens, p.top_k});
  const std::int64_t skew = 1 + rng.below(p.experts);
  const std::int64_t hostile[] = {-1,
                                  p.experts,
                                  p.experts + 1,
                                  std::numeric_limits<std::int32_t>::min(),
                                  std::numeric_limits<std::int32_t>::max(),
                                  wide ? std::numeric_limits<std::int64_t>::min() : -7,
                                  wide ? (std::int64_t{1} << 32) : -8};  // 0 when cut to 32 bits
  for (std::int64_t i = 0; i < p.slots(); ++i) {
    std::int64_t id = rng.below(2) ? rng.below(skew) : rng.below(p.experts);
    if (rng.below(20) == 0) id = hostile[rng.below(7)];
    if (wide)
      p.ids.as<std::int64_t>()[i] = id;
    else
      p.ids.as<std::int32_t>()[i] = static_cast<std::int32_t>(id);
  }
  if (rng.below(3) == 0) {  // any global id may be any local one, and some entries are nonsense
    p.map = HostTensor(DType::kI32, {p.experts});
    for (std::int64_t e = 0; e < p.experts; ++e)
      p.map.as<std::int32_t>()[e] =
          static_cast<std::int32_t>(rng.below(8) == 0 ? std::numeric_limits<std::int32_t>::max()
                                                      : rng.below(p.local.count + 1) - 1);
  }
  return p;
}

// Slots of each local expert, in order: the naive model of everything below.
std::vector<std::vector<std::int32_t>> runs_of(const Problem& p) {
  std::vector<std::vector<std::int32_t>> runs(static_cast<std::size_t>(p.local.count));
  const auto ids = reference::slot_ids(p.ids.view());
  for (std::size_t s = 0; s < ids.size(); ++s) {
    const std::int64_t e = reference::local_expert(ids[s], p.experts, p.local, p.map.view());
    if (e >= 0) runs[static_cast<std::size_t>(e)].push_back(static_cast<std::int32_t>(s));
  }
  return runs;
}

struct Lists {
  std::vector<Tile> tiles;
  std::vector<std::int32_t> row_slot, slot_row, tokens_per_expert;
  std::int32_t dropped = -5;
  std::int64_t tile_rows = 0;
};
Lists run_stage(const Problem& p, std::int64_t capacity, std::int64_t tile_rows) {
  const Backend& cpu = backend({});
  const std::int64_t positions = capacity > 0 ? p.local.count * capacity : p.slots();
  const std::int64_t room = max_tiles(positions, p.local.count, tile_rows);
  Lists l{.tiles = poisoned<Tile>(room + 1),
          .row_slot = poisoned<std::int32_t>(positions + 1),
          .slot_row = poisoned<std::int32_t>(p.slots() + 1),
          .tokens_per_expert = poisoned<std::int32_t>(p.local.count + 1),
          .tile_rows = tile_rows};
  const Lists before = l;
  std::int32_t num_tiles = -9;
  std::vector<std::byte> scratch(cpu.align_scratch_bytes(p.slots(), p.experts) + 1,
                                 std::byte{0x5a});
  cpu.align({.topk_ids = p.ids.view(),
             .experts = p.experts,
             .local = p.local,
             .expert_map = p.map.view(),
             .capacity = capacity,
             .rows = {.tiles = l.tiles.data(),
                      .num_tiles = &num_tiles,
                      .row_slot = l.row_slot.data(),
                      .max_tiles = room,
                      .tile_rows = tile_rows,
                      .positions = positions,
                      .slot_count = p.slots()},
             .slot_row = l.slot_row.data(),
             .tokens_per_expert = l.tokens_per_expert.data(),
             .dropped = &l.dropped,
             .scratch = scratch.data()},
            {});
  EXPECT_EQ(scratch.back(), std::byte{0x5a});
  EXPECT_EQ(l.row_slot.back(), before.row_slot.back()) << "written behind the end";
  EXPECT_EQ(l.slot_row.back(), before.slot_row.back());
  EXPECT_EQ(l.tokens_per_expert.back(), before.tokens_per_expert.back());
  EXPECT_LE(num_tiles, room);
  l.tiles.resize(static_cast<std::size_t>(num_tiles));
  l.slot_row.pop_back();
  l.tokens_per_expert.pop_back();
  return l;
}

void expect_lists(const Problem& p, const Lists& l, std::int64_t capacity) {
  const auto runs = runs_of(p);
  std::vector<std::int32_t> slot_row(static_cast<std::size_t>(p.slots()), -1);
  std::size_t tile = 0;
  std::int64_t position = 0;
  std::int32_t dropped = 0;
  for (std::size_t e = 0; e < runs.size(); ++e) {
    if (capacity > 0) position = static_cast<std::int64_t>(e) * capacity;
    const auto live =
        capacity > 0 ? std::min<std::size_t>(runs[e].size(), static_cast<std::size_t>(capacity))
                     : runs[e].size();
    dropped += static_cast<std::int32_t>(runs[e].size() - live);
    EXPECT_EQ(l.tokens_per_expert[e], static_cast<std::int32_t>(live));
    std::int64_t tiled = position;
    while (tiled < position + static_cast<std::int64_t>(live)) {
      ASSERT_LT(tile, l.tiles.size());
      const Tile& t = l.tiles[tile++];
      EXPECT_EQ(t.expert, static_cast<std::int32_t>(e)) << "tiles ascend";
      EXPECT_EQ(t.first, tiled);
      ASSERT_GT(t.rows, 0);
      EXPECT_LE(t.rows, l.tile_rows);
      tiled += t.rows;
    }
    EXPECT_EQ(tiled, position + static_cast<std::int64_t>(live));
    for (std::size_t i = 0; i < live; ++i, ++position) {
      EXPECT_EQ(l.row_slot[static_cast<std::size_t>(position)], runs[e][i]) << "stable";
      slot_row[static_cast<std::size_t>(runs[e][i])] = static_cast<std::int32_t>(position);
    }
  }
  EXPECT_EQ(tile, l.tiles.size());
  EXPECT_EQ(l.slot_row, slot_row);
  EXPECT_EQ(l.dropped, dropped);
}

TEST(Align, CompactListsLikeTheModel) {
  FRESH_RNG(rng);
  for (int round = 0; round < 300; ++round) {
    const Problem p = random_problem(rng, 200);
    expect_lists(p, run_stage(p, 0, 1 + rng.below(20)), 0);
  }
}

// Defect 6 of the original: nothing checks that an expert's tokens fit. Ours drops and counts.
TEST(Align, OriginalOverflowsCapacityOursDropsAndCounts) {
  FRESH_RNG(rng);
  for (int round = 0; round < 300; ++round) {
    const Problem p = random_problem(rng, 60);
    const std::int64_t capacity = 1 + rng.below(20);
    expect_lists(p, run_stage(p, capacity, 1 + rng.below(20)), capacity);
  }
}

TEST(Align, BatchedBufferOfNoRowsDropsEverything) {
  HostTensor ids(DType::kI32, {3, 1});
  std::int32_t counts[2] = {-1, -1}, slot_row[3] = {5, 5, 5}, dropped = -1, num_tiles = -1;
  std::vector<std::byte> scratch(backend({}).align_scratch_bytes(3, 2));
  Tile tile;
  backend({}).align(
      {.topk_ids = ids.view(),
       .experts = 2,
       .local = {0, 2},
       .rows = {.tiles = &tile, .num_tiles = &num_tiles, .tile_rows = 8, .slot_count = 3},
       .slot_row = slot_row,
       .tokens_per_expert = counts,
       .dropped = &dropped,
       .scratch = scratch.data()},
      {});
  EXPECT_EQ(dropped, 3);
  EXPECT_EQ(num_tiles, 0);
  EXPECT_EQ(counts[0], 0);
  EXPECT_EQ(slot_row[2], -1);
}

// The original's order inside an expert comes from atomics and varies.
TEST(Align, OriginalOrderVariesOursIsStableAtAnyThreads) {
  FRESH_RNG(rng);
  Problem p{.tokens = 40000, .top_k = 3, .experts = 17, .local = {2, 11}};
  p.ids = HostTensor(DType::kI32, {p.tokens, p.top_k});
  for (std::int64_t i = 0; i < p.slots(); ++i)
    p.ids.as<std::int32_t>()[i] = static_cast<std::int32_t>(rng.below(19) - 1);
  for_each_thread_count([&] {
    expect_lists(p, run_stage(p, 0, 48), 0);
    expect_lists(p, run_stage(p, 5000, 48), 5000);
  });
}

TEST(Align, CountsAloneNeedNoLists) {
  FRESH_RNG(rng);
  const Problem p = random_problem(rng, 50);
  std::vector<std::int32_t> counts(static_cast<std::size_t>(p.local.count), -1);
  std::vector<std::byte> scratch(backend({}).align_scratch_bytes(p.slots(), p.experts));
  backend({}).align({.topk_ids = p.ids.view(),
                     .experts = p.experts,
                     .local = p.local,
                     .expert_map = p.map.view(),
                     .rows = {.positions = p.slots(), .slot_count = p.slots()},
                     .tokens_per_expert = counts.data(),
                     .scratch = scratch.data()},
                    {});
  const auto runs = runs_of(p);
  // Defect 9 of the original: tokens_per_expert is sized by global experts. Ours by the local ones.
  for (std::size_t e = 0; e < runs.size(); ++e)
    EXPECT_EQ(counts[e], static_cast<std::int32_t>(runs[e].size()));
}

// --- level 3: padded lists -----------------------------------------------------------------------

struct Padded {
  std::vector<std::int32_t> slots, block_experts, num_padded{-1}, slot_row, tokens_per_expert;
};
Padded run_padded(const Problem& p, std::int64_t block_rows) {
  const std::int64_t capacity = align_capacity(p.slots(), p.experts, block_rows);
  const std::int64_t blocks = (capacity + block_rows - 1) / block_rows;
  Padded out{.slots = poisoned<std::int32_t>(capacity + 1),
             .block_experts = poisoned<std::int32_t>(blocks + 1),
             .slot_row = poisoned<std::int32_t>(p.slots()),
             .tokens_per_expert = poisoned<std::int32_t>(p.local.count)};
  const std::int32_t canary = out.slots.back();
  const auto view = [](std::vector<std::int32_t>& v, std::int64_t n) {
    return Tensor::contiguous(v.data(), DType::kI32, {n});
  };
  const WorkspaceBuffer workspace({}, align_workspace_bytes(p.slots(), p.experts));
  align({.topk_ids = p.ids.view(),
         .experts = p.experts,
         .local = p.local,
         .expert_map = p.map.view(),
         .rows = {.slots = view(out.slots, capacity),
                  .block_experts = view(out.block_experts, blocks),
                  .num_padded = view(out.num_padded, 1),
                  .block_rows = block_rows},
         .slot_row = view(out.slot_row, p.slots()),
         .tokens_per_expert = view(out.tokens_per_expert, p.local.count),
         .workspace = workspace.view()});
  EXPECT_EQ(out.slots.back(), canary);
  EXPECT_EQ(out.block_experts.back(), canary);
  return out;
}

TEST(Align, PaddedListsLikeTheModel) {
  FRESH_RNG(rng);
  for (int round = 0; round < 200; ++round) {
    Problem p = random_problem(rng, 100);
    if (p.tokens == 0) p.ids = HostTensor(DType::kI32, {0, p.top_k});
    const std::int64_t block_rows = 1 + rng.below(40);
    const Padded got = run_padded(p, block_rows);
    const reference::Aligned model =
        reference::align(p.ids.view(), p.experts, p.local, p.map.view(), block_rows);
    ASSERT_EQ(got.num_padded[0], static_cast<std::int32_t>(model.slots.size()));
    for (std::size_t i = 0; i + 1 < got.slots.size(); ++i)
      EXPECT_EQ(got.slots[i], i < model.slots.size() ? model.slots[i] : p.slots());
    for (std::size_t b = 0; b + 1 < got.block_experts.size(); ++b)
      EXPECT_EQ(got.block_experts[b], b < model.block_experts.size() ? model.block_experts[b] : -1);
    EXPECT_EQ(got.slot_row, model.slot_row);
    EXPECT_EQ(got.tokens_per_expert, model.tokens_per_expert);
  }
}

// Defect 7 of the original: duplicate ids in one token's top-k break finalize. Ours counts each.
TEST(Align, OriginalBreaksOnDuplicatesOursCountsEach) {
  Problem p{.tokens = 2,
            .top_k = 3,
            .experts = 4,
            .local = {0, 4},
            .ids = HostTensor(DType::kI32, {2, 3})};
  const std::int32_t ids[] = {1, 1, 1, 2, 1, 2};
  std::copy_n(ids, 6, p.ids.as<std::int32_t>());
  const Padded got = run_padded(p, 4);
  EXPECT_EQ(got.tokens_per_expert, (std::vector<std::int32_t>{0, 4, 2, 0}));
  EXPECT_EQ(std::vector<std::int32_t>(got.slots.begin(), got.slots.begin() + 8),
            (std::vector<std::int32_t>{0, 1, 2, 4, 3, 5, 6, 6}));
}

TEST(Align, CapacityOfTheOriginalSuffices) {
  EXPECT_EQ(align_capacity(8, 128, 64), 8 * 64);  // fewer slots than experts + 1
  EXPECT_EQ(align_capacity(1000, 8, 64), 1000 + 9 * 63);
  EXPECT_EQ(align_capacity(0, 8, 64), 0);
}

// --- callers' lists to tiles ---------------------------------------------------------------------

struct TileRun {
  std::vector<Tile> tiles;
};
TileRun run_tiles(TileStage stage, std::int64_t room) {
  TileRun out{poisoned<Tile>(room + 1)};
  std::int32_t count = -1;
  stage.rows.tiles = out.tiles.data();
  stage.rows.num_tiles = &count;
  stage.rows.max_tiles = room;
  backend({}).tiles(stage, {});
  EXPECT_GE(count, 0);
  EXPECT_LE(count, room);
  out.tiles.resize(static_cast<std::size_t>(std::clamp<std::int64_t>(count, 0, room)));
  return out;
}

// Which expert computes a position; -2: none, -1: filtered.
std::vector<int> owners(const TileRun& run, std::int64_t positions, std::int64_t tile_rows) {
  std::vector<int> of(static_cast<std::size_t>(positions), -2);
  for (const Tile& t : run.tiles) {
    EXPECT_GE(t.first, 0);
    EXPECT_GT(t.rows, 0);
    EXPECT_LE(t.rows, tile_rows);
    EXPECT_LE(t.first + t.rows, positions);
    for (std::int64_t p = t.first; p < std::min(t.first + t.rows, positions); ++p) {
      EXPECT_EQ(of[static_cast<std::size_t>(p)], -2) << "position in two tiles";
      of[static_cast<std::size_t>(p)] = t.expert;
    }
  }
  return of;
}

TEST(Tiles, HostileSortedLists) {
  FRESH_RNG(rng);
  const std::int32_t poison[] = {-1, std::numeric_limits<std::int32_t>::min(),
                                 std::numeric_limits<std::int32_t>::max()};
  for (int round = 0; round < 500; ++round) {
    const std::int64_t block_rows = 1 + rng.below(20), blocks = rng.below(30);
    const std::int64_t positions =
        std::max<std::int64_t>(0, blocks * block_rows - rng.below(block_rows));
    const std::int64_t slot_count = 1 + rng.below(100), experts = 1 + rng.below(10);
    const std::int64_t tile_rows = 8 + rng.below(50);
    HostTensor slots(DType::kI32, {positions}), block_experts(DType::kI32, {blocks}),
        used(DType::kI32, {1});
    for (std::int64_t i = 0; i < positions; ++i)
      slots.as<std::int32_t>()[i] = rng.below(4)
                                        ? static_cast<std::int32_t>(rng.below(slot_count + 2))
                                        : poison[rng.below(3)];
    for (std::int64_t b = 0; b < blocks; ++b)
      block_experts.as<std::int32_t>()[b] =
          rng.below(4) ? static_cast<std::int32_t>(rng.below(experts)) : poison[rng.below(3)];
    used.as<std::int32_t>()[0] =
        rng.below(3) ? static_cast<std::int32_t>(rng.below(positions + 1)) : poison[rng.below(3)];
    const std::int64_t in_use = std::clamp<std::int64_t>(used.as<std::int32_t>()[0], 0, positions);
    const TileRun run =
        run_tiles({.sorted = {slots.view(), block_experts.view(), used.view(), block_rows},
                   .experts = experts,
                   .rows = {.row_slot = slots.as<std::int32_t>(),
                            .tile_rows = tile_rows,
                            .positions = positions,
                            .slot_count = slot_count}},
                  blocks * ((block_rows + tile_rows - 1) / tile_rows));
    const auto of = owners(run, positions, tile_rows);
    for (std::int64_t p = 0; p < positions; ++p) {
      const std::int32_t slot = slots.as<std::int32_t>()[p],
                         e = block_experts.as<std::int32_t>()[p / block_rows];
      const int expected = e >= 0 && e < experts ? e : -1;
      const int owner = of[static_cast<std::size_t>(p)];
      if (p >= in_use)
        EXPECT_EQ(owner, -2);
      else if (slot >= 0 && slot < slot_count)
        EXPECT_EQ(owner, expected);
      else
        EXPECT_TRUE(owner == expected || owner == -2);  // padding may be cut off
    }
  }
}

// A block of 128 rows with one live slot is one row of work.
TEST(Tiles, PaddingIsNotWork) {
  HostTensor slots(DType::kI32, {256}), experts(DType::kI32, {2}), used(DType::kI32, {1});
  std::fill_n(slots.as<std::int32_t>(), 256, 2);
  slots.as<std::int32_t>()[0] = 0;
  slots.as<std::int32_t>()[128] = 1;
  experts.as<std::int32_t>()[1] = 3;
  used.as<std::int32_t>()[0] = 256;
  const TileRun run = run_tiles({.sorted = {slots.view(), experts.view(), used.view(), 128},
                                 .experts = 4,
                                 .rows = {.tile_rows = 48, .positions = 256, .slot_count = 2}},
                                6);
  ASSERT_EQ(run.tiles.size(), 2u);
  EXPECT_EQ(run.tiles[0].rows, 1);
  EXPECT_EQ(run.tiles[1].rows, 1);
  EXPECT_EQ(run.tiles[1].first, 128);
}

TEST(Tiles, HostileCountsAreClippedToCapacity) {
  HostTensor counts(DType::kI32, {4});
  const std::int32_t given[] = {-3, 1000000, 5, std::numeric_limits<std::int32_t>::min()};
  std::copy_n(given, 4, counts.as<std::int32_t>());
  const TileRun run = run_tiles({.batched = {counts.view()},
                                 .capacity = 20,
                                 .experts = 4,
                                 .rows = {.tile_rows = 8, .positions = 80}},
                                max_tiles(80, 4, 8));
  const auto of = owners(run, 80, 8);
  for (std::int64_t p = 0; p < 80; ++p) {
    const bool live = (p >= 20 && p < 40) || (p >= 40 && p < 45);
    EXPECT_EQ(of[static_cast<std::size_t>(p)], live ? static_cast<int>(p / 20) : -2);
  }
}

}  // namespace
}  // namespace moesaic
