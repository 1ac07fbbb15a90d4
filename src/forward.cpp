// SPDX-License-Identifier: Apache-2.0
//   logits -> route -> ids, weights -> align -> row map
//   x -> quantize -> GEMM1 (gather, activation) -> quantize -> GEMM2 -> combine -> y
#include "forward.h"

#include <algorithm>

#include "check.h"

namespace moesaic {
namespace {

struct RoutedBuffers {  // of one chunk of `tokens` tokens
  RowMap rows;
  std::int32_t* slot_row = nullptr;
  void* align_scratch = nullptr;
  InputBuffers input;
  ExpertsBuffers experts;
  Tensor output;  // [positions, H] in slot_dtype
};

struct Buffers {
  float* logits = nullptr;
  std::int32_t* ids = nullptr;
  float* weights = nullptr;
  void* count_scratch = nullptr;  // tokens per expert over all chunks
  RoutedBuffers routed, shared;
  float* shared_weight = nullptr;
};

RoutedBuffers take_routed(Arena& arena, const LayerPlan& plan, std::int64_t tokens) {
  const std::int64_t slots = tokens * plan.config.top_k, experts = plan.fc1.experts;
  RoutedBuffers b;
  b.rows = take_row_map(arena, slots, experts, slots);
  b.rows.row_slot = arena.take<std::int32_t>(slots);
  b.slot_row = arena.take<std::int32_t>(slots);
  b.align_scratch = arena.take(plan.backend->align_scratch_bytes(slots, plan.config.experts));
  b.input = take_input_buffers(
      arena, plan, {.tokens = tokens, .positions = slots, .layout = input_layout(plan, slots)});
  b.experts = take_experts_buffers(arena, plan, slots);
  b.output = arena.take(plan.slot_dtype, slots, plan.config.hidden, plan.device);
  return b;
}

Buffers take_buffers(Arena& arena, const LayerPlan& plan, const LayerPlan* shared,
                     std::int64_t tokens, std::int64_t chunk) {
  Buffers b;
  b.logits = arena.take<float>(chunk * plan.config.experts);
  b.ids = arena.take<std::int32_t>(tokens * plan.config.top_k);
  b.weights = arena.take<float>(tokens * plan.config.top_k);
  if (chunk < tokens)
    b.count_scratch = arena.take(
        plan.backend->align_scratch_bytes(tokens * plan.config.top_k, plan.config.experts));
  b.routed = take_routed(arena, plan, chunk);
  if (shared != nullptr) {
    b.shared = take_routed(arena, *shared, chunk);
    b.shared_weight = arena.take<float>(chunk);
  }
  return b;
}

std::size_t bytes_for(const LayerPlan& plan, const LayerPlan* shared, std::int64_t tokens,
                      std::int64_t chunk) {
  Arena arena;
  take_buffers(arena, plan, shared, tokens, chunk);
  return arena.used();
}

// The most tokens that run at once under the byte cap.
std::int64_t chunk_tokens(const LayerPlan& plan, const LayerPlan* shared, std::int64_t tokens) {
  const std::size_t cap = plan.config.workspace_cap;
  if (cap == 0 || tokens <= 1 || bytes_for(plan, shared, tokens, tokens) <= cap) return tokens;
  // A single token always fits: least_workspace_bytes was checked.
  std::int64_t low = 1, high = tokens;
  while (high - low > 1) {
    const std::int64_t middle = low + (high - low) / 2;
    (bytes_for(plan, shared, tokens, middle) <= cap ? low : high) = middle;
  }
  return low;
}

struct Chunk {
  Tensor x, x_scale, ids, weights, output;
  std::int32_t* tokens_per_expert = nullptr;
};

void forward_chunk(const LoadedLayer& layer, const ForwardArgs& args, const Chunk& chunk,
                   Buffers b) {
  const LayerPlan& plan = *layer.plan;
  const Backend& run = *plan.backend;
  const std::int64_t tokens = chunk.x.shape[0], slots = tokens * plan.config.top_k;
  RowMap& rows = b.routed.rows;
  rows.positions = rows.slot_count = slots;
  set_tile_rows(rows, plan.fc1.experts, run.tile_rows(plan.fc1, slots));
  const ActScaleView x_scale = caller_scale_view(plan.fc1, chunk.x_scale);
  const auto* weights = chunk.weights.as<float>();
  const bool on_input = plan.config.weight_on == WeightOn::kInput;
  const Rows x{.values = chunk.x, .scale = x_scale, .row = RowOf::kToken};
  const InputRun input_run{.plan = &plan,
                           .fc1 = layer.fc1,
                           .rows = &rows,
                           .input = x,
                           .row_weights = on_input ? weights : nullptr,
                           .layout = input_layout(plan, slots),
                           .slot_row = b.routed.slot_row};
  AlignStage align{.topk_ids = chunk.ids,
                   .experts = plan.config.experts,
                   .local = plan.config.local,
                   .rows = rows,
                   .slot_row = b.routed.slot_row,
                   .tokens_per_expert = chunk.tokens_per_expert,
                   .scratch = b.routed.align_scratch};
  const InputStep step = input_step(input_run, b.routed.input);
  const Rows& input = step.rows;
  // Rows that are quantized by token need no list, and align does not need them.
  const bool by_token = !must_expand(plan, &layer.fc1->side) && input_run.layout == RowOf::kToken;
  ExpertsRun experts{.plan = &plan,
                     .fc1 = layer.fc1,
                     .fc2 = layer.fc2,
                     .rows = rows,
                     .input = input,
                     .output = b.routed.output,
                     .tactics = layer.tactics};
  experts.unlisted = {.ids = chunk.ids.as<std::int32_t>(),
                      .first_expert = static_cast<std::int32_t>(plan.config.local.first)};
  const bool few = by_token && chunk.ids.dtype == DType::kI32 &&
                   chunk.tokens_per_expert == nullptr && products_make_tiles(experts);
  if (!few) experts.unlisted = {};
  if (few) {
    experts.output_row = RowOf::kSlot;
    if (step.needed) experts.list_age = ListAge::kSettled;  // the ids are older than that stage
    if (step.needed) run.quantize(step.stage, args.stream);
  } else if (step.needed && by_token) {
    align.ids_age = ListAge::kSettled;
    run.quantize_and_align(step.stage, align, args.stream);
  } else {
    run.align(align, args.stream);
    if (step.needed) run.quantize(step.stage, args.stream);
  }
  run_experts(experts, b.routed.experts, args.stream);

  CombineStage combine{.rows = b.routed.output,
                       .list_age = ListAge::kSettled,
                       .slot_row = few ? nullptr : b.routed.slot_row,
                       .topk_ids = experts.unlisted.ids,
                       .local = few ? plan.config.local : ExpertRange{},
                       .weights = on_input ? nullptr : weights,
                       .top_k = plan.config.top_k,
                       .accumulate = args.accumulate,
                       .output = chunk.output};
  if (layer.shared_plan != nullptr) {
    const LayerPlan& shared = *layer.shared_plan;
    RoutedBuffers& s = b.shared;
    s.rows.positions = s.rows.slot_count = tokens;
    set_tile_rows(s.rows, 1, run.tile_rows(shared.fc1, tokens));
    const Tensor ids = Tensor::contiguous(layer.shared_ids, DType::kI32, {tokens, 1}, plan.device);
    run.align({.topk_ids = ids,
               .experts = 1,
               .local = {0, 1},
               .rows = s.rows,
               .slot_row = s.slot_row,
               .scratch = s.align_scratch},
              args.stream);
    if (layer.shared_gate.defined()) {
      // The gate is a router of one expert: sigmoid(x . g). Its ids (all 0) go where nobody reads
      // them any more once align has run.
      run.route(
          {.spec = shared.config.routing,
           .hidden_states = chunk.x,
           .router = {.weight = layer.shared_gate},
           .logits_scratch = Tensor::contiguous(b.logits, DType::kF32, {tokens, 1}, plan.device),
           .topk_ids = Tensor::contiguous(s.slot_row, DType::kI32, {tokens, 1}, plan.device),
           .topk_weights =
               Tensor::contiguous(b.shared_weight, DType::kF32, {tokens, 1}, plan.device)},
          args.stream);
      combine.shared_weight = b.shared_weight;
    }
    const Rows shared_input =
        prepare_input({.plan = &shared, .fc1 = layer.shared_fc1, .rows = &s.rows, .input = x},
                      s.input, args.stream);
    run_experts({.plan = &shared,
                 .fc1 = layer.shared_fc1,
                 .fc2 = layer.shared_fc2,
                 .rows = s.rows,
                 .input = shared_input,
                 .output = s.output},
                s.experts, args.stream);
    combine.shared = s.output;
    combine.shared.shape[0] = tokens;
  }
  run.combine(combine, args.stream);
}

}  // namespace

InputStep input_step(const InputRun& run, const InputBuffers& buffers) {
  const LayerPlan& plan = *run.plan;
  const SideTensors& side = run.fc1->side;
  const Tensor& x = run.input.values;
  const bool quantizes = plan.fc1.act_scale != ActScale::kDefault && is_float(x.dtype);
  // Per position: what differs between a token's slots, and batched rows, of which only some live.
  const bool differ = must_expand(plan, &side);
  const bool lay_out = run.layout == RowOf::kPosition && run.input.row == RowOf::kToken;
  const bool by_position = differ || lay_out || run.input.row == RowOf::kPosition;
  if (!quantizes && !lay_out && !side.prequant.defined() &&
      !(run.row_weights != nullptr && plan.config.weight_on == WeightOn::kInput))
    return {.rows = run.input};
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
Rows prepare_hidden(const ExpertsRun& run, const ExpertsBuffers& buffers, Stream stream) {
  const LayerPlan& plan = *run.plan;
  const SideTensors& side = run.fc2->side;
  const bool quantizes = plan.quantizes_hidden();
  if (!quantizes && !side.prequant.defined()) return {.values = buffers.hidden};
  // Without lists the rows are all taken, those of no slot as well: nobody reads them.
  Tensor output = quantizes ? buffers.hidden_quantized : buffers.hidden, input = buffers.hidden;
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
    stage.scale = buffers.hidden_scale;
    stage.scale_row_stride = scale_row_stride(plan.fc2);
    stage.scratch = buffers.quantize_scratch;
  }
  plan.backend->quantize(stage, stream);
  if (!quantizes) return {.values = buffers.hidden};
  const bool per_expert =
      (plan.fc2.act_scale == ActScale::kTensorDynamic && run.per_expert_absmax) ||
      (plan.fc2.act_scale == ActScale::kTensorStatic && side.input_scale.shape[0] > 1);
  return {.values = buffers.hidden_quantized,
          .scale = scale_view(plan.fc2, buffers.hidden_scale, per_expert)};
}

// GEMM1 writes 8-bit rows, if the backend does so for this stage.
bool let_gemm1_quantize(const ExpertsRun& run, const ExpertsBuffers& buffers, GemmStage* gemm1) {
  const LayerPlan& plan = *run.plan;
  if (plan.hidden_quantized_by == QuantizedBy::kStage) return false;
  GemmStage stage = *gemm1;
  stage.c = buffers.hidden_quantized;
  stage.quantizer = {.granularity = plan.fc2.act_scale,
                     .round_to = plan.fc2.dtype16,
                     .static_scale = run.fc2->side.input_scale,
                     .scale = buffers.hidden_scale,
                     .scale_row_stride = scale_row_stride(plan.fc2)};
  if (plan.hidden_quantized_by == QuantizedBy::kEither && !plan.backend->gemm1_quantizes(stage))
    return false;
  *gemm1 = stage;
  return true;
}
// What it wrote. Static scales came with the weights.
Rows quantized_hidden(const ExpertsRun& run, const ExpertsBuffers& buffers) {
  Rows hidden{.values = buffers.hidden_quantized};
  const Tensor& given = run.fc2->side.input_scale;
  if (given.defined()) {
    hidden.scale = {.data = given.as<float>(),
                    .expert_stride = given.shape[0] > 1 ? given.strides[0] : 0};
  } else {
    hidden.scale = scale_view(run.plan->fc2, buffers.hidden_scale, /*per_expert=*/false);
  }
  return hidden;
}

}  // namespace

