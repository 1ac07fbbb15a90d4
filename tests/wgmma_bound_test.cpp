// SPDX-License-Identifier: Apache-2.0
// The bound of e4m3 sums on wgmma against a model of the instruction: it must hold for any signs,
// and be tight enough that a lost product shows.
#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "numeric.h"
#include "reference/product.h"

namespace moesaic::reference {
namespace {

// Addends shifted to the exponent of the largest and cut off 13 bits behind its point.
double truncated_sum(double sum, const double* products, int count) {
  double largest = std::abs(sum);
  for (int i = 0; i < count; ++i) largest = std::max(largest, std::abs(products[i]));
  if (largest == 0) return 0;
  const double unit = std::ldexp(1.0, std::ilogb(largest) - 13);
  double total = std::trunc(sum / unit);
  for (int i = 0; i < count; ++i) total += std::trunc(products[i] / unit);
  return total * unit;
}

enum class Signs { kBoth, kOneOperand, kAllPositive };

class WgmmaBound : public testing::TestWithParam<Signs> {};
TEST_P(WgmmaBound, HoldsAndShowsALostProduct) {
  std::mt19937 random(20);
  std::normal_distribution<double> normal(0, 40);
  const auto e4m3 = [&](bool positive) {
    const double v = e4m3_to_float(float_to_e4m3(static_cast<float>(normal(random))));
    return positive ? std::abs(v) : v;
  };
  const bool first = GetParam() != Signs::kBoth, second = GetParam() == Signs::kAllPositive;
  for (const std::int64_t k : {32, 128, 144, 1024, 4096}) {
    const std::int64_t n = 64;
    Row row{.value = std::vector<double>(static_cast<std::size_t>(k)),
            .error = std::vector<double>(static_cast<std::size_t>(k)),
            .scale_error = {},
            .group = k};
    Matrix matrix{.n = n, .k = k, .at = std::vector<double>(static_cast<std::size_t>(n * k))};
    for (double& v : row.value) v = e4m3(first);
    for (double& v : matrix.at) v = e4m3(second);
    const std::vector<Bounded> bound = product(row, matrix, Accumulator::kWgmmaE4M3, {});
    int shown = 0;
    for (std::int64_t i = 0; i < n; ++i) {
      double total = 0, sum = 0;
      std::vector<double> products;
      for (std::int64_t j = 0; j < k; ++j) {
        products.push_back(row.value[static_cast<std::size_t>(j)] *
                           matrix.at[static_cast<std::size_t>(j * n + i)]);
      }
      for (std::int64_t j = 0; j < k; j += 32) {
        const auto count = static_cast<int>(std::min<std::int64_t>(32, k - j));
        sum = truncated_sum(sum, products.data() + j, count);
        if ((j + 32) % 128 == 0 || j + 32 >= k) {
          total += sum;
          sum = 0;
        }
      }
      const Bounded& b = bound[static_cast<std::size_t>(i)];
      EXPECT_LE(std::abs(total - b.value), b.error) << "K " << k << " column " << i;
      shown += std::abs(products.back()) > b.error;
    }
    // The last of up to 144 products: more than half of the columns miss it. (Sums of one sign grow
    // so large that less of every product is kept.)
    if (k <= 144 && !second) {
      EXPECT_GT(shown, n / 2) << "K " << k;
    }
  }
}
INSTANTIATE_TEST_SUITE_P(Data, WgmmaBound,
                         testing::Values(Signs::kBoth, Signs::kOneOperand, Signs::kAllPositive));

}  // namespace
}  // namespace moesaic::reference
