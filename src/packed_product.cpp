// SPDX-License-Identifier: Apache-2.0
// One product of a layer: its packed weights and the small tensors beside them.
#include <algorithm>
#include <string_view>
#include <vector>

#include "check.h"
#include "layer_impl.h"

namespace moesaic {

PackedProduct::PackedProduct(const LayerPlan& plan, const WeightSpec& spec)
    : backend_(plan.backend), storage_(plan.config.weight_storage), side_(*plan.backend, spec) {
  if (storage_ == WeightStorage::kCopied) packed_ = backend_->make_packed(spec);
  operand_.spec = spec;
  operand_.packed = packed_.get();
}

void PackedProduct::keep(const GemmWeights& all) {
  packed_ = backend_->keep_in_place(operand_.spec, all);
  operand_.packed = packed_.get();
}

void PackedProduct::load(std::int64_t expert, const GemmWeights& weights,
                         const ActivationWeights& activation, std::string_view argument) {
  const GemmWeights one = normalize(operand_.spec, 1, weights, argument);
  const SideTensors side = side_views(operand_.spec, 1, one, activation, argument);
  if (storage_ == WeightStorage::kCopied) packed_->load(expert, one);
  side_.load(expert, side, argument);
}

void PackedProduct::unpack(std::int64_t expert, const Tensor& weight,
                           std::string_view argument) const {
  const WeightSpec& spec = operand_.spec;
  check(argument, weight)
      .shape({1, spec.n, is_four_bit(spec.format) ? spec.k / 2 : spec.k})
      .dtype({weight_dtype(spec.format)});
  packed_->unpack(expert, weight);
}

void PackedProduct::finish() {
  side_.complete();
  operand_.side = side_.tensors();
  // The same static scale for every expert (the usual file) is a scalar: x is then quantized once
  // per token instead of once per slot.
  Tensor& scale = operand_.side.input_scale;
  if (scale.defined()) {
    const std::vector<float> values = to_host_f32(*backend_, scale);
    if (std::all_of(values.begin(), values.end(), [&](float v) { return v == values[0]; }))
      scale = scale.slice(0, 1);
  }
}

}  // namespace moesaic
