// SPDX-License-Identifier: Apache-2.0
// The tiles of the 16-bit products.
#pragma once

#include "cuda/sm80/kernel.h"
#include "cuda/sm80/large.h"
#include "cuda/sm80/small.h"

namespace moesaic::cuda {

//                      warps M x N, fragments M x N, K per stage, stages, CTAs per SM; small:
//                      without warps N
template <typename T>
std::span<const Sm80Kernel> natural_kernels() {
  using Op = Natural16<T>;
  static constexpr Sm80Kernel kKernels[] = {
      sm80_small_kernel<Sm80SmallTile<Op, 2, 1, 1, 128, 6, 3>>(),            //   8 x  32
      sm80_small_kernel<Sm80SmallTile<Op, 4, 1, 1, 128, 4, 3>>(),            //   8 x  64
      sm80_kernel<Sm80Tile<Op, 4, 1, 1, 2, 128, 4, 2>>(),                    //  16 x  64
      sm80_kernel<Sm80Tile<Op, 4, 1, 1, 4, 128, 4, 2>>(),                    //  32 x  64
      sm80_kernel<Sm80Tile<Op, 4, 1, 2, 4, 64, 4, 2>>(),                     //  32 x 128
      sm80_kernel<Sm80Tile<Op, 4, 1, 2, 8, 64, 4, 2>>(),                     //  64 x 128
      sm80_large_kernel<Sm80LargeTile<Ahead16<T>, 4, 2, 4, 8, 64, 3, 1>>(),  // 128 x 256
  };
  return kKernels;
}

}  // namespace moesaic::cuda
