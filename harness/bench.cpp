// SPDX-License-Identifier: Apache-2.0
#include "harness/bench.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <deque>
#include <memory>

#include "backend.h"
#include "check.h"
#include "harness/bench_routing.h"
#include "harness/formats.h"
#include "harness/stopwatch.h"

namespace moesaic::harness {
namespace {

LayerConfig config_of(const BenchSpec& spec) {
  LayerConfig c;
  c.experts = spec.shape.experts;
  c.hidden = spec.shape.hidden;
  c.intermediate = spec.shape.intermediate;
  c.top_k = spec.shape.top_k;
  c.max_tokens = *std::max_element(spec.tokens.begin(), spec.tokens.end());
  c.quant = spec.variant.quant;
  c.activation = spec.activation;
  c.input_dtype = spec.variant.input;
  c.output_dtype = spec.variant.output;
  return c;
}

Layer loaded_layer(const LayerConfig& config, const BenchSpec& spec, std::uint64_t set) {
  Layer layer(config, spec.device);
  const WeightOptions options{.seed = mix(spec.seed, set),
                              .bias = spec.bias,
                              .tensor_scales = spec.variant.tensor_scales,
                              .static_scales = spec.variant.static_scales,
                              .extras = spec.variant.extras,
                              .fill = Fill::kFast};
  // Two experts' numbers in turn: each expert has its own place in memory, which is what a timing
  // needs, and drawing all of them on the host would take longer than everything else together.
  const std::int64_t distinct = std::min<std::int64_t>(2, config.experts);
  std::deque<WeightData> drawn;
  std::deque<DeviceWeights> there;
  for (std::int64_t e = 0; e < distinct; ++e) {
    drawn.push_back(make_experts(config, options, e, 1));
    if (spec.device.type == DeviceType::kCuda)
      there.push_back(to_device(drawn.back().weights, spec.device));
  }
  for (std::int64_t e = 0; e < config.experts; ++e) {
    const auto from = static_cast<std::size_t>(e % distinct);
    layer.load_expert(e, there.empty() ? drawn[from].weights : there[from].weights);
  }
  return layer;
}

double ms_since(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin)
      .count();
}

double median(std::vector<double> samples) {
  std::sort(samples.begin(), samples.end());
  const std::size_t n = samples.size();
  return n % 2 ? samples[n / 2] : 0.5 * (samples[n / 2 - 1] + samples[n / 2]);
}

class Bench {
 public:
  Bench(const BenchSpec& spec, const BenchProgress& progress)
      : spec_(spec), progress_(progress), config_(config_of(spec)) {}

  BenchResult run() {
    const Support support = supports(config_, spec_.format, spec_.device);
    if (!support.supported) throw Error(ErrorCode::kUnsupported, support.reason);
    if (spec_.source == RoutingSource::kLogits && spec_.format != Format::kStandard)
      invalid(
          "--route: logits are for the standard format, which alone routes inside the layer; take "
          "--format standard, or --route ids");
    if (spec_.experts_only && spec_.format == Format::kStandard)
      invalid("--experts-only: the standard format is one call; take --format sorted or batched");
    say("probing the machine");
    BenchMachine& m = result_.machine;
    m.start_ms = ms_since(spec_.process_start);
    watch_ = make_stopwatch(spec_.device);  // the context
    const DeviceInfo info = backend(spec_.device).info();
    m.backend = spec_.device.type == DeviceType::kCpu ? "cpu" : "cuda";
    m.device = info.name;
    m.kernels = info.kernels;
    m.threads = spec_.device.type == DeviceType::kCpu ? num_threads() : 0;
    m.context_ms = watch_->context_ms();
    m.before = watch_->products();
    m.before.read_gbytes_s = watch_->read_gbytes_s();
    m.reference =
        spec_.device.type == DeviceType::kCpu ? reference_cpu(m.threads) : reference_gpu(info.name);
    load_sets();
    for (const std::int64_t tokens : spec_.tokens) add_rows(tokens);
    m.after = watch_->products();
    m.after.read_gbytes_s = watch_->read_gbytes_s();
    judge(&result_, spec_.device.type);
    return std::move(result_);
  }

