// SPDX-License-Identifier: Apache-2.0
// The SM90 kernels for rearranged 4-bit weights with zero points and bf16 activations.
#include "cuda/sm90/dequant_kernel.h"

namespace moesaic::cuda::sm90 {

using W = U4<Zeros::kGiven, Arrangement::kRearranged>;
inline constexpr Element E = Element::kBF16;
template void launch_dequant<DequantNarrow<W, E, 8>>(const DequantParams&, int, cudaStream_t);
template void launch_dequant<DequantNarrowUnlisted<W, E, 8>>(const DequantParams&, int,
                                                             cudaStream_t);
template void launch_dequant<DequantMiddle<W, E, 8>>(const DequantParams&, int, cudaStream_t);
template void launch_dequant<DequantTwin<W, E, 8>>(const DequantParams&, int, cudaStream_t);
template void launch_dequant<DequantTwinRuns<W, E, 8>>(const DequantParams&, int, cudaStream_t);
template void launch_dequant<DequantNarrow<W, E, 2>>(const DequantParams&, int, cudaStream_t);
template void launch_dequant<DequantMiddle<W, E, 2>>(const DequantParams&, int, cudaStream_t);
template void launch_dequant<DequantTwin<W, E, 2>>(const DequantParams&, int, cudaStream_t);

}  // namespace moesaic::cuda::sm90
