// SPDX-License-Identifier: Apache-2.0
#include "cuda/sm80/inst/quantized.h"

namespace moesaic::cuda {
std::span<const Sm80Kernel> sm80_e4m3_e4m3() {
  return widened_kernels<Direct16<__half, WeightE4M3<__half>, 8>>();
}
}  // namespace moesaic::cuda
