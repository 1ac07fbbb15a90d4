// SPDX-License-Identifier: Apache-2.0
// config.json's quantization_config, in the words of its several authors.
#include <fmt/format.h>

#include <nlohmann/json.hpp>

#include "check.h"
#include "checkpoint/files.h"
#include "checkpoint/stored.h"

namespace moesaic {
namespace {

// The group of compressed-tensors' config_groups that covers the experts.
const nlohmann::json* expert_group(const nlohmann::json& groups) {
  const nlohmann::json* linear = nullptr;
  const nlohmann::json* first = nullptr;
  for (const auto& group : groups) {
    if (!group.is_object()) continue;
    if (first == nullptr) first = &group;
    const auto targets = group.find("targets");
    if (targets == group.end() || !targets->is_array()) continue;
    for (const auto& target : *targets) {
      if (!target.is_string()) continue;
      const auto& text = target.get_ref<const std::string&>();
      if (text.find("experts") != std::string::npos) return &group;
      if (text == "Linear" && linear == nullptr) linear = &group;
    }
  }
  return linear != nullptr ? linear : first;
}

void read_block(const nlohmann::json* block, const std::string& file, QuantizationConfig& q) {
  if (block == nullptr) return;
  const bool ok = block->is_array() && block->size() == 2 && (*block)[0].is_number_unsigned() &&
                  (*block)[1].is_number_unsigned();
  const std::uint64_t n = ok ? (*block)[0].get<std::uint64_t>() : 0;
  const std::uint64_t k = ok ? (*block)[1].get<std::uint64_t>() : 0;
  constexpr std::uint64_t kMax = 1u << 30;
  if (n == 0 || k == 0 || n > kMax || k > kMax)
    corrupt(file + ": a weight block is two positive whole numbers");
  q.block_n = static_cast<std::int64_t>(n);
  q.block_k = static_cast<std::int64_t>(k);
}

void read_group_size(const ModelConfig& from, QuantizationConfig& q) {
  q.group_size = from.integer("group_size");
  if (q.group_size && *q.group_size != -1 && *q.group_size < 1)
    corrupt(fmt::format("{}: group_size {}; expected -1 or a positive number", from.file(),
                        *q.group_size));
}

void read_compressed_tensors(const ModelConfig& config, QuantizationConfig& q) {
  const nlohmann::json* groups = config.find("config_groups");
  const nlohmann::json* group =
      groups != nullptr && groups->is_object() ? expert_group(*groups) : nullptr;
  if (group == nullptr) corrupt(config.file() + ": compressed-tensors without config_groups");
  const std::string file = config.file() + ": config_groups";
  const ModelConfig parts(group, file);
  if (const nlohmann::json* json = parts.find("weights"); json != nullptr && json->is_object()) {
    const ModelConfig weights(json, file + ": weights");
    q.bits = static_cast<int>(std::min<std::int64_t>(weights.integer("num_bits").value_or(0), 64));
    q.symmetric = weights.boolean("symmetric").value_or(true);
    read_group_size(weights, q);
    read_block(weights.find("block_structure"), file, q);
  }
  q.acts = StoredActs::kNone;
  if (const nlohmann::json* json = parts.find("input_activations");
      json != nullptr && json->is_object()) {
    const ModelConfig acts(json, file + ": input_activations");
    q.act_type = acts.text("type").value_or("int");
    const nlohmann::json* dynamic = acts.find("dynamic");
    const bool is_dynamic = dynamic != nullptr && dynamic->is_boolean() && dynamic->get<bool>();
    const std::string strategy = acts.text("strategy").value_or("tensor");
    const std::int64_t bits = acts.integer("num_bits").value_or(8);
    if (strategy == "tensor") {
      q.acts = is_dynamic ? StoredActs::kTensorDynamic : StoredActs::kTensorStatic;
    } else if (strategy == "token" && is_dynamic) {
      q.acts = StoredActs::kToken;
    } else if (strategy == "group" && is_dynamic) {
      q.acts = StoredActs::kGroup;
    } else {
      q.refusal =
          fmt::format("{}: activations by {} ({}) have no scheme here; override it (--scheme)",
                      file, show_name(strategy), is_dynamic ? "dynamic" : "static");
    }
    if (bits != 8)
      q.refusal = fmt::format("{}: {}-bit activations have no scheme here; override it (--scheme)",
                              file, bits);
    if (acts.boolean("symmetric").value_or(true) == false)
      q.refusal = file + ": asymmetric activations have no scheme here; override it (--scheme)";
  }
}

void read_fp8(const ModelConfig& config, QuantizationConfig& q) {
  read_block(config.find("weight_block_size"), config.file(), q);
  const std::string acts = config.text("activation_scheme").value_or("dynamic");
  q.acts = acts == "static" ? StoredActs::kTensorStatic : StoredActs::kTensorDynamic;
}

void read_gptq(const ModelConfig& config, QuantizationConfig& q) {
  q.bits = static_cast<int>(std::min<std::int64_t>(config.integer("bits").value_or(4), 64));
  q.symmetric = config.boolean("sym").value_or(true);
  q.gptq_v2 = config.text("checkpoint_format").value_or("gptq") == "gptq_v2";
  read_group_size(config, q);
}

void read_awq(const ModelConfig& config, QuantizationConfig& q) {
  q.bits = static_cast<int>(std::min<std::int64_t>(config.integer("bits").value_or(4), 64));
  q.symmetric = false;
  read_group_size(config, q);
  const std::string version = config.text("version").value_or("gemm");
  if (version != "gemm" && version != "GEMM")
    q.refusal = fmt::format(
        "{}: AWQ version {} is packed for one kernel; only 'gemm' is read: convert it "
        "back, or quantize the 16-bit model again",
        config.file(), show_name(version));
}

void read_mxfp4(const ModelConfig&, QuantizationConfig&) {}

struct Method {
  std::string_view name;
  void (*read)(const ModelConfig&, QuantizationConfig&);
};
constexpr Method kMethods[] = {{"fp8", read_fp8},
                               {"compressed-tensors", read_compressed_tensors},
                               {"gptq", read_gptq},
                               {"awq", read_awq},
                               {"mxfp4", read_mxfp4}};

}  // namespace

QuantizationConfig read_quantization(const ModelConfig& config) {
  QuantizationConfig q;
  const nlohmann::json* json = config.find("quantization_config");
  if (json == nullptr) json = config.find("compression_config");  // the older name
  if (json == nullptr) return q;
  if (!json->is_object()) corrupt(config.file() + ": quantization_config should be an object");
  const ModelConfig inner(json, config.file() + ": quantization_config");
  q.method = inner.text("quant_method").value_or("");
  for (const Method& m : kMethods) {
    if (m.name != q.method) continue;
    m.read(inner, q);
    return q;
  }
  q.refusal = fmt::format(
      "{}: quant_method {} is not read; known: fp8, compressed-tensors, gptq, awq, mxfp4. If the "
      "experts are stored as one of these stores them, name their scheme (--scheme)",
      config.file(), show_name(q.method));
  return q;
}

}  // namespace moesaic
