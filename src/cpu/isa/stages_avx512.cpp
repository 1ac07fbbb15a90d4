// SPDX-License-Identifier: Apache-2.0
// The stages' row primitives for AVX-512.
#include "cpu/stage_kernels_body.h"

namespace moesaic {
const StageKernels kStagesAvx512 = kStages;
}  // namespace moesaic
