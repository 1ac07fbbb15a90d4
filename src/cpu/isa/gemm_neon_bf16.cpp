// SPDX-License-Identifier: Apache-2.0
// Level neon_bf16: with BF16 and I8MM: Neoverse V1, N2 and later.
#include "cpu/strip_neon.h"

namespace moesaic {

const CpuKernels kCpuNeonBf16{"neon_bf16", run_strip<Level>};

}  // namespace moesaic
