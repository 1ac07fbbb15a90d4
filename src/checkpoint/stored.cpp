// SPDX-License-Identifier: Apache-2.0
// Finding out how experts are stored, from the tensors themselves; config.json only says what they
// cannot: activations, block sizes, whose packing it is.
#include "checkpoint/stored.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <numeric>

#include "check.h"
#include "checkpoint/files.h"
#include "checkpoint/slice.h"

namespace moesaic {
namespace {

using FusedLayout = CheckpointOptions::FusedLayout;

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

Storage storage_of(const Slice& weight, std::string_view suffix, const QuantizationConfig& q) {
  if (suffix == ".weight_packed") return Storage::kCompressedPacked;
  if (suffix == "_blocks") return Storage::kMxfp4;
  if (suffix == ".qweight") {
    if (q.method == "awq") return Storage::kAwq;
    if (q.method == "gptq") return Storage::kGptq;
    unsupported(fmt::format(
        "tensor {}: packed as GPTQ or AWQ pack, and config.json's quant_method does not "
        "say which",
        show_name(weight.stored->name)));
  }
  switch (weight.dtype) {
    case DType::kF32:
    case DType::kF16:
    case DType::kBF16:
      return Storage::kFloat;
    case DType::kF8E4M3:
      return Storage::kFp8;
    case DType::kI8:
      return Storage::kInt8;
    default:
      unsupported(fmt::format("tensor {}: expert weights of dtype {} are not read",
                              show_name(weight.stored->name), weight.stored->dtype));
  }
}

// Extents of one projection's matrix.
struct Extent {
  std::int64_t n = 0, k = 0;
};

class Detector {
 public:
  Detector(const TensorFile& files, const ExpertNames& names, FusedLayout orientation,
           const QuantizationConfig& quantization)
      : files_(files), names_(names) {
    layout_.names = names;
    layout_.orientation = orientation;
    layout_.quantization = quantization;
  }

