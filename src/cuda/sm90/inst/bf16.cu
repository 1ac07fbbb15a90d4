// SPDX-License-Identifier: Apache-2.0
// The SM90 kernels for bf16 operands.
#include "cuda/sm90/kernel.h"

namespace moesaic::cuda::sm90 {

template void launch_gemm<Narrow<Element::kBF16>>(const Params&, int, cudaStream_t);
template void launch_gemm<NarrowUnlisted<Element::kBF16>>(const Params&, int, cudaStream_t);
template void launch_gemm<Middle<Element::kBF16>>(const Params&, int, cudaStream_t);
template void launch_gemm<Wide<Element::kBF16>>(const Params&, int, cudaStream_t);
template void launch_gemm<Widest<Element::kBF16>>(const Params&, int, cudaStream_t);

}  // namespace moesaic::cuda::sm90
