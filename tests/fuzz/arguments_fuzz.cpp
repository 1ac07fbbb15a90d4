// SPDX-License-Identifier: Apache-2.0
// Arbitrary arguments for Layer, forward, the stages, the grouped GEMM and the pieces around it: an
// Error, or a call that stays inside the tensors.
#include "arguments.h"

namespace moesaic::fuzz {
namespace {

void fuzz_layer(Source& s) {
  const LayerConfig c = make_config(s);
  Layer layer(c);
  Memory m(s);
  const std::int64_t n1 = (is_gated(c.activation.kind) ? 2 : 1) * c.intermediate;
  const std::int64_t local = layer.config().local.count;
  for (std::int64_t e = 0; e < local; ++e) {
    const LayerWeights w{.fc1 = make_weights(c, n1, c.hidden, s, m),
                         .fc2 = make_weights(c, c.hidden, c.intermediate, s, m),
                         .activation = {}};
    if (m.skip()) return;
    layer.load_expert(s.extent(e), w);
  }
  const std::int64_t tokens = s.below(9);
  ForwardArgs a;
  a.hidden_states = m.tensor(c.input_dtype, {tokens, c.hidden});
  if (size_of(c.input_dtype) == 1) a.hidden_scale = m.tensor(DType::kF32, {tokens, 1});
  a.output = m.tensor(c.output_dtype, {tokens, c.hidden});
  const std::int64_t how = s.below(4);
  if (how == 0) a.router_logits = m.tensor(DType::kF32, {tokens, c.experts});
  if (how == 1)
    layer.set_router({.weight = m.tensor(DType::kBF16, {c.experts, c.hidden}),
                      .bias = {},
                      .selection_bias = {}});
  if (how >= 2) {
    a.topk_ids = m.tensor(how == 2 ? DType::kI32 : DType::kI64, {tokens, c.top_k});
    a.topk_weights = m.tensor(DType::kF32, {tokens, c.top_k});
  }
  if (s.rare()) a.tokens_per_expert = m.tensor(DType::kI32, {local});
  if (m.skip()) return;
  const WorkspaceBuffer workspace(
      layer.device(), layer.workspace_bytes(std::clamp<std::int64_t>(tokens, 0, c.max_tokens)));
  a.workspace = workspace.view();
  if (s.rare()) a.workspace.bytes = a.workspace.bytes / 2;
  layer.forward(a);
}

void fuzz_pieces(Source& s) {
  Memory m(s);
  const std::int64_t tokens = s.below(9), experts = 1 + s.below(9), k = 1 + s.below(4),
                     hidden = 1 + s.below(64);
  const WorkspaceBuffer workspace({}, 1 << 16);
  switch (s.below(5)) {
    case 0: {
      RouteArgs a;
      a.spec.method = s.choice<RoutingMethod>(kNumRoutingMethods + 1);
      a.spec.groups = static_cast<int>(s.extent(1));
      const std::int64_t all =
          s.rare() ? 1900 + s.byte() : experts;  // about as many as there may be
      a.logits = m.tensor(DType::kF32, {tokens, all});
      if (s.rare()) a.router.selection_bias = m.tensor(DType::kF32, {all});
      a.topk_ids = m.tensor(DType::kI32, {tokens, k});
      a.topk_weights = m.tensor(DType::kF32, {tokens, k});
      a.workspace = workspace.view();
      if (!m.skip()) route(a);
      return;
    }
    case 1: {
      AlignArgs a;
      a.topk_ids = m.tensor(DType::kI32, {tokens, k});
      a.experts = s.rare() ? s.extent(experts) : experts;
      a.rows.block_rows = s.rare() ? s.extent(4) : 4;
      const std::int64_t capacity = align_capacity(tokens * k, experts, 4);
      a.rows.slots = m.tensor(DType::kI32, {capacity});
      a.rows.block_experts = m.tensor(DType::kI32, {(capacity + 3) / 4});
      a.rows.num_padded = m.tensor(DType::kI32, {1});
      if (s.rare()) a.expert_map = m.tensor(DType::kI32, {experts});
      if (s.rare()) a.slot_row = m.tensor(DType::kI32, {tokens * k});
      if (s.rare()) a.tokens_per_expert = m.tensor(DType::kI32, {experts});
      a.workspace = workspace.view();
      if (!m.skip()) align(a);
      return;
    }
    case 2: {
      QuantizeArgs a;
      a.input = m.tensor(DType::kBF16, {tokens, hidden});
      a.to = s.rare() ? s.choice<DType>(9) : s.below(2) ? DType::kI8 : DType::kF8E4M3;
      a.granularity = s.choice<ActScale>(5);
      a.group_size = s.rare() ? s.extent(16) : 16;
      a.output = m.tensor(a.to, {tokens, hidden});
      if (a.granularity == ActScale::kTensorStatic) a.static_scale = m.tensor(DType::kF32, {1});
      a.scale = m.tensor(DType::kF32,
                         {tokens, a.granularity == ActScale::kGroup ? (hidden + 15) / 16 : 1});
      a.workspace = workspace.view();
      if (!m.skip()) quantize(a);
      return;
    }
    case 3: {
      ActivateArgs a;
      a.spec.kind = s.choice<Activation>(kNumActivations);
      a.spec.order = s.choice<GateOrder>(2);
      a.spec.layout = s.choice<GateLayout>(2);
      const std::int64_t width = is_gated(a.spec.kind) ? 2 * hidden : hidden;
      a.input = m.tensor(s.choice<DType>(3), {tokens, width});
      if (s.below(2)) {
        a.parameters.alpha = m.tensor(DType::kF32, {experts});
        a.parameters.limit = m.tensor(DType::kF32, {experts});
        a.row_expert = m.tensor(DType::kI32, {tokens});
      }
      a.output = m.tensor(s.choice<DType>(3), {tokens, hidden});
      if (!m.skip()) activate(a);
      return;
    }
    default: {
      SumArgs a;
      a.input = m.tensor(DType::kF32, {tokens, k, hidden});
      if (s.rare()) a.slot_row = m.tensor(DType::kI32, {tokens, k});
      if (s.rare()) a.topk_ids = m.tensor(DType::kI32, {tokens, k});
      if (s.below(2)) a.topk_weights = m.tensor(DType::kF32, {tokens, k});
      a.output = m.tensor(DType::kBF16, {tokens, hidden});
      if (!m.skip()) sum_slots(a);
    }
  }
}

// Level 3 on weights in place, in either format. Lists hold anything.
void fuzz_grouped(Source& s) {
  LayerConfig c = make_config(s);
  Memory m(s);
  const std::int64_t experts = 1 + s.below(4), n = 2 * (1 + s.below(33)), k = 2 * (1 + s.below(33)),
                     tokens = s.below(9);
  GroupedGemmArgs a;
  a.quant = c.quant;
  a.top_k = s.rare() ? s.extent(1) : 1 + s.below(3);
  c.activation.kind = Activation::kIdentity;
  a.b = make_weights(c, n, k, s, m, experts);
  if (s.below(2) == 0) {
    const std::int64_t capacity = s.below(9);
    a.a = m.tensor(c.input_dtype, {experts, capacity, k});
    a.batched.num_tokens = m.tensor(DType::kI32, {experts});
    if (s.rare() || size_of(c.input_dtype) == 1)
      a.a_scale = m.tensor(DType::kF32, {experts, capacity, 1});
    a.c = m.tensor(DType::kF32, {experts, capacity, n});
  } else {
    constexpr std::int64_t kRows = 4;
    const std::int64_t slots = tokens * std::clamp<std::int64_t>(a.top_k, 1, 4);
    const std::int64_t capacity = align_capacity(slots, experts, kRows);
    a.sorted = {.slots = m.tensor(DType::kI32, {capacity}),
                .block_experts = m.tensor(DType::kI32, {(capacity + kRows - 1) / kRows}),
                .num_padded = m.tensor(DType::kI32, {1}),
                .block_rows = s.rare() ? s.extent(kRows) : kRows};
    a.a_order = s.choice<RowOrder>(2);
    a.c_order = s.choice<RowOrder>(2);
    a.a = m.tensor(c.input_dtype, {a.a_order == RowOrder::kSorted ? capacity : tokens, k});
    if (s.rare()) a.row_weights = m.tensor(DType::kF32, {slots});
    if (size_of(c.input_dtype) == 1) a.a_scale = m.tensor(DType::kF32, {a.a.shape[0], 1});
    a.c = m.tensor(DType::kF32, {a.c_order == RowOrder::kSorted ? capacity : slots, n});
  }
  if (m.skip()) return;
  const WorkspaceBuffer workspace({}, grouped_gemm_workspace_bytes(a));
  a.workspace = workspace.view();
  if (s.rare()) a.workspace.bytes /= 2;
  grouped_gemm(a);
}

// `experts` on a caller's lists, which hold anything.
void fuzz_sorted(Source& s) {
  const LayerConfig c = make_config(s);
  Memory m(s);
  const std::int64_t experts = std::clamp<std::int64_t>(
                         c.local.count > 0 ? c.local.count : c.experts, 0, 8),
                     tokens = s.below(9), slots = tokens * std::clamp<std::int64_t>(c.top_k, 1, 4);
  constexpr std::int64_t kRows = 4;
  const std::int64_t capacity = align_capacity(slots, std::max<std::int64_t>(experts, 1), kRows);
  const StageShape shape{.format = Format::kSorted, .tokens = tokens, .capacity = capacity};
  const WorkspaceBuffer workspace({}, stage_workspace_bytes(c, shape));
  ExpertsArgs e{.format = Format::kSorted};
  e.rows = m.tensor(s.below(2) ? c.input_dtype : eight_bit_of(c.quant.scheme), {tokens, c.hidden});
  if (size_of(e.rows.dtype) == 1) e.row_scale = m.tensor(DType::kF32, {tokens, 1});
  e.sorted = {.slots = m.tensor(DType::kI32, {capacity}),
              .block_experts = m.tensor(DType::kI32, {(capacity + kRows - 1) / kRows}),
              .num_padded = m.tensor(DType::kI32, {1}),
              .block_rows = s.rare() ? s.extent(kRows) : kRows};
  if (s.below(2)) e.row_weights = m.tensor(DType::kF32, {slots});
  e.output = m.tensor(DType::kF32, {slots, c.hidden});
  e.workspace = workspace.view();
  const std::int64_t n1 = (is_gated(c.activation.kind) ? 2 : 1) * c.intermediate;
  const LayerWeights w{.fc1 = make_weights(c, n1, c.hidden, s, m, experts),
                       .fc2 = make_weights(c, c.hidden, c.intermediate, s, m, experts),
                       .activation = {}};
  if (!m.skip()) moesaic::experts(c, w, e);
}

// Level 2 through a batched buffer, each call with its own idea of the shapes.
void fuzz_stages(Source& s) {
  LayerConfig c = make_config(s);
  Memory m(s);
  const std::int64_t experts = std::clamp<std::int64_t>(
                         c.local.count > 0 ? c.local.count : c.experts, 0, 8),
                     tokens = s.below(9), capacity = s.below(9);
  const WorkspaceBuffer workspace(
      {}, stage_workspace_bytes(c, {.tokens = tokens, .capacity = capacity}));
  const bool scaled = c.quant.scheme > Scheme::kBF16;
  PrepareArgs p;
  p.hidden_states = m.tensor(c.input_dtype, {tokens, c.hidden});
  if (size_of(c.input_dtype) == 1) p.hidden_scale = m.tensor(DType::kF32, {tokens, 1});
  p.topk_ids = m.tensor(DType::kI32, {tokens, c.top_k});
  p.topk_weights = m.tensor(DType::kF32, {tokens, c.top_k});
  if (s.rare()) p.expert_map = m.tensor(DType::kI32, {c.experts});
  p.rows = m.tensor(s.below(2) ? c.input_dtype : s.choice<DType>(9), {experts, capacity, c.hidden});
  if (scaled) p.row_scale = m.tensor(DType::kF32, {experts, capacity, 1});
  p.num_tokens = m.tensor(DType::kI32, {experts});
  if (s.below(2)) p.slot_row = m.tensor(DType::kI32, {tokens, c.top_k});
  if (s.rare()) p.status = m.tensor(DType::kI32, {1});
  p.workspace = workspace.view();
  FinalizeArgs f;
  f.expert_output = m.tensor(DType::kF32, {experts, capacity, c.hidden});
  f.topk_ids = p.topk_ids;
  f.topk_weights = p.topk_weights;
  if (s.below(2)) f.slot_row = m.tensor(DType::kI32, {tokens, c.top_k});
  f.output = m.tensor(c.output_dtype, {tokens, c.hidden});
  f.workspace = workspace.view();
  ExpertsArgs e;
  e.rows = p.rows;
  if (scaled) e.row_scale = p.row_scale;
  e.batched.num_tokens = m.tensor(DType::kI32, {experts});
  e.output = f.expert_output;
  e.expected_tokens = s.extent(tokens);
  e.workspace = workspace.view();
  const std::int64_t n1 = (is_gated(c.activation.kind) ? 2 : 1) * c.intermediate;
  const LayerWeights w{.fc1 = make_weights(c, n1, c.hidden, s, m, experts),
                       .fc2 = make_weights(c, c.hidden, c.intermediate, s, m, experts),
                       .activation = {}};
  if (m.skip()) return;
  const auto each = [](const auto& call) {
    try {
      call();
    } catch (const Error&) {
    }
  };
  each([&] { prepare(c, p); });
  each([&] { moesaic::experts(c, w, e); });
  each([&] { finalize(c, f); });
}

}  // namespace
}  // namespace moesaic::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace moesaic::fuzz;
  static const bool once = [] {
    moesaic::set_num_threads(1);
    return true;
  }();
  static_cast<void>(once);
  Source source(data, size);
  try {
    switch (source.below(5)) {
      case 0:
        fuzz_layer(source);
        break;
      case 1:
        fuzz_pieces(source);
        break;
      case 2:
        fuzz_grouped(source);
        break;
      case 3:
        fuzz_sorted(source);
        break;
      default:
        fuzz_stages(source);
    }
  } catch (const moesaic::Error&) {
  }
  return 0;
}
