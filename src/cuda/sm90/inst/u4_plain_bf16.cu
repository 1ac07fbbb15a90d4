// SPDX-License-Identifier: Apache-2.0
// The SM90 kernels for 4-bit weights as their caller stores them and bf16 activations.
#include "cuda/sm90/dequant_kernel.h"

namespace moesaic::cuda::sm90 {

using M = U4<Zeros::kMiddle, Arrangement::kPlain>;
using G = U4<Zeros::kGiven, Arrangement::kPlain>;
inline constexpr Element E = Element::kBF16;
template void launch_dequant<DequantNarrow<M, E, 8>>(const DequantParams&, int, cudaStream_t);
template void launch_dequant<DequantNarrowUnlisted<M, E, 8>>(const DequantParams&, int,
                                                             cudaStream_t);
template void launch_dequant<DequantMiddle<M, E, 8>>(const DequantParams&, int, cudaStream_t);
template void launch_dequant<DequantNarrow<M, E, 2>>(const DequantParams&, int, cudaStream_t);
template void launch_dequant<DequantMiddle<M, E, 2>>(const DequantParams&, int, cudaStream_t);
template void launch_dequant<DequantNarrow<G, E, 8>>(const DequantParams&, int, cudaStream_t);
template void launch_dequant<DequantNarrowUnlisted<G, E, 8>>(const DequantParams&, int,
                                                             cudaStream_t);
template void launch_dequant<DequantMiddle<G, E, 8>>(const DequantParams&, int, cudaStream_t);
template void launch_dequant<DequantNarrow<G, E, 2>>(const DequantParams&, int, cudaStream_t);
template void launch_dequant<DequantMiddle<G, E, 2>>(const DequantParams&, int, cudaStream_t);

}  // namespace moesaic::cuda::sm90
