// SPDX-License-Identifier: Apache-2.0
// moesaic bench: how fast a layer is, and how far from what the machine can do.
#include "harness/bench.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <iterator>
#include <utility>

#include "tools/command.h"

namespace moesaic::tool {
namespace {

struct BenchFlags {
  std::vector<std::string> shapes{"qwen3-30b-a3b"};
  std::string tokens = "1,16,128", scheme = "bf16", format = "standard", route = "ids";
  std::int64_t capacity = 0;
  std::string load = "uniform", activation = "swiglu";
  bool bias = false, experts_only = false;
  std::uint64_t seed = 1;
  double seconds = 0.5;
  std::string tactic1 = "-1", tactic2 = "-1";
};

void print_machine(const Output& out, const harness::BenchMachine& m) {
  out.line(fmt::format("{}: {} [{}]{}", m.backend, m.device, m.kernels,
                       m.threads > 0 ? fmt::format(", {} threads", m.threads) : ""));
  const auto probe = [&](std::string_view what, double before, double after,
                         std::string_view unit) {
    if (before > 0)
      out.line(fmt::format("  {:<14} {:.0f} before, {:.0f} after  {}", what, before, after, unit));
  };
  const bool cpu = m.backend == "cpu";
  probe("memory read", m.before.read_gbytes_s, m.after.read_gbytes_s, "GB/s");
  if (cpu) probe("fp32 FMA", m.before.fma_gflops, m.after.fma_gflops, "GFLOP/s");
  probe(cpu ? "vdpbf16ps" : "bf16 product", m.before.bf16_gflops, m.after.bf16_gflops, "GFLOP/s");
  probe(cpu ? "vpdpbusd" : "fp8 product", m.before.int8_gops, m.after.int8_gops, "GOP/s");
  if (!m.before.note.empty()) out.line("  " + m.before.note);
  if (!m.reference) out.line("  (no ceilings on record for this kind of machine)");
}

// What a bench measures apart from its shape and scheme: lists on the command line, all combined.
struct Terms {
  std::string format, activation, load;
};
std::vector<Terms> terms_of(const BenchFlags& flags) {
  std::vector<Terms> terms;
  for (const std::string& format : split(flags.format))
    for (const std::string& activation : split(flags.activation))
      for (const std::string& load : split(flags.load)) terms.push_back({format, activation, load});
  return terms;
}

// A tactic that a product has; -1: the policy's own choice, also for `each`.
int parse_tactic(std::string_view flag, const std::string& text, const std::vector<Tactic>& known) {
  if (text == "each") return -1;
  int value = 0;
  const char* end = text.data() + text.size();
  const auto [at, error] = std::from_chars(text.data(), end, value);
  const bool there = value == -1 || std::any_of(known.begin(), known.end(),
                                                [&](const Tactic& t) { return t.id == value; });
  if (error != std::errc{} || at != end || !there)
    throw UsageError(fmt::format(
        "{}: expected the number of a tactic from 0 to {}, -1 for the policy's choice, or each, "
        "got '{}'",
        flag, static_cast<std::ptrdiff_t>(known.size()) - 1, text));
  return value;
}

// The policy's own choice first, as what the others are held against, and last; in between every
// tactic of the products of which all are wanted, the other product's at its own.
std::vector<TacticPair> tactic_pairs(const BenchFlags& flags, const harness::Shape& shape,
                                     const harness::Variant& variant, Device device) {
  if (flags.tactic1 == "-1" && flags.tactic2 == "-1") return {TacticPair{}};
  LayerConfig config{.experts = 1,  // tactics are a product's: its rows, columns and scheme
                     .hidden = shape.hidden,
                     .intermediate = shape.intermediate,
                     .top_k = 1,
                     .max_tokens = 1};
  config.quant = variant.quant;
  config.input_dtype = variant.input;
  config.output_dtype = variant.output;
  const Layer layer(config, device);
  const TacticPair given{.gemm1 = parse_tactic("--tactic1", flags.tactic1, layer.tactics_gemm1()),
                         .gemm2 = parse_tactic("--tactic2", flags.tactic2, layer.tactics_gemm2())};
  std::vector<TacticPair> pairs{given};
  if (flags.tactic1 != "each" && flags.tactic2 != "each") return pairs;
  if (flags.tactic1 == "each")
    for (const Tactic& t : layer.tactics_gemm1())
      pairs.push_back({.gemm1 = t.id, .gemm2 = given.gemm2});
  if (flags.tactic2 == "each")
    for (const Tactic& t : layer.tactics_gemm2())
      pairs.push_back({.gemm1 = given.gemm1, .gemm2 = t.id});
  pairs.push_back(given);
  return pairs;
}

harness::BenchResult measure(const BenchFlags& flags, Device device) {
  harness::BenchResult all;
  Progress progress;
  const std::vector<std::int64_t> tokens = parse_counts("--tokens", flags.tokens);
  if (*std::min_element(tokens.begin(), tokens.end()) < 1)
    throw UsageError("--tokens: 0 tokens take no time; give counts from 1 on");
  if (flags.route != "ids" && flags.route != "logits")
    throw UsageError("--route: expected ids or logits, got '" + flags.route + "'");
  const std::vector<std::string> formats = split(flags.format);
  if (flags.capacity > 0 &&
      std::find(formats.begin(), formats.end(), name(Format::kBatched)) == formats.end())
    throw UsageError(
        fmt::format("--capacity: the batched format alone has one, got --format {}; take --format "
                    "batched, or leave --capacity out",
                    flags.format));
  std::vector<harness::Shape> shapes;
  for (const std::string& text : flags.shapes) shapes.push_back(harness::parse_shape(text));
  for (const std::string& scheme : split(flags.scheme))
    for (const harness::Shape& shape : shapes)
      for (const auto& [format, activation, load] : terms_of(flags)) {
        const std::string label = fmt::format("{} {} {} {}: ", shape.name, scheme, format, load);
        const harness::Variant variant = harness::parse_variant(scheme);
        harness::BenchResult part = harness::bench(
            {.shape = shape,
             .tokens = tokens,
             .variant = variant,
             .format = parse_format(format),
             .experts_only = flags.experts_only,
             .source = flags.route == "logits" ? harness::RoutingSource::kLogits
                                               : harness::RoutingSource::kIds,
             .capacity = flags.capacity,
             .activation = {.kind = parse_activation(activation)},
             .bias = flags.bias ? harness::Biases::kAll : harness::Biases::kNone,
             .load = harness::parse_load(load),
             .device = device,
             .seed = flags.seed,
             .seconds = flags.seconds,
             .tactics = tactic_pairs(flags, shape, variant, device),
             .process_start = process_start()},
            [&](std::string_view what) { progress.show(label + std::string(what)); });
        if (all.rows.empty()) {
          all = std::move(part);
          continue;
        }
        all.machine.after = part.machine.after;
        if (all.machine.invalid.empty()) all.machine.invalid = part.machine.invalid;
        std::move(part.rows.begin(), part.rows.end(), std::back_inserter(all.rows));
      }
  return all;
}

int run_bench(const BenchFlags& flags, const Common& common) {
  const Device device = apply(common);
  const Output out(common);
  const harness::BenchResult all = measure(flags, device);
  print_machine(out, all.machine);
  out.line("");
  std::vector<std::string> header{"shape",  "scheme",  "format",  "load",    "tokens",
                                  "active", "weights", "median",  "min",     "max",
                                  "floor",  "by",      "x floor", "of roof", "GFLOP/s",
                                  "GB/s",   "host us", "MHz",     ""};
  const bool tactics = flags.tactic1 != "-1" || flags.tactic2 != "-1";
  constexpr std::ptrdiff_t kTactics = 5;  // the columns' place: behind the tokens
  if (tactics) header.insert(header.begin() + kTactics, {"tactic1", "tactic2"});
  const auto tactic = [](int id) { return id < 0 ? std::string("own") : fmt::format("{}", id); };
  Table table(std::move(header));
  std::string invalid = all.machine.invalid;
  for (const harness::BenchRow& r : all.rows) {
    std::vector<std::string> cells{r.shape,
                                   r.variant,
                                   r.experts_only ? r.format + " experts" : r.format,
                                   r.source == "ids" ? r.load : r.source,
                                   fmt::format("{}", r.tokens),
                                   fmt::format("{:.1f}", r.active_experts),
                                   bytes_text(r.weight_bytes),
                                   time_text(r.ms_median),
                                   time_text(r.ms_min),
                                   time_text(r.ms_max),
                                   time_text(r.floor_ms),
                                   r.floor_bound,
                                   fmt::format("{:.2f}", r.ratio_to_floor),
                                   fmt::format("{:.2f}", r.fraction_of_roof),
                                   fmt::format("{:.0f}", r.gflops),
                                   fmt::format("{:.1f}", r.gbytes_s),
                                   r.host_us > 0 ? fmt::format("{:.1f}", r.host_us) : "",
                                   r.clock_mhz > 0 ? fmt::format("{:.0f}", r.clock_mhz) : "",
                                   r.invalid.empty() ? "" : "INVALID"};
    if (tactics)
      cells.insert(cells.begin() + kTactics, {tactic(r.tactics.gemm1), tactic(r.tactics.gemm2)});
    table.row(std::move(cells));
    if (invalid.empty()) invalid = r.invalid;
  }
  table.print(out);
  out.line(fmt::format(
      "main to the first finished forward, without probes, weights and inputs: {}, of which that "
      "forward {}{}",
      time_text(all.machine.start_ms), time_text(all.machine.first_forward_ms),
      all.machine.context_ms > 0
          ? ", beyond " + time_text(all.machine.context_ms) + " until the device was ready"
          : ""));
  if (!invalid.empty()) out.line("INVALID: " + invalid + "; the machine was busy, measure again");
  out.write_json(harness::to_json(all));
  return 0;
}

}  // namespace

Command add_bench(CLI::App& parent) {
  CLI::App* app = parent.add_subcommand("bench", "Time a layer against the machine's roof");
  auto common = std::make_shared<Common>();
  auto flags = std::make_shared<BenchFlags>();
  app->add_option("--shape", flags->shapes, "names or E,H,I,k; several apart by blanks")
      ->capture_default_str();
  app->add_option("--tokens", flags->tokens, "token counts")->capture_default_str();
  app->add_option("--scheme", flags->scheme, "schemes, or variants such as int4_w4a16+g64+zp")
      ->capture_default_str();
  app->add_option("--format", flags->format, "standard, sorted, batched")->capture_default_str();
  app->add_flag("--experts-only", flags->experts_only,
                "sorted, batched: their stage `experts` alone");
  app->add_option("--load", flags->load, "uniform, zipf, one, holes, duplicates, remote")
      ->capture_default_str();
  app->add_option("--route", flags->route, "ids: routing is given; logits: the layer routes")
      ->capture_default_str();
  app->add_option("--capacity", flags->capacity, "batched: rows per expert, 0: as many as needed")
      ->capture_default_str()
      ->check(whole(0, kMaxCount));
  app->add_option("--activation", flags->activation, "names of activations")->capture_default_str();
  app->add_flag("--bias", flags->bias, "with biases");
  add_seed(*app, flags->seed, "of weights, tokens and routing");
  app->add_option("--seconds", flags->seconds, "time to measure per row")
      ->capture_default_str()
      ->check(real(0, 600));
  app->add_option("--tactic1", flags->tactic1,
                  "number of a tactic of the first product; -1: its own choice; each: all in turn")
      ->capture_default_str();
  app->add_option("--tactic2", flags->tactic2, "the same for the second product")
      ->capture_default_str();
  add_common(*app, *common);
  return {app, [common, flags] { return run_bench(*flags, *common); }};
}

}  // namespace moesaic::tool
