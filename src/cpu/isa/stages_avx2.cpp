// SPDX-License-Identifier: Apache-2.0
// The stages' row primitives for AVX2.
#include "cpu/stage_kernels_body.h"

namespace moesaic {
const StageKernels kStagesAvx2 = kStages;
}  // namespace moesaic
