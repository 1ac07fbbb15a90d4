// SPDX-License-Identifier: Apache-2.0
// One token's choice of experts: the table in moesaic/routing.h, every method from the same four steps.
#pragma once

#include <array>
#include <cstdint>

#include "cpu/ranges.h"
#include "moesaic/routing.h"

namespace moesaic {

inline constexpr std::int64_t kMaxRoutedExperts = 2048, kMaxPicks = 32;

struct Selection {
  std::array<std::int32_t, kMaxPicks> ids;  // best first; -1: fewer experts than picks
  std::array<float, kMaxPicks> weights;
};

class Selector {
 public:
  Selector(const StageKernels& kernels, const RoutingSpec& spec, std::int64_t experts,
           std::int64_t top_k, const RowView& selection_bias);

  float* logits() { return z_.data(); }  // [experts]: write these, then select
  void add_router_bias(const RowView& bias);
  Selection select();

 private:
  using Row = std::array<float, kMaxRoutedExperts>;

  float score();                     // z_ -> p_; the scores are p_ times what it returns
  void keep_groups(const float* c);  // by the compared scores c: who is eligible
  void weigh(float factor, Selection* out) const;
  Selection sparse_mixer();

  const StageKernels& kernels_;
  const RoutingSpec& spec_;
  std::int64_t experts_, top_k_;
  bool biased_;
  Row z_, p_, c_, bias_;
  std::array<bool, kMaxRoutedExperts> eligible_;
};

}  // namespace moesaic
