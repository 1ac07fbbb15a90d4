// SPDX-License-Identifier: Apache-2.0
// Rows to where a product wants them, quantized on the way. Only live rows are read: padding never
// enters a scale, and one row's bits do not depend on another's (a dynamic per-tensor scale
// excepted).
#include "cpu/quantize.h"

#include <array>
#include <atomic>
#include <cstring>

#include "cpu/ranges.h"
#include "numeric.h"

namespace moesaic {
namespace {

using Buffer = std::array<float, kPiece>;

// One row to move: from `source` of the input to `position` of the output.
struct Move {
  std::int64_t source = 0, position = 0, expert = 0;
  float weight = 1.0f;
};

class Quantizer {
 public:
  explicit Quantizer(const QuantizeStage& stage)
      : stage_(stage),
        kernels_(stage_kernels()),
        input_(stage.input),
        output_(stage.output),
        width_(stage.output.shape[stage.output.rank - 1]),
        premultiplies_(stage.row_weights != nullptr || stage.prequant.defined()) {}

  void run() const {
    if (!is_float(stage_.input.dtype)) {
      move_tensor_scales();
      return for_each_row([this](const Move& move) { copy(move); });
    }
    switch (stage_.granularity) {
      case ActScale::kDefault:
        return for_each_row([this](const Move& move) { convert(move); });
      case ActScale::kToken:
        return for_each_row(
            [this](const Move& move) { quantize_own(move, 0, width_, token_scale(move)); });
      case ActScale::kGroup:
        return for_each_row([this](const Move& move) { groups(move); });
      case ActScale::kTensorStatic:
        return static_tensor();
      case ActScale::kTensorDynamic:
        return dynamic_tensor();
    }
  }

 private:
  // --- which rows --------------------------------------------------------------------------------
  template <typename Body>
  void for_each_row(const Body& body) const {
    if (stage_.rows == nullptr) {
      parallel_ranges(input_.rows(), width_, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t r = begin; r < end; ++r) body({.source = r, .position = r});
      });
      return;
    }
    const RowMap& map = *stage_.rows;
    const std::int64_t tiles = *map.num_tiles;
    std::int64_t rows = 0;
    for (std::int64_t t = 0; t < tiles; ++t) rows += map.tiles[t].rows;
    if (rows == 0) return;
    parallel_ranges(tiles, width_ * std::max<std::int64_t>(1, rows / tiles),
                    [&](std::int64_t begin, std::int64_t end) {
                      for (std::int64_t t = begin; t < end; ++t) tile(map, map.tiles[t], body);
                    });
  }

  template <typename Body>
  void tile(const RowMap& map, const Tile& tile, const Body& body) const {
    if (tile.expert < 0) return;  // filtered: its rows of C become zero, whatever A holds
    for (std::int64_t p = tile.first; p < tile.first + tile.rows; ++p) {
      Move move{.source = p, .position = p, .expert = tile.expert};
      if (map.row_slot != nullptr) {
        const std::int64_t slot = map.row_slot[p];
        if (slot < 0 || slot >= map.slot_count) continue;  // padding
        if (stage_.source == RowOf::kSlot) move.source = slot;
        if (stage_.source == RowOf::kToken) move.source = slot / stage_.top_k;
        if (stage_.row_weights != nullptr) move.weight = stage_.row_weights[slot];
      }
      body(move);
    }
  }

  // --- reading -----------------------------------------------------------------------------------
  // Columns [column, column + n) of the row as they will be quantized.
  void fetch(const Move& move, std::int64_t column, std::int64_t n, float* out) const {
    input_.read(kernels_, move.source, column, n, out);
    if (!premultiplies_) return;
    if (!stage_.prequant.defined())
      return kernels_.premultiply(stage_.round_to, move.weight, nullptr, n, out);
    Buffer factor;
    const RowView view(stage_.prequant);
    view.read(kernels_, view.rows() > 1 ? move.expert : 0, column, n, factor.data());
    kernels_.premultiply(stage_.round_to, move.weight, factor.data(), n, out);
  }

