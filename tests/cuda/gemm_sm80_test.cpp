// SPDX-License-Identifier: Apache-2.0
// The SM80 kernel family: every operand against float64, and the same bits from every tactic, tile
// and layout.
#include <cstdio>
#include <cstdlib>

#include "product.h"
#include "product_timing.h"

namespace moesaic::test {
namespace {

ActivationSpec swiglu(GateOrder order = GateOrder::kGateFirst,
                      GateLayout layout = GateLayout::kHalves) {
  return {.kind = Activation::kSwiglu, .order = order, .layout = layout};
}

// Every operand at every granularity of its scales, in 16-bit types both.
std::vector<ProductCase> operand_cases() {
  using enum WeightFormat;
  std::vector<ProductCase> cases;
  cases.push_back(
      {.name = "f32", .format = kF32, .act = ActFormat::kF32, .act_dtype = DType::kF32});
  cases.push_back({.name = "f16", .format = kF16, .act_dtype = DType::kF16});
  cases.push_back({.name = "bf16", .format = kBF16});
  for (const DType dtype : {DType::kBF16, DType::kF16}) {
    const std::string suffix = dtype == DType::kBF16 ? " bf16" : " f16";
    for (const std::int64_t k : {352, 328}) {  // packed rows of a multiple of 16 bytes, and of 4
      for (const std::int64_t group : {32, 64, 96, 128, 4096}) {
        const std::int64_t g = std::min(group, k);
        for (const bool zeros : {false, true}) {
          cases.push_back({.name = "int4 g" + std::to_string(g) + (zeros ? " zeros" : "") + suffix,
                           .format = kU4,
                           .act_dtype = dtype,
                           .scales = Scales::kGroup,
                           .group_k = g,
                           .zero_points = zeros,
                           .k = k});
        }
      }
    }
    for (const std::int64_t group : {32, 128, 328}) {
      cases.push_back({.name = "int8 groups" + suffix,
                       .format = kU8,
                       .act_dtype = dtype,
                       .scales = Scales::kGroup,
                       .group_k = group,
                       .zero_points = group != 128});
    }
    cases.push_back({.name = "int8 channel" + suffix,
                     .format = kI8,
                     .act_dtype = dtype,
                     .scales = Scales::kChannel});
    for (const Scales scales : {Scales::kTensor, Scales::kHalves, Scales::kChannel}) {
      cases.push_back(
          {.name = "fp8_w8a16" + suffix, .format = kE4M3, .act_dtype = dtype, .scales = scales});
    }
    cases.push_back({.name = "fp8_w8a16 block" + suffix,
                     .format = kE4M3,
                     .act_dtype = dtype,
                     .scales = Scales::kBlock,
                     .group_k = 128,
                     .group_n = 128});
    cases.push_back({.name = "mxfp4" + suffix,
                     .format = kE2M1,
                     .act_dtype = dtype,
                     .scales = Scales::kGroup,
                     .group_k = 32});
  }
  for (const auto& [format, act, dtype] :
       {std::tuple{kE4M3, ActFormat::kE4M3, DType::kF8E4M3}, {kI8, ActFormat::kI8, DType::kI8}}) {
    const std::string name = format == kE4M3 ? "fp8" : "int8";
    const ProductCase base{.format = format, .act = act, .act_dtype = dtype};
    for (const Scales scales : {Scales::kTensor, Scales::kHalves, Scales::kChannel}) {
      for (const TokenScales token : {TokenScales::kTensor, TokenScales::kToken}) {
        ProductCase c = base;
        c.name = name + " w8a8", c.scales = scales, c.token_scales = token;
        cases.push_back(c);
      }
    }
    ProductCase c = base;
    c.name = name + " block", c.scales = Scales::kBlock, c.token_scales = TokenScales::kGroup;
    c.group_k = 128, c.group_n = 128;
    cases.push_back(c);
    c.group_k = 64, c.group_n = 96;
    cases.push_back(c);
  }
  return cases;
}

class GemmSm80 : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!have_device()) GTEST_SKIP() << "no CUDA device";
  }

  static int failures() {
    return ::testing::UnitTest::GetInstance()->current_test_info()->result()->total_part_count();
  }

  // All tactics and several tilings: right, and the same bits.
  void check(const ProductCase& c) {
    const cuda::GemmFamily& family = cuda::family_sm80();
    Product product(c);
    if (!family.supports(product.spec())) {
      ADD_FAILURE() << c.name << ": not supported";
      return;
    }
    const auto tactics = family.tactics(product.spec(), device_traits());
    ASSERT_FALSE(tactics.empty());
    const int before = failures();
    const auto first = product.run(family, -1, 16, 16);
    for (const Tactic& tactic : tactics) {
      if (failures() > before) return;  // one report per case
      for (const auto& [tile_rows, live] :
           {std::pair<std::int64_t, std::int64_t>{64, 64}, {192, 192}, {8, 1}}) {
        EXPECT_TRUE(product.run(family, tactic.id, tile_rows, live) == first)
            << c.name << ": " << tactic.description << " over tiles of " << live << " rows differs";
      }
    }
  }
};

