// SPDX-License-Identifier: Apache-2.0
//   logits -> route -> ids, weights -> align -> row map
//   x -> quantize -> GEMM1 (gather, activation) -> quantize -> GEMM2 (experts.cpp) -> combine -> y
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
  if (few) {
    experts.output_row = RowOf::kSlot;
    if (step.needed) {
      experts.list_age = ListAge::kSettled;  // the ids are older than this stage
      run.quantize(step.stage, args.stream);
    }
  } else {
    experts.unlisted = {};
    if (step.needed && by_token) {
      align.ids_age = ListAge::kSettled;
      run.quantize_and_align(step.stage, align, args.stream);
    } else {
      run.align(align, args.stream);
      if (step.needed) run.quantize(step.stage, args.stream);
    }
  }
  run_experts(experts, b.routed.experts, args.stream);

  CombineStage combine{.rows = b.routed.output,
                       .list_age = ListAge::kSettled,
                       .slot_row = few ? nullptr : b.routed.slot_row,
                       .topk_ids = experts.unlisted.ids,
                       .local = plan.config.local,
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
