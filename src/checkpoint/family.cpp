// SPDX-License-Identifier: Apache-2.0
#include "checkpoint/family.h"

#include <fmt/format.h>

#include <array>
#include <nlohmann/json.hpp>

#include "check.h"
#include "checkpoint/files.h"
#include "words.h"

namespace moesaic {
namespace {

using FusedLayout = CheckpointOptions::FusedLayout;

std::string show_json(const nlohmann::json& value) {
  return printable(
      value.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace).substr(0, 80));
}

[[noreturn]] void wrong_type(const std::string& file, std::string_view key,
                             std::string_view expected, const nlohmann::json& got) {
  const std::string shown =
      got.is_structured() ? fmt::format("a JSON {}", got.type_name()) : show_json(got);
  corrupt(fmt::format("{}: '{}' should be {}, is {}", file, key, expected, shown));
}

// --- routing, one function per wording of config.json -------------------------------------------
void renormalize(const ModelConfig&, ModelDescription& d) {
  d.routing.method = RoutingMethod::kRenormalize;
}

// Softmax over all experts, divided by the selected sum when norm_topk_prob says so. Dividing is
// the same as the softmax over the selected ones.
void softmax_norm(const ModelConfig& config, ModelDescription& d) {
  d.routing.method = config.boolean("norm_topk_prob").value_or(false) ? RoutingMethod::kRenormalize
                                                                      : RoutingMethod::kSoftmaxTopK;
}

std::int64_t small(const ModelConfig& config, std::string_view key, std::int64_t fallback) {
  const std::int64_t value = config.integer(key).value_or(fallback);
  if (value < 1 || value > 65536)
    corrupt(fmt::format("{}: '{}' is {}, expected 1 to 65536", config.file(), key, value));
  return value;
}

void groups(const ModelConfig& config, ModelDescription& d) {
  d.routing.groups = static_cast<int>(small(config, "n_group", 1));
  d.routing.topk_groups = static_cast<int>(small(config, "topk_group", 1));
}

void deepseek_v2(const ModelConfig& config, ModelDescription& d) {
  d.routing.method = RoutingMethod::kDeepSeekV2;
  const std::string method = config.text("topk_method").value_or("greedy");
  if (method == "group_limited_greedy") {
    groups(config, d);
  } else if (method != "greedy") {
    d.routing_refusal = fmt::format(
        "{}: topk_method {} is not read for DeepSeek-V2; override the "
        "routing (--routing)",
        config.file(), show_name(method));
  }
  d.routing.scale = static_cast<float>(config.number("routed_scaling_factor").value_or(1.0));
  if (config.boolean("norm_topk_prob").value_or(false))
    d.routing.renormalize = Renormalize::kAlways;
}

void deepseek_v3(const ModelConfig& config, ModelDescription& d) {
  d.routing.method = RoutingMethod::kDeepSeekV3;
  groups(config, d);
  d.routing.scale = static_cast<float>(config.number("routed_scaling_factor").value_or(1.0));
  if (!config.boolean("norm_topk_prob").value_or(true)) d.routing.renormalize = Renormalize::kNever;
  for (const auto& [key, known] :
       {std::pair<std::string_view, std::string_view>{"scoring_func", "sigmoid"},
        {"topk_method", "noaux_tc"}}) {
    const std::string value = config.text(key).value_or(std::string(known));
    if (value != known)
      d.routing_refusal = fmt::format(
          "{}: {} {} is not read for this family (only {}); override the "
          "routing (--routing)",
          config.file(), key, show_name(value), known);
  }
}

void sparsemixer(const ModelConfig& config, ModelDescription& d) {
  d.routing.method = RoutingMethod::kSparseMixer;
  d.routing.jitter = static_cast<float>(config.number("router_jitter_noise").value_or(0.01));
}

void ernie(const ModelConfig& config, ModelDescription& d) {
  d.routing.method = RoutingMethod::kSoftmaxBias;
  d.routing.sum_floor = static_cast<float>(config.number("moe_norm_min").value_or(1e-12));
}

void llama4(const ModelConfig&, ModelDescription& d) { d.routing.method = RoutingMethod::kLlama4; }

void ask_routing(const ModelConfig&, ModelDescription& d) {
  d.routing_refusal =
      "family generic: nothing says how this model routes; name it (--routing), one of: " +
      routing_names();
}

// --- activation ---------------------------------------------------------------------------------
void gated_act(const ModelConfig& config, ModelDescription& d) {
  const std::string act = config.text("hidden_act").value_or("silu");
  if (const auto known = activation_from(act, true)) {
    d.activation.kind = *known;
  } else {
    d.activation_refusal = fmt::format(
        "{}: hidden_act {} has no gated form here; name the activation (--activation), one of: {}",
        config.file(), show_name(act), activation_names(true));
  }
}

void gpt_oss_act(const ModelConfig& config, ModelDescription& d) {
  d.activation.kind = Activation::kSwigluOai;
  d.activation.alpha = static_cast<float>(config.number("swiglu_alpha").value_or(1.702));
  d.activation.limit = static_cast<float>(config.number("swiglu_limit").value_or(7.0));
}

void ask_activation(const ModelConfig&, ModelDescription& d) {
  d.activation_refusal =
      "family generic: nothing says which activation this model has; name it (--activation), one "
      "of: " +
      activation_names(false);
}

// --- the table ----------------------------------------------------------------------------------
constexpr std::string_view kMlp[] = {"mlp"};
constexpr std::string_view kMlpOrSparse[] = {"block_sparse_moe", "mlp"};
constexpr std::string_view kFeedForward[] = {"feed_forward"};
constexpr std::string_view kMixtral[] = {"mixtral"};
constexpr std::string_view kQwen2[] = {"qwen2_moe"};
constexpr std::string_view kQwen3[] = {"qwen3_moe"};
constexpr std::string_view kDeepSeekV2[] = {"deepseek_v2"};
constexpr std::string_view kDeepSeekV3[] = {"deepseek_v3", "kimi_k2"};
constexpr std::string_view kOlmoe[] = {"olmoe"};
constexpr std::string_view kPhimoe[] = {"phimoe"};
constexpr std::string_view kErnie[] = {"ernie4_5_moe"};
constexpr std::string_view kGlm4[] = {"glm4_moe"};
constexpr std::string_view kGptOss[] = {"gpt_oss"};
constexpr std::string_view kLlama4[] = {"llama4", "llama4_text"};

constexpr std::array<Family, 12> kFamilies{{
    {.name = "mixtral",
     .model_types = kMixtral,
     .blocks = kMlpOrSparse,
     .routing = renormalize,
     .activation = gated_act,
     .note = "Mixtral 8x7B, 8x22B"},
    {.name = "qwen2_moe",
     .model_types = kQwen2,
     .blocks = kMlp,
     .routing = softmax_norm,
     .activation = gated_act,
     .note = "Qwen1.5-MoE, Qwen2-MoE; shared expert behind a sigmoid gate"},
    {.name = "qwen3_moe",
     .model_types = kQwen3,
     .blocks = kMlp,
     .routing = softmax_norm,
     .activation = gated_act,
     .note = "Qwen3-MoE"},
    {.name = "deepseek_v2",
     .model_types = kDeepSeekV2,
     .blocks = kMlp,
     .routing = deepseek_v2,
     .activation = gated_act,
     .note = "DeepSeek-V2 and Lite"},
    {.name = "deepseek_v3",
     .model_types = kDeepSeekV3,
     .blocks = kMlp,
     .routing = deepseek_v3,
     .activation = gated_act,
     .note = "DeepSeek-V3, R1, Kimi-K2"},
    {.name = "olmoe",
     .model_types = kOlmoe,
     .blocks = kMlp,
     .routing = softmax_norm,
     .activation = gated_act,
     .note = "OLMoE"},
    {.name = "phimoe",
     .model_types = kPhimoe,
     .blocks = kMlpOrSparse,
     .routing = sparsemixer,
     .activation = gated_act,
     .note = "Phi-3.5-MoE"},
    {.name = "ernie4_5_moe",
     .model_types = kErnie,
     .blocks = kMlp,
     .routing = ernie,
     .activation = gated_act,
     .note = "ERNIE 4.5"},
    {.name = "glm4_moe",
     .model_types = kGlm4,
     .blocks = kMlp,
     .routing = deepseek_v3,
     .activation = gated_act,
     .note = "GLM-4.5"},
    {.name = "gpt_oss",
     .model_types = kGptOss,
     .blocks = kMlp,
     .fused = FusedLayout::kKN,
     .fused_layout = GateLayout::kInterleaved,
     .routing = renormalize,
     .activation = gpt_oss_act,
     .note = "GPT-OSS, MXFP4 or 16 bit"},
    {.name = "llama4",
     .model_types = kLlama4,
     .blocks = kFeedForward,
     .fused = FusedLayout::kKN,
     .weight_on = WeightOn::kInput,
     .routing = llama4,
     .activation = gated_act,
     .note = "Llama-4 Scout, Maverick"},
    {.name = "generic",
     .routing = ask_routing,
     .activation = ask_activation,
     .note = "any recognizable expert tensors; top_k, routing and activation must be named"},
}};

std::string family_names() {
  std::string names;
  for (const Family& f : kFamilies) append_word(names, f.name);
  return names;
}

}  // namespace

