// SPDX-License-Identifier: Apache-2.0
// Level avx2: AVX2, FMA and F16C: Haswell, Zen and later.
#include "cpu/strip_avx2.h"

namespace moesaic {

const CpuKernels kCpuAvx2{"avx2", run_strip<Level>};

}  // namespace moesaic