TEST_F(GemmSm80, EveryOperandAgainstFloat64) {
  unsigned seed = 1;
  for (ProductCase c : operand_cases()) {
    c.seed = ++seed;
    check(c);
  }
}

TEST_F(GemmSm80, EveryActivationInEveryLayout) {
  unsigned seed = 100;
  for (int kind = 0; kind < kNumActivations; ++kind) {
    for (const GateOrder order : {GateOrder::kGateFirst, GateOrder::kUpFirst}) {
      for (const GateLayout layout : {GateLayout::kHalves, GateLayout::kInterleaved}) {
        ProductCase c{.name = "activation " + std::to_string(kind)};
        c.activation =
            ActivationSpec{.kind = static_cast<Activation>(kind), .order = order, .layout = layout};
        if (!is_gated(c.activation->kind) &&
            (order != GateOrder::kGateFirst || layout != GateLayout::kHalves))
          continue;
        c.activation->limit = 1.5f;
        c.per_expert_terms = kind % 2 == 1;
        c.bias = DType::kF32;
        c.n = 136, c.k = 64, c.seed = ++seed;
        check(c);
      }
    }
  }
}

TEST_F(GemmSm80, LayoutsBiasesAndStrides) {
  unsigned seed = 200;
  for (const Layout layout : {Layout::kSortedPadded, Layout::kCompact, Layout::kBatched}) {
    for (const DType c_dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
      for (const bool transposed : {false, true}) {
        for (const auto& [format, dtype] :
             {std::pair{WeightFormat::kBF16, DType::kBF16}, {WeightFormat::kU4, DType::kF16}}) {
          ProductCase c{.name = "layout " + std::to_string(static_cast<int>(layout)),
                        .format = format,
                        .act_dtype = dtype};
          if (format == WeightFormat::kU4)
            c.scales = Scales::kGroup, c.group_k = 128, c.zero_points = true;
          c.layout = layout;
          c.c_dtype = c_dtype, c.c_transposed = transposed, c.c_padding = seed % 3 * 3;
          c.bias = seed % 3 == 0 ? DType::kF32 : seed % 3 == 1 ? DType::kF16 : DType::kBF16;
          c.row_weights = layout != Layout::kBatched;
          c.alpha = seed % 2;
          c.a_padding = seed % 4 * 4, c.w_padding = seed % 2 * 8;
          if (seed % 2) c.activation = swiglu();
          c.n = 190 + 2 * (seed % 7);
          c.seed = ++seed;
          check(c);
        }
      }
    }
  }
}

