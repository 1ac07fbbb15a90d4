// SPDX-License-Identifier: Apache-2.0
// Where one MoE layer of a checkpoint lies, whatever the model; found at open, read at load.
#pragma once

#include <string>
#include <vector>

#include "checkpoint/convert.h"
#include "checkpoint/stored.h"
#include "moesaic/checkpoint.h"

namespace moesaic {

struct RouterNames {
  std::string weight, bias, selection_bias;  // empty: none
};

struct LayerSource {
  CheckpointLayer layer;
  ModelDescription model;
  StoredLayout experts;
  std::optional<StoredLayout> shared;
  std::string shared_gate;  // empty: none
  RouterNames router;
  std::string refusal;  // why the checkpoint's own quantization cannot be run
};

// All MoE layers of a model in Hugging Face layout. Throws when there is none, or one contradicts
// itself.
std::vector<LayerSource> find_layers(const TensorFile& files, const Family& family,
                                     const ModelConfig& config, const CheckpointOptions& options);

// This library's own layout: one layer per file, described in its metadata. Throws when the
// metadata or the tensors do not fit it.
bool is_native(const TensorFile& files);
LayerSource native_layer(const TensorFile& files);
LayerWeights read_native_expert(const TensorFile& files, const LayerSource& source,
                                std::int64_t expert);
LayerWeights read_native_shared(const TensorFile& files, const LayerSource& source);

// Specs of both products for one expert of `layer` under another quantization. `width`:
// intermediate.
ProductSpecs product_specs(const CheckpointLayer& layer, const QuantSpec& quant, DType dtype,
                           std::int64_t width, Activation activation);

}  // namespace moesaic
