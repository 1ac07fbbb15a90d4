// SPDX-License-Identifier: Apache-2.0
// The CPU backend's grouped product: packing, and one call that does gather, product, scales, bias,
// activation, routing weight and rounding. Which ISA level runs is decided in kernels.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string_view>

#include "backend.h"
#include "cpu/kernels.h"

namespace moesaic {

// Tiles of at most this many rows suit the kernels: behind it a strip of B has been read often
// enough to be bound by arithmetic. Tiles of callers may be taller or smaller.
inline constexpr std::int64_t kCpuTileRows = kStripRows;

std::unique_ptr<PackedWeights> make_packed_cpu(const WeightSpec& spec);
// Scratch of one gemm_cpu call. The CPU's kernels keep theirs on the stack: nothing.
std::size_t gemm_scratch_bytes_cpu(const WeightSpec& spec, std::int64_t positions);
void gemm_cpu(const GemmStage& stage);

// The level that new layers and bare products use, e.g. "avx512_bf16".
std::string_view cpu_kernels_name();

}  // namespace moesaic
