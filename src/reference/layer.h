// SPDX-License-Identifier: Apache-2.0
// The whole layer in float64, y[t] = sum_j w[t,j] * FC2_e(act(FC1_e(x[t]))), e = id[t,j], rounded
// and quantized where docs/numerics.md ("Where numbers are rounded") says, with the bound that follows
// for a correct implementation. Host tensors, one expert after the other, nothing clever.
#pragma once

#include <cstdint>
#include <vector>

#include "moesaic/layer.h"
#include "moesaic/stages.h"
#include "reference/bounded.h"
#include "reference/matrix.h"
#include "reference/product.h"

namespace moesaic::reference {

// What the contract leaves to the implementation, and this device does.
struct Choices {
  Accumulator accumulator = Accumulator::kFp32;
  WeightRounding weights = WeightRounding::kExact;
  DType slots = DType::kF32;  // each slot's output is kept in this dtype before the sum
};

struct LayerInput {
  Tensor hidden_states;  // [T, H], any strides
  Tensor hidden_scale;   // with 8-bit hidden_states: [1] | [T, 1] | [T, ceil(H / block_k)]
  Tensor topk_ids;       // [T, k] i32 or i64, global
  Tensor topk_weights;   // [T, k] f32
  Tensor expert_map;     // optional i32 [experts]
  // Batched: dynamic per-tensor scales are per expert, and slots beyond `capacity` rows drop out.
  Format format = Format::kStandard;
  std::int64_t capacity = 0;  // 0: enough for any routing
};

struct LayerOutput {
  std::int64_t tokens = 0, hidden = 0;
  std::vector<Bounded> output;  // [T, H] before the rounding to the output dtype
  std::int64_t dropped = 0;     // slots beyond capacity
  const Bounded& at(std::int64_t t, std::int64_t h) const {
    return output[static_cast<std::size_t>(t * hidden + h)];
  }
};

// The shared experts, as one expert that every token visits: leading extent 1.
struct SharedWeights {
  LayerWeights weights;
  Tensor gate;  // optional [H] or [1, H]: the output is multiplied by sigmoid(x . gate)
};
// `shared`: null when the configuration has none.
LayerOutput layer(const LayerConfig& config, const LayerWeights& weights,
                  const SharedWeights* shared, const LayerInput& input, const Choices& choices);

// How far the number that lies in memory may be from b.value: b.error and one last rounding.
double stored_error(const Bounded& b, DType output);

}  // namespace moesaic::reference