 private:
  void say(const std::string& what) {
    if (progress_) progress_(what);
  }

  // As many copies of the layer as make eight times the last-level cache: in a model, too, every
  // layer brings its own weights.
  void load_sets() {
    const double layer_bytes =
        expert_bytes(config_, spec_.bias) * static_cast<double>(config_.experts);
    const double wanted = 8.0 * static_cast<double>(watch_->cache_bytes());
    const int sets = std::clamp(static_cast<int>(std::ceil(wanted / layer_bytes)), 1, 16);
    for (int s = 0; s < sets; ++s) {
      say(fmt::format("loading weights, set {} of {}", s + 1, sets));
      layers_.push_back(loaded_layer(config_, spec_, static_cast<std::uint64_t>(s)));
    }
  }

  void add_rows(std::int64_t tokens) {
    say(fmt::format("{} tokens", tokens));
    const double expected_ms =
        6.0 * static_cast<double>(tokens * config_.top_k * config_.hidden) *
        static_cast<double>(config_.intermediate) /
        product_rate(result_.machine.before, config_.quant.scheme, spec_.device.type) * 1e-6;
    const auto count = static_cast<std::size_t>(std::max<std::int64_t>(
        watch_->calls_wanted(expected_ms), static_cast<std::int64_t>(layers_.size())));
    std::vector<Routing> routings;
    std::int64_t busiest = 1;
    double active = 0;
    for (std::size_t r = 0; r < count; ++r) {
      routings.push_back(make_routing(config_, spec_, tokens, static_cast<int>(r)));
      busiest = std::max(busiest, routings.back().busiest);
      active += routings.back().active / static_cast<double>(count);
    }
    // A layer's runs share one set of buffers, as they would in a program; but the lists of a stage
    // that is timed alone are each routing's own.
    std::deque<FormatRunner> runners;
    for (std::size_t r = 0; r < (spec_.experts_only ? count : layers_.size()); ++r)
      runners.emplace_back(layers_[r % layers_.size()], spec_.format, tokens,
                           spec_.capacity > 0 ? spec_.capacity : busiest);
    const Batch batch = make_batch(config_, batch_of(spec_, tokens, 0));
    const DeviceTensor hidden = DeviceTensor::from(batch.hidden_states, spec_.device);
    const DeviceTensor scale = DeviceTensor::from(batch.hidden_scale, spec_.device);
    const DeviceTensor output(spec_.device, config_.output_dtype, {tokens, config_.hidden});
    bool prepared = false;
    std::vector<std::function<void(Stream)>> calls;
    for (std::size_t r = 0; r < count; ++r)
      calls.push_back(
          [&, &runner = runners[r % runners.size()], &routing = routings[r]](Stream stream) {
            const FormatInputs in{.hidden_states = hidden.view(),
                                  .hidden_scale = scale.view(),
                                  .topk_ids = routing.ids.view(),
                                  .topk_weights = routing.weights.view(),
                                  .router_logits = routing.logits.view(),
                                  .output = output.view()};
            if (prepared) return runner.products(in, stream);
            runner.run(in, stream);
          });
    if (result_.machine.first_forward_ms == 0) {
      const auto begin = std::chrono::steady_clock::now();
      calls[0]({});
      output.to_host();  // waits for the device
      result_.machine.first_forward_ms = ms_since(begin);
      result_.machine.start_ms += result_.machine.first_forward_ms;
    }
    if (spec_.experts_only) {
      for (const auto& call : calls) call({});
      output.to_host();
      prepared = true;
    }
    double read_before = watch_->read_gbytes_s(), worth_ms = 0;
    for (const TacticPair& pair : spec_.tactics) {
      for (Layer& layer : layers_) layer.set_tactics(pair);
      const std::vector<double> samples =
          watch_->sample_ms(calls, {.seconds = spec_.seconds, .worth_ms = worth_ms});
      const double read_after = watch_->read_gbytes_s();
      BenchRow done = finished_row(tokens, active, samples, 0.5 * (read_before + read_after));
      done.tactics = pair;
      done.clock_mhz = watch_->clock_mhz();
      if (tokens <= 16 && worth_ms == 0) done.host_us = watch_->host_us(calls[0]);
      if (worth_ms == 0) worth_ms = 2 * done.ms_median;
      read_before = read_after;
      result_.rows.push_back(std::move(done));
    }
  }

