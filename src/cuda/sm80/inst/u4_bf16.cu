// SPDX-License-Identifier: Apache-2.0
#include "cuda/sm80/inst/quantized.h"

namespace moesaic::cuda {
std::span<const Sm80Kernel> sm80_u4_bf16() {
  return narrow_kernels<Direct16<__nv_bfloat16, WeightU4<__nv_bfloat16>>>();
}
}  // namespace moesaic::cuda
