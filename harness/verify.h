// SPDX-License-Identifier: Apache-2.0
// Runs one case on a device and holds the result against the float64 oracle of the same quantized
// numbers: every element within the bound that docs/numerics.md derives. Outputs start poisoned,
// between guard bands.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "harness/cases.h"
#include "harness/faults.h"

namespace moesaic::harness {

enum class Status : std::uint8_t { kPassed, kFailed, kSkipped };
std::string_view name(Status status);  // "passed", "failed", "skipped"

struct VerifyResult {
  std::string name;  // of the case
  Status status = Status::kFailed;
  double max_error = 0;           // largest |y - y*|
  double bound = 0;               // the bound of the element with the largest ratio
  double ratio = 0;               // max over elements of |y - y*| / bound; at most 1 to pass
  double relative_error = 0;      // ||y - y*|| / ||y*||
  double quantization_error = 0;  // ||y* - y_original|| / ||y_original||: not the kernels' doing
  std::string reason;             // when not passed: what went wrong, or why it was skipped
};

// The whole way: weights, packing, forward (or the stages of the case's format), comparison.
// `fault` is applied to the data the layer gets, while the oracle sees the right one.
VerifyResult run_case(const Case& c, Device device = {}, Fault fault = Fault::kNone);

// Bits that must not depend on anything but the token: on repeat, at 1, 2, 3 and 7 threads (CPU),
// for tokens alone or in parts of the batch, and through the other formats. fp8_tensor dynamic:
// repeat and threads only. Failed says which of them, in `reason`.
VerifyResult check_bits(const Case& c, Device device = {});

}  // namespace moesaic::harness