std::string routing_names() {
  std::string names;
  for (int i = 0; i < kNumRoutingMethods; ++i)
    append_word(names, name(static_cast<RoutingMethod>(i)));
  return names;
}

std::string activation_names(bool only_gated) {
  std::string names;
  for (int i = 0; i < kNumActivations; ++i) {
    const auto a = static_cast<Activation>(i);
    if (!only_gated || is_gated(a)) append_word(names, name(a));
  }
  return names;
}

const nlohmann::json* ModelConfig::find(std::string_view key) const {
  if (json_ == nullptr) return nullptr;
  const std::string k(key);
  if (const auto it = json_->find(k); it != json_->end() && !it->is_null()) return &*it;
  const auto text = json_->find("text_config");
  if (text == json_->end() || !text->is_object()) return nullptr;
  const auto it = text->find(k);
  return it != text->end() && !it->is_null() ? &*it : nullptr;
}

std::optional<std::int64_t> ModelConfig::integer(std::string_view key) const {
  const nlohmann::json* v = find(key);
  if (v == nullptr) return {};
  if (!v->is_number_integer() || (v->is_number_unsigned() && v->get<std::uint64_t>() > INT64_MAX))
    wrong_type(file_, key, "a whole number", *v);
  return v->get<std::int64_t>();
}

