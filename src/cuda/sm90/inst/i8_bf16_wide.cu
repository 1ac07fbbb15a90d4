// SPDX-License-Identifier: Apache-2.0
// The widest SM90 kernels for 8-bit integer weights and bf16 activations.
#include "cuda/sm90/dequant_kernel.h"

namespace moesaic::cuda::sm90 {

using W = I8<Zeros::kMiddle>;
inline constexpr Element E = Element::kBF16;
template void launch_dequant<DequantWide<W, E, 8>>(const DequantParams&, int, cudaStream_t);
template void launch_dequant<DequantWide<W, E, 2>>(const DequantParams&, int, cudaStream_t);

}  // namespace moesaic::cuda::sm90
