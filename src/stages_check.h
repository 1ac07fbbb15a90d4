// SPDX-License-Identifier: Apache-2.0
// What prepare, experts and finalize refuse, by the argument's name, and what the shapes of the
// rest say. Workspaces are checked where their buffers are known (stages.cpp).
#pragma once

#include "moesaic/stages.h"
#include "plan.h"

namespace moesaic {

// experts x capacity rows, which positions number with 32 bits.
void check_positions(std::int64_t experts, std::int64_t capacity);

// What prepare fills and finalize reads.
struct BatchedShape {
  std::int64_t tokens, capacity;
  Tensor rows;  // [E * capacity, H]
};
BatchedShape check_prepare(const LayerPlan& plan, const PrepareArgs& args);

struct ExpertsShape {
  std::int64_t tokens = 0;    // sorted only
  std::int64_t capacity = 0;  // batched: rows per expert; sorted: positions in the lists
  Tensor values;              // batched: [E * capacity, H]; sorted: [T, H]
  Tensor output;              // batched: [E * capacity, H]; sorted: [T * k, H]
};
// `fc1`: the small tensors beside its weights.
ExpertsShape check_experts(const LayerPlan& plan, const SideTensors& fc1, const ExpertsArgs& args);

BatchedShape check_finalize(const LayerPlan& plan, const FinalizeArgs& args);

}  // namespace moesaic
