// SPDX-License-Identifier: Apache-2.0
// The activation stage: every function, layout and order against its formula in float64.
#include <cmath>
#include <limits>

#include "reference/activation.h"
#include "stage_testing.h"

namespace moesaic {
namespace {

using harness::HostTensor;
using testing::for_each_thread_count;
using testing::random_tensor;

std::vector<ActivationSpec> all_specs() {
  std::vector<ActivationSpec> specs;
  for (int a = 0; a < kNumActivations; ++a) {
    const auto kind = static_cast<Activation>(a);
    for (const auto order : {GateOrder::kGateFirst, GateOrder::kUpFirst})
      for (const auto layout : {GateLayout::kHalves, GateLayout::kInterleaved})
        if (is_gated(kind) || (order == GateOrder::kGateFirst && layout == GateLayout::kHalves))
          specs.push_back({.kind = kind, .order = order, .layout = layout, .limit = 1.5f});
  }
  return specs;
}

struct Parameters {
  HostTensor alpha, beta, limit, row_expert;
};

double expected(const ActivationSpec& spec, const Parameters* tensors, const Tensor& x,
                std::int64_t row, std::int64_t i, std::int64_t width) {
  reference::ActivationParameters p{spec.alpha, spec.beta, spec.limit};
  if (tensors != nullptr) {
    const std::int32_t e = tensors->row_expert.as<std::int32_t>()[row];
    if (e < 0 || e >= tensors->alpha.numel()) return 0;
    p = {tensors->alpha.as<float>()[e], tensors->beta.as<float>()[e],
         tensors->limit.as<float>()[e]};
  }
  if (!is_gated(spec.kind))
    return reference::activate(spec.kind, p, harness::element(x, {row, i}), 0);
  const bool halves = spec.layout == GateLayout::kHalves;
  const double a = harness::element(x, {row, halves ? i : 2 * i});
  const double b = harness::element(x, {row, halves ? width + i : 2 * i + 1});
  const bool up_first = spec.order == GateOrder::kUpFirst;
  return reference::activate(spec.kind, p, up_first ? b : a, up_first ? a : b);
}

TEST(Activate, EveryFunctionLayoutAndOrder) {
  FRESH_RNG(rng);
  for (const ActivationSpec& spec : all_specs()) {
    SCOPED_TRACE(name(spec.kind));
    for (const DType from : {DType::kF32, DType::kF16, DType::kBF16}) {
      for (const std::int64_t width : {1, 37, 1024 + 5}) {
        const std::int64_t rows = 5, n = is_gated(spec.kind) ? 2 * width : width, experts = 3;
        const HostTensor x = random_tensor(rng, from, {rows, n}, 2);
        Parameters p{.alpha = random_tensor(rng, DType::kF32, {experts}),
                     .beta = random_tensor(rng, DType::kF32, {experts}),
                     .limit = random_tensor(rng, DType::kF32, {experts}),
                     .row_expert = HostTensor(DType::kI32, {rows})};
        for (int e = 0; e < 3; ++e)
          p.limit.as<float>()[e] = std::abs(p.limit.as<float>()[e]) + 0.5f;
        const std::int32_t row_expert[] = {0, 2, -1, 1, std::numeric_limits<std::int32_t>::max()};
        std::copy_n(row_expert, rows, p.row_expert.as<std::int32_t>());
        for (const Parameters* tensors :
             {static_cast<const Parameters*>(nullptr), static_cast<const Parameters*>(&p)}) {
          HostTensor y(DType::kF32, {rows, width});
          ActivateArgs args{.spec = spec, .input = x.view(), .output = y.view()};
          if (tensors != nullptr) {
            args.parameters = {p.alpha.view(), p.beta.view(), p.limit.view()};
            args.row_expert = p.row_expert.view();
          }
          std::fill_n(y.as<float>(), y.numel(), std::numeric_limits<float>::quiet_NaN());
          activate(args);
          for (std::int64_t r = 0; r < rows; ++r) {
            for (std::int64_t i = 0; i < width; ++i) {
              const double want = expected(spec, tensors, x.view(), r, i, width);
              ASSERT_NEAR(harness::element(y.view(), {r, i}), want, 4e-6 + 4e-6 * std::abs(want))
                  << "row " << r << " column " << i;
            }
          }
        }
      }
    }
  }
}

TEST(Activate, OneRoundingToTheOutputDtypeAtAnyThreads) {
  FRESH_RNG(rng);
  const HostTensor x = random_tensor(rng, DType::kBF16, {300, 128});
  HostTensor exact(DType::kF32, {300, 64});
  activate({.input = x.view(), .output = exact.view()});
  for (const DType to : {DType::kF16, DType::kBF16}) {
    HostTensor rounded(to, {300, 64});
    for (std::int64_t i = 0; i < exact.numel(); ++i)
      harness::store_element(rounded.bytes().data(), to, i, exact.as<float>()[i]);
    for_each_thread_count([&] {
      HostTensor y(to, {300, 64});
      activate({.input = x.view(), .output = y.view()});
      EXPECT_TRUE(y.bytes() == rounded.bytes());
    });
  }
}

TEST(Activate, NaNComesThroughAndStaysInItsElement) {
  for (const ActivationSpec& spec : all_specs()) {
    if (spec.layout == GateLayout::kInterleaved) continue;
    const std::int64_t n = is_gated(spec.kind) ? 8 : 4;
    HostTensor x(DType::kF32, {2, n}), y(DType::kF32, {2, 4});
    x.as<float>()[1] = std::numeric_limits<float>::quiet_NaN();
    activate({.spec = spec, .input = x.view(), .output = y.view()});
    for (int i = 0; i < 8; ++i) EXPECT_EQ(std::isnan(y.as<float>()[i]), i == 1) << name(spec.kind);
  }
}

}  // namespace
}  // namespace moesaic
