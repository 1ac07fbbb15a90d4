// SPDX-License-Identifier: Apache-2.0
// From storage to schemes: what the stored numbers are, and which scheme the checkpoint asks for.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <numeric>

#include "check.h"
#include "checkpoint/files.h"
#include "checkpoint/slice.h"
#include "checkpoint/stored.h"
#include "divide.h"

namespace moesaic {
namespace {

using FusedLayout = CheckpointOptions::FusedLayout;

class Describer {
 public:
  Describer(const TensorFile& files, StoredLayout& layout)
      : files_(files), names_(layout.names), layout_(layout) {}

  void run() {
    layout_.refusal = layout_.storage == Storage::kFloat ? "" : layout_.quantization.refusal;
    switch (layout_.storage) {
      case Storage::kFloat:
        float_numbers();
        break;
      case Storage::kFp8:
        fp8_numbers();
        break;
      case Storage::kInt8:
        int8_numbers();
        break;
      case Storage::kCompressedPacked:
      case Storage::kAwq:
      case Storage::kGptq:
        packed_numbers();
        break;
      case Storage::kMxfp4:
        mxfp4_numbers();
        break;
    }
    layout_.description +=
        names_.shape == ExpertNames::Shape::kFused ? ", experts fused" : ", one tensor per expert";
    if (layout_.orientation == FusedLayout::kKN) layout_.description += ", transposed";
  }

 private:
  std::optional<Slice> find(const std::string& projection, Role role) const {
    return find_slice(files_, names_, projection, role, 0);
  }
  Slice require(const std::string& projection, Role role) const {
    return require_slice(files_, names_, projection, role, 0);
  }
  [[noreturn]] void mismatch(const Slice& slice, const std::string& why) const {
    corrupt(fmt::format("tensor {}: {} of shape {}: {}", show_name(slice.stored->name),
                        slice.stored->dtype, fmt::format("{}", slice.stored->shape), why));
  }

  // --- granularity ------------------------------------------------------------------------------
  Extent part_of_fc1() const {
    return {(names_.fc1.size() == 1 && layout_.gated ? 2 : 1) * layout_.intermediate,
            layout_.hidden};
  }
  Extent whole_fc2() const { return {layout_.hidden, layout_.intermediate}; }

  // Granularity of a [N, K] weight's scale tensor.
  WeightScale granularity(const Slice& scale, Extent e) const {
    if (!is_float(scale.dtype)) mismatch(scale, "expected float scales");
    const QuantizationConfig& q = layout_.quantization;
    const auto is = [&](std::int64_t rows, std::int64_t columns) {
      return scale.shape == std::vector<std::int64_t>{rows, columns};
    };
    if (q.block_n > 0 && is(ceil_div(e.n, q.block_n), ceil_div(e.k, q.block_k)))
      return WeightScale::kBlock;
    const std::int64_t numel = scale.numel();
    if (numel == 1) return WeightScale::kTensor;
    if (numel == 2 && layout_.gated && names_.fc1.size() == 1 && scale.shape.size() == 1)
      return WeightScale::kTensor;
    if (numel == e.n && (scale.shape.size() == 1 || is(e.n, 1))) return WeightScale::kChannel;
    if (scale.shape.size() == 2 && scale.shape[0] == e.n && scale.shape[1] <= e.k)
      return WeightScale::kGroup;
    mismatch(scale, fmt::format("fits neither tensor, channel, block nor group scales of [{}, {}]",
                                e.n, e.k));
  }

  // Group size that both products' scale columns agree with; 0: whole K.
  std::int64_t group_size(std::int64_t fc1_columns, std::int64_t fc2_columns) const {
    const std::int64_t k1 = layout_.hidden, k2 = layout_.intermediate;
    const auto said = layout_.quantization.group_size;
    if (fc1_columns == 1 && fc2_columns == 1 && (!said || *said == -1 || *said >= std::max(k1, k2)))
      return 0;
    const auto fits = [&](std::int64_t g) {
      return g > 0 && ceil_div(k1, g) == fc1_columns && ceil_div(k2, g) == fc2_columns;
    };
    if (said && fits(*said)) return *said;
    if (fc1_columns > 0 && fits(ceil_div(k1, fc1_columns))) return ceil_div(k1, fc1_columns);
    if (fc2_columns > 0 && fits(ceil_div(k2, fc2_columns))) return ceil_div(k2, fc2_columns);
    corrupt(fmt::format("{}: {} and {} groups for K = {} and {} fit no group size", names_.prefix,
                        fc1_columns, fc2_columns, k1, k2));
  }

  // --- from storage to schemes -------------------------------------------------------------------
  void refuse(const std::string& why) {
    if (layout_.refusal.empty()) layout_.refusal = why;
  }

