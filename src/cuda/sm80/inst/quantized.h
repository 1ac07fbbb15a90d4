// SPDX-License-Identifier: Apache-2.0
// The tiles of products whose weights are widened in registers. Warps stand side by side along the
// weight rows only: each weight is dequantized once per tile.
#pragma once

#include "cuda/sm80/kernel.h"
#include "cuda/sm80/large.h"
#include "cuda/sm80/small.h"

namespace moesaic::cuda {

//                  warps M x N, fragments M x N, K per stage, stages, CTAs per SM; small: without
//                  warps N
// 4-bit weights, 16-bit activations.
template <typename Op>
std::span<const Sm80Kernel> narrow_kernels() {
  static constexpr Sm80Kernel kKernels[] = {
      sm80_small_kernel<Sm80SmallTile<Op, 4, 1, 1, 128, 5, 4>>(),     //  8 x  64
      sm80_small_kernel<Sm80SmallTile<Op, 4, 2, 1, 128, 4, 3>>(),     //  8 x 128
      sm80_kernel<Sm80Tile<Op, 4, 1, 1, 2, 128, 5, 4>>(),             // 16 x  64
      sm80_kernel<Sm80Tile<Op, 4, 1, 2, 2, 128, 4, 3>>(),             // 16 x 128
      sm80_kernel<Sm80Tile<Op, 4, 1, 2, 4, 128, 4, 2>>(),             // 32 x 128
      sm80_kernel<Sm80Tile<Op, 4, 1, 2, 8, 64, 4, 2>>(),              //  64 x 128
      sm80_large_kernel<Sm80LargeTile<Op, 8, 1, 2, 16, 64, 4, 1>>(),  // 128 x 256
  };
  return kKernels;
}

// 8-bit weights.
template <typename Op>
std::span<const Sm80Kernel> wide_kernels() {
  static constexpr Sm80Kernel kKernels[] = {
      sm80_small_kernel<Sm80SmallTile<Op, 4, 1, 1, 128, 4, 4>>(),     //  8 x  64
      sm80_small_kernel<Sm80SmallTile<Op, 4, 2, 1, 128, 4, 2>>(),     //  8 x 128
      sm80_kernel<Sm80Tile<Op, 4, 1, 1, 2, 128, 4, 3>>(),             // 16 x  64
      sm80_kernel<Sm80Tile<Op, 4, 1, 2, 2, 128, 4, 2>>(),             // 16 x 128
      sm80_kernel<Sm80Tile<Op, 4, 1, 2, 4, 128, 3, 2>>(),             // 32 x 128
      sm80_kernel<Sm80Tile<Op, 4, 1, 2, 8, 64, 4, 2>>(),              //  64 x 128
      sm80_large_kernel<Sm80LargeTile<Op, 8, 1, 2, 16, 64, 4, 1>>(),  // 128 x 256
  };
  return kKernels;
}

// 8-bit weights and activations.
template <typename Op>
std::span<const Sm80Kernel> byte_kernels() {
  static constexpr Sm80Kernel kKernels[] = {
      sm80_small_kernel<Sm80SmallTile<Op, 4, 1, 1, 128, 4, 4>>(),     //  8 x  64
      sm80_small_kernel<Sm80SmallTile<Op, 4, 2, 1, 128, 4, 2>>(),     //  8 x 128
      sm80_kernel<Sm80Tile<Op, 4, 1, 2, 2, 128, 4, 2>>(),             // 16 x 128
      sm80_kernel<Sm80Tile<Op, 4, 1, 2, 4, 128, 4, 2>>(),             // 32 x 128
      sm80_kernel<Sm80Tile<Op, 4, 1, 2, 8, 64, 4, 2>>(),              //  64 x 128
      sm80_large_kernel<Sm80LargeTile<Op, 8, 1, 2, 16, 64, 4, 1>>(),  // 128 x 256
  };
  return kKernels;
}

// The same with tokens that are widened in registers, too. Products, conversions and sums of a warp
// wait for each other: twelve warps of 168 registers hide more of that than eight of 255 that share
// fewer bytes (64 x 256: 1.2 of the time), or than tokens widened once into shared memory (128 x
// 256: 1.03 and 1.11; 64 x 128: 1.2).
template <typename Op>
std::span<const Sm80Kernel> widened_kernels() {
  static constexpr Sm80Kernel kKernels[] = {
      sm80_small_kernel<Sm80SmallTile<Op, 4, 1, 1, 128, 4, 4>>(),  //  8 x  64
      sm80_small_kernel<Sm80SmallTile<Op, 4, 2, 1, 128, 4, 2>>(),  //  8 x 128
      sm80_kernel<Sm80Tile<Op, 4, 1, 2, 2, 128, 4, 2>>(),          // 16 x 128
      sm80_kernel<Sm80Tile<Op, 4, 1, 2, 4, 128, 4, 2>>(),          // 32 x 128
      sm80_kernel<Sm80Tile<Op, 4, 1, 2, 8, 64, 4, 3>>(),           // 64 x 128
  };
  return kKernels;
}

template <typename Op>
std::span<const Sm80Kernel> f32_kernels() {
  static constexpr Sm80Kernel kKernels[] = {
      sm80_small_kernel<Sm80SmallTile<Op, 4, 1, 1, 64, 3, 3>>(),  //  8 x  64
      sm80_kernel<Sm80Tile<Op, 4, 1, 1, 4, 32, 4, 2>>(),          // 32 x  64
      sm80_kernel<Sm80Tile<Op, 4, 1, 2, 8, 32, 4, 2>>(),          // 64 x 128
  };
  return kKernels;
}

}  // namespace moesaic::cuda
