// SPDX-License-Identifier: Apache-2.0
#include "cuda/sm80/inst/quantized.h"

namespace moesaic::cuda {
std::span<const Sm80Kernel> sm80_e2m1_f16() {
  return narrow_kernels<Direct16<__half, WeightE2M1<__half>>>();
}
}  // namespace moesaic::cuda
