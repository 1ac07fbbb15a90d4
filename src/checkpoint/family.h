// SPDX-License-Identifier: Apache-2.0
// What models differ in, one table row per family: where the MoE block lies, how fused experts are
// oriented, and how config.json spells routing and activation.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "moesaic/checkpoint.h"

namespace moesaic {

// config.json, read with defaults. Composite models keep the text model's values in "text_config".
class ModelConfig {
 public:
  ModelConfig(const nlohmann::json* json, std::string file) : json_(json), file_(std::move(file)) {}

  // Null: not there. A value of the wrong type is a kCorruptFile that names the key.
  const nlohmann::json* find(std::string_view key) const;
  std::optional<std::int64_t> integer(std::string_view key) const;
  std::optional<double> number(std::string_view key) const;
  std::optional<bool> boolean(std::string_view key) const;
  std::optional<std::string> text(std::string_view key) const;
  const std::string& file() const { return file_; }

 private:
  const nlohmann::json* json_;  // null: there is no config.json
  std::string file_;
};

// What config.json says about a layer's arithmetic. `refusal`: why it cannot be run as it is,
// unless the caller overrides that part.
struct ModelDescription {
  std::int64_t top_k = 0;  // 0: not said
  RoutingSpec routing{};
  std::string routing_refusal;
  ActivationSpec activation{};
  std::string activation_refusal;
  std::optional<DType> dtype;
};

struct Family {
  std::string_view name;
  std::span<const std::string_view> model_types{};
  std::span<const std::string_view> blocks{};  // last component of the MoE block's path; empty: any
  CheckpointOptions::FusedLayout fused = CheckpointOptions::FusedLayout::kNK;  // of float tensors
  GateLayout fused_layout = GateLayout::kHalves;
  WeightOn weight_on = WeightOn::kOutput;
  void (*routing)(const ModelConfig&, ModelDescription&) = nullptr;
  void (*activation)(const ModelConfig&, ModelDescription&) = nullptr;
  std::string_view note{};  // for docs and refusals
};

std::span<const Family> all_families();
// The row for `options.family`, or for config.json's model_type. Throws kUnsupported, lists them.
const Family& find_family(const CheckpointOptions& options, const ModelConfig& config);
ModelDescription describe(const Family& family, const ModelConfig& config);

// For messages that ask for one.
std::string routing_names();
std::string activation_names(bool only_gated);

// hidden_act of config.json -> our name; gated or not.
std::optional<Activation> activation_from(std::string_view hidden_act, bool gated);

}  // namespace moesaic
