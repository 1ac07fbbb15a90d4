// SPDX-License-Identifier: Apache-2.0
// Slot outputs to tokens: an fp32 sum in slot order and one rounding, whatever T and the threads.
// The original accumulates in the output dtype, in expert order, and modifies its input.
#include "cpu/combine.h"

#include <array>

#include "cpu/ranges.h"

namespace moesaic {
namespace {

struct Combine {
  const CombineStage& stage;
  const StageKernels& kernels;
  RowView rows, shared, output;

  // Row of `rows` that holds the slot; -1: nothing.
  std::int64_t row_of(std::int64_t slot) const {
    if (stage.topk_ids != nullptr && stage.topk_ids[slot] < 0) return -1;
    const std::int64_t row = stage.slot_row != nullptr ? stage.slot_row[slot] : slot;
    return row >= 0 && row < rows.rows() ? row : -1;
  }

  void add(const RowView& from, std::int64_t row, std::int64_t column, std::int64_t n, float weight,
           float* sum) const {
    if (from.dense_rows())
      return kernels.accumulate(from.dtype(), from.at(row, column), weight, n, sum);
    for (std::int64_t i = 0; i < n; ++i)
      kernels.accumulate(from.dtype(), from.at(row, column + i), weight, 1, sum + i);
  }

  void piece(std::int64_t token, std::int64_t column, std::int64_t n) const {
    std::array<float, kPiece> sum;
    std::fill_n(sum.data(), n, 0.0f);
    for (std::int64_t j = 0; j < stage.top_k; ++j) {
      const std::int64_t slot = token * stage.top_k + j, row = row_of(slot);
      if (row < 0) continue;
      const float weight = stage.weights != nullptr ? stage.weights[slot] : 1.0f;
      add(rows, row, column, n, weight, sum.data());
    }
    if (stage.scale != 1.0f) kernels.multiply(stage.scale, n, sum.data());
    if (stage.shared.defined()) {
      const float weight = stage.shared_weight != nullptr ? stage.shared_weight[token] : 1.0f;
      add(shared, token, column, n, weight, sum.data());
    }
    if (stage.accumulate == Accumulate::kAdd) add(output, token, column, n, 1.0f, sum.data());
    output.write(kernels, token, column, n, sum.data());
  }
};

}  // namespace

void combine_cpu(const CombineStage& stage) {
  const Combine combine{stage, stage_kernels(), RowView(stage.rows), RowView(stage.shared),
                        RowView(stage.output)};
  const std::int64_t hidden = combine.output.width(), pieces = (hidden + kPiece - 1) / kPiece;
  parallel_ranges(combine.output.rows() * pieces, std::min(hidden, kPiece) * stage.top_k,
                  [&](std::int64_t begin, std::int64_t end) {
                    for (std::int64_t i = begin; i < end; ++i) {
                      const std::int64_t column = i % pieces * kPiece;
                      combine.piece(i / pieces, column, std::min(kPiece, hidden - column));
                    }
                  });
}

}  // namespace moesaic
