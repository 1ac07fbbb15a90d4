// SPDX-License-Identifier: Apache-2.0
// Activate and combine on the device against the CPU backend: the same bits wherever the contract
// is element-wise or a sum in a fixed order.
#include "reference/activation.h"
#include "tests/cuda/twin_rows.h"

namespace moesaic {
namespace {

// --- activate ------------------------------------------------------------------------------------
TEST(ActivateCuda, LikeTheCpu) {
  MOESAIC_NEEDS_CUDA();
  std::uint64_t seed = 1;
  for (int kind = 0; kind < kNumActivations; ++kind)
    for (const DType type : {DType::kF32, DType::kF16, DType::kBF16})
      for (const GateLayout layout : {GateLayout::kHalves, GateLayout::kInterleaved})
        for (const GateOrder order : {GateOrder::kGateFirst, GateOrder::kUpFirst})
          for (const bool parameters : {false, true}) {
            const ActivationSpec spec{
                .kind = static_cast<Activation>(kind), .order = order, .layout = layout};
            SCOPED_TRACE(testing::Message() << name(spec.kind) << " " << name(type) << " layout "
                                            << static_cast<int>(layout));
            constexpr std::int64_t kRows = 37, kColumns = 100;
            const std::int64_t n = is_gated(spec.kind) ? 2 * kColumns : kColumns;
            Twin<std::uint8_t> input(
                random_storage(type, static_cast<std::size_t>(kRows * n), ++seed, 4.0f));
            Twin<std::uint8_t> output(static_cast<std::size_t>(kRows * kColumns) * 4);
            std::vector<std::int32_t> experts(kRows);
            harness::Rng rng(seed);
            for (std::int32_t& e : experts) e = static_cast<std::int32_t>(rng.below(5)) - 1;
            Twin<std::int32_t> row_expert(experts);
            Twin<float> alpha({1.0f, 1.5f, 1.702f, 2.0f}), beta({0.0f, 1.0f, 0.5f, 2.0f}),
                limit({1.0f, 7.0f, 2.0f, 3.0f});
            for (const Device device : kBoth) {
              const auto per_expert = [&](Twin<float>& t) {
                return parameters ? Tensor::contiguous(t.on(device), DType::kF32, {4}, device)
                                  : Tensor{};
              };
              of(device).activate(
                  {.spec = spec,
                   .parameters = {per_expert(alpha), per_expert(beta), per_expert(limit)},
                   .input = on(device, input, type, {kRows, n}),
                   .row_expert = parameters ? Tensor::contiguous(row_expert.on(device), DType::kI32,
                                                                 {kRows}, device)
                                            : Tensor{},
                   .output = on(device, output, DType::kF32, {kRows, kColumns})},
                  {});
            }
            const std::vector<std::uint8_t> got = output.download();
            for (std::int64_t i = 0; i < kRows * kColumns; ++i) {
              const double a = harness::load_element(output.cpu(), DType::kF32, i),
                           b = harness::load_element(got.data(), DType::kF32, i);
              // 1 + erf(x) and 1 + tanh(x) cancel for x << 0: what is left of both is their
              // rounding.
              ASSERT_NEAR(a, b, 2e-5 + 4e-6 * std::abs(a)) << i;
            }
          }
}

// Everything but the inputs in fp32: what the oracle allows for evaluating a function is all there
// is.
TEST(ActivateCuda, WithinTheBoundOfTheOracle) {
  MOESAIC_NEEDS_CUDA();
  constexpr std::int64_t kRows = 256, kColumns = 500;
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  constexpr float kSpecial[] = {0.0f, -0.0f, 1e-30f, -1e-30f, 1e20f, -1e20f, kInfinity, -kInfinity};
  std::vector<float> pairs(2 * kRows * kColumns);
  harness::Rng rng(1);
  for (std::size_t i = 0; i < pairs.size(); i += 2) {
    const double reach = i % 3 == 0 ? 0.5 : i % 3 == 1 ? 6.0 : 20.0;
    pairs[i] = static_cast<float>((2 * rng.uniform() - 1) * reach);
    pairs[i + 1] = static_cast<float>(2 * rng.uniform() - 1);
  }
  for (std::size_t i = 0; i < std::size(kSpecial); ++i) pairs[2 * i] = kSpecial[i];
  Twin<float> input(pairs), output(static_cast<std::size_t>(kRows * kColumns));
  for (int kind = 0; kind < kNumActivations; ++kind) {
    const ActivationSpec spec{.kind = static_cast<Activation>(kind),
                              .layout = GateLayout::kInterleaved};
    if (spec.kind == Activation::kRelu2) continue;  // exact, and 1e20 is too large for it
    SCOPED_TRACE(name(spec.kind));
    Tensor in = Tensor::contiguous(input.on(kGpu), DType::kF32, {kRows, 2 * kColumns}, kGpu);
    if (!is_gated(spec.kind)) in.shape[1] = kColumns;
    of(kGpu).activate(
        {.spec = spec,
         .input = in,
         .output = Tensor::contiguous(output.on(kGpu), DType::kF32, {kRows, kColumns}, kGpu)},
        {});
    const std::vector<float> got = output.download();
    const reference::ActivationParameters parameters{spec.alpha, spec.beta, spec.limit};
    for (std::int64_t i = 0; i < kRows * kColumns; ++i) {
      const std::int64_t row = i / kColumns, column = i % kColumns;
      const std::int64_t at = row * 2 * kColumns + column * (is_gated(spec.kind) ? 2 : 1);
      const float g = pairs[static_cast<std::size_t>(at)],
                  u = pairs[static_cast<std::size_t>(at + 1)];
      const float y = got[static_cast<std::size_t>(i)];
      const auto [value, error] =
          reference::activate(spec.kind, parameters, reference::Bounded{g}, reference::Bounded{u});
      if (std::isfinite(value)) {  // numbers below the smallest normal one may become 0
        ASSERT_NEAR(y, value, error + 1e-35) << "of " << g << ", " << u;
      } else {
        ASSERT_TRUE(std::isnan(value) ? std::isnan(y) : y == value) << "of " << g << ", " << u;
      }
    }
  }
}

// --- combine -------------------------------------------------------------------------------------
TEST(CombineCuda, TheSameBitsAsTheCpu) {
  MOESAIC_NEEDS_CUDA();
  std::uint64_t seed = 1;
  for (const DType from : {DType::kF32, DType::kF16, DType::kBF16})
    for (const DType to : {DType::kF32, DType::kF16, DType::kBF16})
      for (const std::int64_t columns : {8, 100, 2048, 7168})
        for (const std::int64_t top_k : {1, 8, 22})
          for (const int options : {0, 1, 2, 3}) {
            SCOPED_TRACE(testing::Message() << name(from) << " to " << name(to) << " H " << columns
                                            << " k " << top_k << " options " << options);
            const std::int64_t tokens = columns > 2048 ? 3 : 17, slots = tokens * top_k,
                               rows = slots + 5;
            harness::Rng rng(++seed);
            Twin<std::uint8_t> input(
                random_storage(from, static_cast<std::size_t>(rows * columns), seed));
            Twin<std::uint8_t> shared(
                random_storage(from, static_cast<std::size_t>(tokens * columns), seed + 1));
            Twin<std::uint8_t> output(
                random_storage(to, static_cast<std::size_t>(tokens * columns), seed + 2));
            std::vector<std::int32_t> row(static_cast<std::size_t>(slots)),
                id(static_cast<std::size_t>(slots));
            std::vector<float> w(static_cast<std::size_t>(slots)),
                sw(static_cast<std::size_t>(tokens));
            for (std::int32_t& r : row)
              r = rng.below(9) == 0 ? -1 : static_cast<std::int32_t>(rng.below(rows));
            row[0] = 0x7fffffff;
            for (std::int32_t& i : id) i = static_cast<std::int32_t>(rng.below(9)) - 1;
            for (float& v : w) v = static_cast<float>(rng.uniform());
            for (float& v : sw) v = static_cast<float>(rng.uniform());
            Twin<std::int32_t> slot_row(row), ids(id);
            Twin<float> weights(w), shared_weight(sw);
            for (const Device device : kBoth)
              of(device).combine(
                  {.rows = on(device, input, from, {rows, columns}),
                   .slot_row = options != 1 ? slot_row.on(device) : nullptr,
                   .topk_ids = options == 1 ? ids.on(device) : nullptr,
                   .weights = options != 2 ? weights.on(device) : nullptr,
                   .top_k = top_k,
                   .scale = options == 3 ? 2.5f : 1.0f,
                   .shared = options >= 2 ? on(device, shared, from, {tokens, columns}) : Tensor{},
                   .shared_weight = options == 3 ? shared_weight.on(device) : nullptr,
                   .accumulate =
                       options == 1 || options == 3 ? Accumulate::kAdd : Accumulate::kOverwrite,
                   .output = on(device, output, to, {tokens, columns})},
                  {});
            EXPECT_EQ(output.differences(), "");
          }
}

// Row addresses beyond 2^32 bytes: 305,000 tokens x 8 slots x 2048 columns in 16 bit are 10 GB.
TEST(CombineCuda, AddressesAre64Bit) {
  MOESAIC_NEEDS_CUDA();
  constexpr std::int64_t kTokens = 305000, kTopK = 8, kColumns = 2048, kRows = kTokens * kTopK;
  std::size_t available = 0, total = 0;
  ASSERT_EQ(cudaMemGetInfo(&available, &total), cudaSuccess);
  if (available < std::size_t{14} << 30) GTEST_SKIP() << "needs 14 GiB of device memory";
  const Backend& gpu = *device_backend();
  void* rows = gpu.allocate(kRows * kColumns * 2);
  void* out = gpu.allocate(kTokens * kColumns * 2);
  auto* slot_row = static_cast<std::int32_t*>(gpu.allocate(kRows * 4));
  ASSERT_EQ(cudaMemset(rows, 0, kRows * kColumns * 2), cudaSuccess);
  std::vector<std::int32_t> map(kRows);
  for (std::int64_t s = 0; s < kRows; ++s)
    map[static_cast<std::size_t>(s)] = static_cast<std::int32_t>(kRows - 1 - s);
  gpu.copy(slot_row, map.data(), map.size() * 4, {});
  const std::int64_t tokens[] = {0, 1, 131072, 262144, 304999};
  for (const std::int64_t t : tokens)  // the token's slots hold t % 100 + j
    for (std::int64_t j = 0; j < kTopK; ++j) {
      std::vector<std::uint16_t> row(kColumns, float_to_bf16(static_cast<float>(t % 100 + j)));
      gpu.copy(static_cast<char*>(rows) + (kRows - 1 - (t * kTopK + j)) * kColumns * 2, row.data(),
               row.size() * 2, {});
    }
  gpu.combine({.rows = Tensor::contiguous(rows, DType::kBF16, {kRows, kColumns}, kGpu),
               .slot_row = slot_row,
               .top_k = kTopK,
               .output = Tensor::contiguous(out, DType::kBF16, {kTokens, kColumns}, kGpu)},
              {});
  for (const std::int64_t t : tokens) {
    std::vector<std::uint16_t> y(kColumns);
    gpu.copy(y.data(), static_cast<char*>(out) + t * kColumns * 2, y.size() * 2, {});
    const float expected = bf16_to_float(float_to_bf16(static_cast<float>(8 * (t % 100) + 28)));
    for (const std::uint16_t v : y) ASSERT_EQ(bf16_to_float(v), expected) << "token " << t;
  }
  gpu.deallocate(rows);
  gpu.deallocate(out);
  gpu.deallocate(slot_row);
}

}  // namespace
}  // namespace moesaic
