// SPDX-License-Identifier: Apache-2.0
// What a grouped product under test is made of, and its activation in float64. product.h runs it.
#pragma once

#include <cmath>
#include <cstdint>
#include <optional>
#include <string>

#include "moesaic/activation.h"
#include "scheme.h"

namespace moesaic::test {

enum class Layout { kSortedPadded, kCompact, kBatched };
enum class Scales { kNone, kTensor, kHalves, kChannel, kBlock, kGroup };
enum class TokenScales { kNone, kTensor, kToken, kGroup };

struct ProductCase {
  std::string name{};
  WeightFormat format = WeightFormat::kBF16;
  ActFormat act = ActFormat::k16;
  DType act_dtype = DType::kBF16;
  Scales scales = Scales::kNone;
  std::int64_t group_k = 0, group_n = 0;  // kBlock, kGroup
  bool zero_points = false;
  TokenScales token_scales = TokenScales::kNone;
  std::int64_t experts = 5, tokens = 23, top_k = 3, n = 200, k = 328;
  std::optional<ActivationSpec> activation{};
  bool per_expert_terms = false;
  std::optional<DType> bias{};
  bool row_weights = false, alpha = false;
  DType c_dtype = DType::kF32;
  Layout layout = Layout::kSortedPadded;
  std::int64_t c_padding = 0;                 // extra columns of C's row stride
  std::int64_t a_padding = 0, w_padding = 0;  // extra stored elements per row
  std::int64_t scale_padding = 0;             // extra cells per row, of kGroup; NaN
  bool c_transposed = false;                  // columns far apart
  unsigned seed = 1;
};

// Activation in float64 (the table in moesaic/activation.h, written once more).
inline double reference_activation(const ActivationSpec& s, double g, double u, double alpha,
                                   double beta, double limit) {
  const auto sigmoid = [](double x) { return 1.0 / (1.0 + std::exp(-x)); };
  const auto gelu = [](double x) { return 0.5 * x * (1.0 + std::erf(x / std::sqrt(2.0))); };
  const auto gelu_tanh = [](double x) {
    return 0.5 * x * (1.0 + std::tanh(std::sqrt(2.0 / M_PI) * (x + 0.044715 * x * x * x)));
  };
  const auto clamp = [&](double x) { return std::min(std::max(x, -limit), limit); };
  switch (s.kind) {
    case Activation::kSilu:
      return g * sigmoid(g);
    case Activation::kGelu:
      return gelu(g);
    case Activation::kGeluTanh:
      return gelu_tanh(g);
    case Activation::kRelu:
      return std::max(g, 0.0);
    case Activation::kRelu2:
      return std::max(g, 0.0) * std::max(g, 0.0);
    case Activation::kIdentity:
      return g;
    case Activation::kSwiglu:
      return g * sigmoid(g) * u;
    case Activation::kGeglu:
      return gelu(g) * u;
    case Activation::kGegluTanh:
      return gelu_tanh(g) * u;
    case Activation::kSwigluOai: {
      const double c = std::min(g, limit);
      return c * sigmoid(alpha * c) * (clamp(u) + beta);
    }
    case Activation::kSwigluClamp: {
      const double c = std::min(g, limit);
      return c * sigmoid(c) * clamp(u);
    }
    case Activation::kSwigluStep:
      return std::min(g * sigmoid(g), limit) * clamp(u);
  }
  return 0;
}

}  // namespace moesaic::test
