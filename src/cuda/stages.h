// SPDX-License-Identifier: Apache-2.0
// The stages that are not products: one function and one .cu file each, in the order of the data.
// None allocates or synchronizes; all kernels wait for their predecessors themselves (overlap.h).
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "backend.h"
#include "cuda/launch.h"

namespace moesaic::cuda {

// A warp that walks a list of tiles asks for its first so many before it knows how many there are.
// What it does not use of them means nothing, but all memory that is read has been written: align
// and tiles leave kNoTile there, as far as the list has room.
inline constexpr int kTileWindow = 32;
inline constexpr Tile kNoTile{.expert = -1, .rows = 0, .first = 0};

void run_router(const RouteStage& stage, const DeviceTraits& device,
                cudaStream_t stream);  // logits_scratch
void run_route(const RouteStage& stage, const DeviceTraits& device, cudaStream_t stream);
void run_align(const AlignStage& stage, const DeviceTraits& device, cudaStream_t stream);
void run_tiles(const TileStage& stage, const DeviceTraits& device, cudaStream_t stream);
// `align`: a stage that may run beside it, in the same launch, if neither needs the other; returns
// whether it did.
bool run_quantize(const QuantizeStage& stage, const DeviceTraits& device, cudaStream_t stream,
                  const AlignStage* align = nullptr);
void run_activate(const ActivateStage& stage, const DeviceTraits& device, cudaStream_t stream);
void run_combine(const CombineStage& stage, const DeviceTraits& device, cudaStream_t stream);

// What AlignStage::scratch and QuantizeStage::scratch must hold.
std::size_t align_scratch(std::int64_t slots, std::int64_t experts);
std::size_t quantize_scratch(std::int64_t rows, std::int64_t experts);

}  // namespace moesaic::cuda
