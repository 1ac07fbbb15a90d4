// SPDX-License-Identifier: Apache-2.0
// Runs a loaded layer once through any of the three formats, with everything a caller of that
// format would own: poisoned outputs, guard bands, strided views. What `verify` and the tests look
// at.
#pragma once

#include <cstdint>
#include <string>

#include "harness/data.h"
#include "moesaic/moesaic.h"

namespace moesaic::harness {

struct Execution {
  Format format = Format::kStandard;
  Placement placement = Placement::kDense;
  enum class Source : std::uint8_t { kIds, kLogits, kRouter };
  Source source = Source::kIds;
  Accumulate accumulate = Accumulate::kOverwrite;
  HostTensor initial;         // [T, H]: what output holds before, with kAdd
  std::int64_t capacity = 0;  // batched, rows per expert: 0: as many as the fullest expert needs
  DType expert_output = DType::kF32;  // sorted and batched: dtype of the slots' outputs
  Extras extras = Extras::kNone;      // of the layer's weights: prepare cannot apply AWQ's factors
};

struct Executed {
  HostTensor output;   // [T, H]
  std::string damage;  // empty, or which tensor was written outside, or though it is an input
  std::int64_t dropped = 0;
};

Executed execute(const Layer& layer, const Batch& batch, const Execution& how);

// Rows of the fullest local expert: the capacity that holds this routing, at least 1.
std::int64_t needed_capacity(const LayerConfig& config, const HostTensor& topk_ids);
// `config` with the scheme whose rows are not quantized, for what prepare cannot quantize: static
// scales and AWQ's factors belong to the weights, which it does not see.
LayerConfig float_rows(const LayerConfig& config);
// Tokens [first, first + count) of a batch.
Batch take_tokens(const Batch& batch, std::int64_t first, std::int64_t count);

}  // namespace moesaic::harness
