// SPDX-License-Identifier: Apache-2.0
// One expert's weights of one product as float64: what the storage means, scheme by scheme.
#pragma once

#include <cstdint>
#include <vector>

#include "moesaic/quant.h"
#include "scheme.h"

namespace moesaic::reference {

// Weight-only schemes may round the dequantized weight to 16 bit once, as the originals do, or keep
// it exact by scaling group sums (docs/numerics.md, "Where numbers are rounded").
enum class WeightRounding : std::uint8_t { kExact, k16Bit };

// Transposed, [K, N], because a product walks k outside and n inside.
struct Matrix {
  std::int64_t n = 0, k = 0;
  std::vector<double> at;
};

// (q - zero point) * scale for every element of weights.weight[expert].
Matrix dequantize(const WeightSpec& spec, const GemmWeights& weights, std::int64_t expert,
                  WeightRounding rounding);

}  // namespace moesaic::reference
