// SPDX-License-Identifier: Apache-2.0
// One product's weights on a device: dense, in the caller's row order; along K, too, unless the
// kernels that will read them want 4-bit weights rearranged.
#pragma once

#include <memory>

#include "backend.h"
#include "cuda/launch.h"
#include "cuda/rearrange.h"

namespace moesaic::cuda {

class CudaWeights : public PackedWeights {
 public:
  const GemmWeights& view() const { return view_; }  // dense [E, N, K], scales f32, zero points
  Arrangement arrangement() const { return arrangement_; }

 protected:
  explicit CudaWeights(Arrangement arrangement) : arrangement_(arrangement) {}
  GemmWeights view_;

 private:
  Arrangement arrangement_;
};
// Memory for all experts at once, filled expert by expert. kRearranged: kUnsupported but for 4-bit
// integers whose rows are whole pieces of 16 bytes.
std::unique_ptr<CudaWeights> make_cuda_weights(const WeightSpec& spec, const DeviceTraits& device,
                                               Arrangement arrangement);
// The caller's memory, not owned: every 16 bytes of it rearranged, where asked for. Scales and zero
// points that are not dense and aligned, or not of the kernels' dtype, are copied.
std::unique_ptr<CudaWeights> keep_cuda_weights(const WeightSpec& spec, const DeviceTraits& device,
                                               Arrangement arrangement, const GemmWeights& all);

// The weights a stage reads, packed or the caller's.
inline const GemmWeights& weights_of(const WeightOperand& b) {
  return b.packed ? static_cast<const CudaWeights*>(b.packed)->view() : b.plain;
}
// The caller's are plain.
inline Arrangement arrangement_of(const WeightOperand& b) {
  return b.packed ? static_cast<const CudaWeights*>(b.packed)->arrangement() : Arrangement::kPlain;
}

}  // namespace moesaic::cuda
