// SPDX-License-Identifier: Apache-2.0
// Finding out how experts are stored, from the tensors themselves; config.json only says what they
// cannot: activations, block sizes, whose packing it is.
#include "checkpoint/stored.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>

#include "check.h"
#include "checkpoint/files.h"
#include "checkpoint/slice.h"
#include "divide.h"

namespace moesaic {
namespace {

using FusedLayout = CheckpointOptions::FusedLayout;

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
      unsupported(fmt::format(
          "tensor {}: expert weights of dtype {} are not read, only F32, F16, BF16, F8_E4M3, I8 "
          "and the packed layouts of docs/checkpoints.md; convert it",
          show_name(weight.stored->name), weight.stored->dtype));
  }
}

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
    describe_numbers(files_, layout_);
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
    if (words && w.dtype != DType::kI32)
      unsupported(
          fmt::format("tensor {}: codes packed into {} are not read, only into I32 (NVFP4 is not)",
                      show_name(w.stored->name), w.stored->dtype));
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
