// SPDX-License-Identifier: Apache-2.0
#include "harness/bench_routing.h"

#include <algorithm>
#include <numeric>

namespace moesaic::harness {
namespace {

// Gives a token's largest logits to the experts that were drawn for it, so that layers from logits
// and from ids are timed on the same routing; and ids as the default method makes them of that.
void lead_to(std::int32_t* ids, std::int64_t top_k, float* logits, std::int64_t experts) {
  std::vector<std::int32_t> order(static_cast<std::size_t>(experts));
  std::iota(order.begin(), order.end(), 0);
  const auto falling = [&](std::int32_t a, std::int32_t b) { return logits[a] > logits[b]; };
  std::sort(order.begin(), order.end(), falling);
  std::vector<float> values(order.size());
  std::transform(order.begin(), order.end(), values.begin(), [&](auto e) { return logits[e]; });
  std::stable_partition(order.begin(), order.end(),
                        [&](auto e) { return std::find(ids, ids + top_k, e) != ids + top_k; });
  for (std::size_t i = 0; i < order.size(); ++i) logits[order[i]] = values[i];
  std::copy_n(order.begin(), top_k, ids);
}

}  // namespace

BatchOptions batch_of(const BenchSpec& spec, std::int64_t tokens, int r) {
  return {.tokens = tokens,
          .fill = Fill::kFast,
          .load = spec.load,
          .seed = mix(spec.seed, 1000 + static_cast<std::uint64_t>(r))};
}

Routing make_routing(const LayerConfig& config, const BenchSpec& spec, std::int64_t tokens, int r) {
  LayerConfig narrow = config;
  narrow.hidden =
      1;  // no activations: all routings share them, as weights in between push them out of a cache
  Batch batch = make_batch(narrow, batch_of(spec, tokens, r));
  Routing out;
  std::int32_t* const ids = batch.topk_ids.as<std::int32_t>();
  const std::int64_t slots = tokens * config.top_k;
  // Another set of experts each time: under a skewed load the popular ones would otherwise stay in
  // the cache from one run to the next.
  for (std::int64_t i = 0; i < slots; ++i) {
    if (ids[i] >= 0 && ids[i] < config.experts)
      ids[i] = static_cast<std::int32_t>((ids[i] + r * config.top_k) % config.experts);
  }
  if (spec.source == RoutingSource::kLogits) {
    for (std::int64_t t = 0; t < tokens; ++t)
      lead_to(ids + t * config.top_k, config.top_k,
              batch.router_logits.as<float>() + t * config.experts, config.experts);
    out.logits = DeviceTensor::from(batch.router_logits, spec.device);
  }
  std::vector<std::int64_t> rows(static_cast<std::size_t>(config.experts));
  for (std::int64_t i = 0; i < slots; ++i)
    if (ids[i] >= 0 && ids[i] < config.experts) ++rows[static_cast<std::size_t>(ids[i])];
  out.active = static_cast<double>(active_experts(config, batch.topk_ids));
  out.busiest = *std::max_element(rows.begin(), rows.end());
  out.ids = DeviceTensor::from(batch.topk_ids, spec.device);
  out.weights = DeviceTensor::from(batch.topk_weights, spec.device);
  return out;
}

}  // namespace moesaic::harness
