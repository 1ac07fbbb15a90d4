// SPDX-License-Identifier: Apache-2.0
// `moesaic bench`: the time of a whole layer with weights that come from memory, and the floor that
// the machine sets: bytes over its read rate, or operations over its product rate, probed beside.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "harness/cases.h"
#include "harness/roof.h"
#include "moesaic/moesaic.h"

namespace moesaic::harness {

struct BenchSpec {
  Shape shape;
  std::vector<std::int64_t> tokens;
  Variant variant;  // scheme with its options
  Format format = Format::kStandard;
  bool experts_only = false;  // sorted, batched: their stage `experts` alone, on lists made before
  RoutingSource source = RoutingSource::kIds;  // kLogits: standard format only
  std::int64_t capacity = 0;                   // batched: rows per expert; 0: as many as are needed
  ActivationSpec activation{};
  Biases bias = Biases::kNone;
  Load load = Load::kUniform;
  Device device{};
  std::uint64_t seed = 1;
  double seconds = 0.5;  // per row
  // Each is a row of its own; all of one number of tokens share buffers and routings, one behind
  // the other. Rows behind the first that would take three times as long as it have one sample.
  std::vector<TacticPair> tactics{{}};
  std::chrono::steady_clock::time_point process_start = std::chrono::steady_clock::now();
};

struct BenchRow {
  std::string backend, device, scheme, variant, format, source, shape, load;
  std::int64_t experts = 0, hidden = 0, intermediate = 0, top_k = 0, tokens = 0;
  double ms_median = 0, ms_min = 0, ms_max = 0;
  int runs = 0;
  double active_experts = 0;  // mean over the routings that were rotated
  double weight_bytes = 0;    // of the active experts
  double floor_ms = 0;
  std::string floor_bound;      // "bytes" or "operations"
  double ratio_to_floor = 0;    // time / floor
  double fraction_of_roof = 0;  // floor / time
  double gflops = 0, gbytes_s = 0;
  double read_gbytes_s = 0;  // the probe's mean, just before and after
  double product_gops = 0;   // of the products that this scheme is made of
  double host_us = 0;        // of one call that the host does not wait for
  double clock_mhz = 0;      // of the device, behind the last sample
  std::string activation;
  bool bias = false, experts_only = false;
  TacticPair tactics{};  // what was forced; -1: the policy chose
  std::string invalid;   // why this row does not count; empty: it does
};

struct BenchMachine {
  std::string backend, device, kernels;
  int threads = 0;
  Roof before, after;  // probes; read rates: first and last of the run
  std::optional<Roof> reference;
  std::string invalid;
  // Start-up: until the device could be used at all; what the process takes besides until its first
  // forward has finished, without probes, weights and inputs; and that forward's part of it.
  double context_ms = 0, start_ms = 0, first_forward_ms = 0;
};

struct BenchResult {
  BenchMachine machine;
  std::vector<BenchRow> rows;
};
nlohmann::json to_json(const BenchResult& result);
// Says which rows do not count: those with a low read probe around them; all of them where a
// product probe before or after was low.
void judge(BenchResult* result, DeviceType type);

// Bytes of one local expert's weights, scales, zero points and biases, as the caller holds them.
double expert_bytes(const LayerConfig& config, Biases bias);

// What no implementation can beat: the active experts' bytes over the read rate, or the operations
// over the product rate, whichever takes longer. Activations are not in it.
struct FloorInputs {
  std::int64_t tokens = 0;
  double active_experts = 0;
  double read_gbytes_s = 0, product_rate = 0;  // GB/s, G operations/s
};
struct Floor {
  double ms = 0, weight_bytes = 0, operations = 0;
  const char* bound = "bytes";  // or "operations"
};
Floor layer_floor(const LayerConfig& config, Biases bias, const FloorInputs& inputs);

using BenchProgress = std::function<void(std::string_view what)>;
BenchResult bench(const BenchSpec& spec, const BenchProgress& progress = {});

}  // namespace moesaic::harness
