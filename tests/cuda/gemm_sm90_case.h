// SPDX-License-Identifier: Apache-2.0
// What one product of the SM90 family is tested with: its sizes, layouts and options, by hand or by
// chance.
#pragma once

#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "cuda/gemm.h"

namespace moesaic::cuda {

enum class Scales { kNone, kTensor, kHalves, kChannel, kBlock };
enum class Layout { kCompact, kSorted, kBatched };

struct Case {
  DType dtype = DType::kBF16;  // of both operands
  Scales scales = Scales::kNone;
  std::int64_t experts = 4, n = 128, k = 256, tokens = 10, top_k = 2;
  std::int64_t tile_rows = 16;
  Layout layout = Layout::kCompact;
  RowOf a_row = RowOf::kToken, c_row = RowOf::kPosition;
  int activation = -1;  // Activation, or none
  GateOrder order = GateOrder::kGateFirst;
  GateLayout gates = GateLayout::kHalves;
  DType out = DType::kBF16;
  int bias = -1;  // DType, or none
  bool row_weights = false, alpha = false, filtered = false;
  std::int64_t c_padding = 0, c_column = 1;

  std::string text() const {
    return std::string(name(dtype)) + " E" + std::to_string(experts) + " N" + std::to_string(n) +
           " K" + std::to_string(k) + " T" + std::to_string(tokens) + " top" +
           std::to_string(top_k) + " tile" + std::to_string(tile_rows) + " scales" +
           std::to_string(static_cast<int>(scales)) + " layout" +
           std::to_string(static_cast<int>(layout)) + " a" +
           std::to_string(static_cast<int>(a_row)) + " c" +
           std::to_string(static_cast<int>(c_row)) + " act" + std::to_string(activation) +
           " order" + std::to_string(static_cast<int>(order)) + " gates" +
           std::to_string(static_cast<int>(gates)) + " out " + std::string(name(out)) + " bias" +
           std::to_string(bias) + " w" + std::to_string(row_weights) + " alpha" +
           std::to_string(alpha) + " filtered" + std::to_string(filtered) + " pad" +
           std::to_string(c_padding) + " column" + std::to_string(c_column);
  }
};

inline Case random_case(std::mt19937& random, DType dtype) {
  const auto below = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
  Case c{.dtype = dtype};
  const bool fp8 = dtype == DType::kF8E4M3;
  c.experts = 1 + below(6);
  c.k = (fp8 ? 16 : 8) * (1 + below(below(3) == 0 ? 100 : 40));
  c.n = 16 * (1 + below(below(3) == 0 ? 40 : 14));
  c.tokens = below(4) == 0 ? 1 + below(4) : 1 + below(150);
  c.top_k = 1 + below(3);
  c.tile_rows = std::vector<std::int64_t>{8, 16, 32, 64, 128, 256, 48, 300}[below(8)];
  c.layout = static_cast<Layout>(below(3));
  if (c.layout == Layout::kBatched) {
    c.a_row = c.c_row = RowOf::kPosition;
  } else {
    c.a_row = static_cast<RowOf>(below(3));
    c.c_row = below(2) ? RowOf::kPosition : RowOf::kSlot;
    c.row_weights = below(2);
  }
  c.activation = below(3) == 0 ? -1
                 : below(3)    ? static_cast<int>(Activation::kSwiglu)
                               : below(kNumActivations);
  c.order = static_cast<GateOrder>(below(2));
  c.gates = static_cast<GateLayout>(below(2));
  c.out = below(4) == 0                           ? DType::kF32
          : dtype == DType::kF16 || below(5) == 0 ? DType::kF16
                                                  : DType::kBF16;
  const DType biases[] = {DType::kF32, DType::kF16, DType::kBF16};
  c.bias = below(2) ? -1 : static_cast<int>(biases[below(3)]);
  c.alpha = below(4) == 0;
  c.filtered = below(4) == 0;
  c.c_padding = below(3) == 0 ? 8 * below(3) : below(6) == 0 ? below(7) : 0;
  c.c_column = below(10) == 0 ? 2 : 1;
  const bool gated = c.activation >= 0 && is_gated(static_cast<Activation>(c.activation));
  if (!gated && below(4) == 0) c.n = 1 + below(200);  // any N: nothing must depend on its alignment
  if (fp8) c.scales = static_cast<Scales>(1 + below(4));
  if (c.scales == Scales::kHalves && c.n % 2) c.scales = Scales::kTensor;
  return c;
}

}  // namespace moesaic::cuda
