// SPDX-License-Identifier: Apache-2.0
#include "cpu/stage_kernels.h"

#include "cpu/gemm.h"

namespace moesaic {

const StageKernels& stage_kernels_for(std::string_view level) {
#if defined(__x86_64__)
  if (level.starts_with("avx512") || level.starts_with("amx")) return kStagesAvx512;
  if (level.starts_with("avx")) return kStagesAvx2;
#endif
  return kStagesScalar;
}

const StageKernels& stage_kernels() { return stage_kernels_for(cpu_kernels_name()); }

}  // namespace moesaic