  // Calls body(column, n, numbers) on pieces of [begin, end).
  template <typename Body>
  void pieces(const Move& move, std::int64_t begin, std::int64_t end, const Body& body) const {
    Buffer numbers;
    for (std::int64_t column = begin; column < end; column += kPiece) {
      const std::int64_t n = std::min(kPiece, end - column);
      fetch(move, column, n, numbers.data());
      body(column, n, numbers.data());
    }
  }

  // --- writing -----------------------------------------------------------------------------------
  float top() const { return stage_.output.dtype == DType::kI8 ? kI8Max : kE4M3Max; }

  void write(const float* numbers, std::int64_t n, float scale, char* out) const {
    if (stage_.output.dtype == DType::kF8E4M3)
      return kernels_.to_e4m3(numbers, inverse_scale(scale), n,
                              reinterpret_cast<std::uint8_t*>(out));
    auto* bytes = reinterpret_cast<std::int8_t*>(out);
    if (stage_.int8_rounding == Int8Rounding::kTruncate)
      return kernels_.to_i8_truncate(numbers, scale, n, bytes);
    kernels_.to_i8(numbers, inverse_scale(scale), n, bytes);
  }

  void quantize_part(const Move& move, std::int64_t begin, std::int64_t end, float scale) const {
    pieces(move, begin, end, [&](std::int64_t column, std::int64_t n, const float* numbers) {
      write(numbers, n, scale, output_.at(move.position, column));
    });
  }

  float* token_scale(const Move& move) const {
    return stage_.scale == nullptr ? nullptr
                                   : stage_.scale + move.position * stage_.scale_row_stride;
  }

  // Columns [begin, end) with a scale of their own, also stored. A NaN or infinite element makes
  // the scale so, and with it these columns: it stays a matter of its own token.
  void quantize_own(const Move& move, std::int64_t begin, std::int64_t end, float* stored) const {
    float largest = 0.0f;
    const auto look = [&](std::int64_t, std::int64_t n, const float* numbers) {
      const float piece = kernels_.absmax(numbers, n);
      if (largest == largest && !(piece <= largest)) largest = piece;
    };
    const auto finish = [&] {
      const float scale = activation_scale(largest, top());
      if (stored != nullptr) *stored = scale;
      return scale;
    };
    if (end - begin > kPiece) {  // too long to hold: read twice
      pieces(move, begin, end, look);
      return quantize_part(move, begin, end, finish());
    }
    pieces(move, begin, end, [&](std::int64_t column, std::int64_t n, const float* numbers) {
      look(column, n, numbers);
      write(numbers, n, finish(), output_.at(move.position, column));
    });
  }

  void groups(const Move& move) const {
    float* scales = token_scale(move);
    std::int64_t g = 0;
    for (std::int64_t begin = 0; begin < width_; begin += stage_.group, ++g) {
      const std::int64_t end = std::min(begin + stage_.group, width_);  // a last group may be short
      quantize_own(move, begin, end, scales != nullptr ? scales + g : nullptr);
    }
  }

  void convert(const Move& move) const {
    pieces(move, 0, width_, [&](std::int64_t column, std::int64_t n, const float* numbers) {
      output_.write(kernels_, move.position, column, n, numbers);
    });
  }

  // --- one scale for many rows -------------------------------------------------------------------
  // Experts of the call when each has its own per-tensor scale; only those with rows are known
  // otherwise.
  template <typename Body>
  void for_each_expert(const Body& body) const {
    if (stage_.output.rank == 3) {
      for (std::int64_t e = 0; e < stage_.output.shape[0]; ++e) body(e);
    } else if (stage_.rows != nullptr) {
      for (std::int64_t t = 0; t < *stage_.rows->num_tiles; ++t)
        if (stage_.rows->tiles[t].expert >= 0) body(stage_.rows->tiles[t].expert);
    }
  }

  void static_tensor() const {
    const Tensor& given = stage_.static_scale;
    const std::int64_t count = given.rank == 0 ? 0 : given.shape[0],
                       step = count > 1 ? given.strides[0] : 0;
    const auto of = [&](std::int64_t expert) { return given.as<const float>()[expert * step]; };
    if (stage_.scale != nullptr) {
      stage_.scale[0] = of(0);
      for (std::int64_t e = 1; e < count; ++e) stage_.scale[e] = of(e);
      if (stage_.per_expert_absmax)
        for_each_expert([&](std::int64_t e) { stage_.scale[e] = of(e); });
    }
    for_each_row([&](const Move& move) { quantize_part(move, 0, width_, of(move.expert)); });
  }

