// SPDX-License-Identifier: Apache-2.0
#include "reference/layer.h"

#include <map>

#include "reference/activation.h"
#include "reference/align.h"
#include "reference/quantize.h"
#include "scheme.h"

namespace moesaic::reference {
namespace {

using Numbers = std::vector<Bounded>;

// One live slot on its way through the layer.
struct Slot {
  std::int64_t id = 0, token = 0, expert = 0;  // local expert
  Numbers numbers;                             // the input of the product that comes next
  Row row;                                     // the same, as the product reads it
};
using Slots = std::vector<Slot>;

// One product of one group of experts (the routed ones, or the shared one).
struct Stage {
  const WeightSpec& spec;
  const GemmWeights& weights;
  const Choices& choices;
  Format format;
};

double factor(const Tensor& t, std::int64_t expert, double otherwise) {
  if (!t.defined()) return otherwise;
  return load(t, t.shape[0] == 1 ? 0 : expert);
}

// AWQ's factors come before quantization; their product is rounded to 16 bit like any intermediate.
void apply_prequant(const Stage& stage, Slots* slots) {
  const Tensor& p = stage.weights.prequant;
  if (!p.defined()) return;
  for (Slot& slot : *slots) {
    for (std::size_t k = 0; k < slot.numbers.size(); ++k) {
      const auto at = static_cast<std::int64_t>(k);
      const double f = p.rank == 2 ? load(p, slot.expert, at) : load(p, at);
      Bounded& b = slot.numbers[k];
      // Exact in float64, rounded to fp32 and from there to 16 bit.
      b = round_to(stage.spec.dtype16,
                   {b.value * f, b.error * std::abs(f) + kUnit * std::abs(b.value * f)});
    }
  }
}

// Fills slot.row of every slot from slot.numbers.
void quantize_slots(const Stage& stage, Slots* slots) {
  apply_prequant(stage, slots);
  const WeightSpec& spec = stage.spec;
  const QuantizeRule rule{spec.act_dtype, spec.act_group, spec.int8_rounding};
  // Per tensor, dynamic: over all live rows of the call, or batched over those of each expert.
  std::map<std::int64_t, Bounded> largest;
  const auto pool = [&](const Slot& s) { return stage.format == Format::kBatched ? s.expert : 0; };
  if (spec.act_scale == ActScale::kTensorDynamic) {
    for (const Slot& slot : *slots) {
      Bounded& l = largest[pool(slot)];
      l = larger(l, finite_absmax(slot.numbers));
    }
  }
  for (Slot& slot : *slots) {
    switch (spec.act_scale) {
      case ActScale::kDefault:
        slot.row = as_is(slot.numbers);
        break;
      case ActScale::kTensorStatic:
        slot.row =
            quantize(rule, slot.numbers, {factor(stage.weights.input_scale, slot.expert, 1), 0});
        break;
      case ActScale::kTensorDynamic:
        slot.row = quantize(rule, slot.numbers, scale_of(rule.to, largest[pool(slot)]));
        break;
      case ActScale::kToken: {
        QuantizeRule whole = rule;
        whole.group = 0;
        slot.row = quantize(whole, slot.numbers);
        break;
      }
      case ActScale::kGroup:
        slot.row = quantize(rule, slot.numbers);
        break;
    }
  }
}

// Runs every slot through its expert's product; `finish` turns the sums into the slot's numbers.
template <typename Finish>
void run_product(const Stage& stage, Slots* slots, Finish finish) {
  std::map<std::int64_t, std::vector<Slot*>> by_expert;
  for (Slot& slot : *slots) by_expert[slot.expert].push_back(&slot);
  for (auto& [expert, members] : by_expert) {
    const Matrix matrix = dequantize(stage.spec, stage.weights, expert, stage.choices.weights);
    Epilogue epilogue{.alpha = factor(stage.weights.alpha, expert, 1), .bias = {}};
    if (stage.weights.bias.defined()) epilogue.bias = stage.weights.bias.select(expert);
    epilogue.scale_cells = stage.spec.scale.grid_k;
    for (Slot* slot : members) {
      slot->numbers =
          finish(*slot, product(slot->row, matrix, stage.choices.accumulator, epilogue));
      slot->row = {};
    }
  }
}

// Both products and the activation; slot.numbers become the slot's output of H numbers.
void run_experts(const LayerConfig& config, const LayerWeights& weights, const LayerInput& input,
                 const Choices& choices, Slots* slots) {
  const WeightSpec fc1 = weight_spec(config, Product::kFc1),
                   fc2 = weight_spec(config, Product::kFc2);
  const Stage first{fc1, weights.fc1, choices, input.format};
  const Stage second{fc2, weights.fc2, choices, input.format};
  const bool already_8bit = !is_float(input.hidden_states.dtype);
  if (already_8bit) {
    for (Slot& slot : *slots) slot.row = as_is(slot.numbers);
  } else {
    quantize_slots(first, slots);
  }
  run_product(first, slots, [&](const Slot& slot, const Numbers& sums) {
    Numbers h = activate(config.activation,
                         parameters_of(config.activation, weights.activation, slot.expert), sums);
    for (Bounded& b : h) b = round_to(fc2.dtype16, b);
    return h;
  });
  quantize_slots(second, slots);
  run_product(second, slots, [](const Slot&, Numbers sums) { return sums; });
}

// A token's input, as an fp32 number; 8-bit ones times their scale.
Numbers input_row(const LayerConfig& config, const LayerInput& input, std::int64_t token) {
  const Tensor& x = input.hidden_states;
  const Tensor& scale = input.hidden_scale;
  Numbers row(static_cast<std::size_t>(config.hidden));
  for (std::int64_t h = 0; h < config.hidden; ++h) {
    double v = load(x, token, h);
    if (!is_float(x.dtype)) {
      if (scale.rank == 1)
        v *= load(scale, 0);
      else
        v *= load(scale, token, scale.shape[1] == 1 ? 0 : h / config.quant.block_k);
    }
    row[static_cast<std::size_t>(h)] = {v, 0};
  }
  return row;
}

Slots live_slots(const LayerConfig& config, const LayerInput& input, std::int64_t* dropped) {
  const std::vector<std::int64_t> ids = slot_ids(input.topk_ids);
  const DType dtype16 = intermediate_dtype(config);
  std::map<std::int64_t, std::int64_t> count;
  Slots slots;
  for (std::size_t s = 0; s < ids.size(); ++s) {
    const auto id = static_cast<std::int64_t>(s);
    const std::int64_t expert =
        local_expert(ids[s], config.experts, config.local, input.expert_map);
    if (expert < 0) continue;
    if (input.format == Format::kBatched && input.capacity > 0 && count[expert] >= input.capacity) {
      ++*dropped;
      continue;
    }
    ++count[expert];
    Slot slot{.id = id, .token = id / config.top_k, .expert = expert, .numbers = {}, .row = {}};
    slot.numbers = input_row(config, input, slot.token);
    if (config.weight_on == WeightOn::kInput) {
      const double w = load(input.topk_weights, slot.token, id % config.top_k);
      for (Bounded& b : slot.numbers) b = {round_to(dtype16, b.value * w), 0};
    }
    slots.push_back(std::move(slot));
  }
  return slots;
}

// A slot's finished number, kept in `dtype`, times its weight (or the other way round).
Bounded weighted(const Bounded& b, Bounded weight, DType dtype) {
  const double w = std::abs(weight.value), size = std::abs(b.value) + b.error;
  return {b.value * weight.value, b.error * w + size * weight.error + kUnit * size * w +
                                      rounding_error(dtype, size) * std::max(w, 0x1p-10)};
}

// sigmoid(x . gate), or 1. The product of H terms in fp32 moves the sigmoid by a quarter of its
// error.
Bounded shared_factor(const LayerConfig& config, const SharedWeights& shared,
                      const LayerInput& input, std::int64_t token) {
  const Tensor& gate = shared.gate;
  if (!gate.defined()) return {1, 0};
  const Numbers x = input_row(config, input, token);
  double sum = 0, magnitude = 0;
  for (std::int64_t h = 0; h < config.hidden; ++h) {
    const double term =
        x[static_cast<std::size_t>(h)].value *
        load(gate.data, gate.dtype, h * gate.strides[static_cast<std::size_t>(gate.rank - 1)]);
    sum += term;
    magnitude += std::abs(term);
  }
  const double value = 1 / (1 + std::exp(-sum));
  const double error = 0.25 * (walk(static_cast<double>(config.hidden)) + 2) * kUnit * magnitude;
  return {value, error + (8 + 2 * std::min(std::abs(sum), 100.0)) * kUnit * value};
}

}  // namespace

LayerOutput layer(const LayerConfig& config, const LayerWeights& weights,
                  const SharedWeights* shared, const LayerInput& input, const Choices& choices) {
  LayerOutput out;
  out.tokens = input.hidden_states.shape[0];
  out.hidden = config.hidden;
  out.output.resize(static_cast<std::size_t>(out.tokens * out.hidden));
  std::vector<double> magnitude(out.output.size());
  const auto add = [&](const Slot& slot, Bounded weight) {
    for (std::int64_t h = 0; h < config.hidden; ++h) {
      const auto at = static_cast<std::size_t>(slot.token * config.hidden + h);
      const Bounded term =
          weighted(slot.numbers[static_cast<std::size_t>(h)], weight, choices.slots);
      out.output[at].value += term.value;
      out.output[at].error += term.error;
      magnitude[at] += std::abs(term.value);
    }
  };

  Slots slots = live_slots(config, input, &out.dropped);
  run_experts(config, weights, input, choices, &slots);
  for (const Slot& slot : slots) {  // ascending slots: j ascends within a token
    const bool on_output = config.weight_on == WeightOn::kOutput;
    add(slot, {on_output ? load(input.topk_weights, slot.token, slot.id % config.top_k) : 1, 0});
  }
  if (shared != nullptr) {
    LayerConfig one = config;
    one.experts = 1;
    one.local = {};
    one.top_k = 1;
    one.intermediate = config.shared_intermediate > 0 ? config.shared_intermediate
                                                      : config.shared_experts * config.intermediate;
    Slots all;
    for (std::int64_t t = 0; t < out.tokens; ++t)
      all.push_back(
          {.id = t, .token = t, .expert = 0, .numbers = input_row(config, input, t), .row = {}});
    run_experts(one, shared->weights, input, choices, &all);
    for (const Slot& slot : all) add(slot, shared_factor(config, *shared, input, slot.token));
  }
  const double additions = walk(static_cast<double>(config.top_k + 1)) * kUnit;
  for (std::size_t i = 0; i < out.output.size(); ++i)
    out.output[i].error += additions * magnitude[i] + 0x1p-126;
  return out;
}

double stored_error(const Bounded& b, DType output) {
  return b.error + rounding_error(output, std::abs(b.value) + b.error);
}

}  // namespace moesaic::reference
