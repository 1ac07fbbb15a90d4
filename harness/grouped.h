// SPDX-License-Identifier: Apache-2.0
// One grouped GEMM of level 3 on a device and in the oracle: data, lists, poisoned output,
// comparison.
#pragma once

#include <cstdint>
#include <deque>
#include <string>

#include "harness/compare.h"
#include "harness/data.h"
#include "moesaic/moesaic.h"

namespace moesaic::harness {

struct GroupedCase {
  Variant variant;
  std::int64_t experts = 6, n = 80, k = 136, top_k = 2, tokens = 19;
  Format format = Format::kSorted;  // or kBatched
  Biases bias = Biases::kNone;
  DType a = DType::kBF16;  // float (quantized inside) or the scheme's 8-bit dtype with scales
  DType c = DType::kBF16;
  RowOrder a_order = RowOrder::kSlot, c_order = RowOrder::kSlot;
  enum class RowWeights : std::uint8_t { kNone, kGiven };
  RowWeights row_weights = RowWeights::kNone;
  Placement placement = Placement::kDense;  // of a, c
  std::int64_t k_padding = 0;               // columns behind K in every row of the weights
  std::int64_t block_rows = 16;
  Load load = Load::kUniform;
  ExpertRange local{};  // experts outside become filtered blocks
  std::uint64_t seed = 1;
};

// Empty: every row is what the oracle says (computed within its bound, zero, or untouched).
// Otherwise what is wrong with which row.
std::string check_grouped(const GroupedCase& c, Device device = {});

}  // namespace moesaic::harness
