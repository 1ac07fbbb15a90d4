// SPDX-License-Identifier: Apache-2.0
// Level neon: what every 64-bit ARM has.
#include "cpu/strip_neon.h"

namespace moesaic {

const CpuKernels kCpuNeon{"neon", run_strip<Level>};

}  // namespace moesaic
