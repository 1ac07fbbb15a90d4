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
    // wgmma of e4m3 loses far more, by Truncation; schemes and shapes that it does not take run on
    // mma.sync, which does not.
    case Accumulator::kTensorCore:
    case Accumulator::kWgmmaE4M3:
      return (walk(k) + k / 4 + 8) * kUnit;
  }
  return 0;
}

// wgmma of e4m3 adds 32 products and the sum so far as integers: all are shifted to the exponent of
// the largest and cut off 13 bits behind its point, towards zero (measured: 1 + 2^-14 is 1, and so
// is 1 - 2^-14; 1 + 2^-13 is not). With `unit` = 2^-13 times the largest addend, an addend of sign
// s therefore loses s * unit * u, u between 0 and 1: half a unit on the average, in a direction
// that is known, and a uniform rest of half a unit in either. Signs that cancel leave only the
// rests, a random walk. After four instructions the sum is promoted to fp32 and begins anew.
class Truncation {
 public:
  explicit Truncation(std::size_t n) : largest_(n), signs_(n), sum_(n), drift_(n), squares_(n) {}

  void add(std::size_t i, double product) {
    largest_[i] = std::max(largest_[i], std::abs(product));
    signs_[i] += (product > 0) - (product < 0);
    sum_[i] += product;
  }
  // `k` products have been added; `last` when no more will come.
  void next(std::int64_t k, bool last) {
    constexpr double kAddends = 33;
    if (k % 32 != 0 && !last) return;
    for (std::size_t i = 0; i < sum_.size(); ++i) {
      const double unit = 0x1p-13 * largest_[i];
      drift_[i] += unit / 2 * signs_[i];
      squares_[i] += kAddends * (unit / 2) * (unit / 2);
      const bool promoted = k % 128 == 0;
      if (promoted) sum_[i] = 0;
      largest_[i] = std::abs(sum_[i]);  // the sum so far is one of the next addends
      signs_[i] = (sum_[i] > 0) - (sum_[i] < 0);
    }
  }
  double error(std::size_t i) const {
    return std::abs(drift_[i]) + kConfidence * std::sqrt(squares_[i]);
  }

 private:
  std::vector<double> largest_, signs_, sum_, drift_, squares_;
};

}  // namespace

std::vector<Bounded> product(const Row& row, const Matrix& matrix, Accumulator accumulator,
                             const Epilogue& epilogue) {
  const auto n = static_cast<std::size_t>(matrix.n);
  std::vector<double> sum(n), magnitude(n), errors(n), squares(n), common(n), group_sum(n);
  const bool scaled = !row.scale_error.empty();
  const bool truncates = accumulator == Accumulator::kWgmmaE4M3;
  Truncation truncation(truncates ? n : 0);
  for (std::int64_t k = 0; k < matrix.k; ++k) {
    const double* w = matrix.at.data() + k * matrix.n;
    const double a = row.value[static_cast<std::size_t>(k)];
    const double e = row.error[static_cast<std::size_t>(k)];
    const double a_magnitude = std::abs(a);
    for (std::size_t i = 0; i < n; ++i) {
      group_sum[i] += a * w[i];
      magnitude[i] += a_magnitude * std::abs(w[i]);
    }
    if (truncates) {
      for (std::size_t i = 0; i < n; ++i) truncation.add(i, a * w[i]);
      truncation.next(k + 1, k + 1 == matrix.k);
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
    const double error = relative * magnitude[i] + combine_errors(errors[i], squares[i]) +
                         common[i] + (truncates ? truncation.error(i) : 0);
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
