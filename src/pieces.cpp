// SPDX-License-Identifier: Apache-2.0
// The pieces around the products as calls of their own: route, quantize, activate.
#include <fmt/format.h>

#include <algorithm>

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
  check("topk_weights", args.topk_weights).shape({tokens, top_k}).dtype({DType::kF32}).contiguous().on(device);
  const bool computes = !args.logits.defined();
  std::int64_t experts = 0;
  if (computes) {
    check("router.weight", args.router.weight).rank(2).dtype({DType::kF32, DType::kF16, DType::kBF16}).contiguous().on(device);
    experts = args.router.weight.shape[0];
    check("hidden_states", args.hidden_states)
        .shape({tokens, args.router.weight.shape[1]})
        .dtype({DType::kF32, DType::kF16, DType::kBF16})
        .inner_contiguous()
        .on(device);
    check_workspace(args.workspace, route_workspace_bytes(tokens, experts), "route_workspace_bytes");
  } else {
    check("logits", args.logits).shape({tokens, kAny}).dtype({DType::kF32, DType::kF16, DType::kBF16}).inner_contiguous().on(device);
    experts = args.logits.shape[1];
  }
  const auto per_expert = [&](std::string_view argument, const Tensor& t) {
    if (t.defined())
      check(argument, t).shape({experts}).dtype({DType::kF32, DType::kF16, DType::kBF16}).contiguous().on(device);
  };
  per_expert("router.bias", args.router.bias);
  per_expert("router.selection_bias", args.router.selection_bias);
  check_routing(args.spec, experts, top_k);
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
  return backend(device).quantize_scratch_bytes(rows, 1);
}

void quantize(const QuantizeArgs& args) {
  const Device device = args.input.device;
  check("input", args.input).rank(2).dtype({DType::kF32, DType::kF16, DType::kBF16}).inner_contiguous();
  const std::int64_t rows = args.input.shape[0], columns = args.input.shape[1];
  if (args.to != DType::kF8E4M3 && args.to != DType::kI8)
    unsupported(fmt::format("to: expected fp8_e4m3 or i8, got {}", name(args.to)));
  check("output", args.output).shape({rows, columns}).dtype({args.to}).inner_contiguous().on(device);
  const Check scale = check("scale", args.scale);
  scale.dtype({DType::kF32}).contiguous().on(device);
  std::int64_t row_stride = 0;
  switch (args.granularity) {
    case ActScale::kDefault:
      invalid("granularity: say which: tensor_static, tensor_dynamic, token or group");
    case ActScale::kTensorStatic:
      check("static_scale", args.static_scale).shape({1}).dtype({DType::kF32}).on(device);
      [[fallthrough]];
    case ActScale::kTensorDynamic: scale.shape({1}); break;
    case ActScale::kToken:
      if (args.scale.rank == 1)
        scale.shape({rows});
      else
        scale.shape({rows, 1});
      row_stride = 1;
      break;
    case ActScale::kGroup:
      check_range("group_size", args.group_size, 1, INT64_C(1) << 24);
      row_stride = (columns + args.group_size - 1) / args.group_size;
      scale.shape({rows, row_stride});
      break;
  }
  const std::size_t needed =
      args.granularity == ActScale::kTensorDynamic ? quantize_workspace_bytes(rows, device) : 0;
  check_workspace(args.workspace, needed, "quantize_workspace_bytes");
  if (rows == 0) return;
  backend(device).quantize({.input = args.input,
                            .round_to = args.input.dtype,
                            .granularity = args.granularity,
                            .group = args.group_size,
                            .int8_rounding = args.int8_rounding,
                            .static_scale = args.static_scale,
                            .output = args.output,
                            .scale = args.scale.as<float>(),
                            .scale_row_stride = row_stride,
                            .scratch = args.workspace.data},
                           args.stream);
}

void activate(const ActivateArgs& args) {
  const Device device = args.input.device;
  check("input", args.input).rank(2).dtype({DType::kF32, DType::kF16, DType::kBF16}).inner_contiguous();
  const std::int64_t rows = args.input.shape[0], n = args.input.shape[1];
  const bool gated = is_gated(args.spec.kind);
  if (gated && n % 2 != 0)
    invalid(fmt::format("input: {} is gated and takes an even number of columns, got {}", name(args.spec.kind), n));
  check("output", args.output)
      .shape({rows, gated ? n / 2 : n})
      .dtype({DType::kF32, DType::kF16, DType::kBF16})
      .inner_contiguous()
      .on(device);
  const ActivationWeights& p = args.parameters;
  if (p.alpha.defined() || p.beta.defined() || p.limit.defined()) {
    if (!args.row_expert.defined())
      invalid("row_expert: is required when alpha, beta or limit are given per expert");
    for (const Tensor* t : {&p.alpha, &p.beta, &p.limit})
      if (t->defined()) check("parameters", *t).rank(1).dtype({DType::kF32}).contiguous().on(device);
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

// --- the support matrix -----------------------------------------------------------------------------

Support supports(const LayerConfig& config, Format format, Device device) {
  try {
    const LayerPlan plan = make_plan(config, device);
    return plan.backend->supports(plan.config, format);
  } catch (const Error& error) {
    return {.supported = false, .reason = error.what()};
  }
}

}  // namespace moesaic
