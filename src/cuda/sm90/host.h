// SPDX-License-Identifier: Apache-2.0
// What the host sides of the SM90 families share: how a stage becomes Params, tensor maps and a
// grid.
#pragma once

#include <string>

#include "cuda/gemm.h"
#include "cuda/sm90/gemm.h"
#include "divide.h"

namespace moesaic::cuda::sm90 {

bool aligned(const void* data, std::size_t bytes);

// What a kernel does at a time.
struct TaskShape {
  int tokens = 0, weight_rows = 0;  // of a task
  int run = 1;                      // such tasks one after another, of the same tokens
  int pair = 1;                     // CTAs that run it together
  int per_sm = 1;                   // CTAs that fit into an SM
  int box = 0;                      // tokens of a TMA load
};
template <typename S>
constexpr TaskShape task_shape(int weight_rows = S::kWeightRows) {
  return {.tokens = S::kTokens * S::kPair,
          .weight_rows = weight_rows,
          .pair = S::kPair,
          .per_sm = S::kPerSm,
          .box = S::kBox};
}
std::string describe(const TaskShape& task);
// As many tasks as one CTA (of those that share an SM) has in 128 KiB of weights, rows of
// `row_bytes`: then what the loading warps find out for each run takes them less time than the
// weights. More would only make the last wave longer.
std::int64_t run_of(std::int64_t row_bytes, const TaskShape& task);
// A run of at most `longest` of so many tasks, so short that every CTA still gets `least` runs.
int fair_run(std::int64_t longest, std::int64_t tasks, std::int64_t least, const TaskShape& task,
             const DeviceTraits& device);
inline constexpr std::int64_t kLongestRun = 8;

// Rows that begin at multiples of 16 bytes. Throws kUnsupported.
void check_rows(const Tensor& a);
// Everything but weights and scales; `element`: of the tokens (f16 and bf16 are the same here).
// Throws kUnsupported by name.
void set_arguments(Params& p, const GemmStage& stage, Element element, const TaskShape& task);

// How TMA fetches weight rows. Packed weights are bytes: kE4M3.
struct WeightBox {
  Element element;
  std::int64_t row_k;  // elements of a row
  int k, weight_rows;  // of a box
  CUtensorMapSwizzle swizzle = CU_TENSOR_MAP_SWIZZLE_128B;
};
void set_weights(Params& p, const GemmStage& stage, const WeightBox& box);  // behind set_arguments

// CTAs to launch; how many tiles they walk together; and whether the stage's counter deals out the
// tasks, which it does from so many bytes of K a run on. Behind set_arguments.
int grid_size(Params& p, const GemmStage& stage, const TaskShape& task, const DeviceTraits& device,
              std::int64_t least_dealt_bytes = 0);

}  // namespace moesaic::cuda::sm90
