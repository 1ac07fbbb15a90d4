// SPDX-License-Identifier: Apache-2.0
// From logits to experts and weights in float64: the table in moesaic/routing.h.
#pragma once

#include <cstdint>
#include <vector>

#include "moesaic/routing.h"

namespace moesaic::reference {

// One token's choice, best first.
struct Routed {
  std::vector<std::int64_t> ids;
  std::vector<double> weights;
  // Every expert's selection score in each of the k picks; -inf: not eligible. An implementation in
  // fp32 may pick another expert only where scores are this close.
  std::vector<std::vector<double>> scores;
  // The closest call between a group that stays and one that goes (no groups: infinity).
  double group_margin = 0;
};

// z: one token's logits plus router bias. selection_bias: empty or one per expert.
Routed route(const RoutingSpec& spec, std::int64_t top_k, const std::vector<double>& z,
             const std::vector<double>& selection_bias);

// z = x W^T + bias for one token, from x [H] and the router's tensors.
std::vector<double> logits(const Tensor& x, const RouterWeights& router);

}  // namespace moesaic::reference
