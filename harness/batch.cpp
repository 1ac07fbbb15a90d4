// SPDX-License-Identifier: Apache-2.0
// Random batches: activations, and who goes where.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "check.h"
#include "harness/data.h"
#include "numeric.h"
#include "scheme.h"
#include "words.h"

namespace moesaic::harness {
namespace {

constexpr std::string_view kLoadNames[kNumLoads] = {"uniform", "zipf",       "one",
                                                    "holes",   "duplicates", "remote"};

constexpr std::int64_t kDistinctRows = 256;  // Fill::kFast

// Rows from `made` on are copies of the first ones.
void repeat_rows(HostTensor* x, std::int64_t made) {
  const std::int64_t rows = x->shape()[0];
  if (made == 0 || made >= rows) return;
  std::byte* data = x->bytes().data();
  const std::size_t row = x->bytes().size() / static_cast<std::size_t>(rows);
  for (std::int64_t t = made; t < rows; ++t)
    std::copy_n(data + static_cast<std::size_t>(t % made) * row, row,
                data + static_cast<std::size_t>(t) * row);
}

std::int64_t distinct_rows(const BatchOptions& options) {
  return options.fill == Fill::kFast ? std::min(options.tokens, kDistinctRows) : options.tokens;
}

HostTensor make_hidden(const LayerConfig& config, const BatchOptions& options) {
  HostTensor x(config.input_dtype, {options.tokens, config.hidden});
  for (std::int64_t t = 0; t < distinct_rows(options); ++t) {
    Rng rng(mix(mix(options.seed, 0x31), static_cast<std::uint64_t>(t)));
    double size = 0.5 + rng.uniform();
    if (config.input_dtype == DType::kF8E4M3) size *= 64;
    if (config.input_dtype == DType::kI8) size *= 24;
    for (std::int64_t h = 0; h < config.hidden; ++h)
      store_element(x.bytes().data(), x.dtype(), t * config.hidden + h, size * rng.normal());
  }
  repeat_rows(&x, distinct_rows(options));
  if (options.values == Values::kNonFinite && options.tokens > 0 && x.dtype() != DType::kI8) {
    constexpr double kInf = std::numeric_limits<double>::infinity();
    store_element(x.bytes().data(), x.dtype(), config.hidden / 2, std::nan(""));
    const std::int64_t last = (options.tokens - 1) * config.hidden;
    if (options.tokens > 1)
      store_element(x.bytes().data(), x.dtype(), last,
                    x.dtype() == DType::kF8E4M3 ? std::nan("") : kInf);
  }
  return x;
}

HostTensor make_hidden_scale(const LayerConfig& config, const BatchOptions& options) {
  if (is_float(config.input_dtype)) return {};
  const WeightSpec fc1 = weight_spec(config, Product::kFc1);
  std::vector<std::int64_t> shape{1};
  if (fc1.act_scale == ActScale::kToken) shape = {options.tokens, 1};
  if (fc1.act_scale == ActScale::kGroup)
    shape = {options.tokens, (config.hidden + fc1.act_group - 1) / fc1.act_group};
  HostTensor scale(DType::kF32, shape);
  Rng rng(mix(options.seed, 0x32));
  const double size = config.input_dtype == DType::kI8 ? 1.0 / 32 : 1.0 / 80;
  for (std::int64_t i = 0; i < scale.numel(); ++i)
    scale.as<float>()[i] = static_cast<float>(size * (0.5 + rng.uniform()));
  return scale;
}

// k ids of one token, drawn by popularity, distinct while there are enough.
std::vector<std::int64_t> draw(const std::vector<double>& cumulative, std::int64_t k, Rng* rng) {
  std::vector<std::int64_t> ids;
  const auto count = static_cast<std::int64_t>(cumulative.size());
  std::vector<bool> taken(cumulative.size(), false);
  for (std::int64_t j = 0; j < k; ++j) {
    const double u = rng->uniform() * cumulative.back();
    auto e = std::upper_bound(cumulative.begin(), cumulative.end(), u) - cumulative.begin();
    e = std::min<std::ptrdiff_t>(e, count - 1);
    for (std::int64_t tries = 0; taken[static_cast<std::size_t>(e)] && tries < count; ++tries)
      e = (e + 1) % count;  // the next one that is free
    taken[static_cast<std::size_t>(e)] = true;
    ids.push_back(e);
  }
  return ids;
}

// Ids that no tensor may be indexed with. The last two only exist in 64 bit: cut to 32 they look
// valid.
std::int64_t hostile_id(std::int64_t experts, DType dtype, Rng* rng) {
  const std::int64_t narrow[] = {-1, experts, experts + 7, std::numeric_limits<std::int32_t>::max(),
                                 std::numeric_limits<std::int32_t>::min()};
  const std::int64_t wide[] = {INT64_C(1) << 32, (INT64_C(-1) << 32) + 1};
  const std::int64_t pick = rng->below(dtype == DType::kI64 ? 7 : 5);
  return pick < 5 ? narrow[pick] : wide[pick - 5];
}

HostTensor make_ids(const LayerConfig& config, const BatchOptions& options) {
  HostTensor ids(options.id_dtype, {options.tokens, config.top_k});
  std::vector<double> cumulative(static_cast<std::size_t>(config.experts));
  double sum = 0;
  for (std::int64_t e = 0; e < config.experts; ++e) {
    double popularity = 1;
    if (options.load == Load::kZipf) popularity = 1.0 / static_cast<double>(e + 1);
    if (options.load == Load::kHoles) popularity = e % 2 == 0 ? 1 : 0;
    cumulative[static_cast<std::size_t>(e)] = sum += popularity;
  }
  for (std::int64_t t = 0; t < options.tokens; ++t) {
    Rng rng(mix(mix(options.seed, 0x33), static_cast<std::uint64_t>(t)));
    std::vector<std::int64_t> chosen = draw(cumulative, config.top_k, &rng);
    for (std::int64_t j = 0; j < config.top_k; ++j) {
      std::int64_t& id = chosen[static_cast<std::size_t>(j)];
      if (options.load == Load::kOne) id = config.experts / 2;
      if (options.load == Load::kHoles) id -= id % 2;
      if (options.load == Load::kDuplicates && j > 0 && rng.below(2) == 0)
        id = chosen[static_cast<std::size_t>(j - 1)];
      if (options.load == Load::kRemote && rng.below(3) == 0)
        id = hostile_id(config.experts, options.id_dtype, &rng);
      if (options.id_dtype == DType::kI64)
        ids.as<std::int64_t>()[t * config.top_k + j] = id;
      else
        ids.as<std::int32_t>()[t * config.top_k + j] = static_cast<std::int32_t>(id);
    }
  }
  return ids;
}

}  // namespace

std::string_view name(Load load) { return kLoadNames[static_cast<int>(load)]; }
Load parse_load(std::string_view text) {
  for (int i = 0; i < kNumLoads; ++i)
    if (kLoadNames[i] == text) return static_cast<Load>(i);
  std::string known;
  for (const std::string_view n : kLoadNames) append_word(known, n);
  invalid("load: unknown name '" + std::string(text) + "'; known: " + known);
}

Batch make_batch(const LayerConfig& config, const BatchOptions& options) {
  Batch b;
  b.hidden_states = make_hidden(config, options);
  b.hidden_scale = make_hidden_scale(config, options);
  b.topk_ids = make_ids(config, options);
  b.topk_weights = HostTensor(DType::kF32, {options.tokens, config.top_k});
  b.router_logits = HostTensor(DType::kF32, {options.tokens, config.experts});
  std::vector<float> ladder(static_cast<std::size_t>(config.experts));
  for (std::int64_t t = 0; t < options.tokens; ++t) {
    Rng rng(mix(mix(options.seed, 0x34), static_cast<std::uint64_t>(t)));
    float* w = b.topk_weights.as<float>() + t * config.top_k;
    float sum = 0;
    for (std::int64_t j = 0; j < config.top_k; ++j)
      sum += w[j] = static_cast<float>(0.25 + rng.uniform());
    for (std::int64_t j = 0; j < config.top_k; ++j) w[j] /= sum;
    if (t >= distinct_rows(options)) continue;
    // Logits: a shuffled ladder with steps of 6 / E, so that no two are close.
    for (std::size_t e = 0; e < ladder.size(); ++e) {
      ladder[e] = static_cast<float>((static_cast<double>(e) + 0.5 * rng.uniform()) * 6 /
                                         static_cast<double>(config.experts) -
                                     3);
      std::swap(ladder[e],
                ladder[static_cast<std::size_t>(rng.below(static_cast<std::int64_t>(e) + 1))]);
    }
    std::copy(ladder.begin(), ladder.end(), b.router_logits.as<float>() + t * config.experts);
  }
  repeat_rows(&b.router_logits, distinct_rows(options));
  return b;
}

std::int64_t active_experts(const LayerConfig& config, const HostTensor& topk_ids) {
  const std::int64_t count =
      config.local.count > 0 ? config.local.count : config.experts - config.local.first;
  std::vector<bool> seen(static_cast<std::size_t>(count), false);
  for (std::int64_t i = 0; i < topk_ids.numel(); ++i) {
    const std::int64_t id = topk_ids.dtype() == DType::kI64 ? topk_ids.as<std::int64_t>()[i]
                                                            : topk_ids.as<std::int32_t>()[i];
    if (id >= config.local.first && id < config.local.first + count)
      seen[static_cast<std::size_t>(id - config.local.first)] = true;
  }
  return std::count(seen.begin(), seen.end(), true);
}

}  // namespace moesaic::harness
