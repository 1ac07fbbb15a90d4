// SPDX-License-Identifier: Apache-2.0
// Level avx512_vnni: with VNNI and VBMI: Ice Lake and later.
#include "cpu/strip_avx512.h"

namespace moesaic {

const CpuKernels kCpuAvx512Vnni{"avx512_vnni", run_strip<Level>};

}  // namespace moesaic