TEST_F(GemmSm80, RandomShapes) {
  std::mt19937 random(std::random_device{}());
  const auto pick = [&](std::int64_t low, std::int64_t high) {
    return std::uniform_int_distribution<std::int64_t>(low, high)(random);
  };
  const auto operands = operand_cases();
  const char* rounds = std::getenv("MOESAIC_TEST_ROUNDS");
  for (int i = 0; i < (rounds ? std::atoi(rounds) : 24); ++i) {
    ProductCase c = operands[pick(0, static_cast<std::int64_t>(operands.size()) - 1)];
    c.seed = static_cast<unsigned>(random());
    c.experts = pick(1, 9), c.tokens = pick(1, 90), c.top_k = pick(1, 4);
    c.n = 2 * pick(1, 170), c.k = 8 * pick(1, 70);
    if (c.scales == Scales::kGroup || c.scales == Scales::kBlock) {
      c.group_k = c.format == WeightFormat::kE2M1 ? 32 : 32 * pick(1, 4);
      if (c.group_k > c.k) c.group_k = c.k;
    }
    c.layout = static_cast<Layout>(pick(0, 2));
    if (pick(0, 1))
      c.activation =
          swiglu(static_cast<GateOrder>(pick(0, 1)), static_cast<GateLayout>(pick(0, 1)));
    SCOPED_TRACE("seed " + std::to_string(c.seed) + " n " + std::to_string(c.n) + " k " +
                 std::to_string(c.k) + " group " + std::to_string(c.group_k));
    check(c);
  }
}

// Not a test: prints what the policy reaches and what every tile would
// (--gtest_also_run_disabled_tests).
TEST_F(GemmSm80, DISABLED_Timing) {
  const cuda::GemmFamily& family = cuda::family_sm80();
  for (const TimedShape& shape :
       {TimedShape{"qwen3-30b-a3b", 128, 2048, 768, 8}, {"mixtral-8x7b", 8, 4096, 14336, 2}}) {
    for (const WeightFormat format :
         {WeightFormat::kBF16, WeightFormat::kU4, WeightFormat::kE4M3, WeightFormat::kI8}) {
      TimedLayer layer(shape, format);
      for (const std::int64_t tokens : {1, 4, 16, 128, 1024, 8192}) {
        const bool sweep = format == WeightFormat::kBF16 || format == WeightFormat::kU4;
        const std::int64_t policy =
            family.tile_rows(layer.fc1(), tokens * shape.top_k, layer.traits());
        const auto t = layer.time(family, tokens, policy, -1, -1);
        std::printf(
            "%s format %d T=%ld rows %ld: gemm1 %.4f gemm2 %.4f both %.4f ms, floor %.4f, ratio "
            "%.3f\n",
            shape.name, static_cast<int>(format), static_cast<long>(tokens),
            static_cast<long>(policy), t.gemm1, t.gemm2, t.both, t.floor, t.both / t.floor);
        std::fflush(stdout);
        if (!sweep) continue;
        for (const std::int64_t rows : {policy / 2, policy, policy * 2}) {  // of a tile
          if (rows < 8 || rows > 128) continue;
          for (const Tactic& tactic : family.tactics(layer.fc1(), layer.traits())) {
            if (tactic.description.find(" " + std::to_string(rows) + "x") == std::string::npos)
              continue;
            const auto s = layer.time(family, tokens, rows, tactic.id, tactic.id);
            std::printf("    rows %3ld %-28s gemm1 %.4f gemm2 %.4f both %.4f\n",
                        static_cast<long>(rows), tactic.description.c_str(), s.gemm1, s.gemm2,
                        s.both);
          }
        }
      }
    }
  }
}

// For a profiler: MOESAIC_PROFILE = "format tokens tile_rows tactic".
TEST_F(GemmSm80, DISABLED_Profile) {
  int format = 0, tokens = 0, tile_rows = 0, tactic = 0;
  const char* text = std::getenv("MOESAIC_PROFILE");
  if (!text || std::sscanf(text, "%d %d %d %d", &format, &tokens, &tile_rows, &tactic) != 4) {
    GTEST_SKIP() << "set MOESAIC_PROFILE";
  }
  TimedLayer layer({"qwen3-30b-a3b", 128, 2048, 768, 8}, static_cast<WeightFormat>(format));
  layer.once(cuda::family_sm80(), tokens, tile_rows, tactic);
}

}  // namespace
}  // namespace moesaic::test
