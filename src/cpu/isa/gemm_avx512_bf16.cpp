// SPDX-License-Identifier: Apache-2.0
// Level avx512_bf16: with BF16: Zen 4, Sapphire Rapids and later.
#include "cpu/strip_avx512.h"

namespace moesaic {

const CpuKernels kCpuAvx512Bf16{"avx512_bf16", run_strip<Level>};

}  // namespace moesaic
