// SPDX-License-Identifier: Apache-2.0
#include "reference/quantize.h"

namespace moesaic::reference {
namespace {

// The quantized number, as numeric.h's one rule makes it from fp32.
double to_8bit(const QuantizeRule& rule, double x, double scale) {
  const auto f = static_cast<float>(x), s = static_cast<float>(scale);
  if (rule.to == DType::kF8E4M3) return e4m3_to_float(float_to_e4m3(f * inverse_scale(s)));
  if (rule.int8_rounding == Int8Rounding::kTruncate) return float_to_i8_truncate(f, s);
  return float_to_i8(f * inverse_scale(s));
}

// An exact input and an exact scale give one number, the same bits on every backend. Otherwise the
// candidates at the ends of the intervals: quantizing is monotone, so nothing lies further out.
void quantize_group(const QuantizeRule& rule, std::span<const Bounded> in, Bounded scale,
                    std::int64_t first, Row* out) {
  const double low = scale.value - scale.error, high = scale.value + scale.error;
  for (std::size_t i = 0; i < in.size(); ++i) {
    const double q = to_8bit(rule, in[i].value, scale.value);
    const std::size_t at = static_cast<std::size_t>(first) + i;
    out->value[at] = q * static_cast<float>(scale.value);
    if (in[i].error == 0 && scale.error == 0) continue;
    double furthest = 0;
    for (const double x : {in[i].value - in[i].error, in[i].value + in[i].error})
      for (const double s : {low, high})
        furthest = std::max(furthest, s * std::abs(to_8bit(rule, x, s) - q));
    out->error[at] = furthest;
  }
}

}  // namespace

Bounded larger(Bounded a, Bounded b) {
  if (std::isnan(a.value) || std::isnan(b.value)) return {std::nan(""), 0};
  const double value = std::max(a.value, b.value);
  const double low = std::max(a.value - a.error, b.value - b.error);
  const double high = std::max(a.value + a.error, b.value + b.error);
  return {value, std::max(high - value, value - low)};
}

Bounded absmax(std::span<const Bounded> row) {
  Bounded largest;
  for (const Bounded& b : row) largest = larger(largest, {std::abs(b.value), b.error});
  return largest;
}

Bounded finite_absmax(std::span<const Bounded> row) {
  Bounded largest;
  for (const Bounded& b : row)
    if (std::isfinite(b.value)) largest = larger(largest, {std::abs(b.value), b.error});
  return largest;
}

Bounded scale_of(DType to, Bounded largest) {
  const float limit = to == DType::kF8E4M3 ? kE4M3Max : kI8Max;
  const auto scale = [&](double m) { return activation_scale(static_cast<float>(m), limit); };
  const double value = scale(largest.value);
  if (largest.error == 0) return {value, 0};
  const double low = scale(largest.value - largest.error);
  const double high = scale(largest.value + largest.error);
  return {value, std::max(high - value, value - low)};
}

Row quantize(const QuantizeRule& rule, std::span<const Bounded> row, Bounded scale) {
  Row out{.value = std::vector<double>(row.size()),
          .error = std::vector<double>(row.size()),
          .scale_error = {scale.error == 0 ? 0 : scale.error / scale.value},
          .group = static_cast<std::int64_t>(row.size())};
  quantize_group(rule, row, scale, 0, &out);
  return out;
}

Row quantize(const QuantizeRule& rule, std::span<const Bounded> row) {
  const auto k = static_cast<std::int64_t>(row.size());
  const std::int64_t group = rule.group == 0 ? k : rule.group;
  Row out{.value = std::vector<double>(row.size()),
          .error = std::vector<double>(row.size()),
          .scale_error = {},
          .group = group};
  for (std::int64_t first = 0; first < k; first += group) {
    const auto part = row.subspan(static_cast<std::size_t>(first),
                                  static_cast<std::size_t>(std::min(group, k - first)));
    const Bounded scale = scale_of(rule.to, absmax(part));
    quantize_group(rule, part, scale, first, &out);
    out.scale_error.push_back(scale.error == 0 ? 0 : scale.error / scale.value);
  }
  return out;
}

Row as_is(std::span<const Bounded> row) {
  Row out;
  out.group = static_cast<std::int64_t>(row.size());
  for (const Bounded& b : row) {
    out.value.push_back(b.value);
    out.error.push_back(b.error);
  }
  return out;
}

}  // namespace moesaic::reference
