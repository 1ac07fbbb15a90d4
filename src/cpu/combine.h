// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "backend.h"

namespace moesaic {
void combine_cpu(const CombineStage& stage);
}  // namespace moesaic
