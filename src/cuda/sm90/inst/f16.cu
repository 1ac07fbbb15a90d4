// SPDX-License-Identifier: Apache-2.0
// The SM90 kernels for f16 operands.
#include "cuda/sm90/kernel.h"

namespace moesaic::cuda::sm90 {

template void launch_gemm<Narrow<Element::kF16>>(const Params&, int, cudaStream_t);
template void launch_gemm<NarrowUnlisted<Element::kF16>>(const Params&, int, cudaStream_t);
template void launch_gemm<Middle<Element::kF16>>(const Params&, int, cudaStream_t);
template void launch_gemm<Wide<Element::kF16>>(const Params&, int, cudaStream_t);
template void launch_gemm<Widest<Element::kF16>>(const Params&, int, cudaStream_t);

}  // namespace moesaic::cuda::sm90