  BenchRow finished_row(std::int64_t tokens, double active, const std::vector<double>& samples,
                        double read_rate) const {
    const BenchMachine& m = result_.machine;
    BenchRow r;
    r.backend = m.backend;
    r.device = m.device;
    r.scheme = name(config_.quant.scheme);
    r.variant = spec_.variant.name;
    r.format = name(spec_.format);
    r.source = spec_.source == RoutingSource::kLogits ? "logits" : "ids";
    r.shape = spec_.shape.name;
    r.load = name(spec_.load);
    r.activation = name(config_.activation.kind);
    r.bias = spec_.bias == Biases::kAll;
    r.experts_only = spec_.experts_only;
    r.experts = config_.experts;
    r.hidden = config_.hidden;
    r.intermediate = config_.intermediate;
    r.top_k = config_.top_k;
    r.tokens = tokens;
    r.runs = static_cast<int>(samples.size());
    r.ms_median = median(samples);
    r.ms_min = *std::min_element(samples.begin(), samples.end());
    r.ms_max = *std::max_element(samples.begin(), samples.end());
    r.active_experts = active;
    r.read_gbytes_s = read_rate;
    r.product_gops = product_rate(m.before, config_.quant.scheme, spec_.device.type);
    const Floor floor = layer_floor(config_, spec_.bias,
                                    {.tokens = tokens,
                                     .active_experts = active,
                                     .read_gbytes_s = read_rate,
                                     .product_rate = r.product_gops});
    r.weight_bytes = floor.weight_bytes;
    r.floor_ms = floor.ms;
    r.floor_bound = floor.bound;
    r.ratio_to_floor = r.floor_ms > 0 ? r.ms_median / r.floor_ms : 0;
    r.fraction_of_roof = r.ms_median > 0 ? r.floor_ms / r.ms_median : 0;
    r.gflops = floor.operations / r.ms_median * 1e-6;
    r.gbytes_s = r.weight_bytes / r.ms_median * 1e-6;
    return r;
  }

  const BenchSpec& spec_;
  const BenchProgress& progress_;
  LayerConfig config_;
  std::unique_ptr<Stopwatch> watch_;
  std::deque<Layer> layers_;
  BenchResult result_;
};

nlohmann::json to_json(const Roof& roof) {
  nlohmann::json out{{"read_gbytes_s", roof.read_gbytes_s},
                     {"fma_gflops", roof.fma_gflops},
                     {"bf16_gflops", roof.bf16_gflops},
                     {"int8_gops", roof.int8_gops}};
  if (!roof.note.empty()) out["note"] = roof.note;
  return out;
}

double product_bytes(const WeightSpec& s, Biases bias) {
  const double cells = static_cast<double>(s.scale.grid_n) * static_cast<double>(s.scale.grid_k);
  double bytes = static_cast<double>(s.n) * static_cast<double>(s.row_bytes());
  if (s.scale.has_scale) bytes += cells * (s.e8m0_scales ? 1 : 4);
  if (s.zero_points) bytes += cells * (s.format == WeightFormat::kU4 ? 0.5 : 1);
  if (bias == Biases::kAll) bytes += 4.0 * static_cast<double>(s.n);
  return bytes;
}

}  // namespace

double expert_bytes(const LayerConfig& config, Biases bias) {
  return product_bytes(weight_spec(config, Product::kFc1), bias) +
         product_bytes(weight_spec(config, Product::kFc2), bias);
}

