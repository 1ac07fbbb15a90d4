// SPDX-License-Identifier: Apache-2.0
#include "checkpoint/slice.h"

#include <fmt/format.h>

#include <cstring>
#include <span>

#include "check.h"
#include "checkpoint/dtypes.h"
#include "checkpoint/files.h"
#include "divide.h"
#include "numeric.h"

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
      unsupported(fmt::format("tensor {}: dtype {} is not read here, only {}; convert it",
                              show_name(stored->name), stored->dtype, read_dtypes()));
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

namespace {

template <typename T>
T unaligned(const void* data, std::int64_t index) {
  T value;
  std::memcpy(&value,
              static_cast<const std::byte*>(data) + static_cast<std::size_t>(index) * sizeof(T),
              sizeof(T));
  return value;
}

// e4m3 with the scale that lies beside it: of the tensor, of its rows, or of blocks of 128 x 128.
Tensor read_fp8(const TensorFile& files, const StoredTensor& stored, Arena& arena) {
  const std::int64_t columns = stored.shape.back();
  const std::int64_t rows = columns == 0 ? 0 : static_cast<std::int64_t>(stored.bytes) / columns;
  const std::string names[] = {stored.name + "_scale_inv", stored.name + "_scale"};
  const StoredTensor* found = files.find(names[0]);
  if (found == nullptr) found = files.find(names[1]);
  if (found == nullptr)
    corrupt(fmt::format("tensor {}: is F8_E4M3 without its scale ({} or {})",
                        show_name(stored.name), show_name(names[0]), show_name(names[1])));
  if (found->dtype == stored.dtype)
    corrupt(fmt::format("tensor {}: expected a float scale, got F8_E4M3", show_name(found->name)));
  const bool scalar = found->shape.empty() && found->dtype == "F32";
  const Tensor scale = scalar ? Tensor::contiguous(found->data, DType::kF32, {1})
                              : read_floats(files, found->name, arena);
  const std::int64_t wide = ceil_div(columns, 128);
  const bool one = scale.numel() == 1, by_row = scale.numel() == rows;
  if (!one && !by_row && scale.numel() != ceil_div(rows, 128) * wide)
    corrupt(
        fmt::format("tensor {}: {} is no scale of [{}, {}] by tensor, row or block of 128 x 128",
                    show_name(found->name), to_string(scale), rows, columns));
  const auto scale_at = [&](std::int64_t r, std::int64_t c) {
    const std::int64_t i = one ? 0 : by_row ? r : r / 128 * wide + c / 128;
    if (scale.dtype == DType::kF32) return unaligned<float>(scale.data, i);
    const auto half = unaligned<std::uint16_t>(scale.data, i);
    return scale.dtype == DType::kBF16 ? bf16_to_float(half) : f16_to_float(half);
  };
  Tensor out = arena.tensor(DType::kF32, {rows, columns});
  for (std::int64_t r = 0; r < rows; ++r)
    for (std::int64_t c = 0; c < columns; ++c)
      out.as<float>()[r * columns + c] =
          e4m3_to_float(unaligned<std::uint8_t>(stored.data, r * columns + c)) * scale_at(r, c);
  // In the stored shape: whoever reads it compares that with what it should be.
  return Tensor::contiguous(out.data, DType::kF32, stored.shape);
}

Tensor read_f64(const StoredTensor& stored, Arena& arena) {
  const auto count = static_cast<std::int64_t>(stored.bytes / sizeof(double));
  Tensor out = arena.tensor(DType::kF32, {count});
  for (std::int64_t i = 0; i < count; ++i)
    out.as<float>()[i] = static_cast<float>(unaligned<double>(stored.data, i));
  return Tensor::contiguous(out.data, DType::kF32, stored.shape);
}

}  // namespace

Tensor read_floats(const TensorFile& files, const std::string& name, Arena& arena) {
  const StoredTensor* stored = files.find(name);
  if (stored->shape.empty() || stored->shape.size() > static_cast<std::size_t>(Tensor::kMaxRank))
    corrupt(fmt::format("tensor {}: expected 1 to {} dimensions, got {}", show_name(name),
                        Tensor::kMaxRank, stored->shape.size()));
  if (stored->dtype == "F8_E4M3") return read_fp8(files, *stored, arena);
  if (stored->dtype == "F64") return read_f64(*stored, arena);
  const auto dtype = find_stored_dtype(stored->dtype)->view;
  if (!dtype || !is_float(*dtype))
    unsupported(fmt::format(
        "tensor {}: routers, biases and gates are read from F32, F16, BF16, F64, and F8_E4M3 "
        "with a scale, not from {}; store it as one of these",
        show_name(name), stored->dtype));
  const std::byte* data = stored->data;
  if (reinterpret_cast<std::uintptr_t>(data) % size_of(*dtype) != 0) {
    std::byte* copy = arena.allocate(stored->bytes);
    std::memcpy(copy, data, stored->bytes);
    data = copy;
  }
  return Tensor::contiguous(data, *dtype, stored->shape);
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