  StoredLayout run() {
    const Slice weight = require(names_.fc2, Role::kWeight);
    layout_.storage = storage_of(weight, weight.suffix, layout_.quantization);
    choose_bits();
    shapes(weight);
    check_every_expert();
    layout_.has_bias = find(names_.fc2, Role::kBias).has_value();
    if (find(names_.fc1[0], Role::kBias).has_value() != layout_.has_bias)
      unsupported(names_.prefix + ": biases on one product only are not read");
    numbers();
    return std::move(layout_);
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

  void choose_bits() {
    const QuantizationConfig& q = layout_.quantization;
    if (layout_.storage != Storage::kCompressedPacked && layout_.storage != Storage::kAwq &&
        layout_.storage != Storage::kGptq)
      return;
    layout_.bits = q.bits == 0 ? 4 : q.bits;
    const bool ok = layout_.bits == 4 || (layout_.bits == 8 && layout_.storage != Storage::kAwq);
    if (!ok)
      unsupported(fmt::format("{}: {}-bit weights of {} are not read; only 4 bits{}", names_.prefix,
                              layout_.bits, q.method,
                              layout_.storage == Storage::kAwq ? "" : " and 8"));
  }

  Extent extent(const std::string& projection, const Slice& w) const {
    const auto rank = [&](std::size_t expected) {
      if (w.shape.size() != expected)
        mismatch(w, fmt::format("expected {} dimensions per expert", expected));
    };
    const auto packed = [&](std::int64_t words) {  // codes in `words` int32
      if (words > INT64_MAX / 32) mismatch(w, "too large");
      return words * 32 / layout_.bits;
    };
    const bool words = layout_.storage == Storage::kCompressedPacked ||
                       layout_.storage == Storage::kAwq || layout_.storage == Storage::kGptq;
    if (words && w.dtype != DType::kI32) mismatch(w, "expected I32 words");
    Extent e;
    switch (layout_.storage) {
      case Storage::kFloat:
      case Storage::kFp8:
      case Storage::kInt8:
        rank(2);
        e = {w.shape[0], w.shape[1]};
        break;
      case Storage::kCompressedPacked: {
        rank(2);
        e = {w.shape[0], packed(w.shape[1])};
        // The true K, when the last word is not full.
        if (const auto shape = find(projection, Role::kShape)) {
          const std::vector<std::int64_t> values = load_integers(*shape);
          if (values.size() != 2 || values[0] != e.n || values[1] < 1 || values[1] > e.k ||
              ceil_div(values[1] * layout_.bits, 32) != w.shape[1])
            mismatch(w, "weight_shape says something else");
          e.k = values[1];
        }
        break;
      }
      case Storage::kAwq:
        rank(2);
        e = {packed(w.shape[1]), w.shape[0]};
        break;
      case Storage::kGptq:
        rank(2);
        e = {w.shape[1], packed(w.shape[0])};
        break;
      case Storage::kMxfp4:
        rank(3);
        if (w.dtype != DType::kU8 || w.shape[2] != 16) mismatch(w, "expected U8 [N, K / 32, 16]");
        if (w.shape[1] > INT64_MAX / 32) mismatch(w, "too large");
        e = {w.shape[0], w.shape[1] * 32};
        break;
    }
    constexpr std::int64_t kMax = INT64_C(1) << 31;
    if (e.n < 1 || e.k < 1 || e.n > kMax || e.k > kMax) mismatch(w, "an empty or enormous matrix");
    return e;
  }

  void shapes(const Slice& fc2_weight) {
    const Slice fc1_weight = require(names_.fc1[0], Role::kWeight);
    Extent fc1 = extent(names_.fc1[0], fc1_weight), fc2 = extent(names_.fc2, fc2_weight);
    const bool fused = names_.fc1.size() == 1 && names_.fc1[0] == "gate_up_proj";
    const auto fits = [&](Extent one, Extent two) {
      return one.k == two.n && (fused ? one.n == 2 * two.k : one.n == two.k);
    };
    const bool may_transpose =
        names_.shape == ExpertNames::Shape::kFused && layout_.storage == Storage::kFloat;
    const Extent fc1_t{fc1.k, fc1.n}, fc2_t{fc2.k, fc2.n};
    if (layout_.orientation == FusedLayout::kAuto)
      layout_.orientation =
          may_transpose && fits(fc1_t, fc2_t) ? FusedLayout::kKN : FusedLayout::kNK;
    if (!may_transpose && names_.shape == ExpertNames::Shape::kFused &&
        layout_.storage != Storage::kMxfp4 && layout_.orientation == FusedLayout::kKN)
      unsupported(names_.prefix +
                  ": fused transposed experts are read in 16 bit, f32 and MXFP4 only");
    if (!may_transpose) layout_.orientation = FusedLayout::kNK;
    if (layout_.orientation == FusedLayout::kKN) {
      fc1 = fc1_t;
      fc2 = fc2_t;
    }
    if (!fits(fc1, fc2))
      mismatch(fc1_weight,
               fmt::format("does not fit the second product of [{}, {}] (hidden, intermediate)",
                           fc2.n, fc2.k));
    layout_.hidden = fc2.n;
    layout_.intermediate = fc2.k;
    layout_.gated = fused || names_.fc1.size() == 2;
  }

  // Whatever expert 0 has, every expert must have in the same dtype and shape.
  void check_every_expert() const {
    std::vector<std::string> projections = names_.fc1;
    projections.push_back(names_.fc2);
    for (std::size_t p = 0; p < projections.size(); ++p) {
      for (const Role role : kAllRoles) {
        const auto first = find(projections[p], role);
        if (!first) continue;
        if (p == 1 && projections.size() == 3) {  // up like gate
          const auto gate = find(projections[0], role);
          if (!gate || gate->dtype != first->dtype || gate->shape != first->shape)
            mismatch(*first, "gate and up differ");
        }
        if (names_.shape != ExpertNames::Shape::kPerExpert) continue;
        for (std::int64_t e = 1; e < names_.experts; ++e) {
          const Slice other = require_slice(files_, names_, projections[p], role, e);
          if (other.dtype != first->dtype || other.shape != first->shape)
            mismatch(other, fmt::format("expert 0 has {} {}", first->stored->dtype,
                                        fmt::format("{}", first->stored->shape)));
        }
      }
    }
    if (names_.fc1.size() == 2)
      for (const Role role : kAllRoles)
        if (find(names_.fc1[0], role) && !find(names_.fc1[1], role))
          require_slice(files_, names_, names_.fc1[1], role, 0);
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

  // --- from storage to schemes
  // ---------------------------------------------------------------------
  void refuse(const std::string& why) {
    if (layout_.refusal.empty()) layout_.refusal = why;
  }

  void numbers() {
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
  StoredLayout layout_;
};

}  // namespace

StoredLayout detect_layout(const TensorFile& files, const ExpertNames& names,
                           FusedLayout orientation, const QuantizationConfig& quantization) {
  return Detector(files, names, orientation, quantization).run();
}

}  // namespace moesaic
