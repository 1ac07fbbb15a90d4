// SPDX-License-Identifier: Apache-2.0
// Ids and weights that a device routed, against the oracle of routing.
#pragma once

#include <string>

#include "harness/data.h"
#include "moesaic/moesaic.h"

namespace moesaic::harness {

struct RoutedTokens {
  RoutingSpec spec;
  Tensor logits;         // [T, E], or undefined: computed from
  Tensor hidden_states;  // [T, H] and router.weight
  RouterWeights router;
  const HostTensor* topk_ids = nullptr;      // [T, k] i32
  const HostTensor* topk_weights = nullptr;  // [T, k] f32
};

// Host tensors. Empty: every pick is the best that was left, up to what fp32 can tell apart, and
// its weight is within its bound. Otherwise which token is wrong and how.
std::string check_routing(const RoutedTokens& routed);

}  // namespace moesaic::harness
