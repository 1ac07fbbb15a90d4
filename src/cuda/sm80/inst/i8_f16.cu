// SPDX-License-Identifier: Apache-2.0
#include "cuda/sm80/inst/quantized.h"

namespace moesaic::cuda {
std::span<const Sm80Kernel> sm80_i8_f16() {
  return wide_kernels<Direct16<__half, WeightI8<__half>>>();
}
}  // namespace moesaic::cuda
