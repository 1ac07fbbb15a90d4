// SPDX-License-Identifier: Apache-2.0
// The CPU's product on every ISA level this machine has: against the oracle, and bit by bit however it
// is cut (threads, tiles, packed or the caller's views, other rows beside it, several callers).
#include "cpu/gemm.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <thread>

#include "cpu/kernels.h"
#include "cpu/pack.h"
#include "harness/verify.h"
#include "moesaic/runtime.h"
#include "numeric.h"
#include "weights.h"

namespace moesaic {
namespace {

using harness::Case;
using harness::HostTensor;

class CpuGemm : public ::testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    threads_ = num_threads();
    set_kernels(DeviceType::kCpu, GetParam());
  }
  void TearDown() override {
    set_num_threads(threads_);
    set_kernels(DeviceType::kCpu, "");
  }

 private:
  int threads_ = 1;
};
INSTANTIATE_TEST_SUITE_P(Levels, CpuGemm,
                         ::testing::ValuesIn(available_kernels(DeviceType::kCpu)),
                         [](const auto& info) { return info.param; });

TEST_P(CpuGemm, OracleAgrees) {
  const std::vector<Case> cases = harness::pair_cases();
  for (std::size_t i = 0; i < cases.size(); i += 15) {
    const harness::VerifyResult result = harness::run_case(cases[i]);
    EXPECT_NE(result.status, harness::Status::kFailed) << result.name << ": " << result.reason;
  }
}

// --- one product, by hand -----------------------------------------------------------------------------
GemmWeights one_expert(const GemmWeights& all, std::int64_t e) {
  const auto part = [&](const Tensor& t) { return t.defined() ? t.slice(e, 1) : t; };
  GemmWeights one = all;
  one.weight = part(all.weight);
  one.scale = part(all.scale);
  one.zero_point = part(all.zero_point);
  one.bias = part(all.bias);
  return one;
}

// One product of a case, with random activations.
struct Problem {
  LayerConfig config;
  harness::WeightData data;
  WeightOperand plain, packed;
  std::unique_ptr<PackedWeights> storage;
  const ActivationSpec* activation = nullptr;
  HostTensor a, a_scale;
  std::int64_t rows = 0, columns = 0;

  Problem(const Case& c, Product product, std::int64_t row_count)
      : config(harness::layer_config(c)),
        data(harness::make_weights(config, harness::weight_options(c))),
        rows(row_count) {
    const bool fc1 = product == Product::kFc1;
    const WeightSpec spec = weight_spec(config, product);
    const GemmWeights given =
        normalize(spec, spec.experts, fc1 ? data.weights.fc1 : data.weights.fc2, "weights");
    const SideTensors side = side_views(spec, spec.experts, given,
                                        fc1 ? data.weights.activation : ActivationWeights{}, "side");
    plain = {.spec = spec, .packed = nullptr, .plain = given, .side = side};
    storage = make_packed_cpu(spec);
    for (std::int64_t e = 0; e < spec.experts; ++e) storage->load(e, one_expert(given, e));
    packed = {.spec = spec, .packed = storage.get(), .plain = {}, .side = side};
    if (fc1) activation = &config.activation;
    columns = spec.gated ? spec.n / 2 : spec.n;

    harness::Rng rng(c.seed + 77);
    a = HostTensor(spec.act_dtype, {rows, spec.k});
    for (std::int64_t i = 0; i < a.numel(); ++i)
      harness::store_element(a.bytes().data(), a.dtype(), i,
                             rng.normal() * (spec.act_dtype == DType::kI8 ? 40.0 : 1.0));
    if (spec.act != ActFormat::k16 && spec.act != ActFormat::kF32) {
      const std::int64_t groups =
          spec.act_group > 0 ? (spec.k + spec.act_group - 1) / spec.act_group : 1;
      a_scale = HostTensor(DType::kF32, {rows, groups});
      for (std::int64_t i = 0; i < a_scale.numel(); ++i)
        a_scale.as<float>()[i] = static_cast<float>(0.01 + rng.uniform());
    }
  }

