// SPDX-License-Identifier: Apache-2.0
// One row times one expert's matrix, with the error that accumulating in fp32 may cause.
#pragma once

#include <cstdint>
#include <vector>

#include "reference/bounded.h"
#include "reference/matrix.h"
#include "reference/quantize.h"

namespace moesaic::reference {

// How the device adds up products (rounding point 1).
enum class Accumulator : std::uint8_t {
  kFp32,        // every addition rounded to nearest
  kTensorCore,  // fp32 that truncates: mma.sync and wgmma of 16-bit operands
  kWgmmaE4M3,   // 13 bits behind the largest addend's point, promoted to fp32 every 128 of K
};

struct Epilogue {
  double alpha = 1;              // an extra factor on the sums
  Tensor bias;                   // [N], or undefined
  std::int64_t scale_cells = 1;  // scaled partial sums along K
};

// alpha * row * matrix + bias, before any rounding to storage.
std::vector<Bounded> product(const Row& row, const Matrix& matrix, Accumulator accumulator,
                             const Epilogue& epilogue);

}  // namespace moesaic::reference
