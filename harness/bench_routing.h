// SPDX-License-Identifier: Apache-2.0
// `moesaic bench`: which experts the tokens of a timed layer go to, another set in each run.
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

// How the rotation's batch `r` is drawn.
BatchOptions batch_of(const BenchSpec& spec, std::int64_t tokens, int r);
// Its routing: from logits the one that ids would say, so that both are timed on the same experts.
Routing make_routing(const LayerConfig& config, const BenchSpec& spec, std::int64_t tokens, int r);

}  // namespace moesaic::harness