  struct How {
    std::int64_t tile_rows = kCpuTileRows;
    std::int64_t first = 0, count = -1;  // rows
    DType c = DType::kF32;
  };
  // Rows are dealt to the experts in equal runs.
  HostTensor run(const WeightOperand& b, const How& how) const {
    const std::int64_t experts = b.spec.experts, last = how.count < 0 ? rows : how.first + how.count;
    std::vector<Tile> tiles;
    for (std::int64_t e = 0; e < experts; ++e) {
      const std::int64_t begin = std::max(how.first, rows * e / experts);
      const std::int64_t end = std::min(last, rows * (e + 1) / experts);
      for (std::int64_t r = begin; r < end; r += how.tile_rows)
        tiles.push_back({.expert = static_cast<std::int32_t>(e),
                         .rows = static_cast<std::int32_t>(std::min(how.tile_rows, end - r)),
                         .first = r});
    }
    auto count = static_cast<std::int32_t>(tiles.size());
    HostTensor c(how.c, {rows, columns});
    std::memset(c.bytes().data(), 0xff, c.bytes().size());
    GemmStage stage{.a = a.view(), .b = &b, .activation = activation, .c = c.view()};
    stage.rows = {.tiles = tiles.data(), .num_tiles = &count, .max_tiles = count,
                  .tile_rows = how.tile_rows, .positions = rows};
    if (a_scale.defined())
      stage.a_scale = {.data = a_scale.as<float>(), .row_stride = a_scale.shape()[1],
                       .group_stride = b.spec.act_group > 0 ? 1 : 0};
    gemm_cpu(stage);
    return c;
  }
};

// One case per variant: shapes and activations rotate.
std::vector<Case> one_per_variant() {
  std::vector<Case> cases;
  const harness::Shape shapes[] = {{"ragged", 3, 102, 70, 2}, {"long", 2, 1336, 98, 1}};
  for (const harness::Variant& v : harness::variants()) {
    Case c;
    c.variant = v;
    c.shape = shapes[cases.size() % 2];
    c.activation.kind = static_cast<Activation>(cases.size() % kNumActivations);
    c.bias = cases.size() % 3 == 0 ? harness::Biases::kAll : harness::Biases::kNone;
    c.seed = 100 + cases.size();
    if (harness::supported(c, {}).supported) cases.push_back(c);
  }
  return cases;
}

bool same_bytes(const HostTensor& x, const HostTensor& y) { return x.bytes() == y.bytes(); }

TEST_P(CpuGemm, BitsDoNotDependOnHowTheWorkIsCut) {
  for (const Case& c : one_per_variant()) {
    for (const Product product : {Product::kFc1, Product::kFc2}) {
      SCOPED_TRACE(harness::name(c));
      const Problem problem(c, product, 61);
      set_num_threads(2);
      const HostTensor whole = problem.run(problem.packed, {});
      for (std::int64_t i = 0; i < whole.numel(); ++i)
        ASSERT_TRUE(std::isfinite(whole.as<float>()[i])) << i;
      for (const int threads : {1, 3, 7}) {
        set_num_threads(threads);
        EXPECT_TRUE(same_bytes(problem.run(problem.packed, {}), whole)) << threads << " threads";
      }
      for (const std::int64_t tile_rows : {1, 2, 3, 4, 5, 6, 7, 11, 13, 200}) {
        EXPECT_TRUE(same_bytes(problem.run(problem.packed, {.tile_rows = tile_rows}), whole))
            << "tiles of " << tile_rows;
      }
      EXPECT_TRUE(same_bytes(problem.run(problem.plain, {}), whole)) << "the caller's views";
      EXPECT_TRUE(same_bytes(problem.run(problem.plain, {.tile_rows = 2}), whole))
          << "the caller's views, few rows";
      // A row alone.
      const std::int64_t row = 17, bytes = problem.columns * 4;
      const HostTensor alone = problem.run(problem.packed, {.first = row, .count = 1});
      EXPECT_EQ(0, std::memcmp(alone.bytes().data() + row * bytes, whole.bytes().data() + row * bytes,
                               static_cast<std::size_t>(bytes)));
    }
  }
}

// K that takes several chunks, with more tiles than wait between them.
TEST_P(CpuGemm, BitsDoNotDependOnTheCutsOfALongK) {
  for (const Scheme scheme : {Scheme::kF32, Scheme::kBF16, Scheme::kInt8Channel, Scheme::kInt4W4A16,
                              Scheme::kMxfp4W4A16}) {
    SCOPED_TRACE(name(scheme));
    Case c;
    c.variant = harness::default_variant(scheme);
    c.shape = {"long", 1, 600, scheme == Scheme::kInt8Channel ? 4224 : 2176, 1};
    const Problem problem(c, Product::kFc2, 48);
    const HostTensor whole = problem.run(problem.packed, {});
    for (std::int64_t i = 0; i < whole.numel(); ++i)
      ASSERT_TRUE(std::isfinite(whole.as<float>()[i])) << i;
    EXPECT_TRUE(same_bytes(problem.run(problem.packed, {.tile_rows = 7}), whole));
    EXPECT_TRUE(same_bytes(problem.run(problem.plain, {.tile_rows = 40}), whole));
  }
}

