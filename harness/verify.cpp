// SPDX-License-Identifier: Apache-2.0
#include "harness/verify.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>

#include "backend.h"
#include "harness/compare.h"
#include "harness/execute.h"
#include "harness/routing_check.h"
#include "scheme.h"

namespace moesaic::harness {
namespace {

RouterBias router_bias(RoutingMethod method) {
  using enum RoutingMethod;
  switch (method) {
    case kDeepSeekV3:
    case kMiniMax2:
    case kSqrtSoftplus:
    case kSoftmaxBias:
      return RouterBias::kSelection;
    case kRenormalize:
      return RouterBias::kLogits;
    default:
      return RouterBias::kNone;
  }
}

// A case's data, the layer made of it, and how to run it.
struct Prepared {
  LayerConfig config;
  WeightData weights;
  WeightData shared;
  HostTensor shared_gate;
  RouterData router;
  Batch batch;
  std::optional<Layer> layer;
  Execution how;
};

Prepared prepare_case(const Case& c, Device device, Fault fault) {
  Prepared p;
  p.config = layer_config(c);
  p.weights = make_weights(p.config, weight_options(c));
  p.batch = make_batch(p.config, batch_options(c));
  p.layer.emplace(p.config, device);
  if (fault == Fault::kNone) {
    p.layer->load(p.weights.weights);
  } else {
    WeightData wrong = make_weights(p.config, weight_options(c));
    apply(fault, c, wrong, p.batch.topk_ids);
    p.layer->load(wrong.weights);
  }
  if (c.shared_experts > 0) {
    p.shared = make_shared(p.config, weight_options(c));
    if (is_float(p.config.input_dtype)) {
      p.shared_gate = HostTensor(p.config.input_dtype, {p.config.hidden});
      Rng rng(mix(c.seed, 0x79));
      for (std::int64_t h = 0; h < p.config.hidden; ++h)
        store_element(p.shared_gate.bytes().data(), p.shared_gate.dtype(), h, 0.1 * rng.normal());
    }
    p.layer->load_shared(p.shared.weights, p.shared_gate.view());
  }
  if (c.source != RoutingSource::kIds) {
    p.router = make_router(p.config, router_bias(c.routing.method), mix(c.seed, 0x7a));
    p.layer->set_router(p.router.weights);
  }
  p.how = {.format = c.format,
           .placement = c.placement,
           .source = static_cast<Execution::Source>(c.source),
           .accumulate = c.accumulate,
           .initial = {},
           .capacity = 0,
           .expert_output = backend(device).slot_dtype(weight_spec(p.config, Product::kFc2)),
           .extras = c.variant.extras};
  if (c.accumulate == Accumulate::kAdd) {
    p.how.initial = HostTensor(p.config.output_dtype, {c.tokens, p.config.hidden});
    Rng rng(mix(c.seed, 0x7b));
    for (std::int64_t i = 0; i < p.how.initial.numel(); ++i)
      store_element(p.how.initial.bytes().data(), p.how.initial.dtype(), i, rng.normal());
  }
  return p;
}

// What `route` makes of the case's logits on its device, held against the oracle of routing. The
// layer must do the same as that call: the oracle of the layer gets its ids and weights.
std::string route_on_device(const Case& c, Device device, Prepared* p) {
  if (c.source == RoutingSource::kIds) return {};
  const LayerConfig& config = p->config;
  RouteArgs args;
  args.spec = config.routing;
  const DeviceTensor logits = DeviceTensor::from(p->batch.router_logits, device);
  const DeviceTensor hidden = DeviceTensor::from(p->batch.hidden_states, device);
  const DeviceTensor weight = DeviceTensor::from(p->router.weights.weight, device);
  const DeviceTensor bias = DeviceTensor::from(p->router.weights.bias, device);
  const DeviceTensor selection = DeviceTensor::from(p->router.weights.selection_bias, device);
  if (c.source == RoutingSource::kLogits) {
    args.logits = logits.view();
  } else {
    args.hidden_states = hidden.view();
    args.router.weight = weight.view();
  }
  args.router.bias = bias.view();
  args.router.selection_bias = selection.view();
  const DeviceTensor ids(device, DType::kI32, {c.tokens, config.top_k});
  const DeviceTensor weights(device, DType::kF32, {c.tokens, config.top_k});
  args.topk_ids = ids.view();
  args.topk_weights = weights.view();
  const WorkspaceBuffer workspace(
      device, std::max<std::size_t>(1, route_workspace_bytes(c.tokens, config.experts)));
  args.workspace = workspace.view();
  route(args);
  p->batch.topk_ids = ids.to_host();
  p->batch.topk_weights = weights.to_host();
  RoutedTokens routed{.spec = config.routing,
                      .logits = {},
                      .hidden_states = p->batch.hidden_states.view(),
                      .router = p->router.weights,
                      .topk_ids = &p->batch.topk_ids,
                      .topk_weights = &p->batch.topk_weights};
  if (c.source == RoutingSource::kLogits) routed.logits = p->batch.router_logits.view();
  return check_routing(routed);
}

reference::LayerInput oracle_input(const Case& c, const Batch& batch) {
  return {.hidden_states = batch.hidden_states.view(),
          .hidden_scale = batch.hidden_scale.view(),
          .topk_ids = batch.topk_ids.view(),
          .topk_weights = batch.topk_weights.view(),
          .expert_map = {},
          .format = c.format};
}

std::vector<reference::Bounded> run_oracle(const Case& c, const Prepared& p, const Batch& batch,
                                           const reference::Choices& choices) {
  const reference::SharedWeights shared{p.shared.weights, p.shared_gate.view()};
  std::vector<reference::Bounded> y =
      reference::layer(p.config, p.weights.weights, c.shared_experts > 0 ? &shared : nullptr,
                       oracle_input(c, batch), choices)
          .output;
  if (!p.how.initial.defined()) return y;
  for (std::size_t i = 0; i < y.size(); ++i) {  // y += is one more fp32 addition
    y[i].value += load_element(p.how.initial.bytes().data(), p.how.initial.dtype(),
                               static_cast<std::int64_t>(i));
    y[i].error += reference::kUnit * std::abs(y[i].value);
  }
  return y;
}

// What quantizing did, weights and activations together: the oracle on the unquantized weights in
// float64 throughout, against the oracle of the quantized ones.
double quantization_error(const Case& c, const Prepared& p, const Batch& batch,
                          const std::vector<reference::Bounded>& quantized) {
  if (!weight_spec(p.config, Product::kFc1).scale.has_scale || c.shared_experts > 0) return 0;
  if (c.accumulate == Accumulate::kAdd || c.variant.extras != Extras::kNone) return 0;
  LayerConfig plain = p.config;
  plain.quant = {.scheme = Scheme::kF32};
  plain.input_dtype = plain.output_dtype = DType::kF32;
  LayerWeights weights;
  weights.activation = p.weights.weights.activation;
  weights.fc1.weight = p.weights.fc1_original.view();
  weights.fc1.bias = p.weights.weights.fc1.bias;
  weights.fc2.weight = p.weights.fc2_original.view();
  weights.fc2.bias = p.weights.weights.fc2.bias;
  HostTensor x(DType::kF32, batch.hidden_states.shape());
  const std::int64_t hidden = p.config.hidden;
  const Tensor scale = batch.hidden_scale.view();
  for (std::int64_t i = 0; i < x.numel(); ++i) {
    double v = load_element(batch.hidden_states.bytes().data(), batch.hidden_states.dtype(), i);
    if (scale.rank == 1) v *= element(scale, {0});
    if (scale.rank == 2)
      v *= element(scale,
                   {i / hidden, scale.shape[1] == 1 ? 0 : i % hidden / p.config.quant.block_k});
    store_element(x.bytes().data(), DType::kF32, i, v);
  }
  reference::LayerInput input = oracle_input(c, batch);
  input.hidden_states = x.view();
  input.hidden_scale = {};
  const auto original = reference::layer(plain, weights, nullptr, input, {}).output;
  double difference = 0, norm = 0;
  for (std::size_t i = 0; i < original.size(); ++i) {
    const double d = quantized[i].value - original[i].value;
    if (!std::isfinite(d)) continue;
    difference += d * d;
    norm += original[i].value * original[i].value;
  }
  return norm > 0 ? std::sqrt(difference / norm) : 0;
}

VerifyResult skipped(const Case& c, const Support& support) {
  VerifyResult r;
  r.name = name(c);
  r.status = Status::kSkipped;
  r.reason = support.reason;
  return r;
}

}  // namespace

std::string_view name(Status status) {
  switch (status) {
    case Status::kPassed:
      return "passed";
    case Status::kFailed:
      return "failed";
    case Status::kSkipped:
      return "skipped";
  }
  return "?";
}

VerifyResult run_case(const Case& c, Device device, Fault fault) {
  const Support support = supported(c, device);
  if (!support.supported) return skipped(c, support);
  VerifyResult r;
  r.name = name(c);
  try {
    // The oracle keeps the right ids; `apply` may have changed those the layer gets.
    const Batch right = make_batch(layer_config(c), batch_options(c));
    Prepared p = prepare_case(c, device, fault);
    const Executed done = execute(*p.layer, p.batch, p.how);
    const std::string misrouted = route_on_device(c, device, &p);
    const Batch& seen = c.source == RoutingSource::kIds ? right : p.batch;

    const bool quantizes = weight_spec(p.config, Product::kFc1).act_scale != ActScale::kDefault;
    const NonFinite non_finite = quantizes ? NonFinite::kLoose : NonFinite::kStrict;
    reference::Choices choices = device_choices(p.config, device);
    std::vector<reference::Bounded> oracle = run_oracle(c, p, seen, choices);
    Comparison best = compare(done.output, oracle, non_finite);
    if (best.ratio > 1 && may_round_weights(p.config)) {
      choices.weights = reference::WeightRounding::k16Bit;
      std::vector<reference::Bounded> rounded = run_oracle(c, p, seen, choices);
      const Comparison other = compare(done.output, rounded, non_finite);
      if (other.ratio < best.ratio) best = other;
    }
    r.max_error = best.max_error;
    r.bound = best.bound;
    r.ratio = best.ratio;
    r.relative_error = best.relative_error;
    r.reason = !misrouted.empty() ? misrouted : best.reason.empty() ? done.damage : best.reason;
    if (r.reason.empty() && done.dropped != 0)
      r.reason = "slots were dropped although the capacity holds all";
    r.status = r.reason.empty() ? Status::kPassed : Status::kFailed;
    if (fault == Fault::kNone) r.quantization_error = quantization_error(c, p, seen, oracle);
  } catch (const std::exception& error) {
    r.status = Status::kFailed;
    r.reason = error.what();
  }
  return r;
}

VerifyResult check_bits(const Case& c, Device device) {
  const Support support = supported(c, device);
  if (!support.supported) return skipped(c, support);
  VerifyResult r;
  r.name = name(c);
  const int threads = num_threads();
  try {
    Prepared p = prepare_case(c, device, Fault::kNone);
    const HostTensor first = execute(*p.layer, p.batch, p.how).output;
    const auto same = [&](const HostTensor& other, std::int64_t row, const std::string& what) {
      const std::size_t width =
          static_cast<std::size_t>(p.config.hidden) * size_of(p.config.output_dtype);
      const bool equal = other.bytes().empty() ||
                         std::memcmp(first.bytes().data() + static_cast<std::size_t>(row) * width,
                                     other.bytes().data(), other.bytes().size()) == 0;
      if (!equal && r.reason.empty()) r.reason = "other bits " + what;
    };
    same(execute(*p.layer, p.batch, p.how).output, 0, "on repeat");
    if (device.type == DeviceType::kCpu) {
      for (const int n : {1, 2, 3, 7}) {
        set_num_threads(n);
        same(execute(*p.layer, p.batch, p.how).output, 0, "with " + std::to_string(n) + " threads");
      }
      set_num_threads(threads);
    }
    // One scale for all rows of the call: the exception that `info` names.
    const bool invariant =
        weight_spec(p.config, Product::kFc1).act_scale != ActScale::kTensorDynamic;
    if (invariant && c.tokens > 1) {
      const auto part = [&](std::int64_t begin, std::int64_t count) {
        Execution how = p.how;
        if (how.initial.defined()) {
          Batch with_initial;
          with_initial.hidden_states = p.how.initial;
          how.initial = take_tokens(with_initial, begin, count).hidden_states;
        }
        return execute(*p.layer, take_tokens(p.batch, begin, count), how).output;
      };
      for (const std::int64_t t : {std::int64_t{0}, c.tokens / 2, c.tokens - 1})
        same(part(t, 1), t, "for token " + std::to_string(t) + " alone");
      same(part(c.tokens / 3, c.tokens - c.tokens / 3), c.tokens / 3, "in a part of the batch");
    }
    if (invariant && c.source == RoutingSource::kIds && c.shared_experts == 0) {
      for (const Format f : {Format::kStandard, Format::kSorted, Format::kBatched}) {
        Execution how = p.how;
        how.format = f;
        if (!supports(p.config, f, device).supported) continue;
        same(execute(*p.layer, p.batch, how).output, 0, "through format " + std::string(name(f)));
      }
    }
    r.status = r.reason.empty() ? Status::kPassed : Status::kFailed;
  } catch (const std::exception& error) {
    r.status = Status::kFailed;
    r.reason = error.what();
  }
  if (device.type == DeviceType::kCpu) set_num_threads(threads);
  return r;
}

}  // namespace moesaic::harness
