// SPDX-License-Identifier: Apache-2.0
// How much workspace a forward needs by arithmetic: the formula of docs/layer.md.
#pragma once

#include "forward.h"
#include "harness/cases.h"
#include "plan.h"
#include "scheme.h"

namespace moesaic::harness {

// The formula, term by term. Slots: S = T k.
inline double by_arithmetic(const LayerConfig& c, std::int64_t tokens, const LayerPlan& plan) {
  const auto t = static_cast<double>(tokens), slots = t * static_cast<double>(c.top_k);
  const auto hidden = static_cast<double>(c.hidden), inner = static_cast<double>(c.intermediate);
  const auto rows_of = [](const WeightSpec& spec, double rows) {  // quantized rows and their scales
    return rows * (static_cast<double>(spec.k) * static_cast<double>(size_of(spec.act_dtype)) +
                   4.0 * static_cast<double>(scale_row_stride(spec)));
  };
  double bytes =
      t * (8.0 * static_cast<double>(c.top_k) + 4.0 * static_cast<double>(c.experts));  // routing
  bytes += 10 * slots;  // the row map: two lists, and 16 bytes for every 8 slots
  const bool expands =
      must_expand(plan, nullptr) || input_layout(plan, tokens * c.top_k) == RowOf::kPosition;
  if (expands || plan.quantizes_input()) bytes += rows_of(plan.fc1, expands ? slots : t);
  // Where GEMM1 always quantizes there are neither 16-bit rows nor scales of its own.
  const bool staged = plan.intermediate_quantized_by != QuantizedBy::kGemm1;
  if (staged) bytes += slots * inner * static_cast<double>(size_of(plan.fc2.dtype16));
  if (plan.quantizes_intermediate()) bytes += rows_of(plan.fc2, slots);
  bytes += slots * hidden * static_cast<double>(size_of(plan.slot_dtype));
  return bytes;
}

}  // namespace moesaic::harness