TEST_P(CpuGemm, SixteenBitOutputsAreTheRoundedSums) {
  Case c;
  c.variant = harness::default_variant(Scheme::kBF16);
  c.shape = {"ragged", 3, 102, 70, 2};
  const Problem problem(c, Product::kFc2, 20);
  const HostTensor exact = problem.run(problem.packed, {});
  for (const DType dtype : {DType::kF16, DType::kBF16}) {
    const HostTensor rounded = problem.run(problem.packed, {.c = dtype});
    for (std::int64_t i = 0; i < exact.numel(); ++i) {
      const float x = exact.as<float>()[i];
      const std::uint16_t expected = dtype == DType::kF16 ? float_to_f16(x) : float_to_bf16(x);
      ASSERT_EQ(rounded.as<std::uint16_t>()[i], expected) << x;
    }
  }
}

TEST_P(CpuGemm, NonFiniteStaysInItsRow) {
  for (const Scheme scheme : {Scheme::kF32, Scheme::kF16, Scheme::kBF16, Scheme::kFp8Channel,
                              Scheme::kInt4W4A16, Scheme::kMxfp4W4A16}) {
    Case c;
    c.variant = harness::default_variant(scheme);
    c.shape = {"ragged", 2, 102, 70, 1};
    Problem problem(c, Product::kFc1, 23);
    const HostTensor before = problem.run(problem.packed, {});
    const std::int64_t k = problem.a.shape()[1], bad = 5;
    harness::store_element(problem.a.bytes().data(), problem.a.dtype(), bad * k + 3,
                           std::numeric_limits<double>::quiet_NaN());
    const HostTensor after = problem.run(problem.packed, {});
    const HostTensor alone = problem.run(problem.packed, {.first = bad, .count = 1});
    for (std::int64_t r = 0; r < problem.rows; ++r) {
      for (std::int64_t n = 0; n < problem.columns; ++n) {
        const std::int64_t i = r * problem.columns + n;
        if (r == bad) {
          EXPECT_TRUE(std::isnan(after.as<float>()[i])) << name(scheme) << " column " << n;
          EXPECT_EQ(after.as<std::uint32_t>()[i], alone.as<std::uint32_t>()[i]) << name(scheme);
        } else {
          ASSERT_EQ(after.as<std::uint32_t>()[i], before.as<std::uint32_t>()[i]) << name(scheme);
        }
      }
    }
  }
}

// Every exponent of a group's scale counts, and NaN stays in its column. Levels that fold scales into bf16 weights
// (amx) have not the lowest two and the highest two.
TEST_P(CpuGemm, ScalesOfE8M0ReachTheirEnds) {
  Case c;
  c.variant = harness::default_variant(Scheme::kMxfp4W4A16);
  c.shape = {"ends", 1, 96, 160, 1};
  Problem problem(c, Product::kFc2, 9);
  const std::int64_t k = problem.a.shape()[1], groups = k / 32;
  const Tensor& scale = problem.plain.plain.scale;  // [1, N, groups]
  const Tensor& weight = problem.plain.plain.weight;  // [1, N, k / 2]
  const std::uint8_t ends[] = {0, 1, 2, 127, 252, 253, 254, 255};
  const auto scale_at = [&](std::int64_t n, std::int64_t g) -> std::uint8_t& {
    return static_cast<std::uint8_t*>(scale.data)[n * scale.strides[1] + g * scale.strides[2]];
  };
  for (std::int64_t n = 0; n < problem.columns; ++n)  // one end per column; every third column has it once
    for (std::int64_t g = 0; g < groups; ++g)
      scale_at(n, g) = n % 3 != 0 || g == groups / 2 ? ends[n % 8] : 120;
  problem.storage->load(0, one_expert(problem.plain.plain, 0));
  harness::Rng rng(5);
  for (std::int64_t r = 0; r < problem.rows; ++r)  // rows of such size that low and high scales show
    for (std::int64_t i = 0; i < k; ++i)
      harness::store_element(problem.a.bytes().data(), problem.a.dtype(), r * k + i,
                             rng.normal() * std::exp2(r % 3 == 0 ? 110 : r % 3 == 1 ? 0 : -110));
  const HostTensor got = problem.run(problem.packed, {});
  const bool folds = GetParam() == "amx";
  std::int64_t compared = 0;
  for (std::int64_t n = 0; n < problem.columns; ++n) {
    const std::uint8_t end = ends[n % 8];
    if (folds && (end < 2 || end > 252) && end != 255) continue;
    for (std::int64_t r = 0; r < problem.rows; ++r) {
      double sum = 0.0, size = 0.0;
      for (std::int64_t i = 0; i < k; ++i) {
        const auto byte = weight.as<const std::uint8_t>()[n * weight.strides[1] + i / 2];
        const double w = kE2M1[i % 2 == 0 ? byte & 15 : byte >> 4] * std::exp2(scale_at(n, i / 32) - 127.0);
        const double product = harness::load_element(problem.a.bytes().data(), problem.a.dtype(), r * k + i) * w;
        sum += product;
        size += std::fabs(product);
      }
      const float y = got.as<float>()[r * problem.columns + n];
      if (end == 255) {
        EXPECT_TRUE(std::isnan(y)) << "column " << n;
      } else if (size < 1e38) {
        EXPECT_NEAR(y, sum, size * 1e-4 + 1e-36) << "scale " << int{end} << ", row " << r;
        ++compared;
      }
    }
  }
  // Of eight ends one is NaN and four are what a level that folds has not; some sums leave fp32.
  EXPECT_GT(compared, problem.rows * problem.columns / (folds ? 4 : 2));
}

