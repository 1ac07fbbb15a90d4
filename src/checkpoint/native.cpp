// SPDX-License-Identifier: Apache-2.0
// This library's own layout, written by quantize_layer: one layer in one safetensors file. Tensors
// are GemmWeights member by member, `experts.E.fc1.weight` and so on, so that loading is all views;
// the metadata entry "moesaic" describes the layer in JSON.
#include "checkpoint/native.h"

#include <fmt/format.h>

#include <array>
#include <cmath>
#include <nlohmann/json.hpp>

#include "check.h"
#include "checkpoint/files.h"
#include "checkpoint/layer_source.h"

namespace moesaic {
namespace {

constexpr std::string_view kKey = "moesaic";
constexpr std::int64_t kVersion = 1;
constexpr std::string_view kWeightScales[] = {"default", "tensor", "channel", "block", "group"};
constexpr std::string_view kActScales[] = {"default", "tensor_static", "tensor_dynamic", "token",
                                           "group"};
constexpr std::string_view kRoundings[] = {"nearest", "truncate"};
constexpr std::string_view kRenormalize[] = {"default", "never", "always"};
constexpr std::string_view kWeightOn[] = {"output", "input"};
constexpr std::string_view kGateOrders[] = {"gate_first", "up_first"};
constexpr std::string_view kGateLayouts[] = {"halves", "interleaved"};

template <std::size_t N, typename E>
std::string_view text(const std::string_view (&names)[N], E value) {
  return names[static_cast<std::size_t>(value)];
}

// Reads the description; whatever is not as we write it is a corrupt file.
class Reader {
 public:
  explicit Reader(const nlohmann::json& json) : config_(&json, "metadata 'moesaic'") {}

  std::int64_t whole(std::string_view key, std::int64_t low, std::int64_t high) const {
    const auto value = config_.integer(key);
    if (!value || *value < low || *value > high)
      corrupt(fmt::format("{}: '{}' should be a whole number from {} to {}", config_.file(), key,
                          low, high));
    return *value;
  }
  float real(std::string_view key) const {
    const auto value = config_.number(key);
    if (!value || !std::isfinite(*value))
      corrupt(fmt::format("{}: '{}' should be a number", config_.file(), key));
    return static_cast<float>(*value);
  }
  std::string word(std::string_view key) const {
    const auto value = config_.text(key);
    if (!value) corrupt(fmt::format("{}: '{}' is missing", config_.file(), key));
    return *value;
  }
  template <typename E, std::size_t N>
  E choice(std::string_view key, const std::string_view (&names)[N]) const {
    const std::string value = word(key);
    for (std::size_t i = 0; i < N; ++i)
      if (names[i] == value) return static_cast<E>(i);
    corrupt(
        fmt::format("{}: '{}' is {}, which is not known", config_.file(), key, show_name(value)));
  }
  template <typename Parse>
  auto named(std::string_view key, Parse parse) const {
    const std::string value = word(key);
    try {
      return parse(value);
    } catch (const Error&) {
      corrupt(
          fmt::format("{}: '{}' is {}, which is not known", config_.file(), key, show_name(value)));
    }
  }
  bool flag(std::string_view key) const {
    const auto value = config_.boolean(key);
    if (!value) corrupt(fmt::format("{}: '{}' should be true or false", config_.file(), key));
    return *value;
  }
  bool has(std::string_view key) const { return config_.find(key) != nullptr; }

