// SPDX-License-Identifier: Apache-2.0
#include "plan.h"

#include <fmt/format.h>

#include <algorithm>
#include <limits>

#include "check.h"

namespace moesaic {
namespace {

void check_dtypes(const LayerConfig& config) {
  const SchemeTraits& scheme = traits(config.quant.scheme);
  const auto refuse_input = [&](std::string_view expected) {
    unsupported(
        fmt::format("input_dtype: scheme {} takes {}, not {}; convert the activations or choose "
                    "another scheme",
                    scheme.name, expected, name(config.input_dtype)));
  };
  const DType in = config.input_dtype;
  switch (config.quant.scheme) {
    case Scheme::kF32:
      if (in != DType::kF32) refuse_input("f32");
      break;
    case Scheme::kF16:
      if (in != DType::kF16) refuse_input("f16");
      break;
    case Scheme::kBF16:
      if (in != DType::kBF16) refuse_input("bf16");
      break;
    default: {
      const bool eight_bit = (scheme.act == ActFormat::kE4M3 && in == DType::kF8E4M3) ||
                             (scheme.act == ActFormat::kI8 && in == DType::kI8);
      if (!is_16bit(in) && !eight_bit)
        refuse_input(scheme.act == ActFormat::kE4M3 ? "f16, bf16 or fp8_e4m3"
                     : scheme.act == ActFormat::kI8 ? "f16, bf16 or i8"
                                                    : "f16 or bf16");
      if (eight_bit && config.weight_on == WeightOn::kInput)
        unsupported(
            "weight_on: routing weights cannot multiply an input that is already 8 bit; pass "
            "16-bit hidden_states");
    }
  }
  if (!is_float(config.output_dtype))
    unsupported(fmt::format(
        "output_dtype: expected f32, f16 or bf16, got {}; convert the output afterwards",
        name(config.output_dtype)));
}

}  // namespace

void check_routing(const RoutingSpec& r, std::int64_t experts, std::int64_t top_k) {
  check_enum("routing.method", r.method, kNumRoutingMethods);
  check_enum("routing.renormalize", r.renormalize, 3);
  check_range("top_k", top_k, 1, std::min(experts, kMaxTopK));
  const bool grouped =
      r.method == RoutingMethod::kDeepSeekV2 || r.method == RoutingMethod::kDeepSeekV3;
  if (grouped) {
    check_range("routing.groups", r.groups, 1, experts);
    if (experts % r.groups != 0)
      invalid(fmt::format(
          "routing.groups: expected a divisor of {} experts, got {}; the model's n_group is one",
          experts, r.groups));
    check_range("routing.topk_groups", r.topk_groups, 1, r.groups);
    if (top_k > r.topk_groups * (experts / r.groups))
      invalid(
          fmt::format("top_k: expected at most {}, the experts of {} chosen groups, got {}; raise "
                      "routing.topk_groups",
                      r.topk_groups * (experts / r.groups), r.topk_groups, top_k));
  }
  if (r.method == RoutingMethod::kLlama4 && top_k != 1)
    invalid(fmt::format(
        "top_k: routing llama4 picks 1 expert, not {}; set top_k to 1, or take another routing",
        top_k));
  if (r.method == RoutingMethod::kSparseMixer && top_k != 2)
    invalid(
        fmt::format("top_k: routing sparsemixer picks 2 experts, not {}; set top_k to 2, or take "
                    "another routing",
                    top_k));
}

void check_selection_bias(const RoutingSpec& spec, const Tensor& bias) {
  if (bias.defined() && spec.method == RoutingMethod::kSparseMixer)
    unsupported(
        "router.selection_bias: routing sparsemixer has none; add it to the logits (router.bias), or "
        "take another routing");
}

void check_activation(const ActivationSpec& spec) {
  check_enum("activation.kind", spec.kind, kNumActivations);
  check_enum("activation.order", spec.order, 2);
  check_enum("activation.layout", spec.layout, 2);
}

LayerPlan make_plan(const LayerConfig& config, Device device) {
  return make_plan(config, backend(device), device);
}

LayerPlan make_plan(const LayerConfig& given, const Backend& backend, Device device) {
  LayerConfig config = given;
  check_range("experts", config.experts, 1, kMaxExperts);
  check_range("hidden", config.hidden, 1, INT64_C(1) << 24);
  check_range("intermediate", config.intermediate, 1, INT64_C(1) << 24);
  check_routing(config.routing, config.experts, config.top_k);
  check_activation(config.activation);
  check_enum("weight_on", config.weight_on, 2);
  check_enum("weight_storage", config.weight_storage, 2);
  check_range("max_tokens", config.max_tokens, 0,
              std::numeric_limits<std::int32_t>::max() / config.top_k);
  check_range("local.first", config.local.first, 0, config.experts - 1);
  if (config.local.count == 0) config.local.count = config.experts - config.local.first;
  check_range("local.count", config.local.count, 1, config.experts - config.local.first);
  check_range("shared_experts", config.shared_experts, 0, kMaxExperts);
  if (config.shared_experts > 0 && config.shared_intermediate == 0)
    config.shared_intermediate = config.shared_experts * config.intermediate;
  check_range("shared_intermediate", config.shared_intermediate, 0, INT64_C(1) << 24);
  check_dtypes(config);

  LayerPlan plan{.config = config, .backend = &backend, .device = device};
  plan.fc1 = weight_spec(config, Product::kFc1);
  plan.fc2 = weight_spec(config, Product::kFc2);
  if (config.workspace_cap > 0 && plan.fc1.act_scale == ActScale::kTensorDynamic)
    unsupported(
        "workspace_cap: dynamic per-tensor scales span the whole batch, so it cannot run in "
        "token chunks with the same bits; use a static act_scale or no cap");
  plan.slot_dtype = plan.backend->slot_dtype(plan.fc2);
  if (plan.quantizes_intermediate() && !may_have_prequant(plan.fc2.scheme))
    plan.intermediate_quantized_by =
        plan.backend->intermediate_quantized_by(plan.fc1, plan.fc2, config.activation);
  return plan;
}

LayerPlan make_shared_plan(const LayerPlan& plan) {
  LayerConfig config = plan.config;
  config.experts = config.top_k = 1;
  config.local = {};
  config.intermediate = config.shared_intermediate;
  config.shared_experts = config.shared_intermediate = 0;
  config.routing = {.method = RoutingMethod::kSigmoid};  // the optional gate: sigmoid(x . g)
  config.weight_on = WeightOn::kOutput;
  config.workspace_cap = 0;
  return make_plan(config, plan.device);
}

std::int64_t scale_row_stride(const WeightSpec& spec) {
  switch (spec.act_scale) {
    case ActScale::kToken:
      return 1;
    case ActScale::kGroup:
      return (spec.k + spec.act_group - 1) / spec.act_group;
    default:
      return 0;
  }
}

std::int64_t scale_count(const WeightSpec& spec, std::int64_t rows, std::int64_t experts) {
  const std::int64_t stride = scale_row_stride(spec);
  return stride > 0 ? rows * stride : experts;
}

ActScaleView scale_view(const WeightSpec& spec, const float* data, bool per_expert) {
  return {.data = data,
          .row_stride = scale_row_stride(spec),
          .group_stride = spec.act_scale == ActScale::kGroup ? 1 : 0,
          .expert_stride = per_expert ? 1 : 0};
}

ActScaleView caller_scale_view(const WeightSpec& spec, const Tensor& scale) {
  if (!scale.defined()) return {};
  ActScaleView view{.data = scale.as<float>()};
  if (scale.rank == 1) return view;
  const int row = scale.rank - 2;  // batched scales lead with the expert
  if (scale.rank == 3 && scale.shape[1] == 1) {
    view.expert_stride = scale.strides[0];
  } else {
    view.row_stride = scale.strides[row];
  }
  if (spec.act_scale == ActScale::kGroup) view.group_stride = scale.strides[row + 1];
  return view;
}

void check_activation_scale(std::string_view argument, const WeightSpec& spec, const Tensor& values,
                            const Tensor& scale, Device device) {
  if (is_float(values.dtype)) {
    if (scale.defined())
      invalid(fmt::format("{}: the activations are {}, which carry no scales; leave it undefined",
                          argument, name(values.dtype)));
    return;
  }
  const Check c = check(argument, scale);
  c.dtype({DType::kF32}).on(device);
  const bool per_tensor =
      spec.act_scale == ActScale::kTensorStatic || spec.act_scale == ActScale::kTensorDynamic;
  const std::int64_t groups = spec.act_scale == ActScale::kGroup ? scale_row_stride(spec) : 1;
  if (per_tensor && scale.rank == 1) {
    c.shape({1});
  } else if (values.rank == 2) {
    c.shape({values.shape[0], groups});
  } else {
    c.shape({values.shape[0], per_tensor ? 1 : values.shape[1], groups}).contiguous();
  }
}

bool must_expand(const LayerPlan& plan, const SideTensors* side) {
  if (plan.config.weight_on == WeightOn::kInput) return true;
  if (plan.quantizes_input() && plan.fc1.act_scale == ActScale::kTensorDynamic) return true;
  if (side == nullptr)
    return plan.fc1.act_scale == ActScale::kTensorStatic || may_have_prequant(plan.fc1.scheme);
  const bool per_expert_scale = plan.fc1.act_scale == ActScale::kTensorStatic &&
                                plan.quantizes_input() && side->input_scale.shape[0] > 1;
  const bool per_expert_factor =
      side->prequant.defined() && side->prequant.rank == 2 && side->prequant.shape[0] > 1;
  return per_expert_scale || per_expert_factor;
}

RowOf input_layout(const LayerPlan& plan, std::int64_t slots) {
  if (!is_float(plan.config.input_dtype)) return RowOf::kToken;
  return plan.backend->input_rows(plan.fc1, slots);
}

InputBuffers take_input_buffers(Arena& arena, const LayerPlan& plan, const InputRows& wanted) {
  InputBuffers b;
  const bool expand = must_expand(plan, nullptr) || wanted.layout == RowOf::kPosition;
  if (!plan.quantizes_input() && !expand) return b;
  const std::int64_t rows = expand ? wanted.positions : wanted.tokens;
  b.values = arena.take(plan.fc1.act_dtype, rows, plan.fc1.k, plan.device);
  b.scale = arena.take<float>(scale_count(plan.fc1, rows, plan.fc1.experts));
  b.scratch = arena.take(plan.backend->quantize_scratch_bytes(rows, plan.fc1.experts));
  return b;
}

ExpertsBuffers take_experts_buffers(Arena& arena, const LayerPlan& plan, std::int64_t positions) {
  const WeightSpec& fc2 = plan.fc2;
  ExpertsBuffers buffers;
  const bool staged = plan.intermediate_quantized_by != QuantizedBy::kGemm1;
  if (staged) buffers.intermediate = arena.take(fc2.dtype16, positions, fc2.k, plan.device);
  if (plan.quantizes_intermediate())
    buffers.intermediate_quantized = arena.take(fc2.act_dtype, positions, fc2.k, plan.device);
  if (plan.quantizes_intermediate() && staged) {
    buffers.intermediate_scale = arena.take<float>(scale_count(fc2, positions, fc2.experts));
    buffers.quantize_scratch =
        arena.take(plan.backend->quantize_scratch_bytes(positions, fc2.experts));
  }
  buffers.gemm_scratch = arena.take(std::max(plan.backend->gemm_scratch_bytes(plan.fc1, positions),
                                             plan.backend->gemm_scratch_bytes(fc2, positions)));
  return buffers;
}

Tensor as_rows(std::string_view argument, const Tensor& t) {
  if (t.rank == 2) return t;
  if (t.rank != 3)
    invalid(fmt::format("{}: expected rank 2 or 3, got {}; reshape it", argument, to_string(t)));
  if (t.shape[0] > 1 && t.numel() > 0 && t.strides[0] != t.shape[1] * t.strides[1])
    unsupported(fmt::format(
        "{}: the stride of the first dimension must be {} x the stride of the second; pass a "
        "view without gaps there",
        argument, t.shape[1]));
  Tensor rows = t;
  rows.rank = 2;
  rows.shape = {t.shape[0] * t.shape[1], t.shape[2]};
  rows.strides = {t.strides[1], t.strides[2]};
  return rows;
}

std::int64_t check_sorted_rows(const SortedRows& sorted, Device device) {
  check_range("sorted.block_rows", sorted.block_rows, 1, INT64_C(1) << 20);
  check("sorted.slots", sorted.slots).rank(1).dtype({DType::kI32}).contiguous().on(device);
  const std::int64_t capacity = sorted.slots.shape[0];
  check_range("sorted.slots: length", capacity, 0, INT64_C(0x7fffffff));
  const std::int64_t blocks = (capacity + sorted.block_rows - 1) / sorted.block_rows;
  const Check experts = check("sorted.block_experts", sorted.block_experts);
  experts.rank(1).dtype({DType::kI32}).contiguous().on(device);
  if (sorted.block_experts.shape[0] < blocks)
    invalid(
        fmt::format("sorted.block_experts: expected {} entries ({} slots in blocks of {}), got {}; "
                    "make it that long",
                    blocks, capacity, sorted.block_rows, to_string(sorted.block_experts)));
  check("sorted.num_padded", sorted.num_padded).dtype({DType::kI32}).on(device);
  if (sorted.num_padded.numel() != 1)
    invalid("sorted.num_padded: expected one element, got " + to_string(sorted.num_padded) +
            "; pass i32 [1]");
  return capacity;
}

RowMap take_row_map(Arena& arena, std::int64_t positions, std::int64_t experts,
                    std::int64_t slots) {
  RowMap rows{.positions = positions, .slot_count = slots};
  rows.tiles = arena.take<Tile>(max_tiles(positions, experts, kMinTileRows));
  rows.num_tiles = arena.take<std::int32_t>(1);
  return rows;
}

void set_tile_rows(RowMap& rows, std::int64_t experts, std::int64_t tile_rows) {
  rows.tile_rows = tile_rows;
  rows.max_tiles = max_tiles(rows.positions, experts, tile_rows);
}

void set_tile_rows_of_blocks(RowMap& rows, const SortedRows& sorted, std::int64_t tile_rows) {
  rows.tile_rows = tile_rows;
  const std::int64_t blocks = (rows.positions + sorted.block_rows - 1) / sorted.block_rows;
  rows.max_tiles = blocks * ((sorted.block_rows + tile_rows - 1) / tile_rows);
}

UnlistedRows unlisted_blocks(const RowMap& rows, const SortedRows& sorted) {
  if (sorted.block_rows > rows.tile_rows) return {};
  return {.block_experts = sorted.block_experts.as<std::int32_t>(),
          .num_padded = sorted.num_padded.as<std::int32_t>()};
}

RowMap tiles_of_blocks(const RowMap& rows, const SortedRows& sorted) {
  RowMap blocks = rows;
  blocks.tile_rows = sorted.block_rows;
  blocks.max_tiles = rows.positions / sorted.block_rows;  // a block that is cut off has no rows
  return blocks;
}

}  // namespace moesaic
