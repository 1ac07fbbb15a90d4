// SPDX-License-Identifier: Apache-2.0
// Activations to 8 bit and back, as docs/numerics.md and numeric.h say.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "moesaic/quant.h"
#include "reference/bounded.h"

namespace moesaic::reference {

// A row of activations as a product sees it: scale * q, or the plain 16-bit numbers.
struct Row {
  std::vector<double> value;
  std::vector<double> error;  // per element, independent of each other; empty: all exact
  // The scale of a group may be uncertain as a whole, when the group's absmax is: relative, one per
  // `group` elements. Unlike `error` it moves all of them the same way. Empty: exact.
  std::vector<double> scale_error;
  std::int64_t group = 0;
};

struct QuantizeRule {
  DType to = DType::kF8E4M3;
  std::int64_t group = 0;  // elements of K per scale; 0: the whole row
  Int8Rounding int8_rounding = Int8Rounding::kNearest;
};

// The largest magnitude of a row; of many rows by taking the largest again.
Bounded absmax(std::span<const Bounded> row);
// The same without NaN and infinities: for a scale that rows share, which one of them must not
// spoil.
Bounded finite_absmax(std::span<const Bounded> row);
Bounded larger(Bounded a, Bounded b);

// The scale that a largest magnitude gives, absmax / 448 or / 127 ...
Bounded scale_of(DType to, Bounded largest);
// ... the row quantized with its own scales, one per rule.group elements, ...
Row quantize(const QuantizeRule& rule, std::span<const Bounded> row);
// ... or with a scale that is given (static, or of the whole tensor).
Row quantize(const QuantizeRule& rule, std::span<const Bounded> row, Bounded scale);
// Not quantized at all.
Row as_is(std::span<const Bounded> row);

}  // namespace moesaic::reference
