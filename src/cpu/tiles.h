// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "backend.h"

namespace moesaic {
void tiles_cpu(const TileStage& stage);
}  // namespace moesaic
