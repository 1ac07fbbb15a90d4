// SPDX-License-Identifier: Apache-2.0
#include "harness/execute.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "reference/align.h"
#include "scheme.h"

namespace moesaic::harness {
namespace {

// Tensors of one run, so that all guards are looked at in one place.
class Buffers {
 public:
  Buffers(Device device, Placement placement) : device_(device), placement_(placement) {}

  Tensor input(const char* what, const HostTensor& host, Placement placement = Placement::kDense) {
    if (!host.defined()) return {};
    inputs_.push_back({what, DeviceTensor::from(host, device_, placement), &host});
    return inputs_.back().tensor.view();
  }
  Tensor strided_input(const char* what, const HostTensor& host) {
    return input(what, host, placement_);
  }
  DeviceTensor& output(const char* what, DType dtype, std::vector<std::int64_t> shape,
                       Placement placement = Placement::kDense) {
    outputs_.push_back({what, DeviceTensor(device_, dtype, std::move(shape), placement), nullptr});
    return outputs_.back().tensor;
  }
  Workspace workspace(std::size_t bytes) {
    DeviceTensor& t = output("workspace", DType::kU8, {static_cast<std::int64_t>(bytes)});
    return {t.view().data, bytes};
  }
  Device device() const { return device_; }
  Placement placement() const { return placement_; }

  std::string damage() const {
    for (const Entry& e : outputs_)
      if (!e.tensor.guards_intact()) return std::string(e.what) + ": written outside";
    for (const Entry& e : inputs_) {
      if (!e.tensor.guards_intact()) return std::string(e.what) + ": an input, written outside";
      if (e.tensor.to_host().bytes() != e.host->bytes())
        return std::string(e.what) + ": an input, written";
    }
    return {};
  }

