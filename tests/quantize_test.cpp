// SPDX-License-Identifier: Apache-2.0
// The quantizers: against NumPy's numbers bit for bit, against the scalar rule of numeric.h, and
// the original's defects.
#include <bit>
#include <cmath>
#include <cstring>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <random>

#include "backend.h"
#include "cpu/stage_kernels.h"
#include "numeric.h"
#include "stage_testing.h"

namespace moesaic {
namespace {

using harness::HostTensor;
using testing::for_each_level;
using testing::for_each_thread_count;
using testing::random_tensor;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

struct Quantized {
  HostTensor q, scale;
  friend bool operator==(const Quantized& a, const Quantized& b) {
    return a.q.bytes() == b.q.bytes() && a.scale.bytes() == b.scale.bytes();
  }
  double value(std::int64_t i) const {
    return harness::load_element(q.bytes().data(), q.dtype(), i);
  }
};
Quantized run(QuantizeArgs args) {
  const std::int64_t rows = args.input.shape[0], k = args.input.shape[1];
  Quantized out{HostTensor(args.to, {rows, k}), HostTensor()};
  switch (args.granularity) {
    case ActScale::kToken:
      out.scale = HostTensor(DType::kF32, {rows, 1});
      break;
    case ActScale::kGroup:
      out.scale = HostTensor(DType::kF32, {rows, (k + args.group_size - 1) / args.group_size});
      break;
    default:
      out.scale = HostTensor(DType::kF32, {1});
  }
  std::fill(out.q.bytes().begin(), out.q.bytes().end(), std::byte{0x7f});
  std::fill(out.scale.bytes().begin(), out.scale.bytes().end(), std::byte{0xff});
  args.output = out.q.view();
  args.scale = out.scale.view();
  const WorkspaceBuffer workspace({}, quantize_workspace_bytes(rows));
  args.workspace = workspace.view();
  quantize(args);
  return out;
}

ActScale granularity_of(const std::string& text) {
  return text == "token"            ? ActScale::kToken
         : text == "group"          ? ActScale::kGroup
         : text == "tensor_dynamic" ? ActScale::kTensorDynamic
                                    : ActScale::kTensorStatic;
}

TEST(QuantizeGolden, NumPyBitForBit) {
  std::ifstream file(MOESAIC_SOURCE_DIR "/tests/golden/quantize.json");
  const nlohmann::json golden = nlohmann::json::parse(file);
  const auto rows = static_cast<std::int64_t>(golden.at("input").size());
  const auto width = static_cast<std::int64_t>(golden.at("input")[0].size());
  HostTensor x(DType::kF32, {rows, width}), fixed(DType::kF32, {1});
  fixed.as<float>()[0] = golden.at("static_scale").get<float>();
  for (std::int64_t i = 0; i < rows * width; ++i)
    x.as<float>()[i] = golden.at("input")[i / width][i % width].get<float>();
  for_each_level([&] {
    for (const auto& c : golden.at("cases")) {
      const auto to = c.at("to").get<std::string>();
      SCOPED_TRACE(to + " " + c.at("granularity").get<std::string>());
      const Quantized got = run(
          {.input = x.view(),
           .to = to == "fp8_e4m3" ? DType::kF8E4M3 : DType::kI8,
           .granularity = granularity_of(c.at("granularity")),
           .group_size = golden.at("group").get<std::int64_t>(),
           .int8_rounding = to == "i8_truncate" ? Int8Rounding::kTruncate : Int8Rounding::kNearest,
           .static_scale = fixed.view()});
      for (std::int64_t i = 0; i < rows * width; ++i) {
        const int theirs = c.at("q")[i / width][i % width].get<int>();
        const int mine =
            to == "fp8_e4m3" ? got.q.as<std::uint8_t>()[i] : got.q.as<std::int8_t>()[i];
        EXPECT_EQ(mine, theirs) << "element " << i << " of value " << x.as<float>()[i];
      }
      ASSERT_EQ(c.at("scale_bits").size(), static_cast<std::size_t>(got.scale.numel()));
      for (std::int64_t i = 0; i < got.scale.numel(); ++i)
        EXPECT_EQ(std::bit_cast<std::uint32_t>(got.scale.as<float>()[i]),
                  c.at("scale_bits")[i].get<std::uint32_t>());
    }
  });
}

// The batched form: each expert's live rows have the bits of a plain call on them alone, per-tensor
// scales included; rows and scales behind them are not touched.
TEST(Quantize, BatchedExpertsAreIndependent) {
  constexpr std::int64_t kExperts = 4, kCapacity = 9, kColumns = 40, kGroup = 16;
  const std::int32_t live[kExperts] = {3, 0, 9, 1};
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  HostTensor x(DType::kF32, {kExperts, kCapacity, kColumns}), counts(DType::kI32, {kExperts});
  HostTensor fixed(DType::kF32, {kExperts});
  for (std::int64_t i = 0; i < x.numel(); ++i) x.as<float>()[i] = normal(random);
  std::copy_n(live, kExperts, counts.as<std::int32_t>());
  for (std::int64_t e = 0; e < kExperts; ++e)
    fixed.as<float>()[e] = 0.01f * static_cast<float>(e + 1);
  for_each_level([&] {
    for (const ActScale granularity :
         {ActScale::kTensorStatic, ActScale::kTensorDynamic, ActScale::kToken, ActScale::kGroup}) {
      SCOPED_TRACE(static_cast<int>(granularity));
      const std::int64_t groups =
          granularity == ActScale::kGroup ? (kColumns + kGroup - 1) / kGroup : 1;
      const bool per_row = granularity == ActScale::kToken || granularity == ActScale::kGroup;
      HostTensor q(DType::kF8E4M3, {kExperts, kCapacity, kColumns});
      HostTensor scale(DType::kF32, {kExperts, per_row ? kCapacity : 1, groups});
      std::fill(q.bytes().begin(), q.bytes().end(), std::byte{0x55});
      std::fill(scale.bytes().begin(), scale.bytes().end(), std::byte{0x55});
      QuantizeArgs args{
          .input = x.view(),
          .num_tokens = counts.view(),
          .granularity = granularity,
          .group_size = kGroup,
          .static_scale = granularity == ActScale::kTensorStatic ? fixed.view() : Tensor{},
          .output = q.view(),
          .scale = scale.view()};
      const WorkspaceBuffer workspace({}, quantize_workspace_bytes(args));
      args.workspace = workspace.view();
      quantize(args);
      for (std::int64_t e = 0; e < kExperts; ++e) {
        const auto alone =
            run({.input = Tensor::contiguous(x.as<float>() + e * kCapacity * kColumns, DType::kF32,
                                             {live[e], kColumns}),
                 .granularity = granularity,
                 .group_size = kGroup,
                 .static_scale = granularity == ActScale::kTensorStatic
                                     ? Tensor::contiguous(fixed.as<float>() + e, DType::kF32, {1})
                                     : Tensor{}});
        for (std::int64_t i = 0; i < kCapacity * kColumns; ++i)
          ASSERT_EQ(q.as<std::uint8_t>()[e * kCapacity * kColumns + i],
                    i < live[e] * kColumns ? alone.q.as<std::uint8_t>()[i] : 0x55)
              << "expert " << e << ", element " << i;
        if (!per_row && live[e] == 0) continue;
        const std::int64_t rows = per_row ? kCapacity : 1, written = per_row ? live[e] : 1;
        for (std::int64_t i = 0; i < rows * groups; ++i)
          ASSERT_EQ(std::bit_cast<std::uint32_t>(scale.as<float>()[e * rows * groups + i]),
                    i < written * groups ? std::bit_cast<std::uint32_t>(alone.scale.as<float>()[i])
                                         : 0x55555555u)
              << "expert " << e << ", scale " << i;
      }
    }
  });
}

// The vector bodies against the scalar rule, over a fair part of all floats.
TEST(Quantize, EveryLevelRoundsLikeTheScalarRule) {
  std::vector<float> x;
  for (std::uint64_t u = 0; u < (std::uint64_t{1} << 32); u += 9973)
    x.push_back(std::bit_cast<float>(static_cast<std::uint32_t>(u)));
  for (int b = 0; b < 65536;
       ++b) {  // every bf16 and f16 number, and halfway between bf16 neighbours
    x.push_back(bf16_to_float(static_cast<std::uint16_t>(b)));
    x.push_back(f16_to_float(static_cast<std::uint16_t>(b)));
    x.push_back(std::bit_cast<float>(static_cast<std::uint32_t>(b) << 16 | 0x8000u));
  }
  for (int i = -300; i <= 300; ++i) x.push_back(static_cast<float>(i) * 0.5f);
  const auto n = static_cast<std::int64_t>(x.size());
  std::vector<std::uint16_t> bf16(x.size()), f16(x.size());
  std::vector<std::uint8_t> e4m3(x.size());
  std::vector<std::int8_t> i8(x.size()), truncated(x.size());
  std::vector<float> wide(65536);
  std::vector<std::uint16_t> all(65536);
  for (std::size_t i = 0; i < all.size(); ++i) all[i] = static_cast<std::uint16_t>(i);
  for_each_level([&] {
    const StageKernels& k = stage_kernels();
    k.narrow(DType::kBF16, x.data(), n, bf16.data());
    k.narrow(DType::kF16, x.data(), n, f16.data());
    k.to_e4m3(x.data(), 1.0f, n, e4m3.data());
    k.to_i8(x.data(), 1.0f, n, i8.data());
    k.to_i8_truncate(x.data(), 0.75f, n, truncated.data());
    std::int64_t wrong = 0;
    for (std::size_t i = 0; i < x.size(); ++i) {
      wrong += bf16[i] != float_to_bf16(x[i]);
      wrong += f16[i] != float_to_f16(x[i]);
      wrong += e4m3[i] != float_to_e4m3(x[i]);
      wrong += i8[i] != float_to_i8(x[i]);
      wrong += truncated[i] != float_to_i8_truncate(x[i], 0.75f);
    }
    EXPECT_EQ(wrong, 0);
    const auto same = [](float a, float b) {
      return std::bit_cast<std::uint32_t>(a) == std::bit_cast<std::uint32_t>(b) ||
             (a != a && b != b);
    };
    k.widen(DType::kF16, all.data(), 65536, wide.data());
    for (std::size_t i = 0; i < all.size(); ++i) wrong += !same(wide[i], f16_to_float(all[i]));
    k.widen(DType::kBF16, all.data(), 65536, wide.data());
    for (std::size_t i = 0; i < all.size(); ++i) wrong += !same(wide[i], bf16_to_float(all[i]));
    std::uint8_t bytes[256];
    for (int i = 0; i < 256; ++i) bytes[i] = static_cast<std::uint8_t>(i);
    k.widen(DType::kF8E4M3, bytes, 256, wide.data());
    for (int i = 0; i < 256; ++i)
      wrong += !same(wide[static_cast<std::size_t>(i)], e4m3_to_float(bytes[i]));
    EXPECT_EQ(wrong, 0);
  });
}

// SGLang's group quantizer truncates toward zero: ours only on request.
TEST(Quantize, OriginalInt8GroupsTruncateOursRoundUnlessAsked) {
  HostTensor x(DType::kF32, {1, 4});
  const float given[] = {127.0f, 1.75f, -1.75f, 2.5f};  // scale 1
  std::copy_n(given, 4, x.as<float>());
  QuantizeArgs args{
      .input = x.view(), .to = DType::kI8, .granularity = ActScale::kGroup, .group_size = 4};
  const Quantized nearest = run(args);
  args.int8_rounding = Int8Rounding::kTruncate;
  const Quantized truncated = run(args);
  const int expected[2][4] = {{127, 2, -2, 3}, {127, 1, -1, 2}};
  for (int i = 0; i < 4; ++i) {
    EXPECT_EQ(nearest.q.as<std::int8_t>()[i], expected[0][i]);
    EXPECT_EQ(truncated.q.as<std::int8_t>()[i], expected[1][i]);
  }
}

// A row of zeros must not divide by zero, and 448 / absmax must not overflow for tiny rows.
TEST(Quantize, OriginalFailsOnZeroAndTinyRows) {
  for (const DType to : {DType::kF8E4M3, DType::kI8}) {
    for (const ActScale granularity :
         {ActScale::kToken, ActScale::kGroup, ActScale::kTensorDynamic}) {
      for (const float tiny : {0.0f, 1e-45f, 1e-39f, 1e-30f}) {
        HostTensor x(DType::kF32, {1, 20});
        std::fill_n(x.as<float>(), 20, tiny);
        const Quantized got =
            run({.input = x.view(), .to = to, .granularity = granularity, .group_size = 8});
        for (std::int64_t i = 0; i < got.scale.numel(); ++i) {
          EXPECT_TRUE(std::isfinite(got.scale.as<float>()[i]));
          EXPECT_GT(got.scale.as<float>()[i], 0.0f);
        }
        for (int i = 0; i < 20; ++i)
          EXPECT_NEAR(got.value(i) * got.scale.as<float>()[0], tiny, 1e-11);
      }
    }
  }
}

TEST(Quantize, StaticScaleOfADeadExpertGivesZeros) {
  HostTensor x(DType::kF32, {1, 3}), scale(DType::kF32, {1});
  x.as<float>()[1] = 5.0f;
  for (const DType to : {DType::kF8E4M3, DType::kI8}) {
    const Quantized got = run({.input = x.view(),
                               .to = to,
                               .granularity = ActScale::kTensorStatic,
                               .static_scale = scale.view()});
    for (int i = 0; i < 3; ++i) EXPECT_EQ(got.value(i), 0.0);
  }
}

TEST(Quantize, ARowsBitsDependOnItAlone) {
  FRESH_RNG(rng);
  for (const DType from : {DType::kF32, DType::kF16, DType::kBF16}) {
    for (const DType to : {DType::kF8E4M3, DType::kI8}) {
      for (const std::int64_t k : {1, 17, 200, 4096 + 33}) {
        const HostTensor x = random_tensor(rng, from, {7, k});
        for (const ActScale granularity : {ActScale::kToken, ActScale::kGroup}) {
          QuantizeArgs args{
              .input = x.view(), .to = to, .granularity = granularity, .group_size = 48};
          const Quantized whole = run(args);
          for_each_level([&] { for_each_thread_count([&] { EXPECT_TRUE(run(args) == whole); }); });
          args.input = x.view().slice(3, 1);
          const Quantized alone = run(args);
          const auto bytes = static_cast<std::size_t>(k);
          EXPECT_EQ(std::memcmp(alone.q.bytes().data(), whole.q.bytes().data() + 3 * bytes, bytes),
                    0);
        }
      }
    }
  }
}

TEST(Quantize, NaNAndInfStayInTheirRow) {
  FRESH_RNG(rng);
  const HostTensor clean = random_tensor(rng, DType::kF32, {4, 64});
  for (const float poison : {kNaN, -kNaN, kInf, -kInf}) {
    HostTensor dirty = clean;
    dirty.as<float>()[64 + 10] = poison;
    for (const DType to : {DType::kF8E4M3, DType::kI8}) {
      for (const ActScale granularity : {ActScale::kToken, ActScale::kGroup}) {
        const QuantizeArgs args{.to = to, .granularity = granularity, .group_size = 32};
        QuantizeArgs a = args, b = args;
        a.input = clean.view();
        b.input = dirty.view();
        const Quantized want = run(a), got = run(b);
        for (int i = 0; i < 256; ++i)
          if (i / 64 != 1) {
            EXPECT_EQ(got.value(i), want.value(i));
          }
        const std::int64_t groups = want.scale.numel() / 4;
        for (std::int64_t i = 0; i < want.scale.numel(); ++i)
          if (i / groups != 1) {
            EXPECT_EQ(got.scale.as<float>()[i], want.scale.as<float>()[i]);
          }
        EXPECT_FALSE(std::isfinite(got.scale.as<float>()[groups]))
            << "the row's own scale shows it";
      }
      // One scale for all: it comes from the finite elements, or every token would be NaN.
      const Quantized got =
          run({.input = dirty.view(), .to = to, .granularity = ActScale::kTensorDynamic});
      EXPECT_TRUE(std::isfinite(got.scale.as<float>()[0]));
      for (int i = 128; i < 256; ++i) EXPECT_TRUE(std::isfinite(got.value(i)));
    }
  }
}

}  // namespace
}  // namespace moesaic
