// SPDX-License-Identifier: Apache-2.0
// Level 1: what a layer owns, how weights get in, and the way into the main path.
#include "moesaic/layer.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <optional>

#include "check.h"
#include "forward.h"
#include "layer_check.h"
#include "layer_impl.h"
#include "moesaic/runtime.h"
#include "weights.h"

namespace moesaic {

// --- attaching weights ---------------------------------------------------------------------------

namespace {

// The views of expert e out of [E, ...] views. A scalar or shared tensor serves every expert.
GemmWeights expert_of(const GemmWeights& all, std::int64_t e) {
  const auto pick = [e](const Tensor& t, bool shared = false) {
    return t.defined() && !shared ? t.slice(e, 1) : t;
  };
  return {.weight = pick(all.weight),
          .scale = pick(all.scale),
          .zero_point = pick(all.zero_point),
          .bias = pick(all.bias),
          .input_scale = pick(all.input_scale, all.input_scale.numel() == 1),
          .prequant = pick(all.prequant, all.prequant.rank == 1),
          .alpha = pick(all.alpha)};
}

ActivationWeights expert_of(const ActivationWeights& all, std::int64_t e) {
  const auto pick = [e](const Tensor& t) { return t.defined() ? t.slice(e, 1) : t; };
  return {.alpha = pick(all.alpha), .beta = pick(all.beta), .limit = pick(all.limit)};
}

void check_leading(std::string_view argument, const Tensor& weight, std::int64_t experts) {
  check(argument, weight);
  if (weight.rank < 1 || weight.shape[0] != experts)
    invalid(fmt::format(
        "{}: expected {} local experts in the leading dimension, got {}; load_expert takes one",
        argument, experts, to_string(weight)));
}

// All that is about to be attached, before any of it is: a complaint speaks of the tensor the
// caller passed, and nothing is half loaded.
struct CheckedWeights {
  GemmWeights fc1, fc2;  // normalized
};
CheckedWeights check_weights(const LayerPlan& plan, std::int64_t experts,
                             const LayerWeights& weights, const std::string& prefix) {
  const std::string first = prefix + "fc1", second = prefix + "fc2";
  check_within(plan.device, weights.fc1, weights.activation, first);
  check_within(plan.device, weights.fc2, {}, second);
  const CheckedWeights all{normalize(plan.fc1, experts, weights.fc1, first),
                           normalize(plan.fc2, experts, weights.fc2, second)};
  side_views(plan.fc1, experts, all.fc1, weights.activation, first);
  if (weights.fc1.prequant.defined() && !is_float(plan.config.input_dtype))
    unsupported(
        fmt::format("{}.prequant: multiplies hidden_states before they are quantized, and "
                    "input_dtype is {}; set a 16-bit input_dtype",
                    first, name(plan.config.input_dtype)));
  return all;
}

// Of a layer, or of its shared experts. What stays in place is kept here.
void check_and_keep(const LayerPlan& plan, const LayerWeights& weights, PackedProduct* fc1,
                    PackedProduct* fc2, const std::string& prefix) {
  const auto [all1, all2] = check_weights(plan, plan.fc1.experts, weights, prefix);
  const std::string first = prefix + "fc1", second = prefix + "fc2";
  if (plan.config.weight_storage == WeightStorage::kCopied) return;
  if (fc1->operand().packed != nullptr)
    invalid(
        fmt::format("{}: weight_storage is in_place, and the layer holds such tensors already; "
                    "make another layer",
                    first));
  check_keepable(plan.device, all1.weight, first + ".weight");
  check_keepable(plan.device, all2.weight, second + ".weight");
  fc1->keep(all1);
  fc2->keep(all2);
}

}  // namespace

Layer::Impl::Impl(const LayerConfig& config, Device device)
    : plan(make_plan(config, device)), fc1(plan, plan.fc1), fc2(plan, plan.fc2) {
  loaded.assign(static_cast<std::size_t>(plan.fc1.experts), false);
  if (plan.config.shared_experts > 0) {
    shared = std::make_unique<SharedLayer>(make_shared_plan(plan));
    shared->ids = WorkspaceBuffer(
        device, std::max<std::size_t>(1, static_cast<std::size_t>(plan.config.max_tokens)) * 4);
    const std::vector<std::int32_t> zeros(static_cast<std::size_t>(plan.config.max_tokens), 0);
    plan.backend->copy(shared->ids.view().data, zeros.data(), zeros.size() * 4, {});
  }
}

SharedLayer::SharedLayer(LayerPlan shared_plan)
    : plan(std::move(shared_plan)), fc1(plan, plan.fc1), fc2(plan, plan.fc2) {}

namespace {

// Throws whatever a layer of this configuration is refused for, with the right code.
void check_supported(const LayerConfig& config, Format format, Device device) {
  check_enum("format", format, 3);
  const LayerPlan plan = make_plan(config, device);
  const auto ask = [&](const LayerPlan& asked, std::string_view whose) {
    const Support support = asked.backend->supports(asked.config, format);
    if (!support.supported) unsupported(fmt::format("{}{}", whose, support.reason));
  };
  ask(plan, "");
  std::optional<LayerPlan> shared;
  if (plan.config.shared_experts > 0)
    ask(shared.emplace(make_shared_plan(plan)), "shared experts: ");
  if (format == Format::kStandard) check_workspace_cap(plan, shared ? &*shared : nullptr);
}

}  // namespace

Support supports(const LayerConfig& config, Format format, Device device) {
  try {
    check_supported(config, format, device);
    return {.supported = true};
  } catch (const Error& error) {
    return {.supported = false, .reason = error.what()};
  }
}

Layer::Layer(const LayerConfig& config, Device device) {
  check_supported(config, Format::kStandard, device);
  impl_ = std::make_unique<Impl>(config, device);
}
Layer::~Layer() = default;
Layer::Layer(Layer&&) noexcept = default;
Layer& Layer::operator=(Layer&&) noexcept = default;

const LayerConfig& Layer::config() const { return impl_->plan.config; }
Device Layer::device() const { return impl_->plan.device; }
bool Layer::ready() const { return impl_->is_ready; }

void Layer::load(const LayerWeights& weights) {
  const std::int64_t experts = impl_->plan.fc1.experts;
  check_leading("fc1.weight", weights.fc1.weight, experts);
  check_leading("fc2.weight", weights.fc2.weight, experts);
  check_and_keep(impl_->plan, weights, &impl_->fc1, &impl_->fc2, "");
  impl_->loaded.assign(impl_->loaded.size(), false);  // all are replaced, and complete together
  for (std::int64_t e = 0; e < experts; ++e)
    impl_->attach(e, {.fc1 = expert_of(weights.fc1, e),
                      .fc2 = expert_of(weights.fc2, e),
                      .activation = expert_of(weights.activation, e)});
}

void Layer::load_expert(std::int64_t local_expert, const LayerWeights& weights) {
  Impl& self = *impl_;
  if (self.plan.config.weight_storage == WeightStorage::kInPlace)
    unsupported(
        "load_expert: weight_storage is in_place, which takes all experts as one tensor; call "
        "load");
  check_range("local_expert", local_expert, 0, self.plan.fc1.experts - 1);
  check_weights(self.plan, 1, weights, "");
  self.attach(local_expert, weights);
}

void Layer::Impl::attach(std::int64_t local_expert, const LayerWeights& weights) {
  {
    const std::lock_guard lock(mutex);
    loaded[static_cast<std::size_t>(local_expert)] = is_ready = false;
  }
  fc1.load(local_expert, weights.fc1, weights.activation, "fc1");
  fc2.load(local_expert, weights.fc2, {}, "fc2");
  const std::lock_guard lock(mutex);
  loaded[static_cast<std::size_t>(local_expert)] = true;
  finish_if_complete();
}

void Layer::unpack_expert(std::int64_t local_expert, const Tensor& fc1, const Tensor& fc2) const {
  const Impl& self = *impl_;
  check_range("local_expert", local_expert, 0, self.plan.fc1.experts - 1);
  check_ready(self, "unpack_expert");
  check("fc1", fc1).distinct().within(self.plan.device);
  check("fc2", fc2).distinct().within(self.plan.device);
  self.fc1.unpack(local_expert, fc1, "fc1");
  self.fc2.unpack(local_expert, fc2, "fc2");
}

void Layer::load_shared(const LayerWeights& weights, const Tensor& gate) {
  Impl& self = *impl_;
  if (!self.shared)
    invalid(
        "load_shared: the configuration has shared_experts = 0; set it to the number of shared "
        "experts");
  Tensor row = gate;
  if (gate.defined()) {
    // The gate reads the layer's input, as a router does.
    if (!is_float(self.plan.config.input_dtype))
      unsupported(fmt::format(
          "shared.gate: reads f32, f16 or bf16 hidden_states, and input_dtype is {}; pass 16-bit "
          "hidden_states, or add the shared experts outside",
          name(self.plan.config.input_dtype)));
    if (gate.rank == 1)
      row = Tensor{gate.data, gate.dtype,         gate.device,
                   2,         {1, gate.shape[0]}, {gate.shape[0], gate.strides[0]}};
    check("shared.gate", row)
        .shape({1, self.plan.config.hidden})
        .dtype({DType::kF32, DType::kF16, DType::kBF16});
  }
  if (gate.defined()) check("shared.gate", gate).within(self.plan.device);
  Tensor kept;
  std::list<WorkspaceBuffer> memory;
  if (gate.defined()) kept = self.keep(row, {1, self.plan.config.hidden}, &memory);
  check_and_keep(self.shared->plan, weights, &self.shared->fc1, &self.shared->fc2, "shared.");
  {
    const std::lock_guard lock(self.mutex);
    self.shared->loaded = self.is_ready = false;
  }
  self.shared->fc1.load(0, weights.fc1, weights.activation, "shared.fc1");
  self.shared->fc2.load(0, weights.fc2, {}, "shared.fc2");
  self.shared->gate = kept;
  self.shared->gate_memory = std::move(memory);
  const std::lock_guard lock(self.mutex);
  self.shared->loaded = true;
  self.finish_if_complete();
}

std::string Layer::Impl::missing() const {
  const auto empty = std::find(loaded.begin(), loaded.end(), false);
  if (empty != loaded.end())
    return fmt::format("local expert {} has no weights yet; call load or load_expert",
                       empty - loaded.begin());
  if (shared && !shared->loaded)  // one expert, whose tensors cannot differ from others'
    return "the shared experts have no weights yet; call load_shared";
  std::string uneven = fc1.missing("fc1");
  return uneven.empty() ? fc2.missing("fc2") : uneven;
}

void Layer::Impl::finish_if_complete() {
  if (!missing().empty()) return;
  for (PackedProduct* product : {&fc1, &fc2}) product->finish();
  if (shared)
    for (PackedProduct* product : {&shared->fc1, &shared->fc2}) product->finish();
  is_ready = true;
}

Tensor Layer::Impl::keep(const Tensor& tensor, std::initializer_list<std::int64_t> shape,
                         std::list<WorkspaceBuffer>* memory) const {
  std::vector<float> values;
  const bool dense = tensor.is_contiguous();
  if (!dense) values = to_host_f32(*plan.backend, tensor);
  const DType dtype = dense ? tensor.dtype : DType::kF32;
  const std::size_t bytes = static_cast<std::size_t>(tensor.numel()) * size_of(dtype);
  void* const copy = memory->emplace_back(plan.device, bytes).view().data;
  plan.backend->copy(copy, dense ? tensor.data : values.data(), bytes, {});
  return Tensor::contiguous(copy, dtype, shape, plan.device);
}

void Layer::set_router(const RouterWeights& router) {
  Impl& self = *impl_;
  const std::int64_t experts = self.plan.config.experts, hidden = self.plan.config.hidden;
  check_selection_bias(self.plan.config.routing, router.selection_bias);
  RouterWeights kept;
  std::list<WorkspaceBuffer> memory;
  if (router.weight.defined()) {
    check("router.weight", router.weight)
        .shape({experts, hidden})
        .dtype({DType::kF32, DType::kF16, DType::kBF16})
        .within(self.plan.device);
    kept.weight = self.keep(router.weight, {experts, hidden}, &memory);
  }
  const auto keep_vector = [&](std::string_view argument, const Tensor& t) {
    if (!t.defined()) return Tensor{};
    check(argument, t)
        .shape({experts})
        .dtype({DType::kF32, DType::kF16, DType::kBF16})
        .within(self.plan.device);
    return self.keep(t, {experts}, &memory);
  };
  kept.bias = keep_vector("router.bias", router.bias);
  kept.selection_bias = keep_vector("router.selection_bias", router.selection_bias);
  self.router = kept;
  self.router_memory = std::move(memory);
}

std::size_t Layer::weight_bytes() const {
  const Impl& self = *impl_;
  std::size_t bytes = self.fc1.bytes() + self.fc2.bytes();
  if (self.shared) bytes += self.shared->fc1.bytes() + self.shared->fc2.bytes();
  return bytes;
}

// --- running -------------------------------------------------------------------------------------

LoadedLayer Layer::Impl::loaded_layer() const {
  LoadedLayer view{.plan = &plan,
                   .fc1 = &fc1.operand(),
                   .fc2 = &fc2.operand(),
                   .router = router,
                   .tactics = tactics};
  if (shared) {
    view.shared_plan = &shared->plan;
    view.shared_fc1 = &shared->fc1.operand();
    view.shared_fc2 = &shared->fc2.operand();
    view.shared_gate = shared->gate;
    view.shared_ids = static_cast<const std::int32_t*>(shared->ids.view().data);
  }
  return view;
}

std::size_t Layer::workspace_bytes(std::int64_t tokens) const {
  check_range("tokens", tokens, 0, config().max_tokens);
  return forward_workspace_bytes(impl_->plan, impl_->shared ? &impl_->shared->plan : nullptr,
                                 tokens);
}

void Layer::forward(const ForwardArgs& args) const {
  check_ready(*impl_, "forward");
  check_forward(*impl_, args);
  moesaic::forward(impl_->loaded_layer(), args);
}

std::vector<Tactic> Layer::tactics_gemm1() const {
  return impl_->plan.backend->tactics(impl_->plan.fc1);
}
std::vector<Tactic> Layer::tactics_gemm2() const {
  return impl_->plan.backend->tactics(impl_->plan.fc2);
}
void Layer::set_tactics(TacticPair pair) { impl_->tactics = pair; }

}  // namespace moesaic
