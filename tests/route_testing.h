// SPDX-License-Identifier: Apache-2.0
// One call of route on the CPU, with poisoned outputs.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "stage_testing.h"

namespace moesaic::testing {

struct Result {
  std::vector<std::int32_t> ids;
  std::vector<float> weights;
  std::int64_t top_k = 0;
  friend bool operator==(const Result& a, const Result& b) {
    return a.ids == b.ids &&
           std::memcmp(a.weights.data(), b.weights.data(), a.weights.size() * sizeof(float)) == 0;
  }
};

inline Result run_route(RouteArgs args, std::int64_t tokens, std::int64_t top_k) {
  Result r{.ids = poisoned<std::int32_t>(tokens * top_k),
           .weights = poisoned<float>(tokens * top_k),
           .top_k = top_k};
  args.topk_ids = Tensor::contiguous(r.ids.data(), DType::kI32, {tokens, top_k});
  args.topk_weights = Tensor::contiguous(r.weights.data(), DType::kF32, {tokens, top_k});
  // Whether there are too many experts is for route to say, not for the size of its workspace.
  const std::int64_t experts =
      std::min<std::int64_t>(2048, args.router.weight.defined() ? args.router.weight.shape[0] : 1);
  const WorkspaceBuffer workspace({}, route_workspace_bytes(tokens, experts));
  args.workspace = workspace.view();
  route(args);
  return r;
}
inline std::vector<std::int32_t> ids_of(const Result& r, std::int64_t token) {
  return {r.ids.begin() + token * r.top_k, r.ids.begin() + (token + 1) * r.top_k};
}

}  // namespace moesaic::testing
