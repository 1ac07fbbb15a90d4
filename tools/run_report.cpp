// SPDX-License-Identifier: Apache-2.0
#include "tools/run_report.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "harness/bench.h"
#include "harness/compare.h"
#include "harness/stopwatch.h"
#include "reference/layer.h"
#include "tools/checkpoint_flags.h"

namespace moesaic::tool {
namespace {

// One bar of up to `width` cells for `value` of `most`.
std::string bar(double value, double most, int width, std::string_view cell) {
  std::string out;
  const int cells = most > 0 ? static_cast<int>(std::lround(value / most * width)) : 0;
  for (int i = 0; i < cells; ++i) out += cell;
  return out;
}

// Blocks where a terminal shows them, ASCII in a pipe.
bool fancy() {
  if (!isatty(STDOUT_FILENO)) return false;
  for (const char* variable : {"LC_ALL", "LC_CTYPE", "LANG"})
    if (const char* value = std::getenv(variable); value && *value)
      return std::string_view(value).find("UTF-8") != std::string_view::npos ||
             std::string_view(value).find("utf8") != std::string_view::npos;
  return false;
}

void print_load(const Output& out, const std::vector<std::int64_t>& load) {
  const std::int64_t most = load.empty() ? 0 : *std::max_element(load.begin(), load.end());
  const auto idle = std::count(load.begin(), load.end(), 0);
  out.line(fmt::format("load per expert (most {}, idle {} of {}):", most, idle, load.size()));
  const std::string_view cell = fancy() ? "█" : "#";
  if (load.size() <= 32) {
    for (std::size_t e = 0; e < load.size(); ++e) {
      const std::string cells =
          bar(static_cast<double>(load[e]), static_cast<double>(most), 48, cell);
      out.line(fmt::format("  {:>3} {:>6}{}{}", e, load[e], cells.empty() ? "" : " ", cells));
    }
    return;
  }
  // Many experts: one character each, 64 to a line.
  static constexpr std::string_view kBlocks[] = {" ", "▁", "▂", "▃", "▄", "▅", "▆", "▇", "█"};
  static constexpr std::string_view kAscii[] = {" ", ".", ":", "-", "=", "+", "*", "#", "@"};
  const auto* levels = fancy() ? kBlocks : kAscii;
  for (std::size_t first = 0; first < load.size(); first += 64) {
    std::string line = fmt::format("  {:>4} |", first);
    for (std::size_t e = first; e < std::min(first + 64, load.size()); ++e)
      line += levels[most > 0 ? (load[e] * 8 + most - 1) / most : 0];
    out.line(line + "|");
  }
}

std::string error_text(const harness::Comparison& c, std::int64_t tokens, bool idle) {
  if (c.reason.empty() && c.compared == 0)
    return "error    not measured: every output is NaN or Inf, as in float64";
  if (c.reason.empty() && idle && c.max_error == 0)
    return "error    not measured: no token goes to an expert here, and every output is 0";
  std::string text =
      fmt::format("error    {:.2e} of the norm against float64, {:.2f} of the bound ({} tokens)",
                  c.relative_error, c.ratio, tokens);
  if (!c.reason.empty()) return text + "  OUTSIDE THE BOUND: " + c.reason;
  if (c.not_finite > 0)
    text += fmt::format("; {} of {} outputs are NaN or Inf, as in float64", c.not_finite,
                        c.compared + c.not_finite);
  return text;
}

}  // namespace

void RunReport::compare(const harness::HostTensor& output, std::int64_t layer,
                        std::int64_t wanted) {
  load.assign(static_cast<std::size_t>(config.experts), 0);
  for (std::int64_t i = 0; i < ids->numel(); ++i) {
    const std::int32_t id = ids->as<std::int32_t>()[i];
    if (id >= 0 && id < config.experts) ++load[static_cast<std::size_t>(id)];
  }
  // The oracle does some 1e8 products a second, and needs each active expert once in float64.
  const double per_token =
      3.0 * static_cast<double>(config.top_k * config.hidden * config.intermediate);
  checked = wanted >= 0 ? wanted : static_cast<std::int64_t>(std::max(1.0, 3e8 / per_token));
  // A dynamic scale over the whole call needs the whole call.
  const bool whole = weight_spec(config, Product::kFc1).act_scale == ActScale::kTensorDynamic;
  checked = std::min(checked, tokens);
  if (checked == 0) return;
  const std::int64_t needed = whole ? tokens : checked;

  const HostWeights host = checkpoint->experts(layer, config);
  reference::SharedWeights shared;
  HostShared shared_host;
  if (config.shared_experts > 0) {
    shared_host = checkpoint->shared(layer, config);
    shared = {.weights = shared_host.weights, .gate = shared_host.gate};
  }
  const reference::LayerInput input{.hidden_states = hidden->view().slice(0, needed),
                                    .hidden_scale = {},
                                    .topk_ids = ids->view().slice(0, needed),
                                    .topk_weights = weights->view().slice(0, needed),
                                    .expert_map = {},
                                    .format = format};
  harness::HostTensor part(config.output_dtype, {needed, config.hidden});
  std::copy_n(output.bytes().begin(), part.bytes().size(), part.bytes().begin());
  const auto against = [&](const reference::Choices& choices) {
    return harness::compare(
        part, reference::layer(config, host.weights, config.shared_experts > 0 ? &shared : nullptr,
                               input, choices)
                  .output);
  };
  reference::Choices choices = harness::device_choices(config, device);
  comparison = against(choices);
  // A scheme may round its dequantized weights to 16 bit or not, always the same way.
  if (comparison.ratio > 1 && harness::may_round_weights(config)) {
    choices.weights = reference::WeightRounding::k16Bit;
    const harness::Comparison other = against(choices);
    if (other.ratio < comparison.ratio) comparison = other;
  }
}

void RunReport::time(const std::function<void(Stream)>& forward) {
  if (tokens == 0) return;
  const std::unique_ptr<harness::Stopwatch> watch = harness::make_stopwatch(device);
  const harness::Roof products = watch->products();
  const double read_before = watch->read_gbytes_s();
  const std::vector<std::function<void(Stream)>> calls{forward};
  std::vector<double> samples = watch->sample_ms(calls, {.seconds = 0.3});
  const double read_rate = 0.5 * (read_before + watch->read_gbytes_s());
  std::nth_element(samples.begin(),
                   samples.begin() + static_cast<std::ptrdiff_t>(samples.size() / 2),
                   samples.end());
  ms_median = samples[samples.size() / 2];
  const harness::Floor floor = harness::layer_floor(
      config, stored->has_bias ? harness::Biases::kAll : harness::Biases::kNone,
      {.tokens = tokens,
       .active_experts = static_cast<double>(
           load.size() - static_cast<std::size_t>(std::count(load.begin(), load.end(), 0))),
       .read_gbytes_s = read_rate,
       .product_rate = harness::product_rate(products, config.quant.scheme, device.type)});
  floor_ms = floor.ms;
  floor_bound = floor.bound;
  in_cache = floor.weight_bytes < static_cast<double>(watch->cache_bytes());
}

void RunReport::print(const Output& out) const {
  out.line(fmt::format("{}: {}, {}", checkpoint->path(), checkpoint->family(), stored->name));
  out.line(fmt::format("  {} tokens, {} experts, top {}, hidden {}, intermediate {}, {}", tokens,
                       config.experts, config.top_k, config.hidden, config.intermediate,
                       name(config.activation.kind)));
  out.line(fmt::format("  {} ({}), {} format, on {}, {} packed", quant_text(config.quant),
                       stored->storage, name(format), to_string(device), bytes_text(packed_bytes)));
  const bool idle = config.shared_experts == 0 &&
                    std::all_of(load.begin(), load.end(), [](std::int64_t n) { return n == 0; });
  if (checked > 0) out.line(error_text(comparison, checked, idle));
  if (ms_median > 0)
    out.line(fmt::format("time     {}, {:.2f} x the floor of {} ({}){}", time_text(ms_median),
                         floor_ms > 0 ? ms_median / floor_ms : 0.0, time_text(floor_ms),
                         floor_bound, in_cache ? "; these weights fit the cache" : ""));
  print_load(out, load);
}

nlohmann::json RunReport::to_json() const {
  return {{"checkpoint", checkpoint->path()},
          {"family", checkpoint->family()},
          {"layer", stored->index},
          {"device", to_string(device)},
          {"scheme", name(config.quant.scheme)},
          {"quantization", quant_text(config.quant)},
          {"format", name(format)},
          {"activation", name(config.activation.kind)},
          {"routing", name(config.routing.method)},
          {"experts", config.experts},
          {"hidden", config.hidden},
          {"intermediate", config.intermediate},
          {"top_k", config.top_k},
          {"tokens", tokens},
          {"packed_bytes", packed_bytes},
          {"checked_tokens", checked},
          {"relative_error", comparison.relative_error},
          {"max_error", comparison.max_error},
          {"bound_ratio", comparison.ratio},
          {"compared", comparison.compared},
          {"not_finite", comparison.not_finite},
          {"reason", comparison.reason},
          {"ms_median", ms_median},
          {"floor_ms", floor_ms},
          {"floor_bound", floor_bound},
          {"ratio_to_floor", floor_ms > 0 ? ms_median / floor_ms : 0.0},
          {"tokens_per_expert", load}};
}

}  // namespace moesaic::tool
