// SPDX-License-Identifier: Apache-2.0
//   logits -> route -> ids, weights -> align -> row map
//   x -> quantize -> GEMM1 (gather, activation) -> quantize -> GEMM2 (experts.cpp) -> combine -> y
// for each chunk of tokens that the workspace's cap allows; the shared experts run as a layer of
// one.
#include "forward.h"

#include <fmt/format.h>

#include <algorithm>

#include "check.h"

namespace moesaic {
namespace {

struct RoutedBuffers {  // of one chunk of `tokens` tokens
  RowMap rows;
  std::int32_t* slot_row = nullptr;
  std::int32_t* next_task = nullptr;  // [2]: of both products
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
  b.next_task = arena.take<std::int32_t>(2);
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

// The largest count below `end` whose bytes are at most `cap`; those of 1 are, and they grow with it.
template <typename Bytes>
std::int64_t most_within(std::size_t cap, std::int64_t end, Bytes bytes) {
  std::int64_t low = 1;
  while (end - low > 1) {
    const std::int64_t middle = low + (end - low) / 2;
    (bytes(middle) <= cap ? low : end) = middle;
  }
  return low;
}

// The tokens that run at once under the byte cap: all where they fit. Where they do not, a chunk has
// the size that max_tokens need (one token always fits: check_workspace_cap saw to it), so that it
// is one size for any T.
std::int64_t chunk_tokens(const LayerPlan& plan, const LayerPlan* shared, std::int64_t tokens) {
  const std::size_t cap = plan.config.workspace_cap;
  const std::int64_t most = plan.config.max_tokens;
  if (cap == 0 || tokens <= 1 || bytes_for(plan, shared, tokens, tokens) <= cap) return tokens;
  return most_within(cap, most, [&](std::int64_t chunk) {
    return bytes_for(plan, shared, most, chunk);
  });
}

struct Chunk {
  Tensor x, x_scale, ids, weights, output;
  std::int32_t* tokens_per_expert = nullptr;
};

// The rows of each expert, and x as GEMM1 reads it, for `run`. Lists come from align; products that
// find few rows in the ids themselves need none.
void bring_rows(const LoadedLayer& layer, const Chunk& chunk, const RoutedBuffers& b,
                ExpertsRun* run, Stream stream) {
  const LayerPlan& plan = *layer.plan;
  const bool on_input = plan.config.weight_on == WeightOn::kInput;
  const InputRun input_run{.plan = &plan,
                           .fc1 = layer.fc1,
                           .rows = &b.rows,
                           .input = {.values = chunk.x,
                                     .scale = caller_scale_view(plan.fc1, chunk.x_scale),
                                     .row = RowOf::kToken},
                           .row_weights = on_input ? chunk.weights.as<float>() : nullptr,
                           .layout = input_layout(plan, b.rows.slot_count),
                           .slot_row = b.slot_row};
  InputStep quantize = input_step(input_run, b.input);
  run->input = quantize.rows;
  // Rows that are quantized by token need no list, and align does not need them.
  const bool by_token = !must_expand(plan, &layer.fc1->side) && input_run.layout == RowOf::kToken;
  ExpertsRun listless = *run;
  listless.unlisted = {.ids = chunk.ids.as<std::int32_t>(),
                       .first_expert = static_cast<std::int32_t>(plan.config.local.first)};
  listless.output_row = RowOf::kSlot;
  if (by_token && chunk.ids.dtype == DType::kI32 && chunk.tokens_per_expert == nullptr &&
      products_make_tiles(listless)) {
    *run = listless;
    if (!quantize.needed) return;
    run->list_age = ListAge::kSettled;  // the ids are older than this stage
    plan.backend->quantize(quantize.stage, stream);
    return;
  }
  run->next_task = b.next_task;
  AlignStage align{.topk_ids = chunk.ids,
                   .experts = plan.config.experts,
                   .local = plan.config.local,
                   .rows = b.rows,
                   .next_task = b.next_task,
                   .slot_row = b.slot_row,
                   .tokens_per_expert = chunk.tokens_per_expert,
                   .scratch = b.align_scratch};
  if (quantize.needed && by_token) {
    align.ids_age = ListAge::kSettled;
    plan.backend->quantize_and_align(quantize.stage, align, stream);
    return;
  }
  plan.backend->align(align, stream);
  if (quantize.needed) plan.backend->quantize(quantize.stage, stream);
}

// The expert that every token visits: its rows, and the weights of its gate, for `combine`.
void run_shared_expert(const LoadedLayer& layer, const Chunk& chunk, const Buffers& b,
                       CombineStage* combine, Stream stream) {
  const LayerPlan& plan = *layer.shared_plan;
  const Backend& backend = *plan.backend;
  const std::int64_t tokens = chunk.x.shape[0];
  RowMap rows = b.shared.rows;
  rows.positions = rows.slot_count = tokens;
  set_tile_rows(rows, 1, backend.tile_rows(plan.fc1, tokens));
  backend.align(
      {.topk_ids = Tensor::contiguous(layer.shared_ids, DType::kI32, {tokens, 1}, plan.device),
       .experts = 1,
       .local = {0, 1},
       .rows = rows,
       .slot_row = b.shared.slot_row,
       .scratch = b.shared.align_scratch},
      stream);
  if (layer.shared_gate.defined()) {
    // The gate is a router of one expert: sigmoid(x . g). Its ids (all 0) go where nobody reads
    // them any more once align has run.
    const auto column = [&](void* data, DType dtype) {
      return Tensor::contiguous(data, dtype, {tokens, 1}, plan.device);
    };
    backend.route({.spec = plan.config.routing,
                   .hidden_states = chunk.x,
                   .router = {.weight = layer.shared_gate},
                   .logits_scratch = column(b.logits, DType::kF32),
                   .topk_ids = column(b.shared.slot_row, DType::kI32),
                   .topk_weights = column(b.shared_weight, DType::kF32)},
                  stream);
    combine->shared_weight = b.shared_weight;
  }
  const Rows x{.values = chunk.x,
               .scale = caller_scale_view(layer.plan->fc1, chunk.x_scale),
               .row = RowOf::kToken};
  const Rows input = prepare_input(
      {.plan = &plan, .fc1 = layer.shared_fc1, .rows = &rows, .input = x}, b.shared.input, stream);
  run_experts({.plan = &plan,
               .fc1 = layer.shared_fc1,
               .fc2 = layer.shared_fc2,
               .rows = rows,
               .input = input,
               .output = b.shared.output},
              b.shared.experts, stream);
  combine->shared = b.shared.output;
  combine->shared.shape[0] = tokens;
}

void forward_chunk(const LoadedLayer& layer, const ForwardArgs& args, const Chunk& chunk,
                   Buffers b) {
  const LayerPlan& plan = *layer.plan;
  const std::int64_t slots = chunk.x.shape[0] * plan.config.top_k;
  RowMap& rows = b.routed.rows;
  rows.positions = rows.slot_count = slots;
  set_tile_rows(rows, plan.fc1.experts, plan.backend->tile_rows(plan.fc1, slots));

  ExpertsRun experts{.plan = &plan,
                     .fc1 = layer.fc1,
                     .fc2 = layer.fc2,
                     .rows = rows,
                     .output = b.routed.output,
                     .tactics = layer.tactics};
  bring_rows(layer, chunk, b.routed, &experts, args.stream);
  run_experts(experts, b.routed.experts, args.stream);

  const bool on_output = plan.config.weight_on == WeightOn::kOutput;
  CombineStage combine{.rows = b.routed.output,
                       .list_age = ListAge::kSettled,
                       .slot_row = experts.unlisted.any() ? nullptr : b.routed.slot_row,
                       .topk_ids = experts.unlisted.ids,
                       .local = plan.config.local,
                       .weights = on_output ? chunk.weights.as<float>() : nullptr,
                       .top_k = plan.config.top_k,
                       .accumulate = args.accumulate,
                       .output = chunk.output};
  if (layer.shared_plan != nullptr) run_shared_expert(layer, chunk, b, &combine, args.stream);
  plan.backend->combine(combine, args.stream);
}

// Rows that a GEMM1 cannot read where they lie are refused before any output is written.
void check_input_rows(const LoadedLayer& layer, const Tensor& x, std::int64_t chunk) {
  const std::int64_t tokens = x.shape[0];
  if (tokens == 0) return;
  const auto check = [&](const LayerPlan& plan, const WeightOperand& fc1, RowOf layout) {
    const Rows input{.values = x, .row = RowOf::kToken};
    if (takes_input_as_it_is({.plan = &plan, .fc1 = &fc1, .input = input, .layout = layout}))
      plan.backend->check_rows(plan.fc1, x);
  };
  // Routing weights on the input make other rows of them. The last chunk has the fewest tokens, and
  // may be the only one that is not laid out.
  const LayerConfig& config = layer.plan->config;
  const std::int64_t last = (tokens - 1) % chunk + 1;
  if (config.weight_on == WeightOn::kOutput)
    check(*layer.plan, *layer.fc1, input_layout(*layer.plan, last * config.top_k));
  if (layer.shared_plan != nullptr) check(*layer.shared_plan, *layer.shared_fc1, RowOf::kToken);
}

}  // namespace

void check_workspace_cap(const LayerPlan& plan, const LayerPlan* shared) {
  const LayerConfig& config = plan.config;
  if (config.workspace_cap == 0 || config.max_tokens == 0) return;
  const std::size_t least = bytes_for(plan, shared, config.max_tokens, 1);
  if (least > config.workspace_cap)
    invalid(
        fmt::format("workspace_cap: expected at least {} bytes (max_tokens = {}, one token at a "
                    "time), got {}; raise it or lower max_tokens",
                    least, config.max_tokens, config.workspace_cap));
}

std::size_t forward_workspace_bytes(const LayerPlan& plan, const LayerPlan* shared,
                                    std::int64_t tokens) {
  const std::int64_t chunk = chunk_tokens(plan, shared, tokens);
  const std::size_t bytes = bytes_for(plan, shared, tokens, chunk);
  if (chunk == tokens) return bytes;
  // A workspace for more tokens serves fewer, those that run in one chunk included.
  const auto whole = [&](std::int64_t t) { return bytes_for(plan, shared, t, t); };
  return std::max(bytes, whole(most_within(plan.config.workspace_cap, tokens, whole)));
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
  check_input_rows(layer, args.hidden_states, chunk);
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
