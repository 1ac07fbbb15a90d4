// SPDX-License-Identifier: Apache-2.0
#include "reference/grouped_gemm.h"

#include <map>

#include "reference/quantize.h"
#include "scheme.h"

namespace moesaic::reference {
namespace {

// One output row: where it comes from and where it goes.
struct Work {
  std::int64_t expert = 0, a_row = 0, c_row = 0;
  double weight = 1;
};

// The sorted lists, block by block. Rows of filtered blocks are zero.
std::vector<Work> sorted_work(const GroupedGemmArgs& args, std::int64_t slot_count,
                              GroupedOutput* out) {
  std::vector<Work> work;
  const SortedRows& s = args.sorted;
  const std::int64_t used =
      std::min<std::int64_t>(s.num_padded.as<std::int32_t>()[0], s.slots.shape[0]);
  for (std::int64_t p = 0; p < used; ++p) {
    const std::int64_t slot = s.slots.as<std::int32_t>()[p];
    if (slot < 0 || slot >= slot_count) continue;
    const std::int64_t expert = s.block_experts.as<std::int32_t>()[p / s.block_rows];
    const std::int64_t c_row = args.c_order == RowOrder::kSorted ? p : slot;
    if (expert < 0 || expert >= args.b.weight.shape[0]) {
      out->rows[static_cast<std::size_t>(c_row)] = RowState::kZero;
      continue;
    }
    const double weight = args.row_weights.defined()
                              ? args.row_weights.as<float>()[slot * args.row_weights.strides[0]]
                              : 1;
    work.push_back({.expert = expert,
                    .a_row = args.a_order == RowOrder::kSorted ? p : slot / args.top_k,
                    .c_row = c_row,
                    .weight = weight});
  }
  return work;
}

std::vector<Work> batched_work(const GroupedGemmArgs& args) {
  std::vector<Work> work;
  const std::int64_t capacity = args.a.shape[1];
  for (std::int64_t e = 0; e < args.a.shape[0]; ++e) {
    const std::int64_t live =
        std::min<std::int64_t>(args.batched.num_tokens.as<std::int32_t>()[e], capacity);
    for (std::int64_t i = 0; i < live; ++i)
      work.push_back({.expert = e, .a_row = e * capacity + i, .c_row = e * capacity + i});
  }
  return work;
}

double a_scale(const GroupedGemmArgs& args, const Work& w, std::int64_t group) {
  const Tensor& s = args.a_scale;
  if (s.rank == 1) return load(s, 0);
  if (s.rank == 2) return load(s, w.a_row, s.shape[1] == 1 ? 0 : group);
  const std::int64_t capacity = args.a.shape[1];
  const std::int64_t row = s.shape[1] == 1 ? 0 : w.a_row % capacity;
  return load(s, w.a_row / capacity, row, s.shape[2] == 1 ? 0 : group);
}

}  // namespace

GroupedOutput grouped_gemm(const GroupedGemmArgs& args, const Choices& choices) {
  const bool batched = args.batched.num_tokens.defined();
  const std::int64_t k = args.a.shape[args.a.rank - 1], n = args.b.weight.shape[1];
  // Float activations that come with a scale: it is the static one of a per-tensor scheme.
  QuantSpec quant = args.quant;
  if (is_float(args.a.dtype) && args.a_scale.defined() && quant.act_scale == ActScale::kDefault)
    quant.act_scale = ActScale::kTensorStatic;
  const WeightSpec spec =
      weight_spec(quant, args.b.weight.shape[0], n, k, args.a.dtype, args.c.dtype);
  std::int64_t rows = 1;
  for (int d = 0; d + 1 < args.c.rank; ++d) rows *= args.c.shape[static_cast<std::size_t>(d)];
  GroupedOutput out{
      .n = n,
      .rows = std::vector<RowState>(static_cast<std::size_t>(rows), RowState::kUntouched),
      .values = std::vector<Bounded>(static_cast<std::size_t>(rows * n))};
  // Padding entries are T * k or more. With A in sorted order its height does not tell T.
  std::int64_t slot_count = batched ? 0 : args.a.shape[0] * args.top_k;
  if (args.a_order == RowOrder::kSorted) {
    if (args.c_order == RowOrder::kSlot) slot_count = rows;
    if (args.row_weights.defined()) slot_count = args.row_weights.numel();
  }
  const std::vector<Work> work = batched ? batched_work(args) : sorted_work(args, slot_count, &out);

  const auto read_row = [&](const Work& w) {
    std::vector<Bounded> row(static_cast<std::size_t>(k));
    for (std::int64_t i = 0; i < k; ++i) {
      double v = batched ? load(args.a, w.a_row / args.a.shape[1], w.a_row % args.a.shape[1], i)
                         : load(args.a, w.a_row, i);
      if (!is_float(args.a.dtype))
        v *= a_scale(args, w, spec.act_group > 0 ? i / spec.act_group : 0);
      row[static_cast<std::size_t>(i)] = {v, 0};
    }
    return row;
  };
  // A float input of a scheme with 8-bit activations is quantized here.
  const bool quantizes = spec.act_scale != ActScale::kDefault && is_float(args.a.dtype);
  const QuantizeRule rule{spec.act_dtype, spec.act_scale == ActScale::kGroup ? spec.act_group : 0,
                          spec.int8_rounding};
  std::map<std::int64_t, Bounded> largest;  // batched: of each expert
  const auto pool = [&](const Work& w) { return batched ? w.expert : 0; };
  if (quantizes && spec.act_scale == ActScale::kTensorDynamic)
    for (const Work& w : work)
      largest[pool(w)] = larger(largest[pool(w)], finite_absmax(read_row(w)));

  std::int64_t dequantized = -1;
  Matrix matrix;
  for (const Work& w : work) {
    if (w.expert != dequantized) matrix = dequantize(spec, args.b, w.expert, choices.weights);
    dequantized = w.expert;
    const std::vector<Bounded> numbers = read_row(w);
    Row row;
    if (!quantizes) {
      row = as_is(numbers);
    } else if (spec.act_scale == ActScale::kTensorStatic) {
      const Tensor& s = args.b.input_scale.defined() ? args.b.input_scale : args.a_scale;
      row = quantize(rule, numbers, {load(s, s.shape[0] == 1 ? 0 : w.expert), 0});
    } else if (spec.act_scale == ActScale::kTensorDynamic) {
      row = quantize(rule, numbers, scale_of(rule.to, largest[pool(w)]));
    } else {
      row = quantize(rule, numbers);
    }
    Epilogue epilogue{.alpha = 1, .bias = {}, .scale_cells = spec.scale.grid_k};
    if (args.b.alpha.defined()) epilogue.alpha = load(args.b.alpha, w.expert);
    if (args.b.bias.defined()) epilogue.bias = args.b.bias.select(w.expert);
    const std::vector<Bounded> c = product(row, matrix, choices.accumulator, epilogue);
    out.rows[static_cast<std::size_t>(w.c_row)] = RowState::kComputed;
    for (std::int64_t i = 0; i < n; ++i) {
      const Bounded& b = c[static_cast<std::size_t>(i)];
      const double v = b.value * w.weight;
      out.values[static_cast<std::size_t>(w.c_row * n + i)] = {
          v, b.error * std::abs(w.weight) + kUnit * std::abs(v)};
    }
  }
  return out;
}

}  // namespace moesaic::reference
