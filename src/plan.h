// SPDX-License-Identifier: Apache-2.0
// What happens between the stages: which buffers exist, how large they are, which stages a scheme
// needs. Decided once from the configuration, so that no stage asks which backend it runs on.
#pragma once

#include <cstddef>
#include <cstdint>

#include "backend.h"

namespace moesaic {

inline constexpr std::int64_t kMaxExperts = 2048;
inline constexpr std::int64_t kMaxTopK = 32;

// Carves a workspace into aligned pieces. On a null base it only counts: the size a caller is told
// and the layout forward uses come from the same lines.
class Arena {
 public:
  explicit Arena(void* base = nullptr) : base_(static_cast<char*>(base)) {}
  void* take(std::size_t bytes) {
    char* at = base_ ? base_ + used_ : nullptr;
    used_ += (bytes + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment;
    return at;
  }
  template <typename T>
  T* take(std::int64_t count) {
    return static_cast<T*>(take(static_cast<std::size_t>(count) * sizeof(T)));
  }
  Tensor take(DType dtype, std::int64_t rows, std::int64_t columns, Device device) {
    void* data = take(static_cast<std::size_t>(rows * columns) * size_of(dtype));
    return Tensor::contiguous(data, dtype, {rows, columns}, device);
  }
  std::size_t used() const { return used_; }

 private:
  char* base_;
  std::size_t used_ = 0;
};

// What a layer or a stage call is made of, apart from its tensors.
struct LayerPlan {
  LayerConfig config;       // local.count and shared_intermediate resolved
  const Backend* backend = nullptr;
  Device device{};
  WeightSpec fc1, fc2;
  DType slot_dtype = DType::kF32;
  QuantizedBy intermediate_quantized_by = QuantizedBy::kStage;  // quantizes_intermediate() only; kGemm1: there are no 16-bit rows

  bool quantizes_input() const { return fc1.act_scale != ActScale::kDefault && is_float(config.input_dtype); }
  bool quantizes_intermediate() const { return fc2.act_scale != ActScale::kDefault; }
};
// Checks the configuration (throws), resolves defaults, asks the backend.
LayerPlan make_plan(const LayerConfig& config, Device device);
// For a backend that need not be that of any device here.
LayerPlan make_plan(const LayerConfig& config, const Backend& backend, Device device);
// Options that contradict each other or the number of experts (throws).
void check_routing(const RoutingSpec& spec, std::int64_t experts, std::int64_t top_k);
// A selection bias with a method that has none (throws).
void check_selection_bias(const RoutingSpec& spec, const Tensor& bias);
// Enumerators that are none (throws).
void check_activation(const ActivationSpec& spec);
// The same layer's shared experts, as a layer of one expert that every token visits.
LayerPlan make_shared_plan(const LayerPlan& plan);

// Activations between two stages: values, their scales, and which row belongs to a position.
struct Rows {
  Tensor values;
  ActScaleView scale;
  RowOf row = RowOf::kPosition;
};

// Where x goes when GEMM1 cannot read it as given: quantized once per token, or expanded by position.
struct InputBuffers {
  Tensor values;
  float* scale = nullptr;
  void* scratch = nullptr;
};
struct InputRows {
  std::int64_t tokens = 0, positions = 0;
  RowOf layout = RowOf::kToken;  // kPosition: expanded whether it must be or not
};
InputBuffers take_input_buffers(Arena& arena, const LayerPlan& plan, const InputRows& rows);
// What GEMM1 of the standard format wants.
RowOf input_layout(const LayerPlan& plan, std::int64_t slots);
// Whether rows must be laid out by position before GEMM1, because two slots of one token differ in
// it. Without `side` (sizes are a function of the configuration) the larger case.
bool must_expand(const LayerPlan& plan, const SideTensors* side);

// The buffers of run_experts.
struct ExpertsBuffers {
  Tensor intermediate;         // [positions, intermediate] in the 16-bit dtype (f32: f32), unless GEMM1 quantizes
  Tensor intermediate_quantized;     // the same in e4m3 / int8, schemes with such activations
  float* intermediate_scale = nullptr;
  void* quantize_scratch = nullptr;
  void* gemm_scratch = nullptr;
};
ExpertsBuffers take_experts_buffers(Arena& arena, const LayerPlan& plan, std::int64_t positions);

// Floats of scale that `rows` quantized rows of width k carry, and how they are addressed.
std::int64_t scale_count(const WeightSpec& spec, std::int64_t rows, std::int64_t experts);
ActScaleView scale_view(const WeightSpec& spec, const float* data, bool per_expert);
std::int64_t scale_row_stride(const WeightSpec& spec);
// A caller's scales of 8-bit rows: [1] | [rows, 1] | [rows, groups]; batched: [1] | [E, 1 | capacity, 1 | groups].
ActScaleView caller_scale_view(const WeightSpec& spec, const Tensor& scale);
// Checks them against the rows they belong to; float rows have none.
void check_activation_scale(std::string_view argument, const WeightSpec& spec, const Tensor& values,
                            const Tensor& scale, Device device);

// A rank-3 view [a, b, K] as rows [a * b, K]; rank 2 is rows already. Throws for other ranks, and
// where one row stride does not reach every row.
Tensor as_rows(std::string_view argument, const Tensor& tensor);

// Checks a caller's sorted lists; returns the length of `slots`.
std::int64_t check_sorted_rows(const SortedRows& sorted, Device device);

// Takes the arrays of a RowMap with room for `positions` rows in tiles of any size from kMinTileRows
// on: the size of a workspace must not depend on which tile a policy picks.
inline constexpr std::int64_t kMinTileRows = 8;
RowMap take_row_map(Arena& arena, std::int64_t positions, std::int64_t experts, std::int64_t slots);
void set_tile_rows(RowMap& rows, std::int64_t experts, std::int64_t tile_rows);
// The same for a caller's blocks, which may each be a tile of their own (or several).
void set_tile_rows_of_blocks(RowMap& rows, const SortedRows& sorted, std::int64_t tile_rows);
// A caller's blocks as they are, for products that make their tiles themselves (Backend::makes_tiles): none where
// the tiles wanted (`rows`) are smaller than a block. And the same rows with a tile for each block.
UnlistedRows unlisted_blocks(const RowMap& rows, const SortedRows& sorted);
RowMap tiles_of_blocks(const RowMap& rows, const SortedRows& sorted);

}  // namespace moesaic
