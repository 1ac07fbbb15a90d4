// SPDX-License-Identifier: Apache-2.0
// moesaic inspect: what a checkpoint holds, without loading it.
#include <fmt/format.h>

#include "tools/checkpoint_flags.h"
#include "tools/command.h"

namespace moesaic::tool {
namespace {

void print(const Output& out, const Checkpoint& checkpoint) {
  double bytes = 0;
  for (const CheckpointLayer& layer : checkpoint.layers())
    bytes += static_cast<double>(layer.bytes);
  out.line(fmt::format("{}: {}, {} MoE layer{}, {}", checkpoint.path(), checkpoint.family(),
                       checkpoint.layers().size(), checkpoint.layers().size() == 1 ? "" : "s",
                       bytes_text(bytes)));
  Table table({"layer", "experts", "top_k", "hidden", "intermediate", "shared", "scheme",
               "activation", "routing", "bytes", "stored as"});
  for (const CheckpointLayer& l : checkpoint.layers())
    table.row({fmt::format("{}", l.index), fmt::format("{}", l.experts), fmt::format("{}", l.top_k),
               fmt::format("{}", l.hidden), fmt::format("{}", l.intermediate),
               fmt::format("{}", l.shared_experts), quant_text(l.quant),
               std::string(name(l.activation.kind)) + (l.has_bias ? " + bias" : ""),
               l.has_router ? std::string(name(l.routing.method)) : "no router",
               bytes_text(static_cast<double>(l.bytes)), l.storage});
  table.print(out);
}

nlohmann::json to_json(const Checkpoint& checkpoint) {
  nlohmann::json layers = nlohmann::json::array();
  for (const CheckpointLayer& l : checkpoint.layers())
    layers.push_back({{"layer", l.index},
                      {"name", l.name},
                      {"experts", l.experts},
                      {"top_k", l.top_k},
                      {"hidden", l.hidden},
                      {"intermediate", l.intermediate},
                      {"shared_experts", l.shared_experts},
                      {"shared_intermediate", l.shared_intermediate},
                      {"scheme", name(l.quant.scheme)},
                      {"quantization", quant_text(l.quant)},
                      {"activation", name(l.activation.kind)},
                      {"routing", name(l.routing.method)},
                      {"dtype", name(l.dtype)},
                      {"bias", l.has_bias},
                      {"router", l.has_router},
                      {"bytes", l.bytes},
                      {"storage", l.storage}});
  return {{"path", checkpoint.path()}, {"family", checkpoint.family()}, {"layers", layers}};
}

}  // namespace

Command add_inspect(CLI::App& parent) {
  CLI::App* app = parent.add_subcommand("inspect", "What a checkpoint holds");
  auto common = std::make_shared<Common>();
  auto flags = std::make_shared<CheckpointFlags>();
  app->add_option("checkpoint", flags->path, "a folder, a .safetensors file or an index.json")
      ->required();
  add_reading(*app, *flags);
  add_common(*app, *common);
  return {app, [common, flags] {
            apply(*common);
            const Output out(*common);
            const Checkpoint checkpoint = open(*flags);
            out.keep_off([&](const std::string& path) { return checkpoint.reads(path); });
            print(out, checkpoint);
            out.write_json(to_json(checkpoint));
            return 0;
          }};
}

}  // namespace moesaic::tool
