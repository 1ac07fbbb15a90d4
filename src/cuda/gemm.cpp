// SPDX-License-Identifier: Apache-2.0
#include "cuda/gemm.h"

#include <fmt/format.h>

#include "check.h"

namespace moesaic::cuda {

const GemmFamily* find_family(const WeightSpec& spec, const DeviceTraits& device) {
  // Decided by the scheme and the shape of the weights alone, never by the number of tokens: the
  // families need not give the same bits.
  if (device.use_sm90 && family_sm90().supports(spec)) return &family_sm90();
  if (device.use_sm90 && family_sm90_dequant().supports(spec)) return &family_sm90_dequant();
  if (family_sm80().supports(spec)) return &family_sm80();
  return nullptr;
}

const GemmFamily& family_for(const WeightSpec& spec, const DeviceTraits& device) {
  if (const GemmFamily* family = find_family(spec, device)) return *family;
  unsupported(refusal(spec));
}

void check_ascending(std::string_view argument, const Tensor& t) {
  for (int i = 0; t.defined() && i < t.rank; ++i) {
    if (t.strides[i] < 0 && t.shape[i] > 1)
      unsupported(fmt::format(
          "{}: dimension {} has a negative stride, which no CUDA kernel follows; pass a "
          "contiguous copy",
          argument, i));
  }
}

void check_views(const GemmStage& stage) {
  check_ascending("a", stage.a);
  const WeightOperand& b = *stage.b;
  if (b.packed != nullptr) return;
  check_ascending("b.weight", b.plain.weight);
  check_ascending("b.scale", b.plain.scale);
  check_ascending("b.zero_point", b.plain.zero_point);
  if (b.plain.scale.defined() && !b.spec.e8m0_scales && b.plain.scale.dtype != DType::kF32)
    unsupported(
        fmt::format("b.scale: CUDA kernels read the scales of weights in place as f32, got {}; "
                    "convert them, or load the weights into a layer",
                    name(b.plain.scale.dtype)));
}

std::string refusal(const WeightSpec& spec) {
  const std::string product = fmt::format("scheme {} with {} outputs of {} inputs per expert",
                                          traits(spec.scheme).name, spec.n, spec.k);
  if (spec.k % 8 != 0 || spec.n % 8 != 0)
    return fmt::format(
        "cuda: {}: hidden and intermediate must be multiples of 8; pad the weights with zeros, "
        "or use device cpu",
        product);
  if (spec.scale.grid_k > 1 && spec.scale.group_k % 32 != 0)
    return fmt::format(
        "cuda: {}: groups of {} along the inputs; scale groups must be multiples of 32. "
        "Requantize, "
        "or use device cpu",
        product, spec.scale.group_k);
  return fmt::format(
      "cuda: no kernel for {} (weight scales per {} x {}, activations {}); use device cpu, which "
      "runs every scheme, or one of the schemes that `moesaic info` lists for cuda",
      product, spec.scale.group_n, spec.scale.group_k, name(spec.act_dtype));
}

}  // namespace moesaic::cuda
