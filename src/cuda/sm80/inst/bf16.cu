// SPDX-License-Identifier: Apache-2.0
#include "cuda/sm80/inst/natural.h"

namespace moesaic::cuda {
std::span<const Sm80Kernel> sm80_bf16() { return natural_kernels<__nv_bfloat16>(); }
}  // namespace moesaic::cuda
