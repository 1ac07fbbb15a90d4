// SPDX-License-Identifier: Apache-2.0
// The activation as a stage of its own, for callers between two bare products. Inside a layer it
// happens on GEMM1's finished sums.
#include "cpu/activate.h"

#include <array>

#include "cpu/activation_math.h"
#include "cpu/ranges.h"

namespace moesaic {
namespace {

constexpr std::int64_t kColumns = 1024;  // of the output at a time

struct Activate {
  const ActivateStage& stage;
  const StageKernels& kernels;
  RowView input, output;

  // Experts that the parameter tensors know; INT64_MAX without any.
  std::int64_t experts() const {
    std::int64_t n = INT64_MAX;
    for (const Tensor* t :
         {&stage.parameters.alpha, &stage.parameters.beta, &stage.parameters.limit})
      if (t->defined()) n = std::min(n, t->shape[0]);
    return n;
  }

  ActivationParams parameters(std::int64_t expert) const {
    const auto pick = [&](const Tensor& t, float scalar) {
      return t.defined() ? t.as<const float>()[expert * t.strides[0]] : scalar;
    };
    return {.alpha = pick(stage.parameters.alpha, stage.spec.alpha),
            .beta = pick(stage.parameters.beta, stage.spec.beta),
            .limit = pick(stage.parameters.limit, stage.spec.limit)};
  }

  void gated(std::int64_t row, std::int64_t column, std::int64_t n, const ActivationParams& p,
             float* out) const {
    const bool up_first = stage.spec.order == GateOrder::kUpFirst;
    std::array<float, 2 * kColumns> both;
    float* first = both.data();
    std::int64_t step = 1, second = kColumns;
    if (stage.spec.layout == GateLayout::kInterleaved) {
      input.read(kernels, row, 2 * column, 2 * n, first);
      step = 2, second = 1;
    } else {
      input.read(kernels, row, column, n, first);
      input.read(kernels, row, output.width() + column, n, first + second);
    }
    for (std::int64_t i = 0; i < n; ++i) {
      const float a = first[i * step], b = first[i * step + second];
      out[i] = activate_gated(stage.spec.kind, up_first ? b : a, up_first ? a : b, p);
    }
  }

  void row(std::int64_t r, std::int64_t known_experts) const {
    std::int64_t expert = 0;
    if (stage.row_expert.defined())
      expert = stage.row_expert.as<const std::int32_t>()[r * stage.row_expert.strides[0]];
    const bool live = expert >= 0 && expert < known_experts;
    const ActivationParams p = live ? parameters(expert) : ActivationParams{};
    std::array<float, kColumns> out;
    for (std::int64_t column = 0; column < output.width(); column += kColumns) {
      const std::int64_t n = std::min(kColumns, output.width() - column);
      if (!live) {
        std::fill_n(out.data(), n, 0.0f);
      } else if (is_gated(stage.spec.kind)) {
        gated(r, column, n, p, out.data());
      } else {
        input.read(kernels, r, column, n, out.data());
        for (std::int64_t i = 0; i < n; ++i) out[i] = activate_plain(stage.spec.kind, out[i]);
      }
      output.write(kernels, r, column, n, out.data());
    }
  }
};

}  // namespace

void activate_cpu(const ActivateStage& stage) {
  const Activate activate{stage, stage_kernels(), RowView(stage.input), RowView(stage.output)};
  const std::int64_t experts = activate.experts();
  // An exponential costs some ten elements of copying.
  parallel_ranges(activate.output.rows(), activate.output.width() * 10,
                  [&](std::int64_t begin, std::int64_t end) {
                    for (std::int64_t r = begin; r < end; ++r) activate.row(r, experts);
                  });
}

}  // namespace moesaic
