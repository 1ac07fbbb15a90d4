// SPDX-License-Identifier: Apache-2.0
// The SM90 kernels for 8-bit integer weights and f16 activations.
#include "cuda/sm90/dequant_kernel.h"

namespace moesaic::cuda::sm90 {

using W = I8<Zeros::kMiddle>;
inline constexpr Element E = Element::kF16;
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