// Levels may let sums run on over groups whose scales are near each other: up to the furthest of those and behind it
// results are right, and the same however the work is cut.
TEST_P(CpuGemm, ScalesOfE8M0NearAndFar) {
  Case c;
  c.variant = harness::default_variant(Scheme::kMxfp4W4A16);
  c.shape = {"near", 1, 96, 1312, 1};
  Problem problem(c, Product::kFc2, 31);
  const std::int64_t k = problem.a.shape()[1];
  const Tensor& scale = problem.plain.plain.scale;    // [1, N, groups]
  const Tensor& weight = problem.plain.plain.weight;  // [1, N, k / 2]
  for (const int spread : {0, 3, kNearScales, kNearScales + 1, 60}) {
    harness::Rng rng(static_cast<std::uint64_t>(spread) + 1);
    for (std::int64_t n = 0; n < problem.columns; ++n)
      for (std::int64_t g = 0; g < k / 32; ++g)  // both ends in turns, then anything between
        static_cast<std::uint8_t*>(scale.data)[n * scale.strides[1] + g * scale.strides[2]] =
            static_cast<std::uint8_t>(100 + (g < 8 ? g % 2 * spread : static_cast<int>(rng.uniform() * spread)));
    problem.storage->load(0, one_expert(problem.plain.plain, 0));
    const HostTensor got = problem.run(problem.packed, {});
    for (std::int64_t n = 0; n < problem.columns; ++n)
      for (std::int64_t r = 0; r < problem.rows; ++r) {
        double sum = 0.0, size = 0.0;
        for (std::int64_t i = 0; i < k; ++i) {
          const auto byte = weight.as<const std::uint8_t>()[n * weight.strides[1] + i / 2];
          const int e = static_cast<const std::uint8_t*>(
              scale.data)[n * scale.strides[1] + i / 32 * scale.strides[2]];
          const double product = harness::load_element(problem.a.bytes().data(), problem.a.dtype(), r * k + i) *
                                 kE2M1[i % 2 == 0 ? byte & 15 : byte >> 4] * std::exp2(e - 127.0);
          sum += product;
          size += std::fabs(product);
        }
        EXPECT_NEAR(got.as<float>()[r * problem.columns + n], sum, size * 1e-5)
            << "spread " << spread << ", column " << n << ", row " << r;
      }
    for (const std::int64_t tile_rows : {1, 2, 3, 5, 7, 11, 16})
      for (const WeightOperand* b : {&problem.packed, &problem.plain}) {
        const HostTensor cut = problem.run(*b, {.tile_rows = tile_rows});
        EXPECT_EQ(std::memcmp(cut.bytes().data(), got.bytes().data(), got.bytes().size()), 0)
            << "spread " << spread << ", " << tile_rows << " rows" << (b == &problem.plain ? ", plain" : "");
      }
  }
}

TEST_P(CpuGemm, SeveralCallersAtOnce) {
  Case c;
  c.variant = harness::default_variant(Scheme::kInt4W4A16);
  c.shape = {"ragged", 3, 102, 70, 2};
  const Problem problem(c, Product::kFc1, 61);
  const HostTensor expected = problem.run(problem.packed, {});
  set_num_threads(3);
  std::vector<std::thread> callers;
  std::atomic<int> wrong{0};
  for (int i = 0; i < 4; ++i)
    callers.emplace_back([&] {
      for (int round = 0; round < 10; ++round)
        wrong += !same_bytes(problem.run(problem.packed, {}), expected);
    });
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(wrong.load(), 0);
}

