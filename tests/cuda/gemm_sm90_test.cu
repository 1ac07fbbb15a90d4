// SPDX-License-Identifier: Apache-2.0
// The SM90 grouped product against a float64 reference on the host: random shapes, every scheme and
// epilogue, every tactic bit for bit.
#include <cstdlib>
#include <set>

#include "gemm_sm90_problem.h"

namespace moesaic::cuda {
namespace {

// Against the reference with the policy's tactic; then every other tactic bit for bit.
void expect_right(const Case& c, unsigned seed) {
  const DeviceTraits& device = *hopper();
  Problem problem(c, seed);
  ASSERT_TRUE(family_sm90().supports(problem.spec())) << c.text();
  const Bytes base = problem.run(-1, device);
  ASSERT_TRUE(problem.check(base)) << c.text() << " seed " << seed;
  for (const Tactic& tactic : family_sm90().tactics(problem.spec(), device)) {
    ASSERT_EQ(problem.run(tactic.id, device), base)
        << c.text() << " seed " << seed << ": other bits from " << tactic.description;
  }
}

class Random : public ::testing::TestWithParam<DType> {};
TEST_P(Random, MatchesReference) {
  if (!hopper()) GTEST_SKIP() << "needs a GPU of compute capability 9.0";
  const char* wanted = std::getenv("MOESAIC_SM90_CASES");
  const int cases = wanted ? std::atoi(wanted) : 60;
  for (int i = 0; i < cases; ++i) {
    const unsigned seed = 1000 * static_cast<unsigned>(GetParam()) + i;
    std::mt19937 random(seed);
    ASSERT_NO_FATAL_FAILURE(expect_right(random_case(random, GetParam()), seed));
  }
}
INSTANTIATE_TEST_SUITE_P(Sm90, Random, ::testing::Values(DType::kBF16, DType::kF16, DType::kF8E4M3),
                         [](const auto& p) { return std::string(name(p.param)); });

TEST(Sm90, LargeTilesAndManyExperts) {
  if (!hopper()) GTEST_SKIP() << "needs a GPU of compute capability 9.0";
  expect_right({.experts = 3,
                .n = 768,
                .k = 712,
                .tokens = 900,
                .top_k = 2,
                .tile_rows = 256,
                .activation = static_cast<int>(Activation::kSwiglu)},
               1);
  expect_right({.experts = 100,
                .n = 256,
                .k = 192,
                .tokens = 120,
                .top_k = 4,
                .tile_rows = 16,
                .c_row = RowOf::kSlot},
               2);
  expect_right({.dtype = DType::kF8E4M3,
                .scales = Scales::kBlock,
                .experts = 3,
                .n = 768,
                .k = 720,
                .tokens = 500,
                .top_k = 2,
                .tile_rows = 128,
                .activation = static_cast<int>(Activation::kSwiglu)},
               3);
  // Scales of several chunks at once, gathered rows.
  expect_right({.dtype = DType::kF8E4M3,
                .scales = Scales::kBlock,
                .experts = 2,
                .n = 528,
                .k = 1024,
                .tokens = 400,
                .top_k = 1,
                .tile_rows = 256},
               4);
}

// K so short, and tasks so many, that the policy takes them in runs, the last of which is shorter;
// more tiles than a group has; zeros in between.
TEST(Sm90, RunsOfTasks) {
  if (!hopper()) GTEST_SKIP() << "needs a GPU of compute capability 9.0";
  unsigned seed = 200;
  for (const std::int64_t tile_rows : {16, 64, 256}) {
    for (const Scales scales : {Scales::kNone, Scales::kBlock, Scales::kChannel}) {
      expect_right({.dtype = scales == Scales::kNone ? DType::kBF16 : DType::kF8E4M3,
                    .scales = scales,
                    .experts = 260,
                    .n = 2064,
                    .k = 128,
                    .tokens = 150,
                    .top_k = 2,
                    .tile_rows = tile_rows,
                    .a_row = RowOf::kPosition,
                    .c_row = RowOf::kSlot,
                    .filtered = true},
                   seed++);
    }
  }
}

// Many tasks, dealt out by a counter: each one once, to the bits of tasks that come in turn.
TEST(Sm90, TasksDealtOut) {
  if (!hopper()) GTEST_SKIP() << "needs a GPU of compute capability 9.0";
  unsigned seed = 250;
  for (const std::int64_t tile_rows : {16, 64}) {
    for (const Scales scales : {Scales::kNone, Scales::kBlock, Scales::kTensor}) {
      Problem problem({.dtype = scales == Scales::kNone ? DType::kBF16 : DType::kF8E4M3,
                       .scales = scales,
                       .experts = 40,
                       .n = 2064,
                       .k = 784,
                       .tokens = 150,
                       .top_k = 2,
                       .tile_rows = tile_rows,
                       .c_row = RowOf::kSlot,
                       .filtered = true},
                      ++seed);
      const Bytes in_turn = problem.run(-1, *hopper());
      EXPECT_EQ(problem.tasks_dealt(), 0);
      EXPECT_TRUE(problem.check(in_turn));
      problem.deal_tasks();
      // Whoever begins a task asks once for another: the counter ends at the number of tasks.
      std::set<std::int32_t> dealt;
      for (int i = 0; i < 3; ++i) {
        EXPECT_TRUE(problem.run(-1, *hopper()) == in_turn) << "tiles of " << tile_rows;
        dealt.insert(problem.tasks_dealt());
      }
      EXPECT_EQ(dealt.size(), 1u) << "tiles of " << tile_rows;
      EXPECT_GT(*dealt.begin(), 500) << "tiles of " << tile_rows;
    }
  }
}

// Tiles whose halves nearly fill blocks of 64 tokens: there the pair kernel for e4m3 exchanges the
// sides, by itself as other bits would tell.
TEST(Sm90, UprightTiles) {
  if (!hopper()) GTEST_SKIP() << "needs a GPU of compute capability 9.0";
  unsigned seed = 100;
  for (const Scales scales : {Scales::kBlock, Scales::kChannel}) {
    for (const int activation :
         {-1, static_cast<int>(Activation::kSwiglu), static_cast<int>(Activation::kSwigluOai),
          static_cast<int>(Activation::kGegluTanh), static_cast<int>(Activation::kGeglu),
          static_cast<int>(Activation::kSwigluStep)}) {
      for (const std::int64_t tokens : {55, 122, 240}) {  // of the only expert
        expect_right({.dtype = DType::kF8E4M3,
                      .scales = scales,
                      .experts = 1,
                      .n = 832,
                      .k = 400,
                      .tokens = tokens,
                      .top_k = 1,
                      .tile_rows = 256,
                      .activation = activation,
                      .order = seed % 2 ? GateOrder::kGateFirst : GateOrder::kUpFirst,
                      .gates = seed % 3 ? GateLayout::kHalves : GateLayout::kInterleaved,
                      .out = seed % 4 == 1 ? DType::kF16 : DType::kBF16,
                      .bias = seed % 2 ? static_cast<int>(DType::kF32) : -1},
                     seed);
        ++seed;
      }
    }
  }
}

// Where K is long, block-scaled tiles are walked twice: full ones, then those of one block of
// tokens for each CTA. One expert whose rows end with a short tile; several.
TEST(Sm90, FullTilesFirst) {
  if (!hopper()) GTEST_SKIP() << "needs a GPU of compute capability 9.0";
  const Case one{.dtype = DType::kF8E4M3,
                 .scales = Scales::kBlock,
                 .experts = 1,
                 .n = 128,
                 .k = 6144,
                 .tokens = 260,
                 .top_k = 1,
                 .tile_rows = 256,
                 .out = DType::kBF16};
  expect_right(one, 500);
  Case several = one;
  several.experts = 3;
  several.tokens = 390;
  several.a_row = RowOf::kPosition;
  several.activation = static_cast<int>(Activation::kSwiglu);
  expect_right(several, 501);
}

// More than 128 tokens of a CTA, gathered and by boxes: e4m3 without scales along K takes them in
// two halves.
TEST(Sm90, TilesInHalves) {
  if (!hopper()) GTEST_SKIP() << "needs a GPU of compute capability 9.0";
  unsigned seed = 300;
  for (const Scales scales : {Scales::kTensor, Scales::kChannel}) {
    for (const RowOf a_row : {RowOf::kToken, RowOf::kPosition}) {
      for (const std::int64_t tokens : {258, 273, 288, 530}) {  // of the only expert
        expect_right({.dtype = DType::kF8E4M3,
                      .scales = scales,
                      .experts = 1,
                      .n = 320,
                      .k = 272,
                      .tokens = tokens,
                      .top_k = 1,
                      .tile_rows = 288,
                      .a_row = a_row,
                      .activation = seed % 2 ? -1 : static_cast<int>(Activation::kSwiglu),
                      .out = DType::kBF16},
                     seed);
        ++seed;
      }
    }
  }
}

TEST(Sm90, NoRows) {
  if (!hopper()) GTEST_SKIP() << "needs a GPU of compute capability 9.0";
  expect_right({.tokens = 0}, 4);
}

}  // namespace
}  // namespace moesaic::cuda
