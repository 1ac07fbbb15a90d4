// SPDX-License-Identifier: Apache-2.0
#include "reference/routing.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "reference/bounded.h"

namespace moesaic::reference {
namespace {

using Numbers = std::vector<double>;
constexpr double kLowest = -std::numeric_limits<double>::infinity();

Numbers softmax(const Numbers& z) {
  double top = kLowest;
  for (const double v : z)
    if (v > top) top = v;
  Numbers p(z.size());
  double sum = 0;
  for (std::size_t e = 0; e < z.size(); ++e) {
    p[e] = z[e] == kLowest ? 0 : std::exp(z[e] - top);
    sum += p[e];
  }
  for (double& v : p) v /= sum;
  return p;
}
template <typename F>
Numbers each(const Numbers& z, F f) {
  Numbers out(z.size());
  std::transform(z.begin(), z.end(), out.begin(), f);
  return out;
}
double sigmoid(double v) { return 1 / (1 + std::exp(-v)); }
double softplus(double v) { return v > 30 ? v : std::log1p(std::exp(v)); }

Numbers plus(Numbers scores, const Numbers& bias) {
  for (std::size_t e = 0; e < bias.size(); ++e) scores[e] += bias[e];
  return scores;
}

// The best, the lowest id where equal; NaN ranks last but before what is not eligible.
std::int64_t best(const Numbers& scores, const std::vector<bool>& taken) {
  std::int64_t at = -1;
  for (std::size_t e = 0; e < scores.size(); ++e) {
    if (taken[e]) continue;
    if (at < 0 || scores[e] > scores[static_cast<std::size_t>(at)] ||
        (std::isnan(scores[static_cast<std::size_t>(at)]) && !std::isnan(scores[e])))
      at = static_cast<std::int64_t>(e);
  }
  return at;
}

// Scores outside the topk_groups best groups become ineligible.
struct Grouped {
  Numbers scores;
  double margin;
};
template <typename F>
Grouped keep_groups(const RoutingSpec& spec, const Numbers& scores, F group_score) {
  const auto groups = static_cast<std::size_t>(spec.groups);
  if (spec.topk_groups >= spec.groups) return {scores, std::numeric_limits<double>::infinity()};
  const std::size_t width = scores.size() / groups;
  Numbers of_group(groups);
  for (std::size_t g = 0; g < groups; ++g) {
    const auto first = scores.begin() + static_cast<std::ptrdiff_t>(g * width);
    of_group[g] = group_score(Numbers(first, first + static_cast<std::ptrdiff_t>(width)));
  }
  std::vector<bool> taken(groups, false);
  double last = kLowest;
  for (int i = 0; i < spec.topk_groups; ++i) {
    const auto g = static_cast<std::size_t>(best(of_group, taken));
    taken[g] = true;
    last = of_group[g];
  }
  Grouped out{scores, std::numeric_limits<double>::infinity()};
  for (std::size_t g = 0; g < groups; ++g) {
    if (taken[g]) continue;
    out.margin = std::min(out.margin, last - of_group[g]);
    std::fill_n(out.scores.begin() + static_cast<std::ptrdiff_t>(g * width), width, kLowest);
  }
  return out;
}

double largest(const Numbers& v) { return *std::max_element(v.begin(), v.end()); }
double two_largest(Numbers v) {
  std::sort(v.begin(), v.end(), std::greater<>());
  return v[0] + (v.size() > 1 ? v[1] : 0);
}

// Phi-3.5-MoE at inference: each pick is a softmax over the experts within 2 * jitter of the best,
// relative to max(|z|, best); the second pick leaves the first out.
Routed sparse_mixer(const RoutingSpec& spec, std::int64_t top_k, const Numbers& z) {
  Routed out{.ids = {},
             .weights = {},
             .scores = {},
             .group_margin = std::numeric_limits<double>::infinity()};
  Numbers left = z;
  std::vector<bool> taken(z.size(), false);
  for (std::int64_t j = 0; j < top_k; ++j) {
    const auto pick = static_cast<std::size_t>(best(left, taken));
    const double top = left[pick];
    Numbers masked = left;
    for (std::size_t e = 0; e < z.size(); ++e) {
      const double factor = std::max(std::abs(z[e]), top);
      if ((top - z[e]) / factor > 2 * static_cast<double>(spec.jitter)) masked[e] = kLowest;
    }
    out.scores.push_back(left);
    out.ids.push_back(static_cast<std::int64_t>(pick));
    out.weights.push_back(softmax(masked)[pick] * spec.scale);
    left[pick] = kLowest;
    taken[pick] = true;
  }
  return out;
}

}  // namespace

Routed route(const RoutingSpec& spec, std::int64_t top_k, const std::vector<double>& z,
             const std::vector<double>& selection_bias) {
  Numbers weight;  // of each expert if selected, before division and scale
  Grouped select{{}, std::numeric_limits<double>::infinity()};
  bool divide = false;  // by the sum over S
  double added = 0, floor = 0;
  using enum RoutingMethod;
  switch (spec.method) {
    case kSparseMixer:
      return sparse_mixer(spec, top_k, z);
    case kSoftmaxTopK:
      weight = softmax(z);
      select.scores = z;
      break;
    case kRenormalize:  // softmax over S is the softmax over all, divided by its sum over S
      weight = softmax(z);
      select.scores = z;
      divide = true;
      break;
    case kDeepSeekV3:
      weight = each(z, sigmoid);
      select = keep_groups(spec, plus(weight, selection_bias), two_largest);
      divide = true;
      added = 1e-20;
      break;
    case kDeepSeekV2:
      weight = softmax(z);
      select = keep_groups(spec, plus(weight, selection_bias), largest);
      break;
    case kLlama4:
      weight = each(z, sigmoid);
      select.scores = z;
      break;
    case kTopK:
      weight = z;
      select.scores = z;
      break;
    case kSigmoidRenorm:
      weight = each(z, sigmoid);
      select.scores = z;
      divide = true;
      added = 1e-20;
      break;
    case kMiniMax2:
      weight = each(z, sigmoid);
      select.scores = plus(weight, selection_bias);
      divide = true;
      added = 1e-20;
      break;
    case kSigmoid:
      weight = each(z, sigmoid);
      select.scores = z;
      break;
    case kSqrtSoftplus:
      weight = each(z, [](double v) { return std::sqrt(softplus(v)); });
      select.scores = plus(weight, selection_bias);
      divide = true;
      break;
    case kSoftmaxBias:
      weight = softmax(z);
      select.scores = plus(weight, selection_bias);
      divide = true;
      floor = spec.sum_floor;
      break;
  }
  // Softmax and sigmoid are monotone, so z itself ranks; a selection bias adds to the score
  // instead.
  if (!selection_bias.empty() && select.scores == z) select.scores = plus(weight, selection_bias);
  if (spec.renormalize != Renormalize::kDefault) divide = spec.renormalize == Renormalize::kAlways;

  Routed out{.ids = {}, .weights = {}, .scores = {}, .group_margin = select.margin};
  std::vector<bool> taken(z.size(), false);
  double sum = added;
  for (std::int64_t j = 0; j < top_k; ++j) {
    const auto pick = static_cast<std::size_t>(best(select.scores, taken));
    out.scores.push_back(select.scores);
    for (std::size_t e = 0; e < z.size(); ++e)
      if (taken[e]) out.scores.back()[e] = kLowest;
    taken[pick] = true;
    out.ids.push_back(static_cast<std::int64_t>(pick));
    out.weights.push_back(weight[pick]);
    sum += weight[pick];
  }
  for (double& w : out.weights) w = (divide ? w / std::max(sum, floor) : w) * spec.scale;
  return out;
}

std::vector<double> logits(const Tensor& x, const RouterWeights& router) {
  std::vector<double> z(static_cast<std::size_t>(router.weight.shape[0]));
  for (std::int64_t e = 0; e < router.weight.shape[0]; ++e) {
    double sum = router.bias.defined() ? load(router.bias, e) : 0;
    for (std::int64_t h = 0; h < router.weight.shape[1]; ++h)
      sum += load(x, h) * load(router.weight, e, h);
    z[static_cast<std::size_t>(e)] = sum;
  }
  return z;
}

}  // namespace moesaic::reference
