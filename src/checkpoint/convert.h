// SPDX-License-Identifier: Apache-2.0
// One expert's product from one scheme into another: relabelled where the stored numbers are the
// same, else dequantized and quantized.
#pragma once

#include <vector>

#include "checkpoint/arena.h"
#include "moesaic/quant.h"
#include "scheme.h"

namespace moesaic {

// Whether numbers stored as `from` are also numbers of `to` (as they are, or with scales repeated).
bool same_numbers(const WeightSpec& from, const WeightSpec& to);

// (q - zero) * scale in fp32, dense [n, k]. `one` has leading extent 1.
std::vector<float> dequantize(const WeightSpec& spec, const GemmWeights& one);

// Round to nearest; symmetric unless the scheme has zero points; scales are the smallest that hold
// each cell's extremes. weight, scale and zero_point only.
GemmWeights quantize_weights(const WeightSpec& spec, const std::vector<float>& values,
                             Arena& arena);

// The bias and the like go along. A static activation scale that the source lacks is refused.
GemmWeights convert(const WeightSpec& from, const WeightSpec& to, const GemmWeights& one,
                    Arena& arena);

}  // namespace moesaic
