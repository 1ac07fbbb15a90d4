// SPDX-License-Identifier: Apache-2.0
#include "harness/routing_check.h"

#include <cmath>
#include <vector>

#include "reference/bounded.h"
#include "reference/routing.h"

namespace moesaic::harness {
namespace {

using reference::kUnit;

// One token's logits and how far fp32 may be from them.
struct Logits {
  std::vector<double> z;
  double error = 0;
};

Logits token_logits(const RoutedTokens& r, std::int64_t t) {
  Logits out;
  if (!r.logits.defined()) {
    const Tensor x = r.hidden_states.select(t);
    out.z = reference::logits(x, r.router);
    const std::int64_t hidden = x.shape[0];
    for (std::int64_t e = 0; e < r.router.weight.shape[0]; ++e) {
      double magnitude = 0;
      for (std::int64_t h = 0; h < hidden; ++h)
        magnitude += std::abs(reference::load(x, h) * reference::load(r.router.weight, e, h));
      out.error = std::max(out.error,
                           (reference::walk(static_cast<double>(hidden)) + 2) * kUnit * magnitude);
    }
    return out;
  }
  for (std::int64_t e = 0; e < r.logits.shape[1]; ++e) {
    double z = reference::load(r.logits, t, e);
    if (r.router.bias.defined()) z += reference::load(r.router.bias, e);
    out.z.push_back(z);
    out.error = std::max(out.error, kUnit * std::abs(z));
  }
  return out;
}

}  // namespace

std::string check_routing(const RoutedTokens& r) {
  const std::int64_t tokens = r.topk_ids->shape()[0], top_k = r.topk_ids->shape()[1];
  std::vector<double> bias;
  if (r.router.selection_bias.defined())
    for (std::int64_t e = 0; e < r.router.selection_bias.shape[0]; ++e)
      bias.push_back(reference::load(r.router.selection_bias, e));
  for (std::int64_t t = 0; t < tokens; ++t) {
    const Logits logits = token_logits(r, t);
    const auto experts = static_cast<std::int64_t>(logits.z.size());
    const reference::Routed want = reference::route(r.spec, top_k, logits.z, bias);
    // Every score is a function of z whose slope is at most 1, then a few roundings.
    const double tolerance = 2 * logits.error + 32 * kUnit;
    if (want.group_margin <= 2 * tolerance) continue;  // either group may have stayed
    const std::string where = "token " + std::to_string(t) + ": ";
    std::vector<double> left = want.scores[0];
    bool same = true;
    for (std::int64_t j = 0; j < top_k; ++j) {
      const std::int64_t id = r.topk_ids->as<std::int32_t>()[t * top_k + j];
      if (id < 0 || id >= experts)
        return where + "expert " + std::to_string(id) + " does not exist";
      double best = -INFINITY;
      for (const double s : left) best = std::max(best, s);
      double& score = left[static_cast<std::size_t>(id)];
      if (!(best - score <= tolerance * std::max(1.0, std::abs(best))))
        return where + "pick " + std::to_string(j) + " is expert " + std::to_string(id) +
               ", whose score " + std::to_string(score) + " is below the best left, " +
               std::to_string(best);
      score = -INFINITY;
      same = same && id == want.ids[static_cast<std::size_t>(j)];
    }
    if (!same) continue;  // a tie in fp32: the weights belong to another choice
    for (std::int64_t j = 0; j < top_k; ++j) {
      const double w = r.topk_weights->as<float>()[t * top_k + j],
                   expected = want.weights[static_cast<std::size_t>(j)];
      const double bound =
          std::abs(expected) *
              (4 * logits.error + (reference::walk(static_cast<double>(experts)) + 32) * kUnit) +
          (r.spec.method == RoutingMethod::kTopK ? logits.error * r.spec.scale : 0) + 0x1p-100;
      if (!(std::abs(w - expected) <= bound))
        return where + "weight " + std::to_string(j) + " is " + std::to_string(w) + ", expected " +
               std::to_string(expected) + " within " + std::to_string(bound);
    }
  }
  return {};
}

}  // namespace moesaic::harness
