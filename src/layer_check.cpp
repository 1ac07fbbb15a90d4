// SPDX-License-Identifier: Apache-2.0
#include "layer_check.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <string>

#include "check.h"

namespace moesaic {
namespace {

// `output` is hidden_states itself, or has no byte in common with it (two halves of one buffer's
// columns have none): other rows would be read after they were written, in a forward in chunks,
// say.
void check_overlap(const Tensor& in, const Tensor& out) {
  const std::int64_t tokens = in.shape[0];
  if (tokens == 0) return;
  struct Bytes {
    std::int64_t stride, row, begin, end;  // begin and end: of all rows, from the first one's start
  };
  const auto bytes = [&](const Tensor& t) {
    const auto size = static_cast<std::int64_t>(size_of(t.dtype));
    const std::int64_t stride = tokens == 1 ? 0 : t.strides[0] * size, last = stride * (tokens - 1);
    const std::int64_t row = t.shape[1] * size;
    return Bytes{stride, row, std::min<std::int64_t>(0, last),
                 std::max<std::int64_t>(0, last) + row};
  };
  const Bytes a = bytes(in), b = bytes(out);
  const auto apart = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(out.data) -
                                               reinterpret_cast<std::uintptr_t>(in.data));
  if (apart + b.begin >= a.end || apart + b.end <= a.begin) return;
  if (apart == 0 && a.stride == b.stride && a.row == b.row) return;
  if (a.stride == b.stride && a.stride != 0) {
    const std::int64_t every = std::abs(a.stride), behind = ((apart % every) + every) % every;
    if (behind >= a.row && every - behind >= b.row) return;
  }
  invalid(
      "output: overlaps hidden_states without being the same view; pass hidden_states itself, or "
      "memory of its own");
}

}  // namespace

void check_ready(const Layer::Impl& layer, std::string_view call) {
  if (layer.is_ready) return;
  const std::string missing = layer.missing();
  throw Error(
      ErrorCode::kNotReady,
      fmt::format("{}: {}", call,
                  missing.empty() ? "loading the weights failed; load them again" : missing));
}

void check_forward(const Layer::Impl& layer, const ForwardArgs& args) {
  const LayerConfig& config = layer.plan.config;
  const Device device = layer.plan.device;
  check_enum("accumulate", args.accumulate, 2);
  check("hidden_states", args.hidden_states)
      .shape({kAny, config.hidden})
      .dtype({config.input_dtype})
      .inner_contiguous()
      .on(device);
  const std::int64_t tokens = args.hidden_states.shape[0];
  if (tokens > config.max_tokens)
    invalid(
        fmt::format("hidden_states: {} tokens are more than max_tokens = {}; raise it in the "
                    "configuration or split the batch",
                    tokens, config.max_tokens));
  check("output", args.output)
      .shape({tokens, config.hidden})
      .dtype({config.output_dtype})
      .inner_contiguous()
      .distinct()
      .on(device);
  check_overlap(args.hidden_states, args.output);
  check_activation_scale("hidden_scale", layer.plan.fc1, args.hidden_states, args.hidden_scale,
                         device);

  if (args.topk_ids.defined()) {
    check("topk_ids", args.topk_ids)
        .shape({tokens, config.top_k})
        .dtype({DType::kI32, DType::kI64})
        .contiguous()
        .on(device);
    check("topk_weights", args.topk_weights)
        .shape({tokens, config.top_k})
        .dtype({DType::kF32})
        .contiguous()
        .on(device);
    if (args.router_logits.defined())
      invalid("router_logits: topk_ids were given as well; give one of the two");
  } else if (args.topk_weights.defined()) {
    invalid("topk_weights: were given without topk_ids; give both, or router_logits");
  } else if (args.router_logits.defined()) {
    check("router_logits", args.router_logits)
        .shape({tokens, config.experts})
        .dtype({DType::kF32, DType::kF16, DType::kBF16})
        .inner_contiguous()
        .on(device);
  } else {
    if (!layer.router.weight.defined())
      throw Error(
          ErrorCode::kNotReady,
          "forward: no topk_ids, no router_logits, and no router attached; pass one of the two or "
          "call set_router first");
    if (!is_float(config.input_dtype))
      unsupported(
          "forward: the attached router reads f32, f16 or bf16 hidden_states, not 8-bit ones; pass "
          "router_logits or topk_ids");
  }
  if (args.tokens_per_expert.defined())
    check("tokens_per_expert", args.tokens_per_expert)
        .shape({config.local.count})
        .dtype({DType::kI32})
        .contiguous()
        .on(device);
  check_workspace(
      args.workspace,
      forward_workspace_bytes(layer.plan, layer.shared ? &layer.shared->plan : nullptr, tokens),
      "workspace_bytes(tokens)");
}

}  // namespace moesaic
