// SPDX-License-Identifier: Apache-2.0
// Between the lists and the sum: the rows that GEMM1 reads, and both products. Shared by the layer, the
// stages and grouped_gemm.
#pragma once

#include "plan.h"

namespace moesaic {

// x -> rows that GEMM1 reads: as given, quantized, or expanded by position.
struct InputRun {
  const LayerPlan* plan = nullptr;
  const WeightOperand* fc1 = nullptr;
  const RowMap* rows = nullptr;
  Rows input;                          // as the caller holds it: kToken or kPosition
  const float* row_weights = nullptr;  // by slot, on the input; null with WeightOn::kOutput
  bool per_expert_absmax = false;
  RowOf layout = RowOf::kToken;             // kPosition: laid out by position ...
  const std::int32_t* slot_row = nullptr;   // ... through this, where the slots of a token do not differ
};
// What GEMM1 then reads, and the stage that makes it so, where one must.
struct InputStep {
  Rows rows;
  bool needed = false;
  QuantizeStage stage;
};
// GEMM1 reads the input where it lies: neither quantized, nor multiplied, nor laid out.
bool takes_input_as_it_is(const InputRun& run);
InputStep input_step(const InputRun& run, const InputBuffers& buffers);
Rows prepare_input(const InputRun& run, const InputBuffers& buffers, Stream stream);  // runs it

// Both products and the activation, on rows that a RowMap describes. Shared by the layer and the
// experts stage, whichever format the rows are in and whoever holds the weights.
struct ExpertsRun {
  const LayerPlan* plan = nullptr;
  const WeightOperand* fc1 = nullptr;
  const WeightOperand* fc2 = nullptr;
  RowMap rows;
  UnlistedRows unlisted;
  ListAge list_age = ListAge::kNew;   // of rows, when GEMM1 begins
  Rows input;
  bool per_expert_absmax = false;     // batched: dynamic per-tensor scales are per expert
  const float* row_weights = nullptr;  // by slot, multiplies the output
  Tensor output;
  RowOf output_row = RowOf::kPosition;
  std::int32_t* next_task = nullptr;  // [2], or null: zeros, a counter of tasks for each product
  TacticPair tactics{};
};
void run_experts(const ExpertsRun& run, const ExpertsBuffers& buffers, Stream stream);
// Whether both products can make the tiles of its unlisted rows themselves (Backend::makes_tiles), and
// nobody between them asks for a row's expert.
bool products_make_tiles(const ExpertsRun& run);

}  // namespace moesaic