 private:
  struct Entry {
    const char* what;
    DeviceTensor tensor;
    const HostTensor* host;
  };
  Device device_;
  Placement placement_;
  std::deque<Entry> inputs_, outputs_;
};

HostTensor cleaned_ids(const LayerConfig& config, const HostTensor& ids) {
  HostTensor clean(DType::kI32, ids.shape());
  const std::vector<std::int64_t> all = reference::slot_ids(ids.view());
  for (std::size_t s = 0; s < all.size(); ++s)
    clean.as<std::int32_t>()[s] =
        static_cast<std::int32_t>(all[s] >= 0 && all[s] < config.experts ? all[s] : -1);
  return clean;
}

void run_standard(const Layer& layer, const Batch& batch, const Execution& how, Buffers* b,
                  const DeviceTensor& output) {
  const std::int64_t tokens = batch.hidden_states.shape()[0];
  ForwardArgs args;
  args.hidden_states = b->strided_input("hidden_states", batch.hidden_states);
  args.hidden_scale = b->input("hidden_scale", batch.hidden_scale);
  if (how.source == Execution::Source::kIds) {
    args.topk_ids = b->input("topk_ids", batch.topk_ids);
    args.topk_weights = b->input("topk_weights", batch.topk_weights);
  } else if (how.source == Execution::Source::kLogits) {
    args.router_logits = b->strided_input("router_logits", batch.router_logits);
  }
  args.output = output.view();
  args.accumulate = how.accumulate;
  args.workspace = b->workspace(layer.workspace_bytes(tokens));
  layer.forward(args);
}

void run_sorted(const Layer& layer, const Batch& batch, const Execution& how, Buffers* b,
                const DeviceTensor& output) {
  const LayerConfig& config = layer.config();
  const std::int64_t tokens = batch.hidden_states.shape()[0], slots = tokens * config.top_k;
  constexpr std::int64_t kBlockRows = 16;
  const std::int64_t capacity = align_capacity(slots, config.experts, kBlockRows);
  AlignArgs a;
  a.topk_ids = b->input("topk_ids", batch.topk_ids);
  a.experts = config.experts;
  a.local = config.local;
  a.rows = {.slots = b->output("slots", DType::kI32, {capacity}).view(),
            .block_experts =
                b->output("block_experts", DType::kI32, {(capacity + kBlockRows - 1) / kBlockRows})
                    .view(),
            .num_padded = b->output("num_padded", DType::kI32, {1}).view(),
            .block_rows = kBlockRows};
  a.workspace = b->workspace(align_workspace_bytes(slots, config.experts, b->device()));
  align(a);

  ExpertsArgs e;
  e.format = Format::kSorted;
  e.rows = b->strided_input("hidden_states", batch.hidden_states);
  e.row_scale = b->input("hidden_scale", batch.hidden_scale);
  e.sorted = a.rows;
  const Tensor weights = b->input("topk_weights", batch.topk_weights);
  const bool on_input = config.weight_on == WeightOn::kInput;
  if (on_input) {
    e.row_weights = weights;
    e.row_weights.rank = 1;  // [T * k]
    e.row_weights.shape = {slots};
    e.row_weights.strides = {1};
  }
  e.output =
      b->output("slot outputs", how.expert_output, {slots, config.hidden}, b->placement()).view();
  e.workspace =
      b->workspace(stage_workspace_bytes(config, {Format::kSorted, tokens, capacity, b->device()}));
  experts(layer, e);

  // Ids that no list holds have no row: they are skipped by their id.
  const HostTensor clean = cleaned_ids(config, batch.topk_ids);
  SumArgs s;
  const DeviceTensor ids = DeviceTensor::from(clean, b->device());
  s.topk_ids = ids.view();
  s.input = e.output;
  s.input.rank = 3;
  s.input.shape = {tokens, config.top_k, config.hidden};
  s.input.strides = {config.top_k * e.output.strides[0], e.output.strides[0], 1};
  if (!on_input) s.topk_weights = weights;
  s.accumulate = how.accumulate;
  s.output = output.view();
  sum_slots(s);
}

void run_batched(const Layer& layer, const Batch& batch, const Execution& how, Buffers* b,
                 const DeviceTensor& output, std::int64_t* dropped) {
  const LayerConfig& config = layer.config();
  const WeightSpec fc1 = weight_spec(config, Product::kFc1);
  const std::int64_t tokens = batch.hidden_states.shape()[0];
  const std::int64_t capacity =
      how.capacity > 0 ? how.capacity : needed_capacity(config, batch.topk_ids);
  const bool float_input = is_float(config.input_dtype);
  const bool defer = float_input && (fc1.act_scale == ActScale::kTensorStatic ||
                                     how.extras == Extras::kPrequantAlpha);
  const bool scaled = fc1.act_scale != ActScale::kDefault && !defer;
  const LayerConfig plain = float_rows(config);

  PrepareArgs p;
  p.hidden_states = b->strided_input("hidden_states", batch.hidden_states);
  p.hidden_scale = b->input("hidden_scale", batch.hidden_scale);
  p.topk_ids = b->input("topk_ids", batch.topk_ids);
  p.topk_weights = b->input("topk_weights", batch.topk_weights);
  p.rows = b->output("rows", defer ? fc1.dtype16 : fc1.act_dtype,
                     {fc1.experts, capacity, config.hidden}, b->placement())
               .view();
  if (scaled) {
    const bool per_tensor =
        fc1.act_scale == ActScale::kTensorDynamic || fc1.act_scale == ActScale::kTensorStatic;
    const std::int64_t groups =
        fc1.act_scale == ActScale::kGroup ? (fc1.k + fc1.act_group - 1) / fc1.act_group : 1;
    p.row_scale =
        b->output("row_scale", DType::kF32, {fc1.experts, per_tensor ? 1 : capacity, groups})
            .view();
  }
  p.num_tokens = b->output("num_tokens", DType::kI32, {fc1.experts}).view();
  p.slot_row = b->output("slot_row", DType::kI32, {tokens, config.top_k}).view();
  const DeviceTensor& status = b->output("status", DType::kI32, {1});
  p.status = status.view();
  p.workspace = b->workspace(stage_workspace_bytes(
      defer ? plain : config, {Format::kBatched, tokens, capacity, b->device()}));
  if (defer)
    prepare(plain, p);
  else
    prepare(layer, p);

  ExpertsArgs e;
  e.format = Format::kBatched;
  e.rows = p.rows;
  e.row_scale = p.row_scale;
  e.batched.num_tokens = p.num_tokens;
  e.output = b->output("expert outputs", how.expert_output, {fc1.experts, capacity, config.hidden},
                       b->placement())
                 .view();
  e.workspace = b->workspace(
      stage_workspace_bytes(config, {Format::kBatched, tokens, capacity, b->device()}));
  experts(layer, e);

  FinalizeArgs f;
  f.expert_output = e.output;
  f.topk_ids = p.topk_ids;
  f.topk_weights = p.topk_weights;
  if (tokens % 2 == 0) f.slot_row = p.slot_row;  // given, or derived again
  f.output = output.view();
  f.accumulate = how.accumulate;
  f.workspace = e.workspace;
  finalize(layer, f);
  *dropped = status.to_host().as<std::int32_t>()[0];
}

}  // namespace

std::int64_t needed_capacity(const LayerConfig& config, const HostTensor& topk_ids) {
  std::vector<std::int64_t> count(static_cast<std::size_t>(config.experts), 0);
  std::int64_t most = 1;
  for (const std::int64_t id : reference::slot_ids(topk_ids.view())) {
    const std::int64_t e = reference::local_expert(id, config.experts, config.local, {});
    if (e >= 0) most = std::max(most, ++count[static_cast<std::size_t>(e)]);
  }
  return most;
}

Batch take_tokens(const Batch& batch, std::int64_t first, std::int64_t count) {
  const auto take = [&](const HostTensor& t) {
    if (!t.defined() || t.shape().size() < 2) return t;  // a scalar scale serves all
    std::vector<std::int64_t> shape = t.shape();
    const std::size_t row =
        t.shape()[0] == 0 ? 0 : t.bytes().size() / static_cast<std::size_t>(shape[0]);
    shape[0] = count;
    HostTensor part(t.dtype(), shape);
    if (!part.bytes().empty())
      std::memcpy(part.bytes().data(), t.bytes().data() + static_cast<std::size_t>(first) * row,
                  part.bytes().size());
    return part;
  };
  return {take(batch.hidden_states), take(batch.hidden_scale), take(batch.topk_ids),
          take(batch.topk_weights), take(batch.router_logits)};
}

LayerConfig float_rows(const LayerConfig& config) {
  LayerConfig plain = config;
  plain.quant = {.scheme =
                     intermediate_dtype(config) == DType::kF16 ? Scheme::kF16 : Scheme::kBF16};
  return plain;
}

Executed execute(const Layer& layer, const Batch& batch, const Execution& how) {
  const LayerConfig& config = layer.config();
  const std::int64_t tokens = batch.hidden_states.shape()[0];
  Buffers b(layer.device(), how.placement);
  DeviceTensor& output =
      b.output("output", config.output_dtype, {tokens, config.hidden}, how.placement);
  if (how.initial.defined()) output.assign(how.initial.view());
  Executed done;
  switch (how.format) {
    case Format::kStandard:
      run_standard(layer, batch, how, &b, output);
      break;
    case Format::kSorted:
      run_sorted(layer, batch, how, &b, output);
      break;
    case Format::kBatched:
      run_batched(layer, batch, how, &b, output, &done.dropped);
      break;
  }
  done.output = output.to_host();
  done.damage = b.damage();
  return done;
}

}  // namespace moesaic::harness
