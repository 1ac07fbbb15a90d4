// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "backend.h"

namespace moesaic {
void route_cpu(const RouteStage& stage);
}  // namespace moesaic
