// SPDX-License-Identifier: Apache-2.0
// The stages' row primitives for the baseline every x86-64 has.
#include "cpu/stage_kernels_body.h"

namespace moesaic {
const StageKernels kStagesScalar = kStages;
}  // namespace moesaic
