// SPDX-License-Identifier: Apache-2.0
#include "tools/checkpoint_flags.h"

#include <fmt/format.h>

#include "harness/cases.h"
#include "scheme.h"

namespace moesaic::tool {

void add_reading(CLI::App& app, CheckpointFlags& flags) {
  app.add_option("--family", flags.family,
                 "read the checkpoint as this model family; generic: any recognizable experts");
  app.add_option("--fused", flags.fused, "generic: fused experts are stored nk, kn, or auto")
      ->check(CLI::IsMember({"auto", "nk", "kn"}));
  app.add_option("--gate-order", flags.gate_order, "generic: gate_first or up_first")
      ->check(CLI::IsMember({"gate_first", "up_first"}));
  app.add_option("--gate-layout", flags.gate_layout, "generic: halves or interleaved")
      ->check(CLI::IsMember({"halves", "interleaved"}));
}

void add_overrides(CLI::App& app, CheckpointFlags& flags) {
  app.add_option("--top-k", flags.top_k, "experts per token, instead of the checkpoint's")
      ->check(whole(1, 1024));
  app.add_option("--routing", flags.routing, "routing method, instead of the checkpoint's");
  app.add_option("--activation", flags.activation, "activation, instead of the checkpoint's");
  app.add_option("--scheme", flags.scheme, "scheme or variant, instead of the checkpoint's");
  app.add_flag("--shared", flags.shared, "with the shared experts");
}

Checkpoint open(const CheckpointFlags& flags) {
  using Fused = CheckpointOptions::FusedLayout;
  const Fused fused = flags.fused == "nk"   ? Fused::kNK
                      : flags.fused == "kn" ? Fused::kKN
                                            : Fused::kAuto;
  Checkpoint checkpoint = Checkpoint::open(
      flags.path,
      {.family = flags.family,
       .fused = fused,
       .gate_order = flags.gate_order == "up_first" ? GateOrder::kUpFirst : GateOrder::kGateFirst,
       .gate_layout =
           flags.gate_layout == "interleaved" ? GateLayout::kInterleaved : GateLayout::kHalves});
  const std::string& family = checkpoint.family();
  if (family == "moesaic" && !flags.family.empty())
    throw UsageError(fmt::format(
        "--family: '{}' is moesaic's own file, which says itself how it is read; leave it out",
        flags.path));
  if (family != "generic")
    for (const auto& [flag, value] : {std::pair{"--fused", &flags.fused},
                                      {"--gate-order", &flags.gate_order},
                                      {"--gate-layout", &flags.gate_layout}})
      if (!value->empty())
        throw UsageError(
            fmt::format("{}: family {} has its own; leave it out{}", flag, family,
                        family == "moesaic" ? "" : ", or read this with --family generic"));
  return checkpoint;
}

LayerOverrides overrides(const CheckpointFlags& flags) {
  LayerOverrides out;
  if (flags.top_k > 0) out.top_k = flags.top_k;
  if (!flags.routing.empty()) out.routing = parse_routing(flags.routing);
  if (!flags.activation.empty()) out.activation = parse_activation(flags.activation);
  if (flags.scheme.find('+') != std::string::npos)
    out.quant = parse_quant(flags.scheme);
  else if (!flags.scheme.empty())
    out.scheme = parse_scheme(flags.scheme);
  if (flags.shared) out.shared = SharedExperts::kOn;
  return out;
}

QuantSpec parse_quant(const std::string& text) { return harness::parse_variant(text).quant; }

std::string shape_text(const CheckpointLayer& layer) {
  std::string text = fmt::format("{} experts, top {}, hidden {}, intermediate {}", layer.experts,
                                 layer.top_k, layer.hidden, layer.intermediate);
  if (layer.shared_experts > 0) text += fmt::format(", {} shared", layer.shared_experts);
  return text;
}

std::string quant_text(const QuantSpec& quant) {
  std::string text(name(quant.scheme));
  const SchemeTraits& t = traits(quant.scheme);
  const WeightScale scale =
      quant.weight_scale == WeightScale::kDefault ? t.default_weight_scale : quant.weight_scale;
  if (scale == WeightScale::kBlock)
    text += fmt::format(", blocks {}x{}", quant.block_n, quant.block_k);
  if (scale == WeightScale::kGroup && quant.scheme != Scheme::kMxfp4W4A16)
    text += quant.group_size > 0 ? fmt::format(", group {}", quant.group_size) : ", one group";
  if (quant.zero_points) text += ", zero points";
  return text;
}

}  // namespace moesaic::tool
