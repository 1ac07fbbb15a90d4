// SPDX-License-Identifier: Apache-2.0
// Seed 000's grouped GEMM in float64: scale, bias, routed weight, cast, row by row.
#pragma once

#include <cstdint>
#include <vector>

#include "moesaic/gemm.h"
#include "reference/bounded.h"
#include "reference/layer.h"

namespace moesaic::reference {

enum class RowState : std::uint8_t {
  kUntouched,  // must keep what was there before
  kZero,       // of a filtered block
  kComputed,
};

struct GroupedOutput {
  std::int64_t n = 0;
  std::vector<RowState> rows;   // of c, with leading dimensions flattened
  std::vector<Bounded> values;  // [rows, n] before the cast
};
// `args` describes host tensors; args.c is only asked for its shape and dtype.
GroupedOutput grouped_gemm(const GroupedGemmArgs& args, const Choices& choices);

}  // namespace moesaic::reference