Floor layer_floor(const LayerConfig& config, Biases bias, const FloorInputs& in) {
  Floor floor;
  floor.weight_bytes = in.active_experts * expert_bytes(config, bias);
  const double matrices = is_gated(config.activation.kind) ? 3 : 2;
  floor.operations = 2 * matrices * static_cast<double>(in.tokens) *
                     static_cast<double>(config.top_k) * static_cast<double>(config.hidden) *
                     static_cast<double>(config.intermediate);
  const double bytes_ms = floor.weight_bytes / in.read_gbytes_s * 1e-6;
  const double product_ms = floor.operations / in.product_rate * 1e-6;
  floor.ms = std::max(bytes_ms, product_ms);
  floor.bound = bytes_ms >= product_ms ? "bytes" : "operations";
  return floor;
}

void judge(BenchResult* result, DeviceType type) {
  BenchMachine& m = result->machine;
  std::string product = low_product(m.before, m.reference, type);
  if (product.empty()) product = low_product(m.after, m.reference, type);
  for (BenchRow& row : result->rows) {
    row.invalid = low_read(row.read_gbytes_s, m.reference);
    if (row.invalid.empty()) row.invalid = product;
  }
  m.invalid = low_read(m.before.read_gbytes_s, m.reference);
  if (m.invalid.empty()) m.invalid = low_read(m.after.read_gbytes_s, m.reference);
  if (m.invalid.empty()) m.invalid = product;
}

nlohmann::json to_json(const BenchResult& result) {
  const BenchMachine& m = result.machine;
  nlohmann::json machine{{"backend", m.backend},
                         {"device", m.device},
                         {"kernels", m.kernels},
                         {"threads", m.threads},
                         {"context_ms", m.context_ms},
                         {"start_ms", m.start_ms},
                         {"first_forward_ms", m.first_forward_ms},
                         {"probes", {{"before", to_json(m.before)}, {"after", to_json(m.after)}}},
                         {"valid", m.invalid.empty()},
                         {"invalid_reason", m.invalid}};
  if (m.reference) machine["probes"]["reference"] = to_json(*m.reference);
  nlohmann::json rows = nlohmann::json::array();
  for (const BenchRow& r : result.rows)
    rows.push_back({{"backend", r.backend},
                    {"device", r.device},
                    {"scheme", r.scheme},
                    {"variant", r.variant},
                    {"format", r.format},
                    {"shape", r.shape},
                    {"experts", r.experts},
                    {"hidden", r.hidden},
                    {"intermediate", r.intermediate},
                    {"top_k", r.top_k},
                    {"tokens", r.tokens},
                    {"load", r.load},
                    {"source", r.source},
                    {"activation", r.activation},
                    {"bias", r.bias},
                    {"experts_only", r.experts_only},
                    {"ms_median", r.ms_median},
                    {"ms_min", r.ms_min},
                    {"ms_max", r.ms_max},
                    {"runs", r.runs},
                    {"active_experts", r.active_experts},
                    {"weight_bytes", r.weight_bytes},
                    {"floor_ms", r.floor_ms},
                    {"floor_bound", r.floor_bound},
                    {"ratio_to_floor", r.ratio_to_floor},
                    {"fraction_of_roof", r.fraction_of_roof},
                    {"gflops", r.gflops},
                    {"gbytes_s", r.gbytes_s},
                    {"read_gbytes_s", r.read_gbytes_s},
                    {"product_gops", r.product_gops},
                    {"host_us", r.host_us},
                    {"clock_mhz", r.clock_mhz},
                    {"tactic1", r.tactics.gemm1},
                    {"tactic2", r.tactics.gemm2},
                    {"valid", r.invalid.empty()},
                    {"invalid_reason", r.invalid}});
  return {{"machine", machine}, {"rows", rows}};
}

BenchResult bench(const BenchSpec& spec, const BenchProgress& progress) {
  return Bench(spec, progress).run();
}

}  // namespace moesaic::harness
