// SPDX-License-Identifier: Apache-2.0
#include "stages_check.h"

#include <fmt/format.h>

#include <algorithm>

#include "check.h"

namespace moesaic {
namespace {

// A [E, capacity, K] view as [E * capacity, K] rows, which is how positions address it.
Tensor flatten_batched(std::string_view argument, const Tensor& t) {
  check(argument, t).rank(3).inner_contiguous();
  return as_rows(argument, t);
}

void check_ids(const LayerConfig& config, const Tensor& ids, std::int64_t tokens, Device device) {
  check_range("topk_ids: tokens x top_k", checked_mul(tokens, config.top_k, "topk_ids"), 0,
              INT64_C(0x7fffffff));
  check("topk_ids", ids)
      .shape({tokens, config.top_k})
      .dtype({DType::kI32, DType::kI64})
      .contiguous()
      .on(device);
}
void check_expert_map(const LayerConfig& config, const Tensor& map, Device device) {
  if (map.defined())
    check("expert_map", map).shape({config.experts}).dtype({DType::kI32}).contiguous().on(device);
}

void check_routing_weights(const LayerConfig& config, const Tensor& weights, std::int64_t tokens,
                           Device device) {
  check("topk_weights", weights)
      .shape({tokens, config.top_k})
      .dtype({DType::kF32})
      .contiguous()
      .on(device);
}
void check_slot_row(const LayerConfig& config, const Tensor& slot_row, std::int64_t tokens,
                    Device device) {
  check("slot_row", slot_row)
      .shape({tokens, config.top_k})
      .dtype({DType::kI32})
      .contiguous()
      .on(device);
}

}  // namespace

void check_positions(std::int64_t experts, std::int64_t capacity) {
  check_range("rows: experts x capacity", checked_mul(experts, capacity, "rows"), 0,
              INT64_C(0x7fffffff));
}

BatchedShape check_prepare(const LayerPlan& plan, const PrepareArgs& args) {
  const LayerConfig& config = plan.config;
  const Device device = plan.device;
  check("hidden_states", args.hidden_states)
      .shape({kAny, config.hidden})
      .dtype({config.input_dtype})
      .inner_contiguous()
      .on(device);
  const std::int64_t tokens = args.hidden_states.shape[0];
  check_activation_scale("hidden_scale", plan.fc1, args.hidden_states, args.hidden_scale, device);
  check_ids(config, args.topk_ids, tokens, device);
  check_expert_map(config, args.expert_map, device);
  if (config.weight_on == WeightOn::kInput)
    check_routing_weights(config, args.topk_weights, tokens, device);
  const std::int64_t experts = plan.fc1.experts;
  check("rows", args.rows)
      .shape({experts, kAny, config.hidden})
      .dtype({plan.fc1.act_dtype})
      .distinct()
      .on(device);
  const std::int64_t capacity = args.rows.shape[1];
  check_positions(experts, capacity);
  const Tensor rows = flatten_batched("rows", args.rows);
  if (plan.fc1.act_scale != ActScale::kDefault) {
    const bool per_tensor = plan.fc1.act_scale == ActScale::kTensorStatic ||
                            plan.fc1.act_scale == ActScale::kTensorDynamic;
    if (per_tensor && args.hidden_scale.defined() && args.hidden_scale.numel() > 1)
      invalid(fmt::format(
          "hidden_scale: expected f32[1], since row_scale has one value per expert, got "
          "{}; quantize with one scale, or take a scheme with scales per token",
          to_string(args.hidden_scale)));
    const std::int64_t groups = std::max<std::int64_t>(1, scale_row_stride(plan.fc1));
    check("row_scale", args.row_scale)
        .shape({experts, per_tensor ? 1 : capacity, groups})
        .dtype({DType::kF32})
        .contiguous()
        .on(device);
    if (plan.fc1.act_scale == ActScale::kTensorStatic && plan.quantizes_input())
      unsupported(
          "prepare: a static activation scale belongs to the weights, which prepare does not see; "
          "hand 16-bit rows to experts, or quantize before prepare");
  }
  check("num_tokens", args.num_tokens)
      .shape({experts})
      .dtype({DType::kI32})
      .contiguous()
      .on(device);
  if (args.slot_row.defined()) check_slot_row(config, args.slot_row, tokens, device);
  if (args.status.defined())
    check("status", args.status).shape({1}).dtype({DType::kI32}).on(device);
  return {.tokens = tokens, .capacity = capacity, .rows = rows};
}

ExpertsShape check_experts(const LayerPlan& plan, const SideTensors& fc1, const ExpertsArgs& args) {
  const LayerConfig& config = plan.config;
  const Device device = plan.device;
  check_enum("format", args.format, 3);
  if (args.format == Format::kStandard)
    invalid("format: experts takes sorted or batched rows; standard is what Layer::forward does");
  const std::int64_t experts = plan.fc1.experts;
  const Check given = check("rows", args.rows);
  given.inner_contiguous().on(device);
  // 8-bit rows with scales, or floats that are quantized here.
  const DType eight_bit =
      plan.fc1.act_scale == ActScale::kDefault ? plan.fc1.dtype16 : plan.fc1.act_dtype;
  given.dtype({plan.fc1.dtype16, eight_bit});
  check("output", args.output)
      .dtype({DType::kF32, DType::kF16, DType::kBF16})
      .distinct()
      .on(device);

  ExpertsShape shape{.values = args.rows, .output = args.output};
  if (args.format == Format::kBatched) {
    given.shape({experts, kAny, config.hidden});
    shape.capacity = args.rows.shape[1];
    check_positions(experts, shape.capacity);
    check("output", args.output).shape({experts, shape.capacity, config.hidden});
    check("batched.num_tokens", args.batched.num_tokens)
        .shape({experts})
        .dtype({DType::kI32})
        .contiguous()
        .on(device);
    if (args.row_weights.defined())
      unsupported(
          "row_weights: routing weights are applied by finalize in the batched format; pass them "
          "there");
    shape.values = flatten_batched("rows", args.rows);
    shape.output = flatten_batched("output", args.output);
  } else {
    given.shape({kAny, config.hidden});
    shape.tokens = args.rows.shape[0];
    shape.capacity = check_sorted_rows(args.sorted, device);
    const std::int64_t slots = shape.tokens * config.top_k;
    check("output", args.output).shape({slots, config.hidden}).inner_contiguous();
    if (args.row_weights.defined()) {
      check("row_weights", args.row_weights).dtype({DType::kF32}).contiguous().on(device);
      if (args.row_weights.numel() != slots)
        invalid(fmt::format(
            "row_weights: expected {} values (one per slot), got {}; pass a weight for every slot",
            slots, to_string(args.row_weights)));
    }
  }
  check_activation_scale("row_scale", plan.fc1, args.rows, args.row_scale, device);
  if (!is_float(args.rows.dtype)) {  // nothing can be multiplied into quantized rows
    const auto refuse = [&](std::string_view what) {
      unsupported(
          fmt::format("{} multiplies rows before they are quantized, and these are {}; pass "
                      "{} rows",
                      what, name(args.rows.dtype), name(plan.fc1.dtype16)));
    };
    if (fc1.prequant.defined()) refuse("rows: fc1.prequant");
    if (config.weight_on == WeightOn::kInput && args.row_weights.defined())
      refuse("row_weights: weight_on is input, which");
  }
  return shape;
}

BatchedShape check_finalize(const LayerPlan& plan, const FinalizeArgs& args) {
  const LayerConfig& config = plan.config;
  const Device device = plan.device;
  check_enum("accumulate", args.accumulate, 2);
  check("output", args.output)
      .shape({kAny, config.hidden})
      .dtype({DType::kF32, DType::kF16, DType::kBF16})
      .inner_contiguous()
      .distinct()
      .on(device);
  const std::int64_t tokens = args.output.shape[0], experts = plan.fc1.experts;
  check("expert_output", args.expert_output)
      .shape({experts, kAny, config.hidden})
      .dtype({DType::kF32, DType::kF16, DType::kBF16})
      .on(device);
  const std::int64_t capacity = args.expert_output.shape[1];
  check_positions(experts, capacity);
  const Tensor rows = flatten_batched("expert_output", args.expert_output);
  if (config.weight_on == WeightOn::kOutput)
    check_routing_weights(config, args.topk_weights, tokens, device);
  if (args.slot_row.defined()) {
    check_slot_row(config, args.slot_row, tokens, device);
  } else {
    check_ids(config, args.topk_ids, tokens, device);
    check_expert_map(config, args.expert_map, device);
  }
  return {.tokens = tokens, .capacity = capacity, .rows = rows};
}

}  // namespace moesaic