bool products_make_tiles(const ExpertsRun& run) {
  const LayerPlan& plan = *run.plan;
  const SideTensors& hidden = run.fc2->side;
  const bool one_scale = !hidden.input_scale.defined() || hidden.input_scale.shape[0] == 1 ||
                         plan.hidden_quantized_by == QuantizedBy::kGemm1;
  // A maximum of all rows must not see those of no slot.
  const bool shared_maximum = plan.fc2.act_scale == ActScale::kTensorDynamic;
  return !must_expand(plan, &run.fc1->side) && !hidden.prequant.defined() && one_scale &&
         !shared_maximum && run.tactics.gemm1 < 0 && run.tactics.gemm2 < 0 &&
         plan.backend->makes_tiles(plan.fc1, run.rows, run.unlisted) &&
         plan.backend->makes_tiles(plan.fc2, run.rows, run.unlisted);
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
                  .c = buffers.hidden,
                  .tactic = run.tactics.gemm1,
                  .scratch = buffers.gemm_scratch};
  const bool quantized = let_gemm1_quantize(run, buffers, &gemm1);
  backend.gemm(gemm1, stream);
  const Rows hidden =
      quantized ? quantized_hidden(run, buffers) : prepare_hidden(run, buffers, stream);
  backend.gemm({.rows = run.rows,
                .unlisted = run.unlisted,
                .list_age = ListAge::kSettled,
                .a = hidden.values,
                .a_scale = hidden.scale,
                .top_k = plan.config.top_k,
                .b = run.fc2,
                .row_weights = run.row_weights,
                .c = run.output,
                .c_row = run.output_row,
                .tactic = run.tactics.gemm2,
                .scratch = buffers.gemm_scratch},
               stream);
}

