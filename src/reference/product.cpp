// SPDX-License-Identifier: Apache-2.0
#include "reference/product.h"

namespace moesaic::reference {
namespace {

// Error of adding k products, relative to the sum of their magnitudes.
double accumulation_error(Accumulator accumulator, double k) {
  switch (accumulator) {
    case Accumulator::kFp32:
      return walk(k) * kUnit;
    // Truncation has a direction: one ulp (two units) per instruction of at least 8 products, in a
    // row, beside the walk. f32 as three tf32 products leaves out the smallest: 2^-21 of each.
    case Accumulator::kTensorCore:
      return (walk(k) + k / 4 + 8) * kUnit;
    // Four instructions of K = 32 between promotions, each cutting the sum to 13 bits behind the
    // point; then one fp32 addition per 128.
    case Accumulator::kWgmmaE4M3:
      return 4 * 0x1p-13 + walk(k / 128 + 1) * kUnit;
  }
  return 0;
}

}  // namespace

std::vector<Bounded> product(const Row& row, const Matrix& matrix, Accumulator accumulator,
                             const Epilogue& epilogue) {
  const auto n = static_cast<std::size_t>(matrix.n);
  std::vector<double> sum(n), magnitude(n), errors(n), squares(n), common(n), group_sum(n);
  const bool scaled = !row.scale_error.empty();
  for (std::int64_t k = 0; k < matrix.k; ++k) {
    const double* w = matrix.at.data() + k * matrix.n;
    const double a = row.value[static_cast<std::size_t>(k)];
    const double e = row.error[static_cast<std::size_t>(k)];
    const double a_magnitude = std::abs(a);
    for (std::size_t i = 0; i < n; ++i) {
      group_sum[i] += a * w[i];
      magnitude[i] += a_magnitude * std::abs(w[i]);
    }
    if (e != 0) {
      for (std::size_t i = 0; i < n; ++i) {
        errors[i] += e * std::abs(w[i]);
        squares[i] += e * w[i] * e * w[i];
      }
    }
    if ((k + 1) % row.group == 0 || k + 1 == matrix.k) {
      const double relative = scaled ? row.scale_error[static_cast<std::size_t>(k / row.group)] : 0;
      for (std::size_t i = 0; i < n; ++i) {
        sum[i] += group_sum[i];
        common[i] += relative * std::abs(group_sum[i]);
        group_sum[i] = 0;
      }
    }
  }
  // Three roundings for scales and alpha, one addition per scaled partial sum.
  const double relative = accumulation_error(accumulator, static_cast<double>(matrix.k)) +
                          (3 + walk(static_cast<double>(epilogue.scale_cells))) * kUnit;
  std::vector<Bounded> out(n);
  for (std::size_t i = 0; i < n; ++i) {
    const double error =
        relative * magnitude[i] + combine_errors(errors[i], squares[i]) + common[i];
    out[i] = {epilogue.alpha * sum[i], std::abs(epilogue.alpha) * error + 0x1p-120};
    if (epilogue.bias.defined()) {
      const double bias = load(epilogue.bias, static_cast<std::int64_t>(i));
      out[i].value += bias;
      out[i].error += kUnit * (std::abs(out[i].value) + std::abs(bias));
    }
  }
  return out;
}

}  // namespace moesaic::reference
