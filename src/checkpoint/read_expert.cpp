// SPDX-License-Identifier: Apache-2.0
// One expert from the map into GemmWeights: a view where the bytes already lie as this library has
// them, else one copy in the arena.
#include <fmt/format.h>

#include <algorithm>
#include <cstring>

#include "check.h"
#include "checkpoint/files.h"
#include "checkpoint/slice.h"
#include "checkpoint/stored.h"
#include "checkpoint/unpack.h"
#include "divide.h"
#include "numeric.h"

namespace moesaic {
namespace {

// The slice's bytes, aligned to its element. The safetensors library always aligns; others may not.
const std::byte* aligned(const Slice& slice, Arena& arena) {
  if (reinterpret_cast<std::uintptr_t>(slice.data) % size_of(slice.dtype) == 0) return slice.data;
  std::byte* copy = arena.allocate(slice.bytes);
  std::memcpy(copy, slice.data, slice.bytes);
  return copy;
}

std::vector<float> load_floats(const Slice& slice) {
  if (!is_float(slice.dtype))
    corrupt(fmt::format("tensor {}: expected F32, F16 or BF16", show_name(slice.stored->name)));
  std::vector<float> out(static_cast<std::size_t>(slice.numel()));
  for (std::size_t i = 0; i < out.size(); ++i) {
    if (slice.dtype == DType::kF32) {
      std::memcpy(&out[i], slice.data + i * 4, 4);
    } else {
      std::uint16_t h = 0;
      std::memcpy(&h, slice.data + i * 2, 2);
      out[i] = slice.dtype == DType::kBF16 ? bf16_to_float(h) : f16_to_float(h);
    }
  }
  return out;
}

std::span<const std::int32_t> words(const Slice& slice, Arena& arena) {
  return {reinterpret_cast<const std::int32_t*>(aligned(slice, arena)), slice.bytes / 4};
}

// [rows, columns] -> [columns, rows], in squares that stay in the cache.
std::vector<std::uint8_t> transpose(const std::vector<std::uint8_t>& from, std::int64_t rows,
                                    std::int64_t columns) {
  constexpr std::int64_t kSquare = 64;
  std::vector<std::uint8_t> to(from.size());
  for (std::int64_t r0 = 0; r0 < rows; r0 += kSquare)
    for (std::int64_t c0 = 0; c0 < columns; c0 += kSquare)
      for (std::int64_t r = r0; r < std::min(r0 + kSquare, rows); ++r)
        for (std::int64_t c = c0; c < std::min(c0 + kSquare, columns); ++c)
          to[static_cast<std::size_t>(c * rows + r)] =
              from[static_cast<std::size_t>(r * columns + c)];
  return to;
}

// Reads one product of one expert, part by part: a part is a stored projection, and its rows follow
// those of the part before.
class ProductReader {
 public:
  ProductReader(const TensorFile& files, const StoredLayout& layout, const WeightSpec& spec,
                const std::vector<std::string>& parts, std::int64_t expert, Arena& arena)
      : files_(files),
        layout_(layout),
        spec_(spec),
        parts_(parts),
        expert_(expert),
        arena_(arena),
        part_rows_(spec.n / static_cast<std::int64_t>(parts.size())) {}

  GemmWeights read() {
    allocate();
    for (std::size_t p = 0; p < parts_.size(); ++p) {
      const std::int64_t row = static_cast<std::int64_t>(p) * part_rows_;
      place_weight(parts_[p], row);
      place_scales(parts_[p], row, static_cast<std::int64_t>(p));
      place_zeros(parts_[p], row);
      place_side(parts_[p], row);
    }
    return out_;
  }

 private:
  std::optional<Slice> find(const std::string& part, Role role) const {
    return find_slice(files_, layout_.names, part, role, expert_);
  }
  Slice require(const std::string& part, Role role) const {
    return require_slice(files_, layout_.names, part, role, expert_);
  }
  std::int64_t row_bytes() const { return spec_.row_bytes(); }
  bool packed_integers() const {
    return layout_.storage == Storage::kCompressedPacked || layout_.storage == Storage::kAwq ||
           layout_.storage == Storage::kGptq;
  }
  // int8 in groups becomes unsigned: the only stored bytes that change value.
  bool bytes_change() const {
    return packed_integers() ||
           (layout_.storage == Storage::kInt8 && spec_.format == WeightFormat::kU8);
  }

  void allocate() {
    if (parts_.size() > 1 || bytes_change())
      out_.weight = arena_.tensor(weight_dtype(spec_.format),
                                  {1, spec_.n, is_four_bit(spec_.format) ? spec_.k / 2 : spec_.k});
    if (spec_.scale.has_scale)
      out_.scale = arena_.tensor(spec_.e8m0_scales ? DType::kU8 : DType::kF32,
                                 {1, spec_.scale.grid_n, spec_.scale.grid_k});
    if (spec_.zero_points)
      out_.zero_point = arena_.tensor(
          DType::kU8,
          {1, spec_.format == WeightFormat::kU4 ? spec_.n / 2 : spec_.n, spec_.scale.grid_k});
    if (layout_.has_bias) out_.bias = arena_.tensor(DType::kF32, {1, spec_.n});
    if (find(parts_[0], Role::kInputScale)) {
      out_.input_scale = arena_.tensor(DType::kF32, {1});
      *out_.input_scale.as<float>() = 0;
    }
  }