  void float_numbers() {
    const DType dtype = require(names_.fc2, Role::kWeight).dtype;
    const Slice fc1 = require(names_.fc1[0], Role::kWeight);
    if (fc1.dtype != dtype) mismatch(fc1, "the second product has another dtype");
    layout_.numbers.scheme = dtype == DType::kF32   ? Scheme::kF32
                             : dtype == DType::kF16 ? Scheme::kF16
                                                    : Scheme::kBF16;
    layout_.advertised = layout_.numbers;
    layout_.description = std::string(name(dtype));
  }

  // Both products' scales in one granularity.
  WeightScale both_granularities() const {
    const Slice one = require(names_.fc1[0], Role::kScale), two = require(names_.fc2, Role::kScale);
    const WeightScale a = granularity(one, part_of_fc1()), b = granularity(two, whole_fc2());
    if (a != b) mismatch(two, "the two products' scales differ in granularity");
    return a;
  }

  void set_block() {
    const QuantizationConfig& q = layout_.quantization;
    layout_.numbers.weight_scale = WeightScale::kBlock;
    layout_.numbers.block_k = q.block_k;
    // Gate and up each start a new row of blocks. Stacked, they lie on one grid only if the block
    // divides their height; else a finer grid, whose scales repeat, says the same.
    const bool stacked = names_.fc1.size() == 2;
    layout_.numbers.block_n = stacked ? std::gcd(layout_.intermediate, q.block_n) : q.block_n;
    if (stacked && layout_.intermediate % q.block_n == 0) layout_.numbers.block_n = q.block_n;
  }

  void fp8_numbers() {
    const WeightScale g = both_granularities();
    if (g == WeightScale::kGroup)
      unsupported(names_.prefix + ": fp8 weights in groups along K are not read");
    layout_.numbers = {.scheme = Scheme::kFp8W8A16, .weight_scale = g};
    if (g == WeightScale::kBlock) set_block();
    QuantSpec& a = layout_.advertised = layout_.numbers;
    const StoredActs acts = layout_.quantization.acts;
    const bool has_input_scale = find(names_.fc2, Role::kInputScale).has_value();
    layout_.description =
        fmt::format("fp8 e4m3, {} scales", g == WeightScale::kBlock     ? "block"
                                           : g == WeightScale::kChannel ? "channel"
                                                                        : "tensor");
    if (acts == StoredActs::kNone) return;
    if (g == WeightScale::kTensor && acts != StoredActs::kToken) {
      a.scheme = Scheme::kFp8Tensor;
      a.act_scale = acts != StoredActs::kTensorDynamic && has_input_scale
                        ? ActScale::kTensorStatic
                        : ActScale::kTensorDynamic;
      if (acts == StoredActs::kTensorStatic && !has_input_scale)
        corrupt(names_.prefix + ": static activation scales are announced, and there are none");
      if (acts == StoredActs::kGroup)
        refuse("fp8 tensor scales with grouped activations: use --scheme fp8_tensor");
      return;
    }
    if (acts == StoredActs::kTensorStatic)
      refuse(fmt::format(
          "fp8 {} scales with static activation scales have no scheme; use --scheme {} (scales "
          "computed at run time) or fp8_w8a16",
          g == WeightScale::kBlock ? "block" : "channel",
          g == WeightScale::kBlock ? "fp8_block" : "fp8_channel"));
    a.scheme = g == WeightScale::kBlock ? Scheme::kFp8Block : Scheme::kFp8Channel;
    a.weight_scale = g == WeightScale::kBlock ? g : WeightScale::kChannel;
  }

  void int8_numbers() {
    WeightScale g = both_granularities();
    if (g == WeightScale::kTensor) g = WeightScale::kChannel;  // one scale, repeated
    const StoredActs acts = layout_.quantization.acts;
    layout_.numbers = {.scheme = Scheme::kInt8W8A16, .weight_scale = g};
    if (g == WeightScale::kBlock) {
      set_block();
      layout_.numbers.scheme = Scheme::kInt8Block;
      layout_.advertised = layout_.numbers;
      layout_.description = "int8, block scales";
      return;
    }
    if (g == WeightScale::kGroup)
      layout_.numbers.group_size = group_size(require(names_.fc1[0], Role::kScale).shape[1],
                                              require(names_.fc2, Role::kScale).shape[1]);
    layout_.advertised = layout_.numbers;
    layout_.description =
        fmt::format("int8, {} scales", g == WeightScale::kGroup ? "group" : "channel");
    if (acts == StoredActs::kNone) return;
    if (g == WeightScale::kGroup) {
      refuse(
          "int8 weights in groups with 8-bit activations have no scheme; use --scheme int8_w8a16");
    } else if (acts == StoredActs::kTensorStatic || acts == StoredActs::kTensorDynamic) {
      refuse(
          "int8 weights with one activation scale per tensor have no scheme; use --scheme "
          "int8_channel "
          "(per token) or int8_w8a16");
    } else {
      layout_.advertised.scheme = Scheme::kInt8Channel;
    }
  }

