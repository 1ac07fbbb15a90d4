// SPDX-License-Identifier: Apache-2.0
// One product's weights on a device: dense, in the caller's row order.
#pragma once

#include <memory>

#include "backend.h"
#include "cuda/launch.h"

namespace moesaic::cuda {

class CudaWeights : public PackedWeights {
 public:
  const GemmWeights& view() const { return view_; }  // dense [E, N, K], scales f32, zero points

 protected:
  GemmWeights view_;
};
// Memory for all experts at once, filled expert by expert.
std::unique_ptr<CudaWeights> make_cuda_weights(const WeightSpec& spec, const DeviceTraits& device);

// The weights a stage reads, packed or the caller's.
inline const GemmWeights& weights_of(const WeightOperand& b) {
  return b.packed ? static_cast<const CudaWeights*>(b.packed)->view() : b.plain;
}

}  // namespace moesaic::cuda
