// SPDX-License-Identifier: Apache-2.0
// Level 2: prepare, experts, finalize on either format, with a layer's packed weights or the
// caller's own. The same run_experts as the layer; only where rows come from differs.
#include "moesaic/stages.h"

#include <fmt/format.h>

#include <algorithm>

#include "check.h"
#include "experts.h"
#include "layer_check.h"
#include "layer_impl.h"
#include "stages_check.h"
#include "weights.h"

namespace moesaic {
namespace {

// --- workspaces: each stage's buffers, and (on an empty arena) their size ------------------------

struct PrepareBuffers {
  RowMap rows;
  std::int32_t* slot_row = nullptr;
  void* align_scratch = nullptr;
  void* quantize_scratch = nullptr;
};
PrepareBuffers take_prepare(Arena& arena, const LayerPlan& plan, std::int64_t tokens,
                            std::int64_t capacity) {
  const std::int64_t experts = plan.fc1.experts, positions = experts * capacity;
  const std::int64_t slots = tokens * plan.config.top_k;
  PrepareBuffers b;
  b.rows = take_row_map(arena, positions, experts, slots);
  set_tile_rows(b.rows, experts, plan.backend->tile_rows(plan.fc1, slots));
  b.rows.row_slot = arena.take<std::int32_t>(positions);
  b.slot_row = arena.take<std::int32_t>(slots);
  b.align_scratch = arena.take(plan.backend->align_scratch_bytes(slots, plan.config.experts));
  b.quantize_scratch = arena.take(plan.backend->quantize_scratch_bytes(positions, experts));
  return b;
}

struct ExpertsStageBuffers {
  RowMap rows;
  InputBuffers input;
  ExpertsBuffers experts;
};
ExpertsStageBuffers take_experts(Arena& arena, const LayerPlan& plan, Format format,
                                 std::int64_t tokens, std::int64_t capacity) {
  const std::int64_t experts = plan.fc1.experts;
  const std::int64_t positions = format == Format::kBatched ? experts * capacity : capacity;
  const std::int64_t slots = format == Format::kBatched ? positions : tokens * plan.config.top_k;
  ExpertsStageBuffers b;
  b.rows = take_row_map(arena, positions, format == Format::kBatched ? experts : positions, slots);
  LayerPlan any_input = plan;  // rows may come as floats even where the layer's input is 8 bit
  if (plan.fc1.act_scale != ActScale::kDefault) any_input.config.input_dtype = plan.fc1.dtype16;
  b.input = take_input_buffers(
      arena, any_input,
      {.tokens = format == Format::kBatched ? positions : tokens, .positions = positions});
  b.experts = take_experts_buffers(arena, plan, positions);
  return b;
}

struct FinalizeBuffers {
  std::int32_t* slot_row = nullptr;
  void* align_scratch = nullptr;
};
FinalizeBuffers take_finalize(Arena& arena, const LayerPlan& plan, std::int64_t tokens) {
  const std::int64_t slots = tokens * plan.config.top_k;
  return {
      .slot_row = arena.take<std::int32_t>(slots),
      .align_scratch = arena.take(plan.backend->align_scratch_bytes(slots, plan.config.experts))};
}

template <typename Take>
std::size_t counted(Take&& take) {
  Arena arena;
  take(arena);
  return arena.used();
}

// --- the stages ----------------------------------------------------------------------------------

void run_prepare(const LayerPlan& plan, const PrepareArgs& args) {
  const LayerConfig& config = plan.config;
  const BatchedShape shape = check_prepare(plan, args);
  const std::int64_t tokens = shape.tokens, capacity = shape.capacity;
  check_workspace(args.workspace,
                  counted([&](Arena& a) { take_prepare(a, plan, tokens, capacity); }),
                  "stage_workspace_bytes");

  Arena arena(args.workspace.data);
  const PrepareBuffers b = take_prepare(arena, plan, tokens, capacity);
  auto* const slot_row = args.slot_row.defined() ? args.slot_row.as<std::int32_t>() : b.slot_row;
  // Rows that are the same for all slots of a token may be read once and written to all its
  // positions: nobody needs the lists then.
  const ActScale granularity = plan.fc1.act_scale;
  const bool on_input = config.weight_on == WeightOn::kInput;
  const bool scatter = !on_input && plan.backend->scatters_rows(granularity, tokens * config.top_k);
  RowMap rows_of_slots = b.rows;
  if (scatter) rows_of_slots = {.positions = b.rows.positions, .slot_count = b.rows.slot_count};
  plan.backend->align({.topk_ids = args.topk_ids,
                       .experts = config.experts,
                       .local = config.local,
                       .expert_map = args.expert_map,
                       .capacity = capacity,
                       .rows = rows_of_slots,
                       .slot_row = slot_row,
                       .tokens_per_expert = args.num_tokens.as<std::int32_t>(),
                       .dropped = args.status.as<std::int32_t>(),
                       .scratch = b.align_scratch},
                      args.stream);
  if (tokens == 0) return;
  plan.backend->quantize({.input = args.hidden_states,
                          .input_scale = caller_scale_view(plan.fc1, args.hidden_scale),
                          .rows = scatter ? nullptr : &b.rows,
                          .slot_row = scatter ? slot_row : nullptr,
                          .source = scatter ? RowOf::kPosition : RowOf::kToken,
                          .top_k = config.top_k,
                          .row_weights = on_input ? args.topk_weights.as<float>() : nullptr,
                          .round_to = plan.fc1.dtype16,
                          .granularity = granularity,
                          .group = plan.fc1.act_group,
                          .int8_rounding = plan.fc1.int8_rounding,
                          .per_expert_absmax = true,
                          .output = shape.rows,
                          .scale = args.row_scale.as<float>(),
                          .scale_row_stride = scale_row_stride(plan.fc1),
                          .scratch = b.quantize_scratch},
                         args.stream);
}

void run_experts_stage(LayerPlan plan, const WeightOperand& fc1, const WeightOperand& fc2,
                       TacticPair tactics, const ExpertsArgs& args) {
  const LayerConfig& config = plan.config;
  const ExpertsShape shape = check_experts(plan, fc1.side, args);
  plan.config.input_dtype =
      args.rows.dtype;  // rows may be quantized where the layer's input is not
  const std::int64_t tokens = shape.tokens, capacity = shape.capacity;
  const bool batched = args.format == Format::kBatched;
  const std::int64_t experts = plan.fc1.experts;
  check_workspace(args.workspace,
                  counted([&](Arena& a) { take_experts(a, plan, args.format, tokens, capacity); }),
                  "stage_workspace_bytes");

  Arena arena(args.workspace.data);
  ExpertsStageBuffers b = take_experts(arena, plan, args.format, tokens, capacity);
  TileStage tiles{
      .sorted = args.sorted, .batched = args.batched, .capacity = capacity, .experts = experts};
  if (batched) {
    tiles.sorted = {};
  } else {
    tiles.batched = {};
    b.rows.row_slot = args.sorted.slots.as<std::int32_t>();
  }
  if (b.rows.positions == 0) return;
  if (batched) {
    // The host does not know how many rows are live: the caller may say what it expects.
    // (Cut before it is multiplied: a hint may be any number.)
    const std::int64_t hint = args.expected_tokens > 0 ? args.expected_tokens : b.rows.positions;
    b.rows.slot_count = std::min(std::min(hint, b.rows.positions) * config.top_k, b.rows.positions);
    set_tile_rows(b.rows, experts, plan.backend->tile_rows(plan.fc1, b.rows.slot_count));
  } else {
    set_tile_rows_of_blocks(b.rows, args.sorted,
                            plan.backend->tile_rows(plan.fc1, b.rows.slot_count));
  }
  ExpertsRun run{.plan = &plan, .fc1 = &fc1, .fc2 = &fc2, .rows = b.rows, .tactics = tactics};
  // Blocks are tiles already, where small tiles are wanted anyway.
  if (!batched) run.unlisted = unlisted_blocks(b.rows, args.sorted);
  if (products_make_tiles(run)) {
    run.rows = tiles_of_blocks(b.rows, args.sorted);
  } else {
    run.unlisted = {};
    tiles.rows = b.rows;
    plan.backend->tiles(tiles, args.stream);
  }

  const bool on_input = config.weight_on == WeightOn::kInput && !batched;
  const auto* weights = args.row_weights.as<float>();
  const bool per_expert = batched;
  run.input = prepare_input({.plan = &plan,
                             .fc1 = &fc1,
                             .rows = &b.rows,
                             .input = {.values = shape.values,
                                       .scale = caller_scale_view(plan.fc1, args.row_scale),
                                       .row = batched ? RowOf::kPosition : RowOf::kToken},
                             .row_weights = on_input ? weights : nullptr,
                             .per_expert_absmax = per_expert},
                            b.input, args.stream);
  run.per_expert_absmax = per_expert;
  run.row_weights = on_input ? nullptr : weights;
  run.output = shape.output;
  run.output_row = batched ? RowOf::kPosition : RowOf::kSlot;
  run_experts(run, b.experts, args.stream);
}

void run_finalize(const LayerPlan& plan, const FinalizeArgs& args) {
  const LayerConfig& config = plan.config;
  const BatchedShape shape = check_finalize(plan, args);
  const std::int64_t tokens = shape.tokens, capacity = shape.capacity;
  const std::int32_t* slot_row = args.slot_row.as<std::int32_t>();
  if (!args.slot_row.defined()) {
    check_workspace(args.workspace, counted([&](Arena& a) { take_finalize(a, plan, tokens); }),
                    "stage_workspace_bytes");
    if (tokens == 0) return;
    Arena arena(args.workspace.data);
    const FinalizeBuffers b = take_finalize(arena, plan, tokens);
    const std::int64_t positions = plan.fc1.experts * capacity, slots = tokens * config.top_k;
    plan.backend->align({.topk_ids = args.topk_ids,
                         .experts = config.experts,
                         .local = config.local,
                         .expert_map = args.expert_map,
                         .capacity = capacity,
                         .rows = {.positions = positions, .slot_count = slots},
                         .slot_row = b.slot_row,
                         .scratch = b.align_scratch},
                        args.stream);
    slot_row = b.slot_row;
  }
  if (tokens == 0) return;
  plan.backend->combine(
      {.rows = shape.rows,
       .slot_row = slot_row,
       .weights = config.weight_on == WeightOn::kOutput ? args.topk_weights.as<float>() : nullptr,
       .top_k = config.top_k,
       .accumulate = args.accumulate,
       .output = args.output},
      args.stream);
}

}  // namespace

void prepare(const Layer& layer, const PrepareArgs& args) {
  const Layer::Impl& self = layer.impl();
  if (self.plan.quantizes_input() && self.fc1.operand().side.prequant.defined())
    unsupported(
        "prepare: fc1.prequant multiplies rows before they are quantized, which experts does; "
        "prepare with the configuration of a 16-bit scheme, and hand its rows to experts");
  run_prepare(self.plan, args);
}

void experts(const Layer& layer, const ExpertsArgs& args) {
  const Layer::Impl& self = layer.impl();
  check_ready(self, "experts");
  run_experts_stage(self.plan, self.fc1.operand(), self.fc2.operand(), self.tactics, args);
}

void finalize(const Layer& layer, const FinalizeArgs& args) {
  run_finalize(layer.impl().plan, args);
}

void prepare(const LayerConfig& config, const PrepareArgs& args) {
  run_prepare(make_plan(config, args.hidden_states.device), args);
}

void experts(const LayerConfig& config, const LayerWeights& weights, const ExpertsArgs& args) {
  const LayerPlan plan = make_plan(config, args.rows.device);
  const auto operand = [&](const WeightSpec& spec, const GemmWeights& given,
                           const ActivationWeights& activation, std::string_view argument) {
    WeightOperand b{.spec = spec, .plain = normalize(spec, spec.experts, given, argument)};
    check_in_place(plan.device, given, activation, argument);
    b.side = side_views(spec, spec.experts, b.plain, activation, argument);
    return b;
  };
  const WeightOperand fc1 = operand(plan.fc1, weights.fc1, weights.activation, "fc1");
  const WeightOperand fc2 = operand(plan.fc2, weights.fc2, {}, "fc2");
  run_experts_stage(plan, fc1, fc2, {}, args);
}

void finalize(const LayerConfig& config, const FinalizeArgs& args) {
  run_finalize(make_plan(config, args.output.device), args);
}

std::size_t stage_workspace_bytes(const LayerConfig& config, const StageShape& shape) {
  const std::int64_t tokens = shape.tokens, capacity = shape.capacity;
  check_range("tokens", tokens, 0, INT64_C(0x7fffffff) / std::max<std::int64_t>(1, config.top_k));
  check_range("capacity", capacity, 0, INT64_C(0x7fffffff));
  const LayerPlan plan = make_plan(config, shape.device);
  if (shape.format == Format::kSorted)
    return counted([&](Arena& a) { take_experts(a, plan, shape.format, tokens, capacity); });
  check_positions(plan.fc1.experts, capacity);
  return std::max({counted([&](Arena& a) { take_prepare(a, plan, tokens, capacity); }),
                   counted([&](Arena& a) { take_experts(a, plan, Format::kBatched, 0, capacity); }),
                   counted([&](Arena& a) { take_finalize(a, plan, tokens); })});
}

}  // namespace moesaic