  void packed_numbers() {
    const QuantizationConfig& q = layout_.quantization;
    const bool transposed =
        layout_.storage != Storage::kCompressedPacked;  // scales are [groups, N]
    const bool has_zero = find(names_.fc2, Role::kZero).has_value();
    const auto columns = [&](const std::string& projection, Extent e) {
      const Slice scale = require(projection, Role::kScale);
      if (!is_float(scale.dtype) || scale.shape.size() != 2 ||
          scale.shape[transposed ? 1 : 0] != e.n)
        mismatch(scale, fmt::format("expected float scales of {} columns by groups", e.n));
      const std::int64_t groups = scale.shape[transposed ? 0 : 1];
      if (groups < 1 || groups > e.k) mismatch(scale, "more groups than columns");
      if (const auto zero = find(projection, Role::kZero)) {
        const std::int64_t words = ceil_div(e.n * layout_.bits, 32);
        const std::vector<std::int64_t> expected =
            transposed ? std::vector{groups, words} : std::vector{words, groups};
        if (zero->dtype != DType::kI32 || zero->shape != expected)
          mismatch(*zero, "packed zero points do not fit");
      } else if (transposed) {
        require(projection, Role::kZero);
      }
      if (const auto order = find(projection, Role::kOrder)) {
        if (order->shape != std::vector{e.k})
          mismatch(*order, "expected one group number per column");
      }
      return groups;
    };
    const std::int64_t g1 = columns(names_.fc1[0], part_of_fc1()),
                       g2 = columns(names_.fc2, whole_fc2());
    const std::int64_t group = group_size(g1, g2);
    const bool zeros = has_zero && !q.symmetric;
    if (layout_.storage == Storage::kCompressedPacked && !q.symmetric && !has_zero)
      corrupt(names_.prefix + ": asymmetric weights are announced, and there are no zero points");
    layout_.numbers = {.scheme = layout_.bits == 4 ? Scheme::kInt4W4A16 : Scheme::kInt8W8A16,
                       .weight_scale = WeightScale::kGroup,
                       .group_size = group,
                       .zero_points = zeros};
    if (layout_.bits == 8 && group == 0 && !zeros)
      layout_.numbers.weight_scale = WeightScale::kChannel;
    layout_.advertised = layout_.numbers;
    layout_.description =
        fmt::format("{} int{}, {}{}",
                    layout_.storage == Storage::kAwq    ? "AWQ"
                    : layout_.storage == Storage::kGptq ? (q.gptq_v2 ? "GPTQ v2" : "GPTQ")
                                                        : "packed",
                    layout_.bits, group == 0 ? "whole K" : fmt::format("group {}", group),
                    zeros ? ", zero points" : "");
    for (const std::string& projection : names_.fc1) check_order(projection);
    check_order(names_.fc2);
    if (q.acts == StoredActs::kUnsaid || q.acts == StoredActs::kNone) return;
    if (layout_.bits == 8 && layout_.numbers.weight_scale == WeightScale::kChannel &&
        q.acts == StoredActs::kToken && q.act_type == "int") {
      layout_.advertised.scheme = Scheme::kInt8Channel;
    } else if (layout_.bits == 4 &&
               (q.acts == StoredActs::kToken || q.acts == StoredActs::kTensorDynamic)) {
      layout_.advertised.scheme =
          q.act_type == "float" ? Scheme::kInt4W4A8Fp8 : Scheme::kInt4W4A8Int8;
      layout_.advertised.act_scale =
          q.acts == StoredActs::kToken ? ActScale::kToken : ActScale::kTensorDynamic;
    } else {
      refuse(
          "packed integers with these activations have no scheme; use --scheme int4_w4a16 or "
          "int8_w8a16");
    }
  }

  void check_order(const std::string& projection) {
    const auto order = find(projection, Role::kOrder);
    if (order && !in_order(*order, layout_.numbers.group_size))
      refuse(fmt::format(
          "tensor {}: act-order (desc_act) permutes the columns of K, which is not supported; "
          "quantize again with desc_act=false, or load the 16-bit model",
          show_name(order->stored->name)));
  }

  void mxfp4_numbers() {
    const auto check_scale = [&](const std::string& projection, Extent e) {
      const Slice scale = require(projection, Role::kScale);
      if ((scale.dtype != DType::kU8 && scale.dtype != DType::kE8M0) ||
          scale.shape != std::vector<std::int64_t>{e.n, e.k / 32})
        mismatch(scale, fmt::format("expected E8M0 scales [{}, {}] per expert", e.n, e.k / 32));
    };
    check_scale(names_.fc1[0], part_of_fc1());
    check_scale(names_.fc2, whole_fc2());
    layout_.numbers = {.scheme = Scheme::kMxfp4W4A16, .group_size = 32};
    layout_.advertised = layout_.numbers;
    layout_.description = "MXFP4";
  }

  const TensorFile& files_;
  const ExpertNames& names_;
  StoredLayout& layout_;
};

}  // namespace

void describe_numbers(const TensorFile& files, StoredLayout& layout) {
  Describer(files, layout).run();
}

}  // namespace moesaic
