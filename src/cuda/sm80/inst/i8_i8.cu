// SPDX-License-Identifier: Apache-2.0
#include "cuda/sm80/inst/quantized.h"

namespace moesaic::cuda {
std::span<const Sm80Kernel> sm80_i8_i8() { return byte_kernels<Int8>(); }
}  // namespace moesaic::cuda
