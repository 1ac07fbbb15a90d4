// SPDX-License-Identifier: Apache-2.0
#include "harness/formats.h"

#include <algorithm>

#include "backend.h"
#include "harness/execute.h"
#include "scheme.h"

namespace moesaic::harness {

FormatRunner::FormatRunner(const Layer& layer, Format format, std::int64_t tokens,
                           std::int64_t capacity)
    : layer_(&layer), format_(format), tokens_(tokens) {
  const LayerConfig& c = layer.config();
  const Device device = layer.device();
  const std::int64_t local = c.local.count > 0 ? c.local.count : c.experts;
  const std::int64_t slots = tokens * c.top_k;
  capacity_ = std::max<std::int64_t>(capacity > 0 ? capacity : slots, 1);
  // Few rows per expert: small blocks, or most of a block is padding.
  block_rows_ = slots <= 16 * c.experts ? 16 : 64;
  if (format == Format::kStandard) {
    workspace_ = WorkspaceBuffer(device, layer.workspace_bytes(tokens));
    return;
  }
  // A slot's output as the layer itself keeps it: then all formats give the same bits.
  const DType slot_dtype = backend(device).slot_dtype(weight_spec(c, Product::kFc2));
  if (format == Format::kSorted) {
    const std::int64_t blocks =
        (align_capacity(slots, c.experts, block_rows_) + block_rows_ - 1) / block_rows_;
    const std::int64_t positions = blocks * block_rows_;
    workspace_ = WorkspaceBuffer(
        device, stage_workspace_bytes(c, {Format::kSorted, tokens, positions, device}));
    slots_ = DeviceTensor(device, DType::kI32, {positions});
    block_experts_ = DeviceTensor(device, DType::kI32, {blocks});
    num_padded_ = DeviceTensor(device, DType::kI32, {1});
    slot_outputs_ = DeviceTensor(device, slot_dtype, {tokens, c.top_k, c.hidden});
    align_workspace_ = WorkspaceBuffer(device, align_workspace_bytes(slots, c.experts, device));
    return;
  }
  const bool float_input = is_float(c.input_dtype);
  if (float_input && weight_spec(c, Product::kFc1).act_scale == ActScale::kTensorStatic)
    float_rows_ = float_rows(c);
  const LayerConfig& prepared = float_rows_ ? *float_rows_ : c;
  const StageShape shape{format, tokens, capacity_, device};
  workspace_ = WorkspaceBuffer(
      device, std::max(stage_workspace_bytes(c, shape), stage_workspace_bytes(prepared, shape)));
  const WeightSpec fc1 = weight_spec(prepared, Product::kFc1);
  rows_ = DeviceTensor(device, fc1.act_dtype, {local, capacity_, c.hidden});
  if (fc1.act_scale != ActScale::kDefault) {
    const bool tensor =
        fc1.act_scale == ActScale::kTensorStatic || fc1.act_scale == ActScale::kTensorDynamic;
    const std::int64_t groups =
        fc1.act_scale == ActScale::kGroup ? (c.hidden + fc1.act_group - 1) / fc1.act_group : 1;
    row_scale_ = DeviceTensor(device, DType::kF32, {local, tensor ? 1 : capacity_, groups});
  }
  num_tokens_ = DeviceTensor(device, DType::kI32, {local});
  slot_row_ = DeviceTensor(device, DType::kI32, {tokens, c.top_k});
  expert_outputs_ = DeviceTensor(device, slot_dtype, {local, capacity_, c.hidden});
}

SortedRows FormatRunner::sorted() const {
  return {.slots = slots_.view(),
          .block_experts = block_experts_.view(),
          .num_padded = num_padded_.view(),
          .block_rows = block_rows_};
}

void FormatRunner::before(const FormatInputs& in, Stream stream) const {
  const LayerConfig& c = layer_->config();
  if (format_ == Format::kSorted)
    align({.topk_ids = in.topk_ids,
           .experts = c.experts,
           .local = c.local,
           .rows = sorted(),
           .workspace = align_workspace_.view(),
           .stream = stream});
  if (format_ != Format::kBatched) return;
  const PrepareArgs prepared{.hidden_states = in.hidden_states,
                             .topk_ids = in.topk_ids,
                             .topk_weights = in.topk_weights,
                             .rows = rows_.view(),
                             .row_scale = row_scale_.view(),
                             .num_tokens = num_tokens_.view(),
                             .slot_row = slot_row_.view(),
                             .workspace = workspace_.view(),
                             .stream = stream};
  if (float_rows_)
    prepare(*float_rows_, prepared);
  else
    prepare(*layer_, prepared);
}

void FormatRunner::products(const FormatInputs& in, Stream stream) const {
  const LayerConfig& c = layer_->config();
  if (format_ == Format::kStandard) {
    layer_->forward({.hidden_states = in.hidden_states,
                     .hidden_scale = in.hidden_scale,
                     .topk_ids = in.router_logits.defined() ? Tensor{} : in.topk_ids,
                     .topk_weights = in.router_logits.defined() ? Tensor{} : in.topk_weights,
                     .router_logits = in.router_logits,
                     .output = in.output,
                     .workspace = workspace_.view(),
                     .stream = stream});
    return;
  }
  if (format_ == Format::kBatched) {
    experts(*layer_, {.format = Format::kBatched,
                      .rows = rows_.view(),
                      .row_scale = row_scale_.view(),
                      .batched = {.num_tokens = num_tokens_.view()},
                      .output = expert_outputs_.view(),
                      .expected_tokens = tokens_,
                      .workspace = workspace_.view(),
                      .stream = stream});
    return;
  }
  Tensor by_slot = slot_outputs_.view();  // [T, k, H] -> [T * k, H]
  by_slot.rank = 2;
  by_slot.shape = {tokens_ * c.top_k, c.hidden};
  by_slot.strides = {c.hidden, 1};
  Tensor weights = in.topk_weights;
  weights.rank = 1;
  weights.shape = {tokens_ * c.top_k};
  weights.strides = {1};
  // The routing weight belongs to the sum, as inside the layer; Llama-4's multiplies the input.
  const bool on_input = c.weight_on == WeightOn::kInput;
  experts(*layer_, {.format = Format::kSorted,
                    .rows = in.hidden_states,
                    .sorted = sorted(),
                    .row_weights = on_input ? weights : Tensor{},
                    .output = by_slot,
                    .workspace = workspace_.view(),
                    .stream = stream});
}

void FormatRunner::after(const FormatInputs& in, Stream stream) const {
  const bool on_input = layer_->config().weight_on == WeightOn::kInput;
  if (format_ == Format::kSorted)
    sum_slots({.input = slot_outputs_.view(),
               .topk_weights = on_input ? Tensor{} : in.topk_weights,
               .topk_ids = in.topk_ids,
               .output = in.output,
               .stream = stream});
  if (format_ == Format::kBatched)
    finalize(*layer_, {.expert_output = expert_outputs_.view(),
                       .topk_ids = in.topk_ids,
                       .topk_weights = in.topk_weights,
                       .slot_row = slot_row_.view(),
                       .output = in.output,
                       .workspace = workspace_.view(),
                       .stream = stream});
}

}  // namespace moesaic::harness
