// SPDX-License-Identifier: Apache-2.0
// The SM90 kernel for e4m3 operands without scales along K.
#include "cuda/sm90/kernel.h"

namespace moesaic::cuda::sm90 {

template void launch_gemm<WidestFlat>(const Params&, int, cudaStream_t);

}  // namespace moesaic::cuda::sm90
