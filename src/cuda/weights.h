// SPDX-License-Identifier: Apache-2.0
// One product's weights on a device: dense, in the caller's row order.
#pragma once

#include <memory>

#include "cuda/gemm.h"

namespace moesaic::cuda {

// Memory for all experts at once, filled expert by expert.
std::unique_ptr<CudaWeights> make_cuda_weights(const WeightSpec& spec, const DeviceTraits& device);

}  // namespace moesaic::cuda
