// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>

#include "backend.h"

namespace moesaic {
std::size_t quantize_scratch_bytes_cpu(std::int64_t rows, std::int64_t experts);
void quantize_cpu(const QuantizeStage& stage);
}  // namespace moesaic
