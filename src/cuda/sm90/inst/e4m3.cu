// SPDX-License-Identifier: Apache-2.0
// The SM90 kernels for e4m3 operands.
#include "cuda/sm90/kernel.h"

namespace moesaic::cuda::sm90 {

template void launch_gemm<Narrow<Element::kE4M3>>(const Params&, int, cudaStream_t);
template void launch_gemm<NarrowUnlisted<Element::kE4M3>>(const Params&, int, cudaStream_t);
template void launch_gemm<Middle<Element::kE4M3>>(const Params&, int, cudaStream_t);
template void launch_gemm<Wide<Element::kE4M3>>(const Params&, int, cudaStream_t);
template void launch_gemm<Widest<Element::kE4M3>>(const Params&, int, cudaStream_t);

}  // namespace moesaic::cuda::sm90
