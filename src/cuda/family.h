// SPDX-License-Identifier: Apache-2.0
// Which kernel family runs a scheme on a device: decided in gemm.cpp and nowhere else.
#pragma once

#include <string>

#include "cuda/gemm.h"

namespace moesaic::cuda {

// Null: no kernel here takes it.
const GemmFamily* find_family(const WeightSpec& spec, const DeviceTraits& device);
// Throws kUnsupported with refusal() instead.
const GemmFamily& family_for(const WeightSpec& spec, const DeviceTraits& device);
// Why no family takes it, and what to use instead.
std::string refusal(const WeightSpec& spec);

}  // namespace moesaic::cuda
