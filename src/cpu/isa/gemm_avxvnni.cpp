// SPDX-License-Identifier: Apache-2.0
// Level avxvnni: with AVX-VNNI, the byte products of 256 bits: Alder Lake, Zen 5 and later.
#include "cpu/strip_avx2.h"

namespace moesaic {

const CpuKernels kCpuAvxVnni{"avxvnni", run_strip<Level>};

}  // namespace moesaic
