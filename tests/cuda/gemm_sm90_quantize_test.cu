// SPDX-License-Identifier: Apache-2.0
// SM90 products that quantize what they write: byte for byte what the same product gives in 16 bit,
// quantized on the host, with every tactic; nothing else is written.
#include "gemm_sm90_problem.h"

namespace moesaic::cuda {
namespace {

void expect_quantized(const Case& c, unsigned seed, const Problem::Quantize& quantize) {
  const DeviceTraits& device = *hopper();
  Problem problem(c, seed);
  ASSERT_TRUE(family_sm90().supports(problem.spec())) << c.text();
  const Problem::Quantized expected = problem.quantized(problem.run(-1, device), quantize);
  const bool any = quantize.granularity == ActScale::kTensorStatic;
  for (const Tactic& tactic : family_sm90().tactics(problem.spec(), device)) {
    if (!any && tactic.description.find("pairs") == std::string::npos) continue;
    const Problem::Quantized got = problem.run(tactic.id, device, quantize);
    ASSERT_EQ(got.scale, expected.scale) << c.text() << " seed " << seed;
    ASSERT_EQ(got.c, expected.c) << c.text() << " seed " << seed << ": " << tactic.description;
  }
}

// One scale, or one for each expert; some saturate, some are 0, which gives zeros.
std::vector<float> static_scales(std::mt19937& random, std::int64_t experts) {
  const auto below = [&](unsigned n) { return random() % n; };
  std::vector<float> scales(below(2) ? static_cast<std::size_t>(experts) : 1);
  for (float& s : scales)
    s = below(8) == 0 ? 0.0f : std::exp2(static_cast<float>(below(12)) - 10.0f) * 1.1f;
  return scales;
}

TEST(Sm90Quantizes, StaticScales) {
  if (!hopper()) GTEST_SKIP() << "needs a GPU of compute capability 9.0";
  for (unsigned seed = 0; seed < 80; ++seed) {
    std::mt19937 random(seed);
    Case c = random_case(random, DType::kF8E4M3);
    if (c.out == DType::kF32) c.out = DType::kBF16;
    if (c.scales == Scales::kBlock) c.scales = Scales::kTensor;
    ASSERT_NO_FATAL_FAILURE(expect_quantized(
        c, seed,
        {.granularity = ActScale::kTensorStatic, .scale = static_scales(random, c.experts)}));
  }
}

// The activations that leave through registers, in groups as well.
constexpr Activation kDirectly[] = {Activation::kSwiglu,      Activation::kSwigluOai,
                                    Activation::kGegluTanh,   Activation::kGeglu,
                                    Activation::kSwigluClamp, Activation::kSwigluStep};

// Every tile's kernel with full tiles.
TEST(Sm90Quantizes, StaticScalesOfLargeTiles) {
  if (!hopper()) GTEST_SKIP() << "needs a GPU of compute capability 9.0";
  for (unsigned seed = 0; seed < 28; ++seed) {
    std::mt19937 random(seed);
    const Case c{.dtype = DType::kF8E4M3,
                 .scales = seed % 2 ? Scales::kTensor : Scales::kHalves,
                 .experts = 3,
                 .n = 544,
                 .k = 400,
                 .tokens = 500,
                 .top_k = 2,
                 .tile_rows = 256 >> seed % 4,
                 .layout = static_cast<Layout>(seed % 3),
                 .a_row = RowOf::kPosition,
                 .activation = seed < 24 ? static_cast<int>(kDirectly[seed / 4]) : -1,
                 .out = seed % 4 == 1 ? DType::kF16 : DType::kBF16,
                 .alpha = seed % 3 == 1};
    ASSERT_NO_FATAL_FAILURE(expect_quantized(
        c, seed,
        {.granularity = ActScale::kTensorStatic, .scale = static_scales(random, c.experts)}));
  }
}

// Groups of 128 of gated rows: short last groups, tiles of any size (upright and not, one after the
// other), filtered tiles and padding between them.
TEST(Sm90Quantizes, Groups) {
  if (!hopper()) GTEST_SKIP() << "needs a GPU of compute capability 9.0";
  for (unsigned seed = 0; seed < 80; ++seed) {
    std::mt19937 random(seed);
    Case c = random_case(random, DType::kF8E4M3);
    c.scales = Scales::kBlock;
    c.activation = static_cast<int>(kDirectly[seed % 7 % 6]);
    c.n = 32 * (1 + static_cast<std::int64_t>(random() % 30));
    c.out = seed % 5 == 0 ? DType::kF16 : DType::kBF16;
    c.c_padding = 8 * static_cast<std::int64_t>(random() % 3);
    c.c_column = 1;
    c.experts = 1 + static_cast<std::int64_t>(random() % 12);
    c.tokens = seed % 2 ? 20 + static_cast<std::int64_t>(random() % 1200) : c.tokens;
    ASSERT_NO_FATAL_FAILURE(expect_quantized(c, seed, {.granularity = ActScale::kGroup}));
  }
}

// So many tasks for each CTA that its warpgroups run apart, with products too short to hold them
// together.
TEST(Sm90Quantizes, GroupsOfManyShortTasks) {
  if (!hopper()) GTEST_SKIP() << "needs a GPU of compute capability 9.0";
  for (const std::int64_t k : {16, 128, 512}) {
    for (const std::int64_t tile_rows : {16, 128, 256}) {
      const Case c{.dtype = DType::kF8E4M3,
                   .scales = Scales::kBlock,
                   .experts = 9,
                   .n = 4128,
                   .k = k,
                   .tokens = 3000,
                   .top_k = 2,
                   .tile_rows = tile_rows,
                   .a_row = RowOf::kPosition,
                   .activation = static_cast<int>(Activation::kSwiglu),
                   .filtered = true};
      ASSERT_NO_FATAL_FAILURE(
          expect_quantized(c, static_cast<unsigned>(k), {.granularity = ActScale::kGroup}));
    }
  }
}

}  // namespace
}  // namespace moesaic::cuda