 private:
  ModelConfig config_;
};

constexpr std::int64_t kMaxExtent = INT64_C(1) << 31;

void read_quant(const Reader& r, QuantSpec& q) {
  q.scheme = r.named("scheme", [](std::string_view s) { return parse_scheme(s); });
  q.weight_scale = r.choice<WeightScale>("weight_scale", kWeightScales);
  q.act_scale = r.choice<ActScale>("act_scale", kActScales);
  q.block_n = r.whole("block_n", 1, kMaxExtent);
  q.block_k = r.whole("block_k", 1, kMaxExtent);
  q.group_size = r.whole("group_size", 0, kMaxExtent);
  q.zero_points = r.flag("zero_points");
  q.int8_rounding = r.choice<Int8Rounding>("int8_rounding", kRoundings);
}

void read_routing(const Reader& r, RoutingSpec& s) {
  s.method = r.named("routing", [](std::string_view t) { return parse_routing(t); });
  s.renormalize = r.choice<Renormalize>("renormalize", kRenormalize);
  s.scale = r.real("routing_scale");
  s.groups = static_cast<int>(r.whole("groups", 1, 65536));
  s.topk_groups = static_cast<int>(r.whole("topk_groups", 1, 65536));
  s.jitter = r.real("jitter");
  s.sum_floor = r.real("sum_floor");
}

void read_activation(const Reader& r, ActivationSpec& a) {
  a.kind = r.named("activation", [](std::string_view t) { return parse_activation(t); });
  a.order = r.choice<GateOrder>("gate_order", kGateOrders);
  a.layout = r.choice<GateLayout>("gate_layout", kGateLayouts);
  a.alpha = r.real("alpha");
  a.beta = r.real("beta");
  a.limit = r.real("limit");
}

// The members of GemmWeights and how the file calls them.
constexpr std::pair<std::string_view, Tensor GemmWeights::*> kMembers[] = {
    {"weight", &GemmWeights::weight},
    {"scale", &GemmWeights::scale},
    {"zero_point", &GemmWeights::zero_point},
    {"bias", &GemmWeights::bias},
    {"input_scale", &GemmWeights::input_scale},
    {"prequant", &GemmWeights::prequant},
    {"alpha", &GemmWeights::alpha}};

GemmWeights read_product(const TensorFile& files, const std::string& prefix) {
  GemmWeights w;
  for (const auto& [name, member] : kMembers) {
    const std::string full = prefix + std::string(name);
    if (files.find(full) != nullptr) w.*member = files.tensor(full);
  }
  return w;
}

// Shapes and dtypes as convert makes them, before anybody indexes them.
void check_product(const WeightSpec& spec, const GemmWeights& w, const std::string& prefix) {
  const auto expect = [&](std::string_view what, const Tensor& t, DType dtype,
                          std::initializer_list<std::int64_t> shape) {
    const Tensor expected = Tensor::contiguous(nullptr, dtype, shape);
    if (t.defined() && t.dtype == dtype && t.rank == expected.rank && t.shape == expected.shape)
      return;
    corrupt(fmt::format("{}{}: expected {}, got {}", prefix, what, to_string(expected),
                        t.defined() ? to_string(t) : std::string("nothing")));
  };
  const bool four_bit = is_four_bit(spec.format);
  expect("weight", w.weight, weight_dtype(spec.format),
         {1, spec.n, four_bit ? spec.k / 2 : spec.k});
  if (spec.scale.has_scale)
    expect("scale", w.scale, spec.e8m0_scales ? DType::kU8 : DType::kF32,
           {1, spec.scale.grid_n, spec.scale.grid_k});
  if (spec.zero_points)
    expect("zero_point", w.zero_point, DType::kU8,
           {1, spec.format == WeightFormat::kU4 ? spec.n / 2 : spec.n, spec.scale.grid_k});
  if (w.bias.defined()) expect("bias", w.bias, DType::kF32, {1, spec.n});
  if (spec.act_scale == ActScale::kTensorStatic)
    expect("input_scale", w.input_scale, DType::kF32, {1});
  if (w.prequant.defined() || w.alpha.defined())
    corrupt(prefix + "prequant, alpha: this layout has none");
}

std::string expert_prefix(std::int64_t expert) { return fmt::format("experts.{}.", expert); }

}  // namespace

std::map<std::string, std::string> native_metadata(const NativeDescription& d) {
  const CheckpointLayer& l = d.layer;
  nlohmann::ordered_json j = {{"version", kVersion},
                              {"index", l.index},
                              {"experts", l.experts},
                              {"hidden", l.hidden},
                              {"intermediate", l.intermediate},
                              {"top_k", l.top_k},
                              {"shared_experts", l.shared_experts},
                              {"shared_intermediate", l.shared_intermediate},
                              {"dtype", name(l.dtype)},
                              {"weight_on", text(kWeightOn, l.weight_on)}};
  j["scheme"] = name(l.quant.scheme);
  j["weight_scale"] = text(kWeightScales, l.quant.weight_scale);
  j["act_scale"] = text(kActScales, l.quant.act_scale);
  j["block_n"] = l.quant.block_n;
  j["block_k"] = l.quant.block_k;
  j["group_size"] = l.quant.group_size;
  j["zero_points"] = l.quant.zero_points;
  j["int8_rounding"] = text(kRoundings, l.quant.int8_rounding);
  if (d.model.routing_refusal.empty()) {  // else nobody knows, and the reader of the file must say
    j["routing"] = name(l.routing.method);
    j["renormalize"] = text(kRenormalize, l.routing.renormalize);
    j["routing_scale"] = l.routing.scale;
    j["groups"] = l.routing.groups;
    j["topk_groups"] = l.routing.topk_groups;
    j["jitter"] = l.routing.jitter;
    j["sum_floor"] = l.routing.sum_floor;
  }
  if (!d.model.activation_refusal.empty()) j["activation_unknown"] = true;
  j["activation"] = name(l.activation.kind);  // gated or not, at least
  j["gate_order"] = text(kGateOrders, l.activation.order);
  j["gate_layout"] = text(kGateLayouts, l.activation.layout);
  j["alpha"] = l.activation.alpha;
  j["beta"] = l.activation.beta;
  j["limit"] = l.activation.limit;
  return {{"format", "moesaic"}, {std::string(kKey), j.dump()}};
}

void append_native(const std::string& prefix, const LayerWeights& w,
                   std::vector<NamedTensor>& out) {
  for (const auto& [product, which] :
       {std::pair{"fc1.", &LayerWeights::fc1}, std::pair{"fc2.", &LayerWeights::fc2}})
    for (const auto& [name, member] : kMembers)
      if ((w.*which.*member).defined())
        out.push_back({prefix + product + std::string(name), w.*which.*member});
}

bool is_native(const TensorFile& files) { return files.metadata().count(std::string(kKey)) > 0; }

LayerSource native_layer(const TensorFile& files) {
  const nlohmann::json json =
      parse_json_object(files.metadata().at(std::string(kKey)), "metadata 'moesaic'");
  const Reader r(json);
  const std::int64_t version = r.whole("version", 1, INT64_MAX);
  if (version != kVersion)
    unsupported(
        fmt::format("metadata 'moesaic': version {} of this layout; this library reads version {}",
                    version, kVersion));
  LayerSource source;
  CheckpointLayer& l = source.layer;
  l.index = r.whole("index", 0, INT32_MAX);
  l.name = fmt::format("layer {}", l.index);  // of its model, whose name for it is not kept
  l.experts = r.whole("experts", 1, 65536);
  l.hidden = r.whole("hidden", 1, kMaxExtent);
  l.intermediate = r.whole("intermediate", 1, kMaxExtent);
  l.top_k = r.whole("top_k", 0, l.experts);
  l.shared_experts = r.whole("shared_experts", 0, 65536);
  l.shared_intermediate = r.whole("shared_intermediate", 0, kMaxExtent);
  l.dtype = r.named("dtype", [](std::string_view t) { return parse_dtype(t); });
  if (!is_float(l.dtype)) corrupt("metadata 'moesaic': 'dtype' should be f32, f16 or bf16");
  l.weight_on = r.choice<WeightOn>("weight_on", kWeightOn);
  read_quant(r, l.quant);
  read_activation(r, l.activation);
  if (r.has("activation_unknown"))
    source.model.activation_refusal =
        "the file does not say which activation this layer has; name it (--activation), one of: " +
        activation_names(false);
  if (r.has("routing")) {
    read_routing(r, l.routing);
  } else {
    source.model.routing_refusal =
        "the file does not say how this layer routes; name it (--routing), one of: " +
        routing_names();
  }
  source.model.top_k = l.top_k;
  source.experts.hidden = l.hidden;
  source.experts.intermediate = l.intermediate;
  source.experts.gated = is_gated(l.activation.kind);
  source.experts.numbers = source.experts.advertised = l.quant;
  l.storage = fmt::format("{}, this library's own layout", name(l.quant.scheme));

  const ProductSpecs specs = product_specs(l, l.quant, l.dtype, l.intermediate, l.activation.kind);
  for (std::int64_t e = 0; e < l.experts; ++e) {
    const LayerWeights w = read_native_expert(files, source, e);
    check_product(specs.fc1, w.fc1, expert_prefix(e) + "fc1.");
    check_product(specs.fc2, w.fc2, expert_prefix(e) + "fc2.");
    l.has_bias |= w.fc1.bias.defined();
  }
  if (l.shared_experts > 0) {
    if (l.shared_intermediate == 0) corrupt("metadata 'moesaic': shared experts without a width");
    const ProductSpecs shared =
        product_specs(l, l.quant, l.dtype, l.shared_intermediate, l.activation.kind);
    const LayerWeights w = read_native_shared(files, source);
    check_product(shared.fc1, w.fc1, "shared.fc1.");
    check_product(shared.fc2, w.fc2, "shared.fc2.");
  }
  const auto optional = [&](std::string_view tensor, std::int64_t rows,
                            std::int64_t columns) -> std::string {
    if (files.find(tensor) == nullptr) return {};
    const Tensor t = files.tensor(tensor);
    if (!is_float(t.dtype) || t.numel() != rows * columns ||
        (columns > 1 && (t.rank != 2 || t.shape[0] != rows)))
      corrupt(
          fmt::format("{}: expected [{}, {}] floats, got {}", tensor, rows, columns, to_string(t)));
    return std::string(tensor);
  };
  source.router = {.weight = optional("router.weight", l.experts, l.hidden),
                   .bias = optional("router.bias", l.experts, 1),
                   .selection_bias = optional("router.selection_bias", l.experts, 1)};
  source.shared_gate = optional("shared.gate", l.hidden, 1);
  l.has_router = !source.router.weight.empty();
  l.has_shared_gate = !source.shared_gate.empty();
  for (const StoredTensor& t : files.tensors()) l.bytes += t.bytes;
  return source;
}

LayerWeights read_native_expert(const TensorFile& files, const LayerSource&, std::int64_t expert) {
  const std::string prefix = expert_prefix(expert);
  return {.fc1 = read_product(files, prefix + "fc1."),
          .fc2 = read_product(files, prefix + "fc2."),
          .activation = {}};
}

LayerWeights read_native_shared(const TensorFile& files, const LayerSource&) {
  return {.fc1 = read_product(files, "shared.fc1."),
          .fc2 = read_product(files, "shared.fc2."),
          .activation = {}};
}

}  // namespace moesaic
