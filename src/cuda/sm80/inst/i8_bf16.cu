// SPDX-License-Identifier: Apache-2.0
#include "cuda/sm80/inst/quantized.h"

namespace moesaic::cuda {
std::span<const Sm80Kernel> sm80_i8_bf16() {
  return wide_kernels<Direct16<__nv_bfloat16, WeightI8<__nv_bfloat16>>>();
}
}  // namespace moesaic::cuda
