// SPDX-License-Identifier: Apache-2.0
// Routing on the device against the CPU backend. Logits and biases are multiples of 1/8 and 1/16,
// so that scores are either equal or far apart: ties must go to the lowest id on both, and nothing
// else is close.
#include "tests/cuda/twin.h"

namespace moesaic {
namespace {

struct RouteCase {
  RoutingSpec spec;
  std::int64_t tokens = 7, experts = 64, top_k = 4;
  DType dtype = DType::kF32;
  bool bias = false, selection_bias = false, odd_values = false;
  std::vector<double> row{};  // every token's logits, in place of random ones
};

void check_route(const RouteCase& c, std::uint64_t seed) {
  SCOPED_TRACE(testing::Message() << name(c.spec.method) << " T " << c.tokens << " E " << c.experts
                                  << " k " << c.top_k << " " << name(c.dtype) << " renormalize "
                                  << static_cast<int>(c.spec.renormalize) << " groups "
                                  << c.spec.groups << (c.bias ? " bias" : "")
                                  << (c.selection_bias ? " selection bias" : ""));
  harness::Rng rng(seed);
  std::vector<std::uint8_t> z(static_cast<std::size_t>(c.tokens * c.experts) * size_of(c.dtype)),
      bias(static_cast<std::size_t>(c.experts) * 2),
      selection(static_cast<std::size_t>(c.experts) * 4);
  for (std::int64_t i = 0; i < c.tokens * c.experts; ++i) {
    const double any = static_cast<double>(rng.below(80) - 40) / 8;
    harness::store_element(z.data(), c.dtype, i,
                           c.row.empty() ? any : c.row[static_cast<std::size_t>(i % c.experts)]);
  }
  if (c.odd_values && c.tokens > 2) {
    harness::store_element(z.data(), c.dtype, 3, std::nan(""));
    for (std::int64_t e = 0; e < c.experts; ++e)
      harness::store_element(z.data(), c.dtype, c.experts + e, std::nan(""));
    harness::store_element(z.data(), c.dtype, 2 * c.experts + 1, -HUGE_VAL);
  }
  for (std::int64_t e = 0; e < c.experts; ++e) {
    harness::store_element(bias.data(), DType::kBF16, e,
                           static_cast<double>(rng.below(16) - 8) / 8);
    harness::store_element(selection.data(), DType::kF32, e,
                           static_cast<double>(rng.below(16) - 8) / 16);
  }
  Twin<std::uint8_t> logits(z), router_bias(bias), selection_bias(selection);
  const std::size_t n = static_cast<std::size_t>(c.tokens * c.top_k);
  Twin<std::int32_t> ids(n);
  Twin<float> weights(n);
  for (const Device device : kBoth)
    of(device).route(
        {.spec = c.spec,
         .logits = on(device, logits, c.dtype, {c.tokens, c.experts}),
         .router = {.weight = {},
                    .bias = c.bias ? on(device, router_bias, DType::kBF16, {c.experts}) : Tensor{},
                    .selection_bias = c.selection_bias
                                          ? on(device, selection_bias, DType::kF32, {c.experts})
                                          : Tensor{}},
         .topk_ids = Tensor::contiguous(ids.on(device), DType::kI32, {c.tokens, c.top_k}, device),
         .topk_weights =
             Tensor::contiguous(weights.on(device), DType::kF32, {c.tokens, c.top_k}, device)},
        {});
  EXPECT_EQ(ids.differences(), "");
  const std::vector<float> got = weights.download();
  for (std::size_t i = 0; i < n; ++i) {
    if (std::isnan(got[i]) && std::isnan(weights.cpu()[i])) continue;
    ASSERT_NEAR(got[i], weights.cpu()[i], 1e-30 + 4e-6 * std::abs(weights.cpu()[i])) << i;
  }
}

TEST(RouteCuda, EveryMethodAndOption) {
  MOESAIC_NEEDS_CUDA();
  std::uint64_t seed = 1;
  for (int m = 0; m < kNumRoutingMethods; ++m) {
    const auto method = static_cast<RoutingMethod>(m);
    for (const Renormalize renormalize :
         {Renormalize::kDefault, Renormalize::kNever, Renormalize::kAlways})
      for (const std::int64_t experts : {4, 64, 96, 256, 512, 1000, 2048})
        for (const bool biased : {false, true}) {
          RouteCase c{
              .spec = {.method = method, .renormalize = renormalize, .scale = biased ? 2.5f : 1.0f},
              .experts = experts};
          c.top_k = method == RoutingMethod::kLlama4        ? 1
                    : method == RoutingMethod::kSparseMixer ? 2
                                                            : std::min<std::int64_t>(experts, 8);
          if (experts == 2048 && c.top_k == 8) c.top_k = 32;
          c.bias = biased;
          c.selection_bias = biased && method != RoutingMethod::kSparseMixer;
          const bool grouped =
              method == RoutingMethod::kDeepSeekV3 || method == RoutingMethod::kDeepSeekV2;
          if (grouped && experts % 8 == 0) {
            c.spec.groups = 8;
            c.spec.topk_groups = 4;
          }
          check_route(c, ++seed);
          c.dtype = biased ? DType::kBF16 : DType::kF16;
          c.tokens = 130;
          check_route(c, ++seed);
        }
  }
}

TEST(RouteCuda, NotANumberRanksLast) {
  MOESAIC_NEEDS_CUDA();
  std::uint64_t seed = 500;
  for (int m = 0; m < kNumRoutingMethods; ++m) {
    const auto method = static_cast<RoutingMethod>(m);
    if (method == RoutingMethod::kSparseMixer)
      continue;  // its softmax is of the neighbours of the best
    RouteCase c{.spec = {.method = method}, .experts = 32, .odd_values = true};
    if (method == RoutingMethod::kLlama4) c.top_k = 1;
    check_route(c, ++seed);
  }
}

// Of many experts, where a block routes: NaN, infinities, and nothing but equal keys.
TEST(RouteCuda, OddValuesOfManyExperts) {
  MOESAIC_NEEDS_CUDA();
  std::uint64_t seed = 550;
  for (const std::int64_t experts : {257, 300, 512, 2048})
    for (const std::int64_t top_k : {1, 8, 32}) {
      RouteCase c{.spec = {.method = RoutingMethod::kRenormalize}, .experts = experts};
      c.top_k = top_k, c.odd_values = true;
      check_route(c, ++seed);
      c.odd_values = false, c.row.assign(static_cast<std::size_t>(experts), 0.0);
      check_route(c, ++seed);
      for (std::int64_t e = 0; e < experts; ++e)  // fewer numbers than picks
        c.row[static_cast<std::size_t>(e)] = e % 100 == 3 ? 1.0 : -HUGE_VAL;
      check_route(c, ++seed);
    }
}

// A group of NaN ranks behind one of -infinity, and so does a sum of two with a NaN in it.
TEST(RouteCuda, GroupsOfNaN) {
  MOESAIC_NEEDS_CUDA();
  const double nan = std::nan("");
  for (const RoutingMethod method : {RoutingMethod::kDeepSeekV2, RoutingMethod::kDeepSeekV3})
    for (const int kept : {1, 2, 3, 4}) {
      RouteCase c{.spec = {.method = method, .groups = 5, .topk_groups = kept},
                  .experts = 15,
                  .top_k = 3,
                  .row = {nan, nan, nan, -HUGE_VAL, -HUGE_VAL, -HUGE_VAL, nan, -HUGE_VAL, nan, -1,
                          -2, -3, 0.5, nan, nan}};
      check_route(c, 600);
    }
}

// Nothing is added to a sum that is divided by because the caller says so.
TEST(RouteCuda, SmallSigmoidsRenormalized) {
  MOESAIC_NEEDS_CUDA();
  for (const RoutingMethod method : {RoutingMethod::kSigmoid, RoutingMethod::kLlama4,
                                     RoutingMethod::kSigmoidRenorm, RoutingMethod::kTopK}) {
    RouteCase c{.spec = {.method = method, .renormalize = Renormalize::kAlways},
                .experts = 4,
                .top_k = method == RoutingMethod::kLlama4 ? 1 : 2,
                .row = {-50, -51, -60, -70}};
    check_route(c, 650);
  }
}

// So many that several share a block.
TEST(RouteCuda, ManyTokens) {
  MOESAIC_NEEDS_CUDA();
  std::uint64_t seed = 700;
  for (const std::int64_t experts : {24, 130, 500})
    for (const RoutingMethod method :
         {RoutingMethod::kRenormalize, RoutingMethod::kDeepSeekV3, RoutingMethod::kSparseMixer}) {
      RouteCase c{.spec = {.method = method}, .tokens = 4099, .experts = experts};
      if (method == RoutingMethod::kDeepSeekV3 && experts == 24) {
        c.spec.groups = 6;
        c.spec.topk_groups = 3;
        c.selection_bias = true;
      }
      if (method == RoutingMethod::kSparseMixer) c.top_k = 2;
      check_route(c, ++seed);
    }
}

// The router's product: right, and the same bits for a token whatever the batch.
TEST(RouteCuda, LogitsFromHiddenStates) {
  MOESAIC_NEEDS_CUDA();
  std::uint64_t seed = 900;
  for (const DType x_type : {DType::kF32, DType::kBF16, DType::kF16})
    for (const DType w_type : {DType::kF32, DType::kBF16})
      for (const std::int64_t hidden : {8, 100, 264, 2048})
        for (const std::int64_t experts : {1, 6, 128}) {
          SCOPED_TRACE(testing::Message() << name(x_type) << " x " << name(w_type) << " H "
                                          << hidden << " E " << experts);
          constexpr std::int64_t kTokens = 21;
          const std::int64_t top_k = std::min<std::int64_t>(experts, 4);
          Twin<std::uint8_t> x(
              random_storage(x_type, static_cast<std::size_t>(kTokens * hidden), ++seed));
          Twin<std::uint8_t> w(
              random_storage(w_type, static_cast<std::size_t>(experts * hidden), ++seed));
          Twin<float> logits(static_cast<std::size_t>(kTokens * experts)),
              alone(static_cast<std::size_t>(kTokens * experts));
          Twin<std::int32_t> ids(static_cast<std::size_t>(kTokens * top_k));
          Twin<float> weights(static_cast<std::size_t>(kTokens * top_k));
          const auto run = [&](std::int64_t first, std::int64_t count, Twin<float>& z) {
            device_backend()->route(
                {.spec = {.method = RoutingMethod::kSigmoid},
                 .hidden_states = on(kGpu, x, x_type, {kTokens, hidden}).slice(first, count),
                 .router = {.weight = on(kGpu, w, w_type, {experts, hidden})},
                 .logits_scratch =
                     Tensor::contiguous(z.gpu(), DType::kF32, {kTokens, experts}, kGpu)
                         .slice(first, count),
                 .topk_ids = Tensor::contiguous(ids.gpu(), DType::kI32, {count, top_k}, kGpu),
                 .topk_weights =
                     Tensor::contiguous(weights.gpu(), DType::kF32, {count, top_k}, kGpu)},
                {});
          };
          run(0, kTokens, logits);
          run(0, 1, alone);
          run(1, 3, alone);
          run(4, kTokens - 4, alone);
          EXPECT_EQ(logits.download(), alone.download());
          const std::vector<float> got = logits.download();
          for (std::int64_t t = 0; t < kTokens; ++t)
            for (std::int64_t e = 0; e < experts; ++e) {
              double sum = 0, size = 0;
              for (std::int64_t h = 0; h < hidden; ++h) {
                const double p = harness::load_element(x.cpu(), x_type, t * hidden + h) *
                                 harness::load_element(w.cpu(), w_type, e * hidden + h);
                sum += p;
                size += std::abs(p);
              }
              ASSERT_NEAR(got[static_cast<std::size_t>(t * experts + e)], sum,
                          1e-5 * size / std::sqrt(static_cast<double>(hidden)) + 1e-6);
            }
        }
}

// Every tile makes the same bits, and so do rows that begin anywhere.
TEST(RouteCuda, LogitsOfManyTokens) {
  MOESAIC_NEEDS_CUDA();
  struct Case {
    DType x, w;
    std::int64_t hidden, experts;
  };
  std::uint64_t seed = 1900;
  for (const Case& c :
       {Case{DType::kBF16, DType::kBF16, 1032, 100}, Case{DType::kF16, DType::kF16, 2048, 128},
        Case{DType::kBF16, DType::kF32, 520, 130}}) {
    SCOPED_TRACE(testing::Message() << name(c.x) << " x " << name(c.w) << " H " << c.hidden);
    constexpr std::int64_t kTokens = 2500;
    Twin<std::uint8_t> x(random_storage(c.x, static_cast<std::size_t>(kTokens * c.hidden), ++seed));
    Twin<std::uint8_t> w(
        random_storage(c.w, static_cast<std::size_t>(c.experts * c.hidden), ++seed));
    Twin<std::uint8_t> odd(static_cast<std::size_t>(kTokens * (c.hidden + 1)) * size_of(c.x));
    for (std::int64_t t = 0; t < kTokens; ++t)
      std::memcpy(odd.cpu() + static_cast<std::size_t>(t * (c.hidden + 1)) * size_of(c.x),
                  x.cpu() + static_cast<std::size_t>(t * c.hidden) * size_of(c.x),
                  static_cast<std::size_t>(c.hidden) * size_of(c.x));
    odd.upload();
    const std::size_t entries = static_cast<std::size_t>(kTokens * c.experts);
    Twin<float> whole(entries), parts(entries), shifted(entries);
    Twin<std::int32_t> ids(static_cast<std::size_t>(kTokens));
    Twin<float> weights(static_cast<std::size_t>(kTokens));
    const Tensor rows = on(kGpu, x, c.x, {kTokens, c.hidden});
    Tensor rows_apart = rows;
    rows_apart.data = odd.gpu();
    rows_apart.strides[0] = c.hidden + 1;
    const auto run = [&](const Tensor& hidden, std::int64_t first, std::int64_t count,
                         Twin<float>& z) {
      device_backend()->route(
          {.spec = {.method = RoutingMethod::kSigmoid},
           .hidden_states = hidden.slice(first, count),
           .router = {.weight = on(kGpu, w, c.w, {c.experts, c.hidden})},
           .logits_scratch = Tensor::contiguous(z.gpu(), DType::kF32, {kTokens, c.experts}, kGpu)
                                 .slice(first, count),
           .topk_ids = Tensor::contiguous(ids.gpu(), DType::kI32, {count, 1}, kGpu),
           .topk_weights = Tensor::contiguous(weights.gpu(), DType::kF32, {count, 1}, kGpu)},
          {});
    };
    run(rows, 0, kTokens, whole);
    std::int64_t first = 0;
    for (const std::int64_t count : {1, 2, 13, 100, 700, 1684}) {
      run(rows, first, count, parts);
      first += count;
    }
    ASSERT_EQ(first, kTokens);
    run(rows_apart, 0, kTokens, shifted);
    const std::vector<float> got = whole.download();
    EXPECT_EQ(got, parts.download());
    EXPECT_EQ(got, shifted.download());
    for (std::int64_t t = 0; t < kTokens; t += 37)
      for (std::int64_t e = 0; e < c.experts; ++e) {
        double sum = 0, size = 0;
        for (std::int64_t h = 0; h < c.hidden; ++h) {
          const double p = harness::load_element(x.cpu(), c.x, t * c.hidden + h) *
                           harness::load_element(w.cpu(), c.w, e * c.hidden + h);
          sum += p;
          size += std::abs(p);
        }
        ASSERT_NEAR(got[static_cast<std::size_t>(t * c.experts + e)], sum,
                    1e-5 * size / std::sqrt(static_cast<double>(c.hidden)) + 1e-6)
            << "token " << t << " expert " << e;
      }
  }
}

}  // namespace
}  // namespace moesaic
