// SPDX-License-Identifier: Apache-2.0
// The table of schemes, and how a configuration becomes the WeightSpec of each product.
#include "scheme.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>

#include "check.h"
#include "divide.h"

namespace moesaic {
namespace {

constexpr WeightScale kByTensor[] = {WeightScale::kTensor};
constexpr WeightScale kByChannel[] = {WeightScale::kChannel};
constexpr WeightScale kByBlock[] = {WeightScale::kBlock};
constexpr WeightScale kByGroup[] = {WeightScale::kGroup};
constexpr WeightScale kByAnyFp8[] = {WeightScale::kTensor, WeightScale::kChannel,
                                     WeightScale::kBlock};
constexpr WeightScale kByChannelOrGroup[] = {WeightScale::kChannel, WeightScale::kGroup};
constexpr ActScale kActTensor[] = {ActScale::kTensorStatic, ActScale::kTensorDynamic};
constexpr ActScale kActToken[] = {ActScale::kToken};
constexpr ActScale kActGroup[] = {ActScale::kGroup};
constexpr ActScale kActTokenOrTensor[] = {ActScale::kToken, ActScale::kTensorStatic,
                                          ActScale::kTensorDynamic};

using enum WeightFormat;
constexpr WeightScale kNoScale = WeightScale::kDefault;
constexpr ActScale kNoAct = ActScale::kDefault;

// clang-format off
constexpr std::array<SchemeTraits, kNumSchemes> kSchemes{{
    {Scheme::kF32, "f32", kF32, ActFormat::kF32, kNoScale, {}, kNoAct, {}, false,
     "f32 weights and activations"},
    {Scheme::kF16, "f16", kF16, ActFormat::k16, kNoScale, {}, kNoAct, {}, false,
     "f16 weights and activations"},
    {Scheme::kBF16, "bf16", kBF16, ActFormat::k16, kNoScale, {}, kNoAct, {}, false,
     "bf16 weights and activations"},
    {Scheme::kFp8Tensor, "fp8_tensor", kE4M3, ActFormat::kE4M3, WeightScale::kTensor, kByTensor,
     ActScale::kTensorDynamic, kActTensor, false, "e4m3 x e4m3, one scale per expert and per tensor"},
    {Scheme::kFp8Channel, "fp8_channel", kE4M3, ActFormat::kE4M3, WeightScale::kChannel, kByChannel,
     ActScale::kToken, kActToken, false, "e4m3 x e4m3, scales per output channel and per token"},
    {Scheme::kFp8Block, "fp8_block", kE4M3, ActFormat::kE4M3, WeightScale::kBlock, kByBlock,
     ActScale::kGroup, kActGroup, false, "e4m3 x e4m3, scales per weight block and (token, group)"},
    {Scheme::kFp8W8A16, "fp8_w8a16", kE4M3, ActFormat::k16, WeightScale::kChannel, kByAnyFp8, kNoAct,
     {}, false, "e4m3 weights, 16-bit activations"},
    {Scheme::kInt8Channel, "int8_channel", kI8, ActFormat::kI8, WeightScale::kChannel, kByChannel,
     ActScale::kToken, kActToken, false, "int8 x int8, scales per output channel and per token"},
    {Scheme::kInt8Block, "int8_block", kI8, ActFormat::kI8, WeightScale::kBlock, kByBlock,
     ActScale::kGroup, kActGroup, false, "int8 x int8, scales per weight block and (token, group)"},
    {Scheme::kInt8W8A16, "int8_w8a16", kI8, ActFormat::k16, WeightScale::kChannel, kByChannelOrGroup,
     kNoAct, {}, true, "int8 per channel or uint8 in groups, 16-bit activations"},
    {Scheme::kInt4W4A16, "int4_w4a16", kU4, ActFormat::k16, WeightScale::kGroup, kByGroup, kNoAct, {},
     true, "uint4 in groups, 16-bit activations"},
    {Scheme::kInt4W4A8Fp8, "int4_w4a8_fp8", kU4, ActFormat::kE4M3, WeightScale::kGroup, kByGroup,
     ActScale::kToken, kActTokenOrTensor, true, "uint4 in groups, e4m3 activations"},
    {Scheme::kInt4W4A8Int8, "int4_w4a8_int8", kU4, ActFormat::kI8, WeightScale::kGroup, kByGroup,
     ActScale::kToken, kActTokenOrTensor, true, "uint4 in groups, int8 activations"},
    {Scheme::kMxfp4W4A16, "mxfp4_w4a16", kE2M1, ActFormat::k16, WeightScale::kGroup, kByGroup, kNoAct,
     {}, false, "e2m1 in groups of 32 with E8M0 scales, 16-bit activations"},
}};
// clang-format on

constexpr std::int64_t kMxGroup = 32;

std::string_view name(WeightScale scale) {
  constexpr std::string_view kNames[] = {"default", "tensor", "channel", "block", "group"};
  // A C caller can pass any number; what is asked for is refused by this very name.
  const auto index = static_cast<std::size_t>(scale);
  return index < std::size(kNames) ? kNames[index] : "an unknown one";
}
std::string_view name(ActScale scale) {
  constexpr std::string_view kNames[] = {"default", "tensor_static", "tensor_dynamic", "token",
                                         "group"};
  // A C caller can pass any number; what is asked for is refused by this very name.
  const auto index = static_cast<std::size_t>(scale);
  return index < std::size(kNames) ? kNames[index] : "an unknown one";
}

// The granularity asked for, or the scheme's own; refuses what the scheme does not list.
template <typename G>
G choose(std::string_view scheme, std::string_view what, G asked, G own,
         std::span<const G> allowed) {
  if (asked == G::kDefault) return own;
  if (std::find(allowed.begin(), allowed.end(), asked) != allowed.end()) return asked;
  std::string names;
  for (const G g : allowed) names += (names.empty() ? "" : " or ") + std::string(name(g));
  unsupported(
      fmt::format("quant.{}: scheme {} takes {}, not {}; choose one it takes, or another scheme",
                  what, scheme, names.empty() ? "none" : names, name(asked)));
}

ScaleGrid scale_grid(const QuantSpec& quant, WeightScale granularity, std::int64_t n,
                     std::int64_t k, bool two_halves) {
  switch (granularity) {
    case WeightScale::kDefault:
      return {.has_scale = false, .group_n = n, .group_k = k};
    case WeightScale::kTensor: {
      const std::int64_t cells = two_halves ? 2 : 1;
      return {.has_scale = true, .group_n = n / cells, .group_k = k, .grid_n = cells, .grid_k = 1};
    }
    case WeightScale::kChannel:
      return {.has_scale = true, .group_n = 1, .group_k = k, .grid_n = n, .grid_k = 1};
    case WeightScale::kBlock:
      check_range("quant.block_n", quant.block_n, 1, INT64_C(1) << 40);
      check_range("quant.block_k", quant.block_k, 1, INT64_C(1) << 40);
      return {.has_scale = true,
              .group_n = quant.block_n,
              .group_k = quant.block_k,
              .grid_n = ceil_div(n, quant.block_n),
              .grid_k = ceil_div(k, quant.block_k)};
    case WeightScale::kGroup: {
      check_range("quant.group_size", quant.group_size, 0, INT64_C(1) << 40);
      const std::int64_t g = quant.scheme == Scheme::kMxfp4W4A16 ? kMxGroup
                             : quant.group_size == 0             ? k
                                                                 : quant.group_size;
      return {.has_scale = true, .group_n = 1, .group_k = g, .grid_n = n, .grid_k = ceil_div(k, g)};
    }
  }
  return {};
}

struct ProductShape {
  std::int64_t experts, n, k;
  DType dtype16;
  bool gated = false;
  GateOrder order = GateOrder::kGateFirst;
  GateLayout layout = GateLayout::kHalves;
};

WeightSpec resolve(const QuantSpec& quant, const ProductShape& shape) {
  const SchemeTraits& t = traits(quant.scheme);
  WeightSpec spec{.scheme = quant.scheme, .format = t.weight, .act = t.act};
  spec.experts = shape.experts;
  spec.n = shape.n;
  spec.k = shape.k;
  spec.gated = shape.gated;
  spec.order = shape.order;
  spec.layout = shape.layout;
  spec.dtype16 = shape.dtype16;
  check_enum("weight_scale", quant.weight_scale, 5);
  check_enum("act_scale", quant.act_scale, 5);
  check_enum("int8_rounding", quant.int8_rounding, 2);
  const WeightScale granularity =
      choose(t.name, "weight_scale", quant.weight_scale, t.default_weight_scale, t.weight_scales);
  spec.act_scale = choose(t.name, "act_scale", quant.act_scale, t.default_act_scale, t.act_scales);
  spec.int8_rounding = quant.int8_rounding;
  if (spec.act_scale == ActScale::kGroup) spec.act_group = quant.block_k;
  switch (t.act) {
    case ActFormat::kF32:
      spec.act_dtype = DType::kF32;
      break;
    case ActFormat::k16:
      spec.act_dtype = shape.dtype16;
      break;
    case ActFormat::kE4M3:
      spec.act_dtype = DType::kF8E4M3;
      break;
    case ActFormat::kI8:
      spec.act_dtype = DType::kI8;
      break;
  }
  // Grouped int8 is unsigned with a zero point, per-channel int8 is signed without (SGLang).
  if (quant.scheme == Scheme::kInt8W8A16 && granularity == WeightScale::kGroup) spec.format = kU8;
  spec.zero_points = quant.zero_points;
  if (quant.zero_points && (!t.may_have_zero_points || spec.format == kI8))
    unsupported(fmt::format("quant.zero_points: scheme {} {}has none; leave it false", t.name,
                            t.may_have_zero_points ? "per channel " : ""));
  // One cell per expert, or for a gated fc1 whose halves come from two tensors one cell each.
  const bool two_halves = shape.gated && shape.layout == GateLayout::kHalves;
  spec.scale = scale_grid(quant, granularity, shape.n, shape.k, two_halves);
  spec.e8m0_scales = quant.scheme == Scheme::kMxfp4W4A16;
  const bool four_bit = is_four_bit(spec.format);
  if (four_bit && shape.k % 2 != 0)
    unsupported(
        fmt::format("scheme {}: packs two weights in a byte along K, so K must be even, got {}; "
                    "pad K, or take an 8-bit scheme",
                    t.name, shape.k));
  if (spec.zero_points && spec.format == kU4 && shape.n % 2 != 0)
    unsupported(
        fmt::format("scheme {}: packs two zero points in a byte along N, so N must be even, got "
                    "{}; pad N, or leave zero_points false",
                    t.name, shape.n));
  return spec;
}

}  // namespace

const SchemeTraits& traits(Scheme scheme) {
  check_enum("scheme", scheme, kNumSchemes);
  return kSchemes[static_cast<std::size_t>(scheme)];
}
std::span<const SchemeTraits> all_schemes() { return kSchemes; }

int WeightSpec::implicit_zero() const { return format == kU4 ? 8 : format == kU8 ? 128 : 0; }

std::int64_t WeightSpec::row_bytes() const {
  if (is_four_bit(format)) return k / 2;
  return k * static_cast<std::int64_t>(size_of(weight_dtype(format)));
}

std::int64_t WeightSpec::gate_row(std::int64_t i) const {
  const bool second = order == GateOrder::kUpFirst;
  return layout == GateLayout::kInterleaved ? 2 * i + second : i + second * (n / 2);
}
std::int64_t WeightSpec::up_row(std::int64_t i) const {
  const bool second = order == GateOrder::kGateFirst;
  return layout == GateLayout::kInterleaved ? 2 * i + second : i + second * (n / 2);
}

DType weight_dtype(WeightFormat format) {
  switch (format) {
    case kF32:
      return DType::kF32;
    case kF16:
      return DType::kF16;
    case kBF16:
      return DType::kBF16;
    case kE4M3:
      return DType::kF8E4M3;
    case kI8:
      return DType::kI8;
    case kU8:
    case kU4:
    case kE2M1:
      return DType::kU8;
  }
  return DType::kU8;
}

DType intermediate_dtype(const LayerConfig& config) {
  const DType own = weight_dtype(traits(config.quant.scheme).weight);
  if (is_float(own)) return own;
  if (is_16bit(config.input_dtype)) return config.input_dtype;
  if (is_16bit(config.output_dtype)) return config.output_dtype;
  return DType::kBF16;
}

WeightSpec weight_spec(const LayerConfig& config, Product product) {
  const bool fc1 = product == Product::kFc1;
  const bool gated = fc1 && is_gated(config.activation.kind);
  const std::int64_t experts = config.local.count > 0 ? config.local.count : config.experts;
  return resolve(config.quant, {.experts = experts,
                                .n = fc1 ? (gated ? 2 : 1) * config.intermediate : config.hidden,
                                .k = fc1 ? config.hidden : config.intermediate,
                                .dtype16 = intermediate_dtype(config),
                                .gated = gated,
                                .order = config.activation.order,
                                .layout = config.activation.layout});
}

WeightSpec weight_spec(const QuantSpec& quant, std::int64_t experts, std::int64_t n, std::int64_t k,
                       DType act_input, DType fallback16) {
  LayerConfig like;  // only to share the rule for the 16-bit dtype
  like.quant = quant;
  like.input_dtype = act_input;
  like.output_dtype = fallback16;
  return resolve(quant, {.experts = experts, .n = n, .k = k, .dtype16 = intermediate_dtype(like)});
}

}  // namespace moesaic
