// SPDX-License-Identifier: Apache-2.0
#include "cuda/sm80/inst/quantized.h"

namespace moesaic::cuda {
std::span<const Sm80Kernel> sm80_f32() { return f32_kernels<Tf32x3>(); }
}  // namespace moesaic::cuda
