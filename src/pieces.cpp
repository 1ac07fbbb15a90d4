// SPDX-License-Identifier: Apache-2.0
// The pieces around the products as calls of their own: route, quantize, activate.
#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "backend.h"
#include "check.h"
#include "moesaic/moesaic.h"
#include "plan.h"

namespace moesaic {

std::size_t route_workspace_bytes(std::int64_t tokens, std::int64_t experts) {
  check_range("tokens", tokens, 0, INT64_C(0x7fffffff));
  check_range("experts", experts, 1, kMaxExperts);
  return static_cast<std::size_t>(tokens * experts) * sizeof(float);
}

void route(const RouteArgs& args) {
  const Device device = args.topk_ids.device;
  check("topk_ids", args.topk_ids).rank(2).dtype({DType::kI32}).contiguous();
  const std::int64_t tokens = args.topk_ids.shape[0], top_k = args.topk_ids.shape[1];
  check("topk_weights", args.topk_weights)
      .shape({tokens, top_k})
      .dtype({DType::kF32})
      .contiguous()
      .on(device);
  const bool computes = !args.logits.defined();
  std::int64_t experts = 0;
  if (computes) {
    check("router.weight", args.router.weight)
        .rank(2)
        .dtype({DType::kF32, DType::kF16, DType::kBF16})
        .contiguous()
        .on(device);
    experts = args.router.weight.shape[0];
    check_range("router.weight: experts", experts, 1, kMaxExperts);
    check("hidden_states", args.hidden_states)
        .shape({tokens, args.router.weight.shape[1]})
        .dtype({DType::kF32, DType::kF16, DType::kBF16})
        .inner_contiguous()
        .on(device);
    check_workspace(args.workspace, route_workspace_bytes(tokens, experts),
                    "route_workspace_bytes");
  } else {
    check("logits", args.logits)
        .shape({tokens, kAny})
        .dtype({DType::kF32, DType::kF16, DType::kBF16})
        .inner_contiguous()
        .on(device);
    experts = args.logits.shape[1];
    check_range("logits: experts", experts, 1, kMaxExperts);
  }
  const auto per_expert = [&](std::string_view argument, const Tensor& t) {
    if (t.defined())
      check(argument, t)
          .shape({experts})
          .dtype({DType::kF32, DType::kF16, DType::kBF16})
          .contiguous()
          .on(device);
  };
  per_expert("router.bias", args.router.bias);
  per_expert("router.selection_bias", args.router.selection_bias);
  check_routing(args.spec, experts, top_k);
  check_selection_bias(args.spec, args.router.selection_bias);
  if (tokens == 0) return;
  backend(device).route({.spec = args.spec,
                         .logits = args.logits,
                         .hidden_states = computes ? args.hidden_states : Tensor{},
                         .router = args.router,
                         .logits_scratch = Tensor::contiguous(args.workspace.data, DType::kF32,
                                                              {tokens, experts}, device),
                         .topk_ids = args.topk_ids,
                         .topk_weights = args.topk_weights},
                        args.stream);
}

std::size_t quantize_workspace_bytes(std::int64_t rows, Device device) {
  check_range("rows", rows, 0, INT64_C(0x7fffffff));
  Arena arena;
  arena.take(backend(device).quantize_scratch_bytes(rows, 1));
  return arena.used();
}

namespace {

// What a call resolves to: plain rows, or the live rows of every expert's buffer.
struct Quantization {
  bool batched = false;
  std::int64_t experts = 1, capacity = 0, positions = 0;
  Tensor input, output;  // [positions, K]
  std::int64_t scale_row_stride = 0;
};

Quantization resolve(const QuantizeArgs& args) {
  Quantization q;
  const Device device = args.input.device;
  q.batched = args.num_tokens.defined();
  check_enum("granularity", args.granularity, 5);
  check_enum("int8_rounding", args.int8_rounding, 2);
  check("input", args.input)
      .rank(q.batched ? 3 : 2)
      .dtype({DType::kF32, DType::kF16, DType::kBF16})
      .inner_contiguous();
  const std::int64_t columns = args.input.shape[args.input.rank - 1];
  q.capacity = args.input.shape[q.batched ? 1 : 0];
  if (q.batched) {
    q.experts = args.input.shape[0];
    check_range("input: experts", q.experts, 1, kMaxExperts);
    check("num_tokens", args.num_tokens)
        .shape({q.experts})
        .dtype({DType::kI32})
        .contiguous()
        .on(device);
  }
  q.positions = checked_mul(q.experts, q.capacity, "input");
  check_range("input: rows", q.positions, 0, INT64_C(0x7fffffff));
  if (args.to != DType::kF8E4M3 && args.to != DType::kI8)
    unsupported(
        fmt::format("to: expected fp8_e4m3 or i8, got {}; choose one of the two", name(args.to)));
  const Check output = check("output", args.output);
  output.dtype({args.to}).inner_contiguous().distinct().on(device);
  if (q.batched)
    output.shape({q.experts, q.capacity, columns});
  else
    output.shape({q.capacity, columns});
  if (args.granularity == ActScale::kGroup) {
    check_range("group_size", args.group_size, 1, INT64_C(1) << 24);
    q.scale_row_stride = (columns + args.group_size - 1) / args.group_size;
  } else if (args.granularity == ActScale::kToken) {
    q.scale_row_stride = 1;
  }
  const bool per_tensor = q.scale_row_stride == 0 && args.granularity != ActScale::kGroup;
  const Check scale = check("scale", args.scale);
  scale.dtype({DType::kF32}).contiguous().on(device);
  if (q.batched)
    scale.shape({q.experts, per_tensor ? 1 : q.capacity, per_tensor ? 1 : q.scale_row_stride});
  else if (per_tensor)
    scale.shape({1});
  else if (args.granularity == ActScale::kToken && args.scale.rank == 1)
    scale.shape({q.capacity});
  else
    scale.shape({q.capacity, q.scale_row_stride});
  if (args.granularity == ActScale::kDefault)
    invalid(
        "granularity: expected tensor_static, tensor_dynamic, token or group, got default; name "
        "one: there is no scheme here whose own it could be");
  if (args.granularity == ActScale::kTensorStatic) {
    const Check given = check("static_scale", args.static_scale);
    given.dtype({DType::kF32}).contiguous().on(device);
    given.shape({q.batched && args.static_scale.numel() != 1 ? q.experts : 1});
  }
  q.input = as_rows("input", args.input);
  q.output = as_rows("output", args.output);
  return q;
}

struct QuantizeBuffers {
  RowMap rows;
  void* scratch = nullptr;
};
QuantizeBuffers take_quantize(Arena& arena, const QuantizeArgs& args, const Quantization& q) {
  QuantizeBuffers b;
  if (q.batched) {
    b.rows = take_row_map(arena, q.positions, q.experts, q.positions);
    // A row is all the work there is: no reason for larger tiles.
    set_tile_rows(b.rows, q.experts, kMinTileRows);
  }
  if (q.batched || args.granularity == ActScale::kTensorDynamic)
    b.scratch =
        arena.take(backend(args.input.device).quantize_scratch_bytes(q.positions, q.experts));
  return b;
}

}  // namespace

std::size_t quantize_workspace_bytes(const QuantizeArgs& args) {
  Arena arena;
  take_quantize(arena, args, resolve(args));
  return arena.used();
}

void quantize(const QuantizeArgs& args) {
  const Quantization q = resolve(args);
  Arena counting;
  take_quantize(counting, args, q);
  check_workspace(args.workspace, counting.used(), "quantize_workspace_bytes");
  if (q.positions == 0) return;
  Arena arena(args.workspace.data);
  const QuantizeBuffers b = take_quantize(arena, args, q);
  const Backend& kernels = backend(args.input.device);
  if (q.batched)
    kernels.tiles({.batched = {.num_tokens = args.num_tokens},
                   .capacity = q.capacity,
                   .experts = q.experts,
                   .rows = b.rows},
                  args.stream);
  kernels.quantize({.input = q.input,
                    .rows = q.batched ? &b.rows : nullptr,
                    .round_to = args.input.dtype,
                    .granularity = args.granularity,
                    .group = args.group_size,
                    .int8_rounding = args.int8_rounding,
                    .static_scale = args.static_scale,
                    .per_expert_absmax = q.batched,
                    .output = q.output,
                    .scale = args.scale.as<float>(),
                    .scale_row_stride = q.scale_row_stride,
                    .scratch = b.scratch},
                   args.stream);
}

void activate(const ActivateArgs& args) {
  const Device device = args.input.device;
  check_activation(args.spec);
  check("input", args.input)
      .rank(2)
      .dtype({DType::kF32, DType::kF16, DType::kBF16})
      .inner_contiguous();
  const std::int64_t rows = args.input.shape[0], n = args.input.shape[1];
  const bool gated = is_gated(args.spec.kind);
  if (gated && n % 2 != 0)
    invalid(fmt::format(
        "input: {} is gated and takes an even number of columns, got {}; pass gate and up",
        name(args.spec.kind), n));
  check("output", args.output)
      .shape({rows, gated ? n / 2 : n})
      .dtype({DType::kF32, DType::kF16, DType::kBF16})
      .inner_contiguous()
      .distinct()
      .on(device);
  const ActivationWeights& p = args.parameters;
  if (p.alpha.defined() || p.beta.defined() || p.limit.defined()) {
    if (!args.row_expert.defined())
      invalid(
          "row_expert: is required when alpha, beta or limit are given per expert, and was not "
          "given; pass i32 [R]");
    std::int64_t experts = kAny;  // what row_expert may name: the same in all of them
    for (const auto& [argument, t] : {std::pair{"parameters.alpha", &p.alpha},
                                      {"parameters.beta", &p.beta},
                                      {"parameters.limit", &p.limit}}) {
      if (!t->defined()) continue;
      check(argument, *t).rank(1).shape({experts}).dtype({DType::kF32}).contiguous().on(device);
      experts = t->shape[0];
    }
  }
  if (args.row_expert.defined())
    check("row_expert", args.row_expert).shape({rows}).dtype({DType::kI32}).contiguous().on(device);
  if (rows == 0) return;
  backend(device).activate({.spec = args.spec,
                            .parameters = args.parameters,
                            .input = args.input,
                            .row_expert = args.row_expert,
                            .output = args.output},
                           args.stream);
}

}  // namespace moesaic
