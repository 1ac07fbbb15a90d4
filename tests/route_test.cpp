// SPDX-License-Identifier: Apache-2.0
// Routing on the CPU: against the float64 model, and on logits that somebody chose to hurt.
#include <algorithm>
#include <cmath>
#include <limits>
#include <set>

#include "reference/routing.h"
#include "route_testing.h"

namespace moesaic {
namespace {

using harness::HostTensor;
using testing::for_each_level;
using testing::for_each_thread_count;
using testing::ids_of;
using testing::random_tensor;
using testing::Result;
using testing::run_route;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

Result run_logits(const RoutingSpec& spec, const std::vector<std::vector<float>>& z,
                  std::int64_t top_k, const RouterWeights& router = {}) {
  std::vector<float> flat;
  for (const auto& row : z) flat.insert(flat.end(), row.begin(), row.end());
  const auto tokens = static_cast<std::int64_t>(z.size());
  const auto experts = static_cast<std::int64_t>(z[0].size());
  return run_route({.spec = spec,
                    .logits = Tensor::contiguous(flat.data(), DType::kF32, {tokens, experts}),
                    .router = router},
                   tokens, top_k);
}

// --- the float64 model ---------------------------------------------------------------------------

struct Shape {
  std::int64_t experts, top_k;
  int groups = 1, topk_groups = 1;
};

std::vector<RoutingSpec> all_specs(const Shape& shape) {
  std::vector<RoutingSpec> specs;
  for (int m = 0; m < kNumRoutingMethods; ++m) {
    const auto method = static_cast<RoutingMethod>(m);
    if (method == RoutingMethod::kLlama4 && shape.top_k != 1) continue;
    if (method == RoutingMethod::kSparseMixer && shape.top_k != 2) continue;
    for (const auto renormalize :
         {Renormalize::kDefault, Renormalize::kNever, Renormalize::kAlways}) {
      // What dividing raw logits or a sparse mixture means, no model says.
      if (renormalize != Renormalize::kDefault &&
          (method == RoutingMethod::kTopK || method == RoutingMethod::kSparseMixer))
        continue;
      RoutingSpec s{.method = method, .renormalize = renormalize, .scale = 1.75f};
      if (method == RoutingMethod::kDeepSeekV2 || method == RoutingMethod::kDeepSeekV3) {
        s.groups = shape.groups;
        s.topk_groups = shape.topk_groups;
      }
      specs.push_back(s);
    }
  }
  return specs;
}
bool has_selection_bias(RoutingMethod m) {
  return m == RoutingMethod::kDeepSeekV3 || m == RoutingMethod::kMiniMax2 ||
         m == RoutingMethod::kSqrtSoftplus || m == RoutingMethod::kSoftmaxBias;
}

// In fp32 another expert may win where the scores are closer than fp32 tells apart.
void expect_like_model(const RoutingSpec& spec, const Result& r, std::int64_t token,
                       const reference::Routed& model, const std::vector<double>& z) {
  if (model.group_margin < 1e-5) return;
  const auto ids = ids_of(r, token);
  bool same_set = true;
  for (std::size_t j = 0; j < ids.size(); ++j) {
    ASSERT_GE(ids[j], 0);
    ASSERT_LT(ids[j], static_cast<std::int32_t>(z.size()));
    const double best = model.scores[j][static_cast<std::size_t>(model.ids[j])];
    if (ids[j] == model.ids[j]) continue;
    same_set = false;
    const double mine = model.scores[j][static_cast<std::size_t>(ids[j])];
    EXPECT_LT(best - mine, 1e-5 * (1 + std::abs(best))) << name(spec.method) << " pick " << j;
  }
  if (!same_set) return;
  for (std::size_t j = 0; j < ids.size(); ++j) {
    const double w = r.weights[static_cast<std::size_t>(token) * ids.size() + j];
    EXPECT_NEAR(w, model.weights[j], 1e-7 + 1e-5 * std::abs(model.weights[j]))
        << name(spec.method) << " pick " << j;
  }
}

TEST(Route, EveryMethodLikeTheModel) {
  FRESH_RNG(rng);
  const Shape shapes[] = {{1, 1},          {2, 1},           {5, 2, 5, 3},   {8, 2, 4, 2},
                          {60, 4, 1, 1},   {64, 6, 8, 3},    {128, 8, 8, 4}, {256, 8, 8, 4},
                          {512, 22, 4, 2}, {2048, 32, 16, 5}};
  for (const Shape& shape : shapes) {
    SCOPED_TRACE("experts " + std::to_string(shape.experts));
    const std::int64_t tokens = shape.experts > 1000 ? 3 : 9;
    for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
      const HostTensor logits = random_tensor(rng, dtype, {tokens, shape.experts}, 2);
      const HostTensor bias = random_tensor(rng, dtype, {shape.experts}, 0.5);
      const HostTensor selection_bias = random_tensor(rng, dtype, {shape.experts}, 0.1);
      for (const RoutingSpec& spec : all_specs(shape)) {
        RouterWeights router{.bias = bias.view()};
        if (has_selection_bias(spec.method)) router.selection_bias = selection_bias.view();
        const Result r = run_route({.spec = spec, .logits = logits.view(), .router = router},
                                   tokens, shape.top_k);
        for (std::int64_t t = 0; t < tokens; ++t) {
          std::vector<double> z, b;
          for (std::int64_t e = 0; e < shape.experts; ++e) {
            z.push_back(static_cast<float>(harness::element(logits.view(), {t, e})) +
                        static_cast<float>(harness::element(bias.view(), {e})));
            if (router.selection_bias.defined())
              b.push_back(harness::element(selection_bias.view(), {e}));
          }
          expect_like_model(spec, r, t, reference::route(spec, shape.top_k, z, b), z);
        }
      }
    }
  }
}

TEST(Route, LogitsAreTheProductInFp32) {
  FRESH_RNG(rng);
  for (const std::int64_t hidden : {1, 15, 16, 17, 100, 7168}) {
    for (const DType x_dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
      for (const DType w_dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
        const std::int64_t tokens = 5, experts = 7;
        const HostTensor x = random_tensor(rng, x_dtype, {tokens, hidden});
        const HostTensor w = random_tensor(rng, w_dtype, {experts, hidden});
        const RoutingSpec raw{.method = RoutingMethod::kTopK};  // the weights are the logits
        for_each_level([&] {
          const Result r =
              run_route({.spec = raw, .hidden_states = x.view(), .router = {.weight = w.view()}},
                        tokens, experts);
          for (std::int64_t t = 0; t < tokens; ++t) {
            for (std::int64_t j = 0; j < experts; ++j) {
              const std::int64_t e = r.ids[static_cast<std::size_t>(t * experts + j)];
              double exact = 0, magnitude = 0;
              for (std::int64_t h = 0; h < hidden; ++h) {
                const double p =
                    harness::element(x.view(), {t, h}) * harness::element(w.view(), {e, h});
                exact += p;
                magnitude += std::abs(p);
              }
              // A product and at most hidden / 16 + 4 additions, each rounded by half an ulp.
              const double bound = magnitude * (static_cast<double>(hidden) / 16 + 6) * 0x1p-24;
              EXPECT_NEAR(r.weights[static_cast<std::size_t>(t * experts + j)], exact,
                          bound + 1e-30);
            }
          }
        });
      }
    }
  }
}

TEST(Route, SameBitsInAnyBatchOnAnyThreadsAtAnyLevel) {
  FRESH_RNG(rng);
  const std::int64_t tokens = 37, experts = 96, hidden = 333, top_k = 2;
  const HostTensor x = random_tensor(rng, DType::kBF16, {tokens, hidden});
  const HostTensor w = random_tensor(rng, DType::kBF16, {experts, hidden}, 0.1);
  const HostTensor bias = random_tensor(rng, DType::kF32, {experts}, 0.1);
  for (const RoutingSpec& spec : all_specs({experts, top_k, 8, 3})) {
    RouteArgs args{.spec = spec, .hidden_states = x.view(), .router = {.weight = w.view()}};
    if (has_selection_bias(spec.method)) args.router.selection_bias = bias.view();
    const Result whole = run_route(args, tokens, top_k);
    for_each_level([&] {
      for_each_thread_count(
          [&] { EXPECT_TRUE(run_route(args, tokens, top_k) == whole) << name(spec.method); });
    });
    for (const std::int64_t t : {std::int64_t{0}, std::int64_t{17}, tokens - 1}) {
      RouteArgs one = args;
      one.hidden_states = x.view().slice(t, 1);
      const Result alone = run_route(one, 1, top_k);
      for (std::int64_t j = 0; j < top_k; ++j) {
        const auto at = static_cast<std::size_t>(t * top_k + j);
        EXPECT_EQ(alone.ids[static_cast<std::size_t>(j)], whole.ids[at]);
        EXPECT_EQ(std::bit_cast<std::uint32_t>(alone.weights[static_cast<std::size_t>(j)]),
                  std::bit_cast<std::uint32_t>(whole.weights[at]));
      }
    }
  }
}

// --- values chosen to hurt -----------------------------------------------------------------------

TEST(Route, TiesGoToTheLowestId) {
  for (int m = 0; m < kNumRoutingMethods; ++m) {
    const auto method = static_cast<RoutingMethod>(m);
    const std::int64_t top_k = method == RoutingMethod::kLlama4 ? 1 : 2;
    const Result r =
        run_logits({.method = method}, {{0, 1, 1, -0.0f, 1}, {-0.0f, 0, 0, 0, -0.0f}}, top_k);
    EXPECT_EQ(r.ids[0], 1) << name(method);
    EXPECT_EQ(r.ids[static_cast<std::size_t>(top_k)], 0) << name(method) << ": -0 equals 0";
    if (top_k == 2) {
      EXPECT_EQ(r.ids[1], 2);
      EXPECT_EQ(r.ids[3], 1);
    }
  }
}

TEST(Route, SaturatedSigmoidsStillFollowTheLogits) {
  // sigmoid(20) and sigmoid(30) are both 1 in fp32.
  const Result r = run_logits({.method = RoutingMethod::kSigmoidRenorm}, {{20, 30, 25, 0}}, 3);
  EXPECT_EQ(ids_of(r, 0), (std::vector<std::int32_t>{1, 2, 0}));
}

TEST(Route, NaNRanksLastAndNothingIsChosenTwice) {
  FRESH_RNG(rng);
  const std::vector<float> poison{kNaN, -kNaN, kInf, -kInf, 1e38f, -1e38f, 0.0f};
  for (int round = 0; round < 200; ++round) {
    const std::int64_t experts = 4 * (1 + rng.below(9));
    std::vector<std::vector<float>> z(3, std::vector<float>(static_cast<std::size_t>(experts)));
    for (auto& row : z)
      for (float& v : row)
        v = rng.below(2) ? poison[static_cast<std::size_t>(rng.below(7))] : rng.normal();
    z[1].assign(z[1].size(), kNaN);
    z[2].assign(z[2].size(), -kInf);
    for (int m = 0; m < kNumRoutingMethods; ++m) {
      const auto method = static_cast<RoutingMethod>(m);
      const std::int64_t top_k = method == RoutingMethod::kLlama4 ? 1
                                 : method == RoutingMethod::kSparseMixer
                                     ? 2
                                     : 1 + rng.below(experts / 2);
      RoutingSpec spec{.method = method};
      if (method == RoutingMethod::kDeepSeekV2 || method == RoutingMethod::kDeepSeekV3)
        spec.groups = 4, spec.topk_groups = 2;
      const Result r = run_logits(spec, z, top_k);
      for (std::int64_t t = 0; t < 3; ++t) {
        const auto ids = ids_of(r, t);
        const std::set<std::int32_t> distinct(ids.begin(), ids.end());
        EXPECT_EQ(distinct.size(), ids.size()) << name(method);
        EXPECT_GE(*distinct.begin(), 0);
        EXPECT_LT(*distinct.rbegin(), experts);
      }
      if (spec.groups > 1) continue;
      // In every ungrouped method without a bias the order is that of z.
      const auto ids = ids_of(r, 0);
      for (std::size_t j = 0; j + 1 < ids.size(); ++j) {
        const float a = z[0][static_cast<std::size_t>(ids[j])],
                    b = z[0][static_cast<std::size_t>(ids[j + 1])];
        EXPECT_TRUE(std::isnan(b) || a >= b) << name(method) << " " << a << " before " << b;
      }
    }
  }
}

TEST(Route, ATokenWithNaNLeavesTheOthersAlone) {
  FRESH_RNG(rng);
  const std::int64_t tokens = 8, experts = 16;
  HostTensor z = random_tensor(rng, DType::kF32, {tokens, experts});
  for (int m = 0; m < kNumRoutingMethods; ++m) {
    const RoutingSpec spec{.method = static_cast<RoutingMethod>(m)};
    const std::int64_t top_k = spec.method == RoutingMethod::kLlama4 ? 1 : 2;
    HostTensor bad = z;
    bad.as<float>()[3 * experts + 5] = kNaN;
    const Result clean = run_route({.spec = spec, .logits = z.view()}, tokens, top_k);
    const Result dirty = run_route({.spec = spec, .logits = bad.view()}, tokens, top_k);
    for (std::int64_t t = 0; t < tokens; ++t) {
      if (t == 3) continue;
      for (std::int64_t i = t * top_k; i < (t + 1) * top_k; ++i) {
        EXPECT_EQ(clean.ids[static_cast<std::size_t>(i)], dirty.ids[static_cast<std::size_t>(i)]);
        EXPECT_EQ(clean.weights[static_cast<std::size_t>(i)],
                  dirty.weights[static_cast<std::size_t>(i)]);
      }
    }
  }
}

// Models mask the other groups with 0, which wins over a negative biased score. Ours leaves them
// out.
TEST(Route, OriginalGroupMaskOfZeroLosesToNegativeScores) {
  const HostTensor bias = [] {
    HostTensor b(DType::kF32, {8});
    std::fill_n(b.as<float>(), 8, -2.0f);
    return b;
  }();
  const Result r = run_logits({.method = RoutingMethod::kDeepSeekV3, .groups = 4, .topk_groups = 1},
                              {{0, 0, 3, 3, 1, 1, 0, 0}}, 2, {.selection_bias = bias.view()});
  EXPECT_EQ(ids_of(r, 0), (std::vector<std::int32_t>{2, 3}));
}

TEST(Route, ScaleIsAppliedExactlyOnce) {
  FRESH_RNG(rng);
  const HostTensor z = random_tensor(rng, DType::kF32, {4, 16});
  for (int m = 0; m < kNumRoutingMethods; ++m) {
    const auto method = static_cast<RoutingMethod>(m);
    const std::int64_t top_k = method == RoutingMethod::kLlama4 ? 1 : 2;
    const Result one = run_route({.spec = {.method = method}, .logits = z.view()}, 4, top_k);
    const Result four =
        run_route({.spec = {.method = method, .scale = 4.0f}, .logits = z.view()}, 4, top_k);
    for (std::size_t i = 0; i < one.weights.size(); ++i)
      EXPECT_EQ(one.weights[i] * 4, four.weights[i]);
  }
}

TEST(Route, StridedLogitsAndHiddenStates) {
  FRESH_RNG(rng);
  const HostTensor wide = random_tensor(rng, DType::kBF16, {6, 100});
  const HostTensor w = random_tensor(rng, DType::kF32, {24, 40});
  Tensor x = wide.view();
  x.shape[1] = 40;
  HostTensor dense(DType::kBF16, {6, 40});
  for (std::int64_t t = 0; t < 6; ++t)
    std::copy_n(wide.as<std::uint16_t>() + t * 100, 40, dense.as<std::uint16_t>() + t * 40);
  const RouteArgs product{.hidden_states = x, .router = {.weight = w.view()}};
  RouteArgs same = product;
  same.hidden_states = dense.view();
  EXPECT_TRUE(run_route(product, 6, 4) == run_route(same, 6, 4));
  EXPECT_TRUE(run_route({.logits = x}, 6, 4) == run_route({.logits = dense.view()}, 6, 4));
}

TEST(Route, AsManyExpertsAsThereMayBe) {
  FRESH_RNG(rng);
  const HostTensor most = random_tensor(rng, DType::kF32, {2, 2048});
  const Result result = run_route({.logits = most.view()}, 2, 4);
  for (const std::int32_t id : result.ids) EXPECT_TRUE(id >= 0 && id < 2048);
  const HostTensor more = random_tensor(rng, DType::kF32, {1, 2049});
  const HostTensor x(DType::kF32, {1, 8}), router(DType::kF32, {2049, 8});
  const auto refusal = [](const RouteArgs& args) -> std::string {
    try {
      run_route(args, 1, 4);
    } catch (const Error& error) {
      return error.what();
    }
    return "computed";
  };
  EXPECT_TRUE(refusal({.logits = more.view()}).starts_with("logits: experts"));
  EXPECT_TRUE(refusal({.hidden_states = x.view(), .router = {.weight = router.view()}})
                  .starts_with("router.weight: experts"));
}

TEST(Route, SparseMixerHasNoSelectionBias) {
  const HostTensor z(DType::kF32, {1, 16}), bias(DType::kF32, {16});
  EXPECT_THROW(run_route({.spec = {.method = RoutingMethod::kSparseMixer},
                          .logits = z.view(),
                          .router = {.selection_bias = bias.view()}},
                         1, 2),
               Error);
}

TEST(Route, NoTokens) {
  const HostTensor z(DType::kF32, {0, 16});
  EXPECT_NO_THROW(run_route({.logits = z.view()}, 0, 4));
}

}  // namespace
}  // namespace moesaic
