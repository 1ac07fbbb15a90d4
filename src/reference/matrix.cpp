// SPDX-License-Identifier: Apache-2.0
#include "reference/matrix.h"

#include "reference/bounded.h"

namespace moesaic::reference {
namespace {

// The number stored at (n, k), before zero point and scale.
double stored(const WeightSpec& spec, const Tensor& weight, std::int64_t n, std::int64_t k) {
  if (!is_four_bit(spec.format)) return load(weight, n, k);
  const auto byte = static_cast<unsigned>(load(weight, n, k / 2));  // two along K, low nibble first
  const unsigned nibble = k % 2 == 0 ? byte & 15u : byte >> 4;
  return spec.format == WeightFormat::kE2M1 ? kE2M1[nibble] : nibble;
}

double zero_point(const WeightSpec& spec, const Tensor& zero, std::int64_t expert, std::int64_t n,
                  std::int64_t group) {
  if (!spec.zero_points || !zero.defined()) return spec.implicit_zero();
  const bool grouped = zero.rank == 3;  // otherwise [E, N or N / 2]: one group
  if (grouped && zero.shape[2] == 1) group = 0;
  if (spec.format != WeightFormat::kU4)
    return grouped ? load(zero, expert, n, group) : load(zero, expert, n);
  const double pair = grouped ? load(zero, expert, n / 2, group) : load(zero, expert, n / 2);
  const auto byte = static_cast<unsigned>(pair);  // two along N, low nibble = even n
  return n % 2 == 0 ? byte & 15u : byte >> 4;
}

double scale_of(const WeightSpec& spec, const Tensor& scale, std::int64_t expert, std::int64_t n,
                std::int64_t k) {
  if (!spec.scale.has_scale) return 1;
  if (scale.rank == 1) return load(scale, expert);  // one per expert
  if (scale.rank == 2 && scale.shape[1] == 2 && spec.scale.group_k == spec.k &&
      spec.scale.group_n * 2 == spec.n)
    return load(scale, expert, 2 * n / spec.n);  // one for each half of N
  if (scale.rank == 2 && scale.shape[1] == 1 && spec.n != 1) return load(scale, expert, 0);
  if (scale.rank == 2) return load(scale, expert, n);                             // per channel
  const std::int64_t row = std::min(n / spec.scale.group_n, scale.shape[1] - 1);  // [E, 1, 1]: all
  const double s = load(scale, expert, row, k / spec.scale.group_k);
  if (!spec.e8m0_scales || scale.dtype == DType::kE8M0) return s;
  return e8m0_to_float(static_cast<std::uint8_t>(s));
}

}  // namespace

Matrix dequantize(const WeightSpec& spec, const GemmWeights& weights, std::int64_t expert,
                  WeightRounding rounding) {
  Matrix m{spec.n, spec.k, std::vector<double>(static_cast<std::size_t>(spec.n * spec.k))};
  const Tensor weight = weights.weight.select(expert);
  for (std::int64_t n = 0; n < spec.n; ++n) {
    for (std::int64_t k = 0; k < spec.k; ++k) {
      double w = stored(spec, weight, n, k);
      if (spec.scale.has_scale) {
        w -= zero_point(spec, weights.zero_point, expert, n, k / spec.scale.group_k);
        w *= scale_of(spec, weights.scale, expert, n, k);
        if (rounding == WeightRounding::k16Bit) w = round_to(spec.dtype16, w);
      }
      m.at[static_cast<std::size_t>(k * spec.n + n)] = w;
    }
  }
  return m;
}

}  // namespace moesaic::reference
