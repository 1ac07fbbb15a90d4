// SPDX-License-Identifier: Apache-2.0
#include "cuda/sm80/inst/natural.h"

namespace moesaic::cuda {
std::span<const Sm80Kernel> sm80_f16() { return natural_kernels<__half>(); }
}  // namespace moesaic::cuda
