// SPDX-License-Identifier: Apache-2.0
// Which experts the tokens of a timed layer go to.
#pragma once

#include <cstdint>

#include "harness/bench.h"
#include "harness/data.h"

namespace moesaic::harness {

// One routing of the rotation, on the device.
struct Routing {
  DeviceTensor ids, weights, logits;
  double active = 0;
  std::int64_t busiest = 0;  // slots of the expert with the most
};

// The rotation's routing `r`. From logits it is the same one as from ids.
BatchOptions batch_of(const BenchSpec& spec, std::int64_t tokens, int r);
Routing make_routing(const LayerConfig& config, const BenchSpec& spec, std::int64_t tokens, int r);

}  // namespace moesaic::harness
