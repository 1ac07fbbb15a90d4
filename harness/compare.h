// SPDX-License-Identifier: Apache-2.0
// Numbers that came out against the oracle's bounded ones.
#pragma once

#include <string>
#include <vector>

#include "harness/cases.h"
#include "harness/data.h"
#include "reference/layer.h"

namespace moesaic::harness {

struct Comparison {
  double max_error = 0;       // largest |y - y*|
  double bound = 0;           // of the element with the largest ratio
  double ratio = 0;           // |y - y*| / bound, the largest
  double relative_error = 0;  // ||y - y*|| / ||y*||
  // Elements held against a bound, and those where the oracle itself has none: NaN, Inf, or so near
  // the largest number that its bound is not finite.
  std::int64_t compared = 0, not_finite = 0;
  std::string reason;  // empty: every element is within its bound
};

// NaN and Inf in an oracle's row: such a row may hold anything when `loose`; otherwise the same
// elements must be non-finite.
enum class NonFinite : std::uint8_t { kStrict, kLoose };
Comparison compare(const HostTensor& output, const std::vector<reference::Bounded>& oracle,
                   NonFinite non_finite = NonFinite::kStrict);

// What the oracle must know about the device that ran the layer.
reference::Choices device_choices(const LayerConfig& config, Device device);
// Whether the scheme may round dequantized weights to 16 bit or not: then both are compared.
bool may_round_weights(const LayerConfig& config);

}  // namespace moesaic::harness
