// SPDX-License-Identifier: Apache-2.0
// Which MoE layers a model's files hold. Layers are found by their tensors' names, not by counting
// config.json's: dense first layers, every-other-layer models and extra prediction layers then need
// no rule of their own.
#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <map>
#include <set>

#include "check.h"
#include "checkpoint/files.h"
#include "checkpoint/layer_source.h"
#include "checkpoint/slice.h"

namespace moesaic {
namespace {

constexpr std::string_view kExperts = ".experts.";
constexpr std::int64_t kMaxExperts = 65536;

// A whole non-negative number of at most nine digits.
std::optional<std::int64_t> number(std::string_view text) {
  std::int64_t value = 0;
  if (text.empty() || text.size() > 9) return {};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < 0) return {};
  return value;
}

std::string_view last_component(std::string_view path) {
  const std::size_t dot = path.rfind('.');
  return dot == std::string_view::npos ? path : path.substr(dot + 1);
}

// The model's layer number: the last component that is a number.
std::optional<std::int64_t> layer_number(std::string_view path) {
  while (!path.empty()) {
    const std::string_view last = last_component(path);
    if (const auto n = number(last)) return n;
    path.remove_suffix(std::min(path.size(), last.size() + 1));
  }
  return {};
}

// What was seen below one block's ".experts.".
struct Block {
  std::set<std::int64_t> numbers;
  std::set<std::string> projections;
  bool fused = false;
};

void see(std::string_view rest, Block& block) {
  const std::size_t dot = rest.find('.');
  if (const auto n = number(rest.substr(0, dot)); n && dot != std::string_view::npos) {
    block.numbers.insert(*n);
    const std::string_view after = rest.substr(dot + 1);
    block.projections.insert(std::string(after.substr(0, after.find('.'))));
    return;
  }
  // "gate_up_proj", "gate_up_proj_blocks", "gate_up_proj.weight" ...
  for (const std::string_view name : {"gate_up_proj", "down_proj"}) {
    if (!rest.starts_with(name)) continue;
    block.fused = true;
    block.projections.insert(std::string(name));
  }
}

// The names of the three projections, where all of them are there.
bool name_projections(const std::set<std::string>& seen, ExpertNames& names) {
  static constexpr std::string_view kGated[][3] = {{"gate_proj", "up_proj", "down_proj"},
                                                   {"w1", "w3", "w2"}};
  static constexpr std::string_view kPlain[][2] = {
      {"gate_up_proj", "down_proj"}, {"up_proj", "down_proj"}, {"fc1", "fc2"}, {"w1", "w2"}};
  const auto has = [&](std::string_view name) { return seen.count(std::string(name)) > 0; };
  for (const auto& [gate, up, down] : kGated) {
    if (!has(gate) || !has(up) || !has(down)) continue;
    names.fc1 = {std::string(gate), std::string(up)};
    names.fc2 = down;
    return true;
  }
  for (const auto& [up, down] : kPlain) {
    if (!has(up) || !has(down)) continue;
    names.fc1 = {std::string(up)};
    names.fc2 = down;
    return true;
  }
  return false;
}

std::string first_there(const TensorFile& files, const std::string& prefix,
                        std::initializer_list<std::string_view> names) {
  for (const std::string_view name : names) {
    std::string full = prefix + std::string(name);
    if (files.find(full) != nullptr) return full;
  }
  return {};
}

void expect_shape(const TensorFile& files, const std::string& name, std::int64_t numel,
                  std::optional<std::int64_t> rows) {
  Arena arena;
  const Tensor t = read_floats(files, name, arena);
  const bool ok =
      is_float(t.dtype) && t.numel() == numel && (!rows || (t.rank == 2 && t.shape[0] == *rows));
  if (!ok)
    corrupt(fmt::format("tensor {}: expected {} floats{}, got {}", show_name(name), numel,
                        rows ? fmt::format(" in {} rows", *rows) : std::string(), to_string(t)));
}

void find_router(const TensorFile& files, const std::string& block, LayerSource& source) {
  RouterNames& r = source.router;
  const std::int64_t experts = source.layer.experts;
  r.weight = first_there(files, block, {"gate.weight", "router.weight", "gate.wg.weight"});
  r.bias = first_there(files, block, {"router.bias", "gate.bias"});
  r.selection_bias =
      first_there(files, block,
                  {"gate.e_score_correction_bias", "moe_statics.e_score_correction_bias",
                   "gate.moe_statics.e_score_correction_bias", "e_score_correction_bias"});
  if (!r.weight.empty()) expect_shape(files, r.weight, experts * source.layer.hidden, experts);
  if (!r.bias.empty()) expect_shape(files, r.bias, experts, {});
  if (!r.selection_bias.empty()) expect_shape(files, r.selection_bias, experts, {});
  source.layer.has_router = !r.weight.empty();
  // DeepSeek-V4's first layers: a table from token ids to experts.
  if (const std::string table = first_there(files, block, {"gate.tid2eid"}); !table.empty())
    source.model.routing_refusal = fmt::format(
        "layer {}: is hash-routed ({} chooses experts by token id, which a layer does not see); "
        "look "
        "the experts up outside, pass topk_ids and topk_weights, and name the routing (--routing)",
        show_name(source.layer.name), show_name(table));
}

void find_shared(const TensorFile& files, const std::string& block, const ModelConfig& config,
                 const QuantizationConfig& quantization, LayerSource& source) {
  ExpertNames names{.prefix = {}, .shape = ExpertNames::Shape::kSingle, .fc1 = {}, .fc2 = {}};
  for (const std::string_view what : {"shared_expert.", "shared_experts."}) {
    names.prefix = block + std::string(what);
    std::set<std::string> seen;
    for (const std::string_view p : {"gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}) {
      const std::string base = names.prefix + std::string(p);
      if (files.find(base + ".weight") || files.find(base + ".weight_packed") ||
          files.find(base + ".qweight"))
        seen.insert(std::string(p));
    }
    if (!name_projections(seen, names)) continue;
    source.shared = detect_layout(files, names, CheckpointOptions::FusedLayout::kNK, quantization);
    if (source.shared->hidden != source.layer.hidden ||
        source.shared->gated != source.experts.gated)
      corrupt(names.prefix + ": the shared experts do not fit the routed ones");
    source.layer.shared_intermediate = source.shared->intermediate;
    for (const std::string_view key : {"n_shared_experts", "moe_num_shared_experts"})
      if (const auto n = config.integer(key); n && *n > 0 && *n <= kMaxExperts)
        source.layer.shared_experts = *n;
    if (source.layer.shared_experts == 0) source.layer.shared_experts = 1;
    source.shared_gate = first_there(files, block, {"shared_expert_gate.weight"});
    if (!source.shared_gate.empty())
      expect_shape(files, source.shared_gate, source.layer.hidden, {});
    source.layer.has_shared_gate = !source.shared_gate.empty();
    return;
  }
}

// Everything that config.json says of the experts, under each of the names that families have for it.
void check_against_config(const ModelConfig& config, const Family& family, const std::string& block,
                          const StoredLayout& experts) {
  // A list has a value for each layer, and counts layers as its family does: not compared.
  const auto integer = [&](std::string_view key) -> std::optional<std::int64_t> {
    const nlohmann::json* value = config.find(key);
    if (value != nullptr && value->is_array()) return {};
    return config.integer(key);
  };
  for (const std::string_view key :
       {"num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"})
    if (const auto said = integer(key); said && *said != experts.names.experts)
      corrupt(fmt::format("{}: {} is {}, but {} has {} experts; a shard may be missing",
                          config.file(), key, *said, show_name(block), experts.names.experts));
  // `generic` is for models of which nobody knows what these keys mean: experts may be narrower than
  // the model. Where experts have no key of their own, `intermediate_size` may be the dense layers'.
  if (family.name == "generic") return;
  for (const auto& [key, have] :
       {std::pair<std::string_view, std::int64_t>{"hidden_size", experts.hidden},
        {"moe_intermediate_size", experts.intermediate}})
    if (const auto said = integer(key); said && *said != have)
      corrupt(fmt::format("{}: {} is {}, but the experts of {} have {}; one of the files may be "
                          "another model's",
                          config.file(), key, *said, show_name(block), have));
}

LayerSource make_layer(const TensorFile& files, const std::string& path, const Block& seen,
                       const Family& family, const ModelConfig& config,
                       const CheckpointOptions& options) {
  const bool generic = family.name == "generic";
  LayerSource source;
  ExpertNames names{.prefix = path + std::string(kExperts), .fc1 = {}, .fc2 = {}};
  if (!name_projections(seen.projections, names))
    unsupported(fmt::format(
        "{}: the experts' tensors have names that are not known; known: gate_proj/up_proj/"
        "down_proj, w1/w3/w2, gate_up_proj/down_proj, up_proj/down_proj",
        show_name(path)));
  if (seen.fused) {
    names.shape = ExpertNames::Shape::kFused;
    const StoredTensor* first = nullptr;
    for (const std::string_view suffix : {"", "_blocks", ".weight"})
      if (first == nullptr) first = files.find(names.prefix + names.fc2 + std::string(suffix));
    if (first == nullptr || first->shape.empty() || first->shape[0] < 1 ||
        first->shape[0] > kMaxExperts)
      corrupt(fmt::format("{}: fused experts without a weight of experts x rows x columns",
                          show_name(path)));
    names.experts = first->shape[0];
  } else {
    names.experts = static_cast<std::int64_t>(seen.numbers.size());
    if (*seen.numbers.rbegin() != names.experts - 1)
      corrupt(fmt::format(
          "{}: experts are numbered up to {}, and only {} are there; a shard may be missing",
          show_name(path), *seen.numbers.rbegin(), names.experts));
    if (names.experts > kMaxExperts)
      unsupported(
          fmt::format("{}: {} experts, at most {}", show_name(path), names.experts, kMaxExperts));
  }
  const QuantizationConfig quantization = read_quantization(config);
  source.experts =
      detect_layout(files, names, generic ? options.fused : family.fused, quantization);
  check_against_config(config, family, path, source.experts);
  source.refusal = source.experts.refusal;
  source.model = describe(family, config);

  CheckpointLayer& layer = source.layer;
  layer.name = path;
  layer.storage = source.experts.description;
  layer.experts = names.experts;
  layer.hidden = source.experts.hidden;
  layer.intermediate = source.experts.intermediate;
  layer.top_k = source.model.top_k;
  if (layer.top_k > layer.experts)
    corrupt(
        fmt::format("{}: {} experts per token of {}", config.file(), layer.top_k, layer.experts));
  layer.quant = source.experts.advertised;
  layer.activation = source.model.activation;
  layer.routing = source.model.routing;
  layer.weight_on = family.weight_on;
  layer.has_bias = source.experts.has_bias;
  if (names.fc1[0] == "gate_up_proj") {
    layer.activation.layout = generic ? options.gate_layout : family.fused_layout;
    layer.activation.order = generic ? options.gate_order : GateOrder::kGateFirst;
  }
  if (!source.experts.gated && !generic)
    unsupported(fmt::format(
        "{}: the experts have no gate projection; read it with --family generic", show_name(path)));

  const std::string block = path + ".";
  find_router(files, block, source);
  find_shared(files, block, config, quantization, source);
  const Scheme stored = source.experts.numbers.scheme;
  layer.dtype = source.model.dtype.value_or(stored == Scheme::kF16   ? DType::kF16
                                            : stored == Scheme::kF32 ? DType::kF32
                                                                     : DType::kBF16);
  const auto all = files.tensors();  // sorted by name: those of one block are neighbours
  auto t = std::lower_bound(all.begin(), all.end(), block,
                            [](const StoredTensor& a, const std::string& b) { return a.name < b; });
  for (; t != all.end() && t->name.starts_with(block); ++t) layer.bytes += t->bytes;
  return source;
}

}  // namespace

std::vector<LayerSource> find_layers(const TensorFile& files, const Family& family,
                                     const ModelConfig& config, const CheckpointOptions& options) {
  std::map<std::string, Block, std::less<>> blocks;
  for (const StoredTensor& t : files.tensors()) {
    const std::string_view name = t.name;
    const std::size_t at = name.find(kExperts);
    if (at == std::string_view::npos) continue;
    const std::string_view path = name.substr(0, at);
    const bool known =
        family.blocks.empty() || std::find(family.blocks.begin(), family.blocks.end(),
                                           last_component(path)) != family.blocks.end();
    if (!known || !layer_number(path)) continue;
    auto it = blocks.find(path);
    if (it == blocks.end()) it = blocks.emplace(std::string(path), Block{}).first;
    see(name.substr(at + kExperts.size()), it->second);
  }
  std::vector<LayerSource> layers;
  for (const auto& [path, block] : blocks) {
    if (block.numbers.empty() && !block.fused) continue;
    layers.push_back(make_layer(files, path, block, family, config, options));
    layers.back().layer.index = *layer_number(path);
  }
  if (layers.empty())
    unsupported(fmt::format(
        "{}: no tensors of experts as family {} names them; see docs/checkpoints.md, or read it "
        "with --family generic",
        config.file(), family.name));
  std::sort(layers.begin(), layers.end(), [](const LayerSource& a, const LayerSource& b) {
    return a.layer.index < b.layer.index;
  });
  for (std::size_t i = 1; i < layers.size(); ++i)
    if (layers[i].layer.index == layers[i - 1].layer.index)
      unsupported(fmt::format(
          "{} and {} are both layer {}: this model has two stacks of experts, which is not read",
          show_name(layers[i - 1].layer.name), show_name(layers[i].layer.name),
          layers[i].layer.index));
  return layers;
}

}  // namespace moesaic
