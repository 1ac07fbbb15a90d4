// SPDX-License-Identifier: Apache-2.0
#include "cuda/sm80/inst/quantized.h"

namespace moesaic::cuda {
std::span<const Sm80Kernel> sm80_u4_f16() {
  return narrow_kernels<Direct16<__half, WeightU4<__half>>>();
}
}  // namespace moesaic::cuda
