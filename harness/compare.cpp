// SPDX-License-Identifier: Apache-2.0
#include "harness/compare.h"

#include <algorithm>
#include <cmath>

#include "backend.h"
#include "scheme.h"

namespace moesaic::harness {

Comparison compare(const HostTensor& output, const std::vector<reference::Bounded>& oracle,
                   NonFinite non_finite) {
  Comparison c;
  double difference = 0, norm = 0;
  const std::int64_t width =
      output.shape().empty() ? 1 : std::max<std::int64_t>(1, output.shape().back());
  const auto where = [&](std::size_t i) {
    return "row " + std::to_string(static_cast<std::int64_t>(i) / width) + ", column " +
           std::to_string(static_cast<std::int64_t>(i) % width);
  };
  for (std::size_t i = 0; i < oracle.size(); ++i) {
    const double got =
        load_element(output.bytes().data(), output.dtype(), static_cast<std::int64_t>(i));
    const reference::Bounded& want = oracle[i];
    if (!std::isfinite(want.value) || !std::isfinite(want.error)) {
      ++c.not_finite;
      if (non_finite == NonFinite::kStrict && std::isfinite(got) && !std::isfinite(want.value) &&
          c.reason.empty())
        c.reason = where(i) + ": got " + std::to_string(got) + " where NaN or Inf belongs";
      continue;
    }
    ++c.compared;
    const double error = std::abs(got - want.value);
    const double bound = reference::stored_error(want, output.dtype());
    if (!std::isfinite(got)) {
      c.ratio = std::numeric_limits<double>::infinity();
      if (c.reason.empty())
        c.reason = where(i) + ": got a number that is not finite, or nothing was written";
      continue;
    }
    c.max_error = std::max(c.max_error, error);
    difference += error * error;
    norm += want.value * want.value;
    if (error > c.ratio * bound) {
      c.ratio = error / bound;
      c.bound = bound;
      if (c.ratio > 1)
        c.reason = where(i) + ": got " + std::to_string(got) + ", expected " +
                   std::to_string(want.value) + " within " + std::to_string(bound);
    }
  }
  c.relative_error = norm > 0 ? std::sqrt(difference / norm) : 0;
  return c;
}

reference::Choices device_choices(const LayerConfig& config, Device device) {
  const Backend& b = backend(device);
  const WeightSpec fc2 = weight_spec(config, Product::kFc2);
  reference::Choices choices;
  choices.slots = b.slot_dtype(fc2);
  if (device.type == DeviceType::kCuda) {
    const bool wgmma = b.info().kernels == "sm90a" && fc2.act == ActFormat::kE4M3;
    choices.accumulator =
        wgmma ? reference::Accumulator::kWgmmaE4M3 : reference::Accumulator::kTensorCore;
  }
  return choices;
}

bool may_round_weights(const LayerConfig& config) {
  const WeightSpec fc1 = weight_spec(config, Product::kFc1);
  return fc1.act == ActFormat::k16 && fc1.scale.has_scale;
}

}  // namespace moesaic::harness