std::optional<double> ModelConfig::number(std::string_view key) const {
  const nlohmann::json* v = find(key);
  if (v == nullptr) return {};
  if (!v->is_number()) wrong_type(file_, key, "a number", *v);
  return v->get<double>();
}

std::optional<bool> ModelConfig::boolean(std::string_view key) const {
  const nlohmann::json* v = find(key);
  if (v == nullptr) return {};
  if (!v->is_boolean()) wrong_type(file_, key, "true or false", *v);
  return v->get<bool>();
}

std::optional<std::string> ModelConfig::text(std::string_view key) const {
  const nlohmann::json* v = find(key);
  if (v == nullptr) return {};
  if (!v->is_string()) wrong_type(file_, key, "a string", *v);
  return v->get<std::string>();
}

std::span<const Family> all_families() { return kFamilies; }

const Family& find_family(const CheckpointOptions& options, const ModelConfig& config) {
  if (!options.family.empty()) {
    for (const Family& f : kFamilies)
      if (f.name == options.family) return f;
    unsupported(fmt::format("family: unknown name {}; known: {}", show_name(options.family),
                            family_names()));
  }
  const auto model_type = config.text("model_type");
  if (!model_type)
    unsupported(fmt::format("{}: has no model_type; name the family (--family), one of: {}",
                            config.file(), family_names()));
  for (const Family& f : kFamilies)
    for (const std::string_view type : f.model_types)
      if (type == *model_type) return f;
  unsupported(
      fmt::format("{}: model_type {} is not known; if it is laid out like one of these, say so "
                  "(--family): {}",
                  config.file(), show_name(*model_type), family_names()));
}

ModelDescription describe(const Family& family, const ModelConfig& config) {
  ModelDescription d;
  for (const std::string_view key :
       {"num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_k"}) {
    if (const auto k = config.integer(key)) {
      d.top_k = small(config, key, *k);
      break;
    }
  }
  family.routing(config, d);
  family.activation(config, d);
  for (const std::string_view key : {"dtype", "torch_dtype"}) {
    const auto name = config.text(key);
    if (!name) continue;
    if (*name == "bfloat16") d.dtype = DType::kBF16;
    if (*name == "float16") d.dtype = DType::kF16;
    if (*name == "float32") d.dtype = DType::kF32;
    break;
  }
  return d;
}

std::optional<Activation> activation_from(std::string_view act, bool gated) {
  struct Row {
    std::string_view name;
    std::optional<Activation> gated, plain;
  };
  static constexpr Row kRows[] = {
      {"silu", Activation::kSwiglu, Activation::kSilu},
      {"swish", Activation::kSwiglu, Activation::kSilu},
      {"gelu", Activation::kGeglu, Activation::kGelu},
      {"gelu_pytorch_tanh", Activation::kGegluTanh, Activation::kGeluTanh},
      {"gelu_new", Activation::kGegluTanh, Activation::kGeluTanh},
      {"relu", {}, Activation::kRelu},
      {"relu2", {}, Activation::kRelu2},
  };
  for (const Row& row : kRows)
    if (row.name == act) return gated ? row.gated : row.plain;
  return {};
}

}  // namespace moesaic
