// SPDX-License-Identifier: Apache-2.0
// What the host sides of the SM90 families share: how a stage becomes Params, tensor maps and a
// grid.
#pragma once

#include <string>

#include "cuda/gemm.h"
#include "cuda/gemm_sm90.h"
#include "divide.h"

namespace moesaic::cuda::sm90 {

bool aligned(const void* data, std::size_t bytes);

// What a kernel does at a time.
struct TaskShape {
  int tokens = 0, rows = 0;  // of a task
  int run = 1;               // such tasks one after another, of the same tokens
  int pair = 1;              // CTAs that run it together
  int per_sm = 1;            // CTAs that fit into an SM
  int box = 0;               // tokens of a TMA load
};
template <typename S>
constexpr TaskShape task_shape(int rows = S::kRows) {
  return {.tokens = S::kTokens * S::kPair,
          .rows = rows,
          .pair = S::kPair,
          .per_sm = S::kPerSm,
          .box = S::kBox};
}
std::string describe(const TaskShape& task);

// Everything but weights and scales; `element`: of the tokens (f16 and bf16 are the same here).
// Throws kUnsupported by name.
void set_stage(Params& p, const GemmStage& stage, Element element, const TaskShape& task);

// How TMA fetches weight rows. Packed weights are bytes: kE4M3.
struct WeightBox {
  Element element;
  std::int64_t row_k;  // elements of a row
  int k, rows;         // of a box
  CUtensorMapSwizzle swizzle = CU_TENSOR_MAP_SWIZZLE_128B;
};
void set_weights(Params& p, const GemmStage& stage, const WeightBox& box);  // behind set_stage

// CTAs to launch; and how many tiles they walk together.
int grid_size(Params& p, const TaskShape& task, const DeviceTraits& device);

}  // namespace moesaic::cuda::sm90
