// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "backend.h"

namespace moesaic {
void activate_cpu(const ActivateStage& stage);
}  // namespace moesaic
