// SPDX-License-Identifier: Apache-2.0
// The main path. Begin at forward(), at the end of forward.cpp: route for all tokens, then for each chunk
// of them bring_rows, run_experts, run_shared_expert, combine.
#pragma once

#include "experts.h"
#include "moesaic/layer.h"

namespace moesaic {

// Everything forward needs of a loaded layer.
struct LoadedLayer {
  const LayerPlan* plan = nullptr;
  const WeightOperand* fc1 = nullptr;
  const WeightOperand* fc2 = nullptr;
  RouterWeights router;
  TacticPair tactics{};
  // Shared experts, when configured: one expert that every token visits through slot 0.
  const LayerPlan* shared_plan = nullptr;
  const WeightOperand* shared_fc1 = nullptr;
  const WeightOperand* shared_fc2 = nullptr;
  Tensor shared_gate;                         // [1, H] or undefined
  const std::int32_t* shared_ids = nullptr;   // [max_tokens] zeros
};

// Throws where workspace_cap could not be kept even by one token at a time.
void check_workspace_cap(const LayerPlan& plan, const LayerPlan* shared_plan);
std::size_t forward_workspace_bytes(const LayerPlan& plan, const LayerPlan* shared_plan,
                                    std::int64_t tokens);
void forward(const LoadedLayer& layer, const ForwardArgs& args);

}  // namespace moesaic
