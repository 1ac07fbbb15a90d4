// SPDX-License-Identifier: Apache-2.0
// How one expert's projections lie in the files, quantized or not, and how they become GemmWeights.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "checkpoint/arena.h"
#include "checkpoint/family.h"
#include "moesaic/checkpoint.h"
#include "scheme.h"

namespace moesaic {

// --- names --------------------------------------------------------------------------------------
// One expert's tensors are  prefix + [number + "."] + projection + suffix ; fused tensors hold all
// experts, leading extent `experts`, and no number.
struct ExpertNames {
  enum class Shape : std::uint8_t { kPerExpert, kFused, kSingle };  // kSingle: shared experts
  std::string prefix;                                               // "model.layers.3.mlp.experts."
  Shape shape = Shape::kPerExpert;
  std::vector<std::string> fc1;  // {"gate_proj", "up_proj"}, {"gate_up_proj"} or {"up_proj"}
  std::string fc2;               // "down_proj"
  std::int64_t experts = 1;
};

// --- what quantization_config says --------------------------------------------------------------
enum class StoredActs : std::uint8_t {
  kUnsaid,
  kNone,
  kToken,
  kTensorStatic,
  kTensorDynamic,
  kGroup
};
struct QuantizationConfig {
  std::string method;  // "": none
  StoredActs acts = StoredActs::kUnsaid;
  std::string act_type;                    // "float" or "int", compressed-tensors
  std::optional<std::int64_t> group_size;  // -1: whole K
  std::int64_t block_n = 0, block_k = 0;   // 0: not by blocks
  int bits = 0;
  bool symmetric = true;
  bool gptq_v2 = false;
  std::string refusal;  // what cannot be read, and why
};
QuantizationConfig read_quantization(const ModelConfig& config);

// --- one layer's storage ------------------------------------------------------------------------
// Extents of one projection's matrix.
struct Extent {
  std::int64_t n = 0, k = 0;
};

enum class Storage : std::uint8_t {
  kFloat,             // f32, f16, bf16
  kFp8,               // e4m3, scales per tensor, channel or block
  kInt8,              // int8, scales per channel, block or group
  kCompressedPacked,  // compressed-tensors pack-quantized: int32 [N, K * bits / 32]
  kAwq,               // int32 [K, N / 8], interleaved
  kGptq,              // int32 [K * bits / 32, N]
  kMxfp4,             // u8 [N, K / 32, 16] and E8M0 [N, K / 32]
};

struct StoredLayout {
  ExpertNames names;
  Storage storage{};
  CheckpointOptions::FusedLayout orientation =
      CheckpointOptions::FusedLayout::kNK;    // kFloat, kFused
  std::int64_t hidden = 0, intermediate = 0;  // intermediate: of one of gate / up
  bool gated = true;
  QuantizationConfig quantization;
  int bits = 0;  // packed integers
  bool has_bias = false;
  QuantSpec numbers;        // what the stored numbers are: a scheme with 16-bit activations
  QuantSpec advertised;     // with the activations that quantization_config asks for
  std::string refusal;      // why `advertised` cannot be run as it is
  std::string description;  // "bf16, one tensor per expert"
};

// Finds out how the experts are stored and checks dtype and shape of every expert's tensors.
StoredLayout detect_layout(const TensorFile& files, const ExpertNames& names,
                           CheckpointOptions::FusedLayout orientation,
                           const QuantizationConfig& quantization);

// The second half of detect_layout: numbers, advertised, refusal and description, from the scales.
void describe_numbers(const TensorFile& files, StoredLayout& layout);

// One expert as `layout.numbers` describes it: views where the bytes are already right, copies in
// `arena` where they are not. `fc1` and `fc2` resolve layout.numbers.
struct ProductSpecs {
  WeightSpec fc1, fc2;
};
LayerWeights read_expert(const TensorFile& files, const StoredLayout& layout,
                         const ProductSpecs& specs, std::int64_t expert, Arena& arena);
// Gives the mapped pages of one expert's tensors back (of a fused tensor: its slice).
void release_expert(const TensorFile& files, const StoredLayout& layout, std::int64_t expert);

}  // namespace moesaic
