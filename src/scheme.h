// SPDX-License-Identifier: Apache-2.0
// The closed list of schemes and what distinguishes them: one row of traits each. Everything that
// differs between schemes is read from here; adding one starts with a row in scheme.cpp.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>

#include "moesaic/layer.h"
#include "moesaic/quant.h"

namespace moesaic {

// How a weight element is stored.
enum class WeightFormat : std::uint8_t { kF32, kF16, kBF16, kE4M3, kI8, kU8, kU4, kE2M1 };
constexpr bool is_four_bit(WeightFormat f) {  // two codes in a byte, the earlier k in the low nibble
  return f == WeightFormat::kU4 || f == WeightFormat::kE2M1;
}
// What the product multiplies it with. k16: f16 or bf16, whichever the layer's 16-bit dtype is.
enum class ActFormat : std::uint8_t { kF32, k16, kE4M3, kI8 };

struct SchemeTraits {
  Scheme scheme;
  std::string_view name;
  WeightFormat weight;            // int8_w8a16 with WeightScale::kGroup is kU8: see resolve()
  ActFormat act;
  WeightScale default_weight_scale;           // kDefault: none (f32, f16, bf16)
  std::span<const WeightScale> weight_scales; // all that are allowed
  ActScale default_act_scale;                 // kDefault: none
  std::span<const ActScale> act_scales;       // all that are allowed
  bool may_have_zero_points;
  std::string_view summary;                   // one line for `info` and docs
};
const SchemeTraits& traits(Scheme scheme);
std::span<const SchemeTraits> all_schemes();

// Where the scale (and zero point) of weight element (n, k) lies: cell (n / group_n, k / group_k) of
// an expert's [grid_n, grid_k]. "Granularity is a stride": per tensor is one cell, per channel is
// group_n = 1 and group_k = K. No scales: has_scale is false and the groups span everything.
struct ScaleGrid {
  bool has_scale = false;
  std::int64_t group_n = 1, group_k = 1;
  std::int64_t grid_n = 1, grid_k = 1;
};

// A QuantSpec with every default resolved, for one product: what packing and the kernels read.
struct WeightSpec {
  Scheme scheme{};
  WeightFormat format{};
  ActFormat act{};
  ActScale act_scale = ActScale::kDefault;   // kDefault: activations are not quantized
  std::int64_t act_group = 0;                // kGroup: elements of K per activation scale
  Int8Rounding int8_rounding = Int8Rounding::kNearest;
  DType act_dtype = DType::kBF16;            // of the operand: f32, f16, bf16, e4m3 or i8
  DType dtype16 = DType::kBF16;              // the 16-bit dtype intermediates are rounded to (f32: f32)
  std::int64_t experts = 0, n = 0, k = 0;    // local experts
  ScaleGrid scale;
  bool zero_points = false;                  // a tensor of them; else implicit_zero()
  bool e8m0_scales = false;
  bool gated = false;                        // fc1 of a gated activation: n = 2 * intermediate
  GateOrder order = GateOrder::kGateFirst;
  GateLayout layout = GateLayout::kHalves;

  int implicit_zero() const;                 // 8 (u4), 128 (u8), 0 otherwise
  std::int64_t row_bytes() const;            // bytes of one n-row of K elements
  // Row of fc1 that holds gate / up of output column i (0 <= i < n / 2). Gated only.
  std::int64_t gate_row(std::int64_t i) const;
  std::int64_t up_row(std::int64_t i) const;
};

enum class Product : std::uint8_t { kFc1, kFc2 };
// Resolves and checks (throws): unknown combinations, groups that do not fit, int4 without a group.
WeightSpec weight_spec(const LayerConfig& config, Product product);
// The same for a bare grouped GEMM, whose activations are `act_input` (16-bit, f32, or 8-bit).
WeightSpec weight_spec(const QuantSpec& quant, std::int64_t experts, std::int64_t n, std::int64_t k,
                       DType act_input, DType fallback16);

// Schemes whose activations may be multiplied by a factor per channel first (GemmWeights::prequant).
constexpr bool may_have_prequant(Scheme scheme) {
  return scheme == Scheme::kInt4W4A8Fp8 || scheme == Scheme::kInt4W4A8Int8;
}

DType weight_dtype(WeightFormat format);  // of the caller's tensor; 4-bit: kU8
// The 16-bit (f32 for scheme f32) dtype of a layer's intermediates.
DType intermediate_dtype(const LayerConfig& config);

}  // namespace moesaic
