// SPDX-License-Identifier: Apache-2.0
// The kernel families behind Backend::gemm on CUDA. All read weights in the caller's own layout
// [E, N, K]. Which family runs a scheme on a device is decided in one place: gemm.cpp.
#pragma once

#include <cuda_runtime.h>

#include <vector>

#include "backend.h"
#include "cuda/launch.h"

namespace moesaic::cuda {

// Packed weights on this device: the dense copy of one product.
class CudaWeights : public PackedWeights {
 public:
  const GemmWeights& view() const { return view_; }  // dense [E, N, K], scales f32, zero points

 protected:
  GemmWeights view_;
};

// The weights a stage reads, packed or the caller's.
inline const GemmWeights& weights_of(const WeightOperand& b) {
  return b.packed ? static_cast<const CudaWeights*>(b.packed)->view() : b.plain;
}

// One kernel family. Functions are pure but for `run`.
struct GemmFamily {
  bool (*supports)(const WeightSpec& spec);
  // Token rows per tile that the family wants for `slots` live slots: see RowMap::tile_rows.
  std::int64_t (*tile_rows)(const WeightSpec& fc1, std::int64_t slots, const DeviceTraits& device);
  std::vector<Tactic> (*tactics)(const WeightSpec& spec, const DeviceTraits& device);
  void (*run)(const GemmStage& stage, const DeviceTraits& device, cudaStream_t stream);
  // Consecutive rows of A come by TMA, whole boxes at once: see CudaBackend::input_rows.
  bool boxes = false;
};
const GemmFamily& family_sm90();          // wgmma + TMA, SM90a: f16, bf16, fp8 w8a8
const GemmFamily& family_sm90_dequant();  // the same, weights widened in registers: weight-only
const GemmFamily& family_sm80();          // mma.sync + cp.async: every scheme the backend supports

}  // namespace moesaic::cuda