  std::byte* row_at(std::int64_t row) { return out_.weight.as<std::byte>() + row * row_bytes(); }

  void place_weight(const std::string& part, std::int64_t row) {
    const Slice w = require(part, Role::kWeight);
    if (packed_integers()) {
      place_codes(codes(w, part), row);
    } else if (bytes_change()) {
      auto* to = reinterpret_cast<std::uint8_t*>(row_at(row));
      for (std::size_t i = 0; i < w.bytes; ++i)
        to[i] = static_cast<std::uint8_t>(w.data[i]) ^ 0x80;  // + 128
    } else if (parts_.size() > 1) {
      std::memcpy(row_at(row), w.data, w.bytes);
    } else {
      view_weight(w);
    }
  }

  void view_weight(const Slice& w) {
    const bool transposed = layout_.orientation == CheckpointOptions::FusedLayout::kKN;
    const std::int64_t columns = is_four_bit(spec_.format) ? spec_.k / 2 : spec_.k;
    out_.weight =
        Tensor::contiguous(aligned(w, arena_), weight_dtype(spec_.format), {1, spec_.n, columns});
    if (transposed) {  // the file's [K, N]
      out_.weight.strides[1] = 1;
      out_.weight.strides[2] = spec_.n;
    }
  }

  // Codes [part_rows, K], one per byte.
  std::vector<std::uint8_t> codes(const Slice& w, const std::string& part) {
    const std::int64_t k = spec_.k;
    if (const auto order = find(part, Role::kOrder);
        order && !in_order(*order, layout_.numbers.group_size))
      unsupported(
          fmt::format("tensor {}: act-order (desc_act) permutes the columns of K, which is not "
                      "supported; quantize again with desc_act=false, or load the 16-bit model",
                      show_name(order->stored->name)));
    std::vector<std::uint8_t> q(static_cast<std::size_t>(part_rows_ * k));
    switch (layout_.storage) {
      case Storage::kAwq:
        unpack_awq(words(w, arena_), k, part_rows_, q.data());
        return transpose(q, k, part_rows_);
      case Storage::kGptq:
        unpack_rows(words(w, arena_), k, part_rows_, layout_.bits, q.data());
        return transpose(q, k, part_rows_);
      default:
        unpack_columns(words(w, arena_), part_rows_, k, layout_.bits, q.data());
        return q;
    }
  }

  void place_codes(const std::vector<std::uint8_t>& q, std::int64_t row) {
    auto* to = reinterpret_cast<std::uint8_t*>(row_at(row));
    if (spec_.format == WeightFormat::kU4) {  // K is even, so a byte never spans rows
      for (std::size_t i = 0; i < q.size() / 2; ++i)
        to[i] = static_cast<std::uint8_t>(q[2 * i] | q[2 * i + 1] << 4);
    } else {
      const std::uint8_t flip = spec_.format == WeightFormat::kI8 ? 0x80 : 0;  // stored + 128
      for (std::size_t i = 0; i < q.size(); ++i) to[i] = q[i] ^ flip;
    }
  }

  void place_scales(const std::string& part, std::int64_t row, std::int64_t index) {
    if (!spec_.scale.has_scale) return;
    const ScaleGrid& g = spec_.scale;
    const Slice stored = require(part, Role::kScale);
    if (spec_.e8m0_scales) {
      std::memcpy(out_.scale.as<std::byte>() + row * g.grid_k, stored.data, stored.bytes);
      return;
    }
    const std::vector<float> from = load_floats(stored);
    float* to = out_.scale.as<float>();
    const auto at = [&](std::int64_t i) { return from[static_cast<std::size_t>(i)]; };
    const std::int64_t count = static_cast<std::int64_t>(from.size());
    switch (layout_.numbers.weight_scale) {
      case WeightScale::kTensor: {  // cells: gate and up, or one. A fused tensor's one scale counts
                                    // for both
        const std::int64_t first = parts_.size() > 1 ? index : 0,
                           last = parts_.size() > 1 ? index + 1 : g.grid_n;
        for (std::int64_t i = first; i < last; ++i) to[i] = at(count > 1 ? i : 0);
        return;
      }
      case WeightScale::kBlock: {
        const std::int64_t source_n = layout_.quantization.block_n;
        for (std::int64_t i = 0; i < ceil_div(part_rows_, g.group_n); ++i)
          for (std::int64_t j = 0; j < g.grid_k; ++j)
            to[(row / g.group_n + i) * g.grid_k + j] = at(i * g.group_n / source_n * g.grid_k + j);
        return;
      }
      default: {  // kChannel, kGroup
        const bool transposed =
            layout_.storage == Storage::kAwq || layout_.storage == Storage::kGptq;
        for (std::int64_t i = 0; i < part_rows_; ++i)
          for (std::int64_t j = 0; j < g.grid_k; ++j)
            to[(row + i) * g.grid_k + j] = at(count == 1   ? 0
                                              : transposed ? j * part_rows_ + i
                                                           : i * g.grid_k + j);
      }
    }
  }

