// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>

#include "backend.h"

namespace moesaic {
std::size_t align_scratch_bytes_cpu(std::int64_t slots, std::int64_t experts);
void align_cpu(const AlignStage& stage);
}  // namespace moesaic
