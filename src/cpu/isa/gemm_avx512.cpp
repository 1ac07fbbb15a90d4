// SPDX-License-Identifier: Apache-2.0
// Level avx512: F, BW, VL, DQ: Skylake-X and later.
#include "cpu/strip_avx512.h"

namespace moesaic {

const CpuKernels kCpuAvx512{"avx512", run_strip<Level>};

}  // namespace moesaic
