// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "backend.h"

namespace moesaic {
void combine_cpu(const CombineStage& stage);
// The same for columns [first, first + columns of `rows`) of the output, from rows that hold only those.
void combine_columns_cpu(const CombineStage& stage, const Tensor& rows, std::int64_t first);
}  // namespace moesaic
