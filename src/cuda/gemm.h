// SPDX-License-Identifier: Apache-2.0
// The kernel families behind Backend::gemm on CUDA. All read weights [E, N, K] in the caller's own
// layout, or as rearrange.h has them. Which family runs a scheme on a device, find_family decides.
#pragma once

#include <cuda_runtime.h>

#include <string>
#include <string_view>
#include <vector>

#include "backend.h"
#include "cuda/launch.h"

namespace moesaic::cuda {

// Tiles that a product makes itself (Backend::makes_tiles) have no more rows.
inline constexpr std::int64_t kUnlistedTileRows = 16;

// One kernel family. Functions are pure but for `run`.
struct GemmFamily {
  bool (*supports)(const WeightSpec& spec);
  // Token rows per tile that the family wants for `slots` live slots: see RowMap::tile_rows.
  std::int64_t (*tile_rows)(const WeightSpec& fc1, std::int64_t slots, const DeviceTraits& device);
  std::vector<Tactic> (*tactics)(const WeightSpec& spec, const DeviceTraits& device);
  // Refuses by name rows whose address or strides no kernel of the family takes; run does, too.
  void (*check_rows)(const Tensor& a);
  void (*run)(const GemmStage& stage, const DeviceTraits& device, cudaStream_t stream);
  // As in Backend, where fc1 is this family's; null: kStage.
  QuantizedBy (*intermediate_quantized_by)(const WeightSpec& fc1, const WeightSpec& fc2,
                                           const ActivationSpec& activation) = nullptr;
  bool (*gemm1_quantizes)(const GemmStage& stage, const DeviceTraits& device) = nullptr;
  // Whether a product, of tiles of up to kUnlistedTileRows that are no more than a warp's lanes, or
  // of so many blocks of a caller's list that are tiles, makes these itself: Backend::makes_tiles.
  // Null: it does not.
  bool (*makes_tiles)(const WeightSpec& spec, const RowMap& rows,
                      const DeviceTraits& device) = nullptr;
  std::int64_t most_blocks = 0;
  // Packed 4-bit weights are to be as rearrange.h has them.
  bool rearranges_u4 = false;
  // Consecutive rows of A come by TMA, whole boxes at once: see CudaBackend::input_rows.
  bool boxes = false;
};
const GemmFamily& family_sm90();          // wgmma + TMA, SM90a: f16, bf16, fp8 w8a8
const GemmFamily& family_sm90_dequant();  // the same, weights widened in registers: weight-only
const GemmFamily& family_sm80();          // mma.sync + cp.async: every scheme the backend supports

// The first of them, in this order, that runs the scheme on the device; null: no kernel here takes
// it.
const GemmFamily* find_family(const WeightSpec& spec, const DeviceTraits& device);
// Throws kUnsupported with refusal() instead.
const GemmFamily& family_for(const WeightSpec& spec, const DeviceTraits& device);
// Throws kUnsupported by name for views that no family follows: negative strides, and scales of
// weights in place that are not f32.
void check_views(const GemmStage& stage);
void check_ascending(std::string_view argument, const Tensor& t);
// Why no family takes it, and what to use instead.
std::string refusal(const WeightSpec& spec);

}  // namespace moesaic::cuda
