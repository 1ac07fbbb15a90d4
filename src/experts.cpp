// SPDX-License-Identifier: Apache-2.0
//   x -> quantize -> GEMM1 (gather, activation) -> quantize -> GEMM2
#include "experts.h"

namespace moesaic {

bool takes_input_as_it_is(const InputRun& run) {
  const LayerPlan& plan = *run.plan;
  const bool quantizes =
      plan.fc1.act_scale != ActScale::kDefault && is_float(run.input.values.dtype);
  const bool lay_out = run.layout == RowOf::kPosition && run.input.row == RowOf::kToken;
  return !quantizes && !lay_out && !run.fc1->side.prequant.defined() &&
         !(run.row_weights != nullptr && plan.config.weight_on == WeightOn::kInput);
}

InputStep input_step(const InputRun& run, const InputBuffers& buffers) {
  if (takes_input_as_it_is(run)) return {.rows = run.input};
  const LayerPlan& plan = *run.plan;
  const SideTensors& side = run.fc1->side;
  const Tensor& x = run.input.values;
  const bool quantizes = plan.fc1.act_scale != ActScale::kDefault && is_float(x.dtype);
  // Per position: what differs between a token's slots, and batched rows, of which only some live.
  const bool differ = must_expand(plan, &side);
  const bool lay_out = run.layout == RowOf::kPosition && run.input.row == RowOf::kToken;
  const bool by_position = differ || lay_out || run.input.row == RowOf::kPosition;
  // Read once and written to all its positions, instead of read again for each.
  const bool scatter = lay_out && !differ && run.slot_row != nullptr;
  Tensor output = buffers.values;
  output.shape[0] = by_position ? run.rows->positions : x.shape[0];
  InputStep step{.needed = true};
  step.stage = {.input = x,
                .input_scale = run.input.scale,
                .rows = by_position && !scatter ? run.rows : nullptr,
                .slot_row = scatter ? run.slot_row : nullptr,
                .source = by_position && !scatter ? run.input.row : RowOf::kPosition,
                .top_k = plan.config.top_k,
                .row_weights = run.row_weights,
                .prequant = side.prequant,
                .round_to = plan.fc1.dtype16,
                .granularity = quantizes ? plan.fc1.act_scale : ActScale::kDefault,
                .group = plan.fc1.act_group,
                .int8_rounding = plan.fc1.int8_rounding,
                .static_scale = side.input_scale,
                .per_expert_absmax = run.per_expert_absmax,
                .output = output,
                .scale = buffers.scale,
                .scale_row_stride = scale_row_stride(plan.fc1),
                .scratch = buffers.scratch};
  // Scales by row already tell experts apart.
  const bool per_expert =
      (run.per_expert_absmax && plan.fc1.act_scale == ActScale::kTensorDynamic) ||
      (by_position && side.input_scale.defined() && side.input_scale.shape[0] > 1);
  step.rows = {
      .values = output,
      .scale = quantizes ? scale_view(plan.fc1, buffers.scale, per_expert) : ActScaleView{},
      .row = by_position ? RowOf::kPosition : run.input.row};
  return step;
}

Rows prepare_input(const InputRun& run, const InputBuffers& buffers, Stream stream) {
  const InputStep step = input_step(run, buffers);
  if (step.needed) run.plan->backend->quantize(step.stage, stream);
  return step.rows;
}

namespace {

// What GEMM1 left in 16 bit -> rows that GEMM2 reads: as they are, quantized, or multiplied by a
// factor per channel.
Rows prepare_intermediate(const ExpertsRun& run, const ExpertsBuffers& buffers, Stream stream) {
  const LayerPlan& plan = *run.plan;
  const SideTensors& side = run.fc2->side;
  const bool quantizes = plan.quantizes_intermediate();
  if (!quantizes && !side.prequant.defined()) return {.values = buffers.intermediate};
  // Without lists the rows are all taken, those of no slot as well: nobody reads them.
  Tensor output = quantizes ? buffers.intermediate_quantized : buffers.intermediate,
         input = buffers.intermediate;
  const bool listed = !run.unlisted.any();
  if (!listed) input.shape[0] = output.shape[0] = run.rows.positions;
  QuantizeStage stage{.input = input,
                      .rows = listed ? &run.rows : nullptr,
                      .list_age = ListAge::kSettled,
                      .prequant = side.prequant,
                      .round_to = plan.fc2.dtype16,
                      .output = output};  // element-wise: in place
  if (quantizes) {
    stage.granularity = plan.fc2.act_scale;
    stage.group = plan.fc2.act_group;
    stage.int8_rounding = plan.fc2.int8_rounding;
    stage.static_scale = side.input_scale;
    stage.per_expert_absmax = run.per_expert_absmax;
    stage.scale = buffers.intermediate_scale;
    stage.scale_row_stride = scale_row_stride(plan.fc2);
    stage.scratch = buffers.quantize_scratch;
  }
  plan.backend->quantize(stage, stream);
  if (!quantizes) return {.values = buffers.intermediate};
  const bool per_expert =
      (plan.fc2.act_scale == ActScale::kTensorDynamic && run.per_expert_absmax) ||
      (plan.fc2.act_scale == ActScale::kTensorStatic && side.input_scale.shape[0] > 1);
  return {.values = buffers.intermediate_quantized,
          .scale = scale_view(plan.fc2, buffers.intermediate_scale, per_expert)};
}

// GEMM1 writes 8-bit rows, if the backend does so for this stage.
bool let_gemm1_quantize(const ExpertsRun& run, const ExpertsBuffers& buffers, GemmStage* gemm1) {
  const LayerPlan& plan = *run.plan;
  if (plan.intermediate_quantized_by == QuantizedBy::kStage) return false;
  GemmStage stage = *gemm1;
  stage.c = buffers.intermediate_quantized;
  stage.quantizer = {.granularity = plan.fc2.act_scale,
                     .round_to = plan.fc2.dtype16,
                     .static_scale = run.fc2->side.input_scale,
                     .scale = buffers.intermediate_scale,
                     .scale_row_stride = scale_row_stride(plan.fc2)};
  if (plan.intermediate_quantized_by == QuantizedBy::kEither &&
      !plan.backend->gemm1_quantizes(stage))
    return false;
  *gemm1 = stage;
  return true;
}
// What it wrote. Static scales came with the weights.
Rows quantized_intermediate(const ExpertsRun& run, const ExpertsBuffers& buffers) {
  Rows rows{.values = buffers.intermediate_quantized};
  const Tensor& given = run.fc2->side.input_scale;
  if (given.defined()) {
    rows.scale = {.data = given.as<float>(),
                  .expert_stride = given.shape[0] > 1 ? given.strides[0] : 0};
  } else {
    rows.scale = scale_view(run.plan->fc2, buffers.intermediate_scale, /*per_expert=*/false);
  }
  return rows;
}

}  // namespace

bool products_make_tiles(const ExpertsRun& run) {
  const LayerPlan& plan = *run.plan;
  const SideTensors& side = run.fc2->side;
  const bool one_scale = !side.input_scale.defined() || side.input_scale.shape[0] == 1 ||
                         plan.intermediate_quantized_by == QuantizedBy::kGemm1;
  // A maximum of all rows must not see those of no slot.
  const bool shared_maximum = plan.fc2.act_scale == ActScale::kTensorDynamic;
  const bool staged =
      plan.quantizes_intermediate() && plan.intermediate_quantized_by != QuantizedBy::kGemm1;
  return !must_expand(plan, &run.fc1->side) && !side.prequant.defined() && one_scale &&
         !shared_maximum && run.tactics.gemm1 < 0 && run.tactics.gemm2 < 0 &&
         plan.backend->makes_tiles(plan.fc1, run.rows, run.unlisted, staged) &&
         plan.backend->makes_tiles(plan.fc2, run.rows, run.unlisted, staged);
}

void run_experts(const ExpertsRun& run, const ExpertsBuffers& buffers, Stream stream) {
  const LayerPlan& plan = *run.plan;
  const Backend& backend = *plan.backend;
  GemmStage gemm1{.rows = run.rows,
                  .unlisted = run.unlisted,
                  .list_age = run.list_age,
                  .a = run.input.values,
                  .a_scale = run.input.scale,
                  .a_row = run.input.row,
                  .top_k = plan.config.top_k,
                  .b = run.fc1,
                  .activation = &plan.config.activation,
                  .c = buffers.intermediate,
                  .next_task = run.next_task,
                  .tactic = run.tactics.gemm1,
                  .scratch = buffers.gemm_scratch};
  const bool quantized = let_gemm1_quantize(run, buffers, &gemm1);
  backend.gemm(gemm1, stream);
  const Rows intermediate =
      quantized ? quantized_intermediate(run, buffers) : prepare_intermediate(run, buffers, stream);
  backend.gemm({.rows = run.rows,
                .unlisted = run.unlisted,
                .list_age = ListAge::kSettled,
                .a = intermediate.values,
                .a_scale = intermediate.scale,
                .top_k = plan.config.top_k,
                .b = run.fc2,
                .row_weights = run.row_weights,
                .c = run.output,
                .c_row = run.output_row,
                .next_task = run.next_task != nullptr ? run.next_task + 1 : nullptr,
                .tactic = run.tactics.gemm2,
                .scratch = buffers.gemm_scratch},
               stream);
}

}  // namespace moesaic