  void place_zeros(const std::string& part, std::int64_t row) {
    const auto stored = find(part, Role::kZero);
    if (!stored) return;
    const std::int64_t groups = spec_.scale.grid_k, n = part_rows_;
    std::vector<std::uint8_t> z(
        static_cast<std::size_t>(n * groups));  // [groups, n] or [n, groups]
    bool transposed = true;
    switch (layout_.storage) {
      case Storage::kAwq:
        unpack_awq(words(*stored, arena_), groups, n, z.data());
        break;
      case Storage::kGptq:
        unpack_columns(words(*stored, arena_), groups, n, layout_.bits, z.data());
        break;
      case Storage::kCompressedPacked:
        if (!spec_.zero_points) return;  // symmetric: they say 8 or 128
        unpack_rows(words(*stored, arena_), n, groups, layout_.bits, z.data());
        transposed = false;
        break;
      default:
        return;
    }
    const int top = (1 << layout_.bits) - 1;
    // v1 stores zp - 1, and what wrote it takes the sum modulo 2^bits when it reads it back.
    const int add = layout_.storage == Storage::kGptq && !layout_.quantization.gptq_v2 ? 1 : 0;
    for (std::int64_t i = 0; i < n; ++i) {
      for (std::int64_t j = 0; j < groups; ++j) {
        const int zero =
            (z[static_cast<std::size_t>(transposed ? j * n + i : i * groups + j)] + add) & top;
        if (spec_.zero_points)
          put_zero(row + i, j, zero);
        else if (zero != (top + 1) / 2)
          corrupt(
              fmt::format("tensor {}: config.json says the weights are symmetric, a zero point is "
                          "{} instead of {}",
                          show_name(stored->stored->name), zero, (top + 1) / 2));
      }
    }
  }

  void put_zero(std::int64_t n, std::int64_t j, int zero) {
    const std::int64_t groups = spec_.scale.grid_k;
    auto* z = out_.zero_point.as<std::uint8_t>();
    if (spec_.format != WeightFormat::kU4) {
      z[n * groups + j] = static_cast<std::uint8_t>(zero);
      return;
    }
    std::uint8_t& byte = z[n / 2 * groups + j];
    byte = static_cast<std::uint8_t>(n % 2 == 0 ? zero : byte | zero << 4);
  }

  void place_side(const std::string& part, std::int64_t row) {
    if (layout_.has_bias) {
      const std::vector<float> bias = load_floats(require(part, Role::kBias));
      if (static_cast<std::int64_t>(bias.size()) != part_rows_)
        corrupt(fmt::format("{}{}: expected a bias of {} values, got {}", layout_.names.prefix,
                            part, part_rows_, bias.size()));
      std::copy(bias.begin(), bias.end(), out_.bias.as<float>() + row);
    }
    if (out_.input_scale.defined()) {
      // Gate and up read the same rows, quantized once: the larger range holds both.
      for (const float s : load_floats(require(part, Role::kInputScale)))
        *out_.input_scale.as<float>() = std::max(*out_.input_scale.as<float>(), s);
    }
  }

  const TensorFile& files_;
  const StoredLayout& layout_;
  const WeightSpec& spec_;
  const std::vector<std::string>& parts_;
  const std::int64_t expert_;
  Arena& arena_;
  const std::int64_t part_rows_;
  GemmWeights out_;
};

}  // namespace

LayerWeights read_expert(const TensorFile& files, const StoredLayout& layout,
                         const ProductSpecs& specs, std::int64_t expert, Arena& arena) {
  const std::vector<std::string> fc2{layout.names.fc2};
  return {.fc1 = ProductReader(files, layout, specs.fc1, layout.names.fc1, expert, arena).read(),
          .fc2 = ProductReader(files, layout, specs.fc2, fc2, expert, arena).read(),
          .activation = {}};
}

void release_expert(const TensorFile& files, const StoredLayout& layout, std::int64_t expert) {
  std::vector<std::string> projections = layout.names.fc1;
  projections.push_back(layout.names.fc2);
  for (const std::string& projection : projections) {
    for (const Role role : {Role::kWeight, Role::kScale, Role::kZero}) {
      const auto slice = find_slice(files, layout.names, projection, role, expert);
      if (!slice) continue;
      StoredTensor part = *slice->stored;
      part.data = slice->data;
      part.bytes = slice->bytes;
      files.release(part);
    }
  }
}

}  // namespace moesaic
