// SPDX-License-Identifier: Apache-2.0
// What `moesaic run` says about an answer: its error against the oracle, its time against the
// machine's floor, and which experts the tokens chose.
#pragma once

#include <cstdint>
#include <functional>
#include <nlohmann/json.hpp>
#include <vector>

#include "harness/compare.h"
#include "harness/data.h"
#include "moesaic/checkpoint.h"
#include "moesaic/moesaic.h"
#include "tools/command.h"

namespace moesaic::tool {

struct RunReport {
  // What was run.
  const Checkpoint* checkpoint = nullptr;
  const CheckpointLayer* stored = nullptr;
  LayerConfig config;
  Format format{};
  Device device{};
  std::int64_t tokens = 0;
  double packed_bytes = 0;
  const harness::HostTensor* hidden = nullptr;
  const harness::HostTensor* ids = nullptr;
  const harness::HostTensor* weights = nullptr;

  // What came of it.
  std::int64_t checked = 0;  // tokens that were compared
  harness::Comparison comparison;
  double ms_median = 0, floor_ms = 0;
  const char* floor_bound = "bytes";
  bool in_cache = false;  // the active weights fit the last-level cache: the floor is not one
  std::vector<std::int64_t> load;  // slots per expert

  // `wanted` tokens from the first on; -1: as many as the oracle does in seconds.
  void compare(const harness::HostTensor& output, std::int64_t layer, std::int64_t wanted);
  void time(const std::function<void(Stream)>& forward);
  bool within_bound() const { return comparison.reason.empty(); }
  void print(const Output& out) const;
  nlohmann::json to_json() const;
};

}  // namespace moesaic::tool
