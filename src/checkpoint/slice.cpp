// SPDX-License-Identifier: Apache-2.0
#include "checkpoint/slice.h"

#include <fmt/format.h>

#include <cstring>
#include <span>

#include "check.h"
#include "checkpoint/dtypes.h"
#include "checkpoint/files.h"

namespace moesaic {
namespace {

// What each role is called, in the order of trying. Those of fused experts begin with '_' or are
// nothing at all (the weight itself).
std::span<const std::string_view> suffixes(Role role, ExpertNames::Shape shape) {
  static constexpr std::string_view kWeight[] = {".weight", ".weight_packed", ".qweight"};
  static constexpr std::string_view kScale[] = {".weight_scale_inv", ".weight_scale", ".scales"};
  static constexpr std::string_view kZero[] = {".weight_zero_point", ".qzeros"};
  static constexpr std::string_view kInputScale[] = {".input_scale", ".activation_scale"};
  static constexpr std::string_view kOrder[] = {".g_idx", ".weight_g_idx"};
  static constexpr std::string_view kShape[] = {".weight_shape"};
  static constexpr std::string_view kBias[] = {".bias"};
  static constexpr std::string_view kFusedWeight[] = {"", "_blocks", ".weight"};
  static constexpr std::string_view kFusedScale[] = {"_scales", "_scale_inv", "_scale",
                                                     ".weight_scale_inv", ".weight_scale"};
  static constexpr std::string_view kFusedInputScale[] = {"_input_scale", ".input_scale",
                                                          "_activation_scale"};
  static constexpr std::string_view kFusedBias[] = {"_bias", ".bias"};
  using Names = std::span<const std::string_view>;
  const bool fused = shape == ExpertNames::Shape::kFused;
  switch (role) {
    case Role::kWeight:
      return fused ? Names(kFusedWeight) : Names(kWeight);
    case Role::kScale:
      return fused ? Names(kFusedScale) : Names(kScale);
    case Role::kInputScale:
      return fused ? Names(kFusedInputScale) : Names(kInputScale);
    case Role::kBias:
      return fused ? Names(kFusedBias) : Names(kBias);
    case Role::kZero:
      return fused ? Names() : Names(kZero);
    case Role::kOrder:
      return fused ? Names() : Names(kOrder);
    case Role::kShape:
      return fused ? Names() : Names(kShape);
  }
  return {};
}

std::string base_name(const ExpertNames& names, std::string_view projection, std::int64_t expert) {
  std::string base = names.prefix;
  if (names.shape == ExpertNames::Shape::kPerExpert) base += std::to_string(expert) + ".";
  return base += projection;
}

}  // namespace

std::int64_t Slice::numel() const {
  std::int64_t n = 1;
  for (const std::int64_t extent : shape) n *= extent;  // no overflow: the bytes are in the file
  return n;
}

std::optional<Slice> find_slice(const TensorFile& files, const ExpertNames& names,
                                std::string_view projection, Role role, std::int64_t expert) {
  const std::string base = base_name(names, projection, expert);
  for (const std::string_view suffix : suffixes(role, names.shape)) {
    const StoredTensor* stored = files.find(base + std::string(suffix));
    if (stored == nullptr) continue;
    const auto dtype = find_stored_dtype(stored->dtype)->view;
    if (!dtype)
      unsupported(fmt::format("tensor {}: dtype {} is not read here", show_name(stored->name),
                              stored->dtype));
    Slice slice{.stored = stored,
                .suffix = suffix,
                .dtype = *dtype,
                .shape = stored->shape,
                .data = stored->data,
                .bytes = stored->bytes};
    if (names.shape == ExpertNames::Shape::kFused) {
      if (slice.shape.empty() || slice.shape[0] != names.experts)
        corrupt(fmt::format("tensor {}: expected a leading extent of {} experts",
                            show_name(stored->name), names.experts));
      slice.shape.erase(slice.shape.begin());
      slice.bytes = stored->bytes / static_cast<std::size_t>(names.experts);
      slice.data += static_cast<std::size_t>(expert) * slice.bytes;
    }
    return slice;
  }
  return {};
}

Slice require_slice(const TensorFile& files, const ExpertNames& names, std::string_view projection,
                    Role role, std::int64_t expert) {
  if (auto slice = find_slice(files, names, projection, role, expert)) return *std::move(slice);
  static constexpr std::string_view kWhat[] = {"weight",      "scale", "zero point", "input scale",
                                               "group index", "shape", "bias"};
  corrupt(fmt::format(
      "{}: no {} tensor, which other experts or the quantization need; a shard may be missing",
      show_name(base_name(names, projection, expert)), kWhat[static_cast<int>(role)]));
}

Tensor read_floats(const TensorFile& files, const std::string& name, Arena& arena) {
  const StoredTensor* stored = files.find(name);
  const auto dtype = find_stored_dtype(stored->dtype)->view;
  if (!dtype || !is_float(*dtype) || stored->shape.empty() ||
      stored->shape.size() > static_cast<std::size_t>(Tensor::kMaxRank))
    corrupt(fmt::format("tensor {}: expected floats of up to {} dimensions, got {}",
                        show_name(name), Tensor::kMaxRank, stored->dtype));
  const std::byte* data = stored->data;
  if (reinterpret_cast<std::uintptr_t>(data) % size_of(*dtype) != 0) {
    std::byte* copy = arena.allocate(stored->bytes);
    std::memcpy(copy, data, stored->bytes);
    data = copy;
  }
  return Tensor::contiguous(data, *dtype, stored->shape.data(),
                            static_cast<int>(stored->shape.size()));
}

std::vector<std::int64_t> load_integers(const Slice& slice) {
  if (slice.dtype != DType::kI32 && slice.dtype != DType::kI64)
    corrupt(fmt::format("tensor {}: expected I32 or I64", show_name(slice.stored->name)));
  std::vector<std::int64_t> out(static_cast<std::size_t>(slice.numel()));
  for (std::size_t i = 0; i < out.size(); ++i) {
    if (slice.dtype == DType::kI64) {
      std::memcpy(&out[i], slice.data + i * 8, 8);
    } else {
      std::int32_t v = 0;
      std::memcpy(&v, slice.data + i * 4, 4);
      out[i] = v;
    }
  }
  return out;
}

bool in_order(const Slice& order, std::int64_t group_size) {
  const std::vector<std::int64_t> groups = load_integers(order);
  for (std::size_t k = 0; k < groups.size(); ++k)
    if (groups[k] != (group_size == 0 ? 0 : static_cast<std::int64_t>(k) / group_size))
      return false;
  return true;
}

}  // namespace moesaic
