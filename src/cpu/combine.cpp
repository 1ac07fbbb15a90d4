// SPDX-License-Identifier: Apache-2.0
// Slot outputs to tokens: an fp32 sum in slot order and one rounding, whatever T and the threads.
// The original accumulates in the output dtype, in expert order, and modifies its input.
#include "cpu/combine.h"

#include <array>

#include "cpu/ranges.h"

namespace moesaic {
namespace {

// Each piece fetches the rows of the next one of its task: few and long tasks.
constexpr std::int64_t kMostTasks = 64;

// Live slots of a token: their rows, from a column on, and what those are multiplied by.
struct Slots {
  static constexpr std::int64_t kMost = 32;  // more are taken one batch after the other
  std::array<std::int64_t, kMost> index;
  std::array<const void*, kMost> rows;
  std::array<float, kMost> weights;
  std::int64_t count = 0;
};

// Some columns of a token.
struct Piece {
  std::int64_t token = 0, column = 0, n = 0;
};

struct Combine {
  const CombineStage& stage;
  const StageKernels& kernels;
  RowView rows, shared, output;

  std::int64_t pieces_of_row() const { return (output.width() + kPiece - 1) / kPiece; }
  Piece piece(std::int64_t i) const {
    const std::int64_t column = i % pieces_of_row() * kPiece;
    return {.token = i / pieces_of_row(), .column = column,
            .n = std::min(kPiece, output.width() - column)};
  }

  // Row of `rows` that holds the slot; -1: nothing.
  std::int64_t row_of(std::int64_t slot) const {
    if (stage.topk_ids != nullptr) {
      const std::int64_t id = stage.topk_ids[slot] - stage.local.first;
      if (id < 0 || (stage.local.count > 0 && id >= stage.local.count)) return -1;
    }
    const std::int64_t row = stage.slot_row != nullptr ? stage.slot_row[slot] : slot;
    return row >= 0 && row < rows.rows() ? row : -1;
  }

  // The token's slots from `first` on.
  void look_up(const Piece& piece, std::int64_t first, Slots* out) const {
    out->count = 0;
    for (std::int64_t j = first; j < std::min(stage.top_k, first + Slots::kMost); ++j) {
      const std::int64_t slot = piece.token * stage.top_k + j, row = row_of(slot);
      if (row < 0) continue;
      const auto at = static_cast<std::size_t>(out->count++);
      out->index[at] = row;
      out->rows[at] = rows.at(row, piece.column);
      out->weights[at] = stage.weights != nullptr ? stage.weights[slot] : 1.0f;
    }
  }

  void add(const RowView& from, std::int64_t row, const Piece& piece, float weight,
           float* sum) const {
    const std::int64_t step = from.dense_rows() ? piece.n : 1;
    for (std::int64_t i = 0; i < piece.n; i += step) {
      const void* const at = from.at(row, piece.column + i);
      kernels.accumulate({.dtype = from.dtype(), .rows = &at, .weights = &weight, .count = 1,
                          .n = step, .sum = sum + i});
    }
  }

  void add(const Slots& slots, const Piece& piece, const Slots& next, float* sum) const {
    if (rows.dense_rows())
      return kernels.accumulate({.dtype = rows.dtype(), .rows = slots.rows.data(),
                                 .weights = slots.weights.data(), .count = slots.count,
                                 .n = piece.n, .sum = sum, .next = next.rows.data(),
                                 .next_count = next.count});
    for (std::size_t j = 0; j < static_cast<std::size_t>(slots.count); ++j)
      add(rows, slots.index[j], piece, slots.weights[j], sum);
  }

  // `first`: the piece's slots, `next`: those of the piece behind it.
  void run(const Piece& piece, const Slots& first, const Slots& next) const {
    std::array<float, kPiece> sum;
    std::fill_n(sum.data(), piece.n, 0.0f);
    add(first, piece, next, sum.data());
    for (std::int64_t j = Slots::kMost; j < stage.top_k; j += Slots::kMost) {
      Slots more;
      look_up(piece, j, &more);
      add(more, piece, Slots(), sum.data());
    }
    if (stage.scale != 1.0f) kernels.multiply(stage.scale, piece.n, sum.data());
    if (stage.shared.defined()) {
      const float weight = stage.shared_weight != nullptr ? stage.shared_weight[piece.token] : 1.0f;
      add(shared, piece.token, piece, weight, sum.data());
    }
    if (stage.accumulate == Accumulate::kAdd) add(output, piece.token, piece, 1.0f, sum.data());
    output.write(kernels, piece.token, piece.column, piece.n, sum.data());
  }

  void run(std::int64_t begin, std::int64_t end) const {
    std::array<Slots, 2> slots;
    look_up(piece(begin), 0, &slots[0]);
    for (std::int64_t i = begin; i < end; ++i) {
      Slots &here = slots[(i - begin) % 2], &next = slots[(i - begin + 1) % 2];
      next.count = 0;
      if (i + 1 < end) look_up(piece(i + 1), 0, &next);
      run(piece(i), here, next);
    }
  }
};

}  // namespace

void combine_cpu(const CombineStage& stage) {
  const Combine combine{stage, stage_kernels(), RowView(stage.rows), RowView(stage.shared),
                        RowView(stage.output)};
  const std::int64_t width = std::min(combine.output.width(), kPiece);
  parallel_ranges(combine.output.rows() * combine.pieces_of_row(), width * stage.top_k, kMostTasks,
                  [&](std::int64_t begin, std::int64_t end) { combine.run(begin, end); });
}

}  // namespace moesaic