std::size_t least_workspace_bytes(const LayerPlan& plan, const LayerPlan* shared) {
  return bytes_for(plan, shared, plan.config.max_tokens, 1);
}

std::size_t forward_workspace_bytes(const LayerPlan& plan, const LayerPlan* shared,
                                    std::int64_t tokens) {
  return bytes_for(plan, shared, tokens, chunk_tokens(plan, shared, tokens));
}

void forward(const LoadedLayer& layer, const ForwardArgs& args) {
  const LayerPlan& plan = *layer.plan;
  const LayerConfig& config = plan.config;
  const std::int64_t tokens = args.hidden_states.shape[0];
  const std::int64_t chunk = chunk_tokens(plan, layer.shared_plan, tokens);
  Arena arena(args.workspace.data);
  const Buffers buffers = take_buffers(arena, plan, layer.shared_plan, tokens, chunk);

  Tensor ids = args.topk_ids, weights = args.topk_weights;
  if (!ids.defined()) {
    ids = Tensor::contiguous(buffers.ids, DType::kI32, {tokens, config.top_k}, plan.device);
    weights = Tensor::contiguous(buffers.weights, DType::kF32, {tokens, config.top_k}, plan.device);
    // All ids before the first chunk's output: it may be the hidden states themselves, and tokens
    // are counted over the whole call.
    const bool given = args.router_logits.defined();
    for (std::int64_t first = 0; first < tokens; first += chunk) {
      const std::int64_t count = std::min(chunk, tokens - first);
      plan.backend->route(
          {.spec = config.routing,
           .logits = given ? args.router_logits.slice(first, count) : Tensor{},
           .hidden_states = given ? Tensor{} : args.hidden_states.slice(first, count),
           .router = layer.router,
           .logits_scratch = Tensor::contiguous(buffers.logits, DType::kF32,
                                                {count, config.experts}, plan.device),
           .topk_ids = ids.slice(first, count),
           .topk_weights = weights.slice(first, count)},
          args.stream);
    }
  }
  auto* counts = args.tokens_per_expert.as<std::int32_t>();
  const bool one_chunk = chunk == tokens && tokens > 0;
  if (counts != nullptr &&
      !one_chunk) {  // counted over the whole call, apart from the chunks' lists
    const std::int64_t slots = tokens * config.top_k;
    plan.backend->align({.topk_ids = ids,
                         .experts = config.experts,
                         .local = config.local,
                         .rows = {.positions = slots, .slot_count = slots},
                         .tokens_per_expert = counts,
                         .scratch = buffers.count_scratch},
                        args.stream);
  }
  for (std::int64_t first = 0; first < tokens; first += chunk) {
    const std::int64_t count = std::min(chunk, tokens - first);
    const Tensor& scale = args.hidden_scale;
    forward_chunk(layer, args,
                  {.x = args.hidden_states.slice(first, count),
                   .x_scale = scale.rank == 2 ? scale.slice(first, count) : scale,
                   .ids = ids.slice(first, count),
                   .weights = weights.slice(first, count),
                   .output = args.output.slice(first, count),
                   .tokens_per_expert = one_chunk ? counts : nullptr},
                  buffers);
  }
}

}  // namespace moesaic