// Rows come through the slot list, padding and hostile slots are skipped, filtered tiles become zero,
// and everything else keeps what it held: in an output with strides of its own.
TEST_P(CpuGemm, GathersScattersAndFilters) {
  Case c;
  c.variant = harness::default_variant(Scheme::kF32);
  c.shape = {"small", 2, 40, 33, 2};
  const Problem problem(c, Product::kFc2, 6);  // A: one row per token
  const std::int64_t n = problem.columns, top_k = 2, slots = 12;
  std::vector<std::int32_t> slot_of{3, 0, 12, 7, -5, 11, 2, 900, 4};
  std::vector<Tile> tiles{{.expert = 0, .rows = 3, .first = 0},
                          {.expert = -1, .rows = 3, .first = 3},
                          {.expert = 1, .rows = 3, .first = 6}};
  std::int32_t count = 3;
  std::vector<float> weights(static_cast<std::size_t>(slots));
  std::iota(weights.begin(), weights.end(), 1.0f);
  std::vector<float> out(static_cast<std::size_t>(slots * n * 2), -77.0f);
  GemmStage stage{.a = problem.a.view(), .a_row = RowOf::kToken, .top_k = top_k,
                  .b = &problem.packed, .row_weights = weights.data(), .c_row = RowOf::kSlot};
  stage.rows = {.tiles = tiles.data(), .num_tiles = &count, .row_slot = slot_of.data(), .max_tiles = 3,
                .tile_rows = 3, .positions = 9, .slot_count = slots};
  stage.c = Tensor::contiguous(out.data(), DType::kF32, {slots, n});
  stage.c.strides[0] = n * 2;  // columns at every other element
  stage.c.strides[1] = 2;
  gemm_cpu(stage);
  const HostTensor dense = problem.run(problem.packed, {});  // tokens 0-2: expert 0, 3-5: expert 1
  for (std::int64_t slot = 0; slot < slots; ++slot) {
    for (std::int64_t i = 0; i < n; ++i) {
      const float got = out[static_cast<std::size_t>(slot * n * 2 + i * 2)];
      ASSERT_EQ(out[static_cast<std::size_t>(slot * n * 2 + i * 2 + 1)], -77.0f);
      const std::int64_t token = slot / top_k;
      const float product = dense.as<float>()[token * n + i] * weights[static_cast<std::size_t>(slot)];
      if (slot == 3 || slot == 0) {
        ASSERT_EQ(got, product) << slot;
      } else if (slot == 7 || slot == 11) {
        ASSERT_EQ(got, 0.0f) << slot;
      } else if (slot != 2 && slot != 4) {  // those two: tokens 1 and 2 by expert 1
        ASSERT_EQ(got, -77.0f) << slot;
      } else {
        ASSERT_NE(got, -77.0f) << slot;
      }
    }
  }
}

TEST(CpuKernels, LevelsAreChosenByName) {
  const std::vector<std::string> levels = available_kernels(DeviceType::kCpu);
  ASSERT_FALSE(levels.empty());
  EXPECT_EQ(levels.front(), "scalar");
  for (const std::string& level : levels) {
    set_kernels(DeviceType::kCpu, level);
    EXPECT_EQ(cpu_kernels_name(), level);
  }
  set_kernels(DeviceType::kCpu, "");
  EXPECT_EQ(cpu_kernels_name(), levels.back());
  EXPECT_THROW(set_kernels(DeviceType::kCpu, "sse9"), Error);
  EXPECT_EQ(cpu_kernels_name(), levels.back());
}

// Every number of a tile lies where the layout says, once.
TEST(CpuPack, TilesHoldEveryWeightOnce) {
  for (const std::int64_t n : {1, 63, 64, 130}) {
    for (const std::int64_t k : {1, 2, 3, 37}) {
      WeightSpec spec{.scheme = Scheme::kF32, .format = WeightFormat::kF32, .experts = 1, .n = n, .k = k};
      spec.scale = {.group_n = n, .group_k = k};
      PackedCpu packed(spec);
      std::vector<float> values(static_cast<std::size_t>(n * k));
      std::iota(values.begin(), values.end(), 1.0f);
      GemmWeights w{.weight = Tensor::contiguous(values.data(), DType::kF32, {1, n, k})};
      packed.load(0, w);
      const auto* tiles = reinterpret_cast<const float*>(packed.tile(0, 0));
      for (std::int64_t row = 0; row < n; ++row)
        for (std::int64_t i = 0; i < k; ++i)
          ASSERT_EQ(tiles[(row / kTileCols * k + i) * kTileCols + row % kTileCols],
                    values[static_cast<std::size_t>(row * k + i)]);
    }
  }
}

}  // namespace
}  // namespace moesaic
