// SPDX-License-Identifier: Apache-2.0
// Seeded faults: the mistakes a kernel could make, played on the data that the layer is given while
// the oracle sees the right one. Each must make `verify` fail, or the bound would be too wide.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>

#include "harness/cases.h"
#include "harness/data.h"

namespace moesaic::harness {

enum class Fault : std::uint8_t {
  kNone,
  kTailDropped,      // the last element of K counts nothing
  kNeighboursScale,  // a scale cell is read one too far along N
  kNibblesSwapped,   // 4-bit: low and high exchanged
  kZeroPointOff,     // zero points one too high (without a tensor: 7 instead of 8, by one tensor)
  kBiasSkipped,      // biases read as zero
  kGateUpExchanged,  // the halves (or interleaved rows) of fc1 exchanged
  kLastRowSkipped,   // the last token's slots contribute nothing
};
inline constexpr int kNumFaults = 8;
std::string_view name(Fault fault);
std::span<const Fault> all_faults();  // kNone left out

// Whether the case has what the fault needs (a bias, a scale with a neighbour, nibbles ...).
bool applies(Fault fault, const Case& c);
// Changes the data in place. kLastRowSkipped changes `ids`, every other one `weights`.
void apply(Fault fault, const Case& c, WeightData& weights, HostTensor& ids);

}  // namespace moesaic::harness