  // Two passes: the largest magnitude of the live rows, then the rows. Non-finite elements do not
  // count, or one token's NaN would reach all others through the scale.
  void dynamic_tensor() const {
    const bool per_expert = stage_.per_expert_absmax;
    std::uint32_t of_call = 0;
    std::uint32_t* absmax = per_expert ? static_cast<std::uint32_t*>(stage_.scratch) : &of_call;
    if (per_expert) for_each_expert([&](std::int64_t e) { absmax[e] = 0; });
    for_each_row([&](const Move& move) {
      std::uint32_t& shared = absmax[per_expert ? move.expert : 0];
      pieces(move, 0, width_, [&](std::int64_t, std::int64_t n, const float* numbers) {
        raise(shared, kernels_.finite_absmax(numbers, n));
      });
    });
    const auto scale_of = [&](std::int64_t e) {
      return activation_scale(std::bit_cast<float>(absmax[per_expert ? e : 0]), top());
    };
    if (stage_.scale != nullptr) {
      if (!per_expert) stage_.scale[0] = scale_of(0);
      if (per_expert) for_each_expert([&](std::int64_t e) { stage_.scale[e] = scale_of(e); });
    }
    for_each_row([&](const Move& move) { quantize_part(move, 0, width_, scale_of(move.expert)); });
  }

  // Magnitudes compare as integers, and a maximum does not depend on the order: the same bits at
  // any number of threads.
  static void raise(std::uint32_t& shared, float magnitude) {
    const auto mine = std::bit_cast<std::uint32_t>(magnitude);
    const std::atomic_ref<std::uint32_t> cell(shared);
    std::uint32_t seen = cell.load(std::memory_order_relaxed);
    while (seen < mine && !cell.compare_exchange_weak(seen, mine, std::memory_order_relaxed)) {
    }
  }

  // --- rows that are 8 bit already ---------------------------------------------------------------
  float given_scale(const Move& move, std::int64_t group) const {
    const ActScaleView& s = stage_.input_scale;
    return s
        .data[move.source * s.row_stride + group * s.group_stride + move.expert * s.expert_stride];
  }
  bool moves_scales() const {
    return stage_.scale != nullptr && stage_.input_scale.data != nullptr;
  }

  void move_tensor_scales() const {
    const bool tensor = stage_.granularity == ActScale::kTensorStatic ||
                        stage_.granularity == ActScale::kTensorDynamic;
    if (!tensor || !moves_scales()) return;
    stage_.scale[0] = given_scale({}, 0);
    if (stage_.per_expert_absmax || stage_.input_scale.expert_stride != 0)
      for_each_expert([&](std::int64_t e) { stage_.scale[e] = given_scale({.expert = e}, 0); });
  }

  void copy(const Move& move) const {
    if (input_.dense_rows() && output_.dense_rows()) {
      std::memcpy(output_.row(move.position), input_.row(move.source),
                  static_cast<std::size_t>(width_));
    } else {
      for (std::int64_t c = 0; c < width_; ++c)
        *output_.at(move.position, c) = *input_.at(move.source, c);
    }
    if (!moves_scales()) return;
    float* scales = token_scale(move);
    if (stage_.granularity == ActScale::kToken) *scales = given_scale(move, 0);
    if (stage_.granularity == ActScale::kGroup)
      for (std::int64_t g = 0; g * stage_.group < width_; ++g) scales[g] = given_scale(move, g);
  }

  const QuantizeStage& stage_;
  const StageKernels& kernels_;
  RowView input_, output_;
  std::int64_t width_;
  bool premultiplies_;
};

}  // namespace

// Per-tensor scales of the batched format: an absmax for each expert, as the bits of a float.
std::size_t quantize_scratch_bytes_cpu(std::int64_t, std::int64_t experts) {
  return static_cast<std::size_t>(std::max<std::int64_t>(1, experts)) * sizeof(std::uint32_t);
}

void quantize_cpu(const QuantizeStage& stage) { Quantizer(stage).run(); }

}  // namespace moesaic
