// SPDX-License-Identifier: Apache-2.0
// Packing: from the caller's views to tiles. The same code packs a layer once at load and, part by
// part, a caller's plain weights inside a call, so that both give the same bits.
#include "cpu/pack.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "cpu/near_scales.h"
#include "cpu/pack_transpose.h"
#include "numeric.h"

namespace moesaic {
namespace {

constexpr std::int64_t kLine = 64;
// An int32 sum of products of bytes is exact for this many at least.
constexpr std::int64_t kIntegerK = INT64_C(1) << 16;

PackKind pack_kind(const WeightSpec& spec) {
  const bool integers = integer_product(spec);
  switch (spec.format) {
    case WeightFormat::kF32: return PackKind::kF32;
    case WeightFormat::kF16: return PackKind::kF16;
    case WeightFormat::kBF16: return PackKind::kB16Pair;
    case WeightFormat::kE4M3: return PackKind::kB8Pair;
    case WeightFormat::kI8:
    case WeightFormat::kU8: return integers ? PackKind::kB8Quad : PackKind::kB8Pair;
    case WeightFormat::kU4: return integers ? PackKind::kU4Quad : PackKind::kU4Pair;
    case WeightFormat::kE2M1: return PackKind::kU4Pair;
  }
  return PackKind::kF32;
}

std::int64_t segment_length(const WeightSpec& spec) {
  std::int64_t length = spec.k;
  if (spec.scale.has_scale && spec.scale.group_k < length) length = spec.scale.group_k;
  if (spec.act_scale == ActScale::kGroup && spec.act_group < spec.k)
    length = std::gcd(length == spec.k ? spec.act_group : length, spec.act_group);
  if (integer_product(spec) && length > kIntegerK)
    length = length == spec.k ? kIntegerK : std::gcd(length, kIntegerK);
  return std::max<std::int64_t>(length, 1);
}

// Whether each half tile of every tile lies in one row of the scale grid.
bool scales_by_halves(const WeightSpec& spec, std::int64_t tiles) {
  if (spec.scale.grid_n == 1) return true;
  for (std::int64_t tile = 0; tile < tiles; ++tile) {
    for (std::int64_t c = 0; c < kTileCols; ++c) {
      const std::int64_t row = row_of_column(spec, tile, c);
      const std::int64_t first = row_of_column(spec, tile, c / kHalf * kHalf);
      if (row >= 0 && row / spec.scale.group_n != first / spec.scale.group_n) return false;
    }
  }
  return true;
}

// --- steps: one function per kind, for one column --------------------------------------------------
struct Column {
  const std::byte* data;  // element 0 of this row of the caller's
  std::int64_t stride;    // between elements of K, in elements
  std::int64_t k0, k1;    // what lies in these steps
  std::int64_t steps;
};

template <typename T, std::int64_t kStepBytes>
void fill_plain(const Column& column, std::int64_t c, std::byte* out) {
  const std::int64_t count = column.k1 - column.k0;
  // A column of padding has no data, and nothing may be added to that.
  const T* in = count > 0 ? reinterpret_cast<const T*>(column.data) + column.k0 * column.stride : nullptr;
  auto* to = reinterpret_cast<T*>(out) + c;
  for (std::int64_t k = 0; k < count; ++k)
    to[k * (kStepBytes / static_cast<std::int64_t>(sizeof(T)))] = in[k * column.stride];
  for (std::int64_t k = count; k < column.steps; ++k)
    to[k * (kStepBytes / static_cast<std::int64_t>(sizeof(T)))] = 0;
}

// T holds one step of one column; U is an element.
template <typename T, typename U, std::int64_t kStepBytes>
void fill_grouped(const Column& column, std::byte* out, std::int64_t offset, T flip) {
  constexpr std::int64_t kPer = sizeof(T) / sizeof(U);
  const U* in = reinterpret_cast<const U*>(column.data);
  const std::int64_t whole = (column.k1 - column.k0) / kPer;
  std::byte* to = out + offset;
  if (column.stride == 1) {
    for (std::int64_t s = 0; s < whole; ++s) {
      T value;
      std::memcpy(&value, in + column.k0 + s * kPer, sizeof(T));
      value = static_cast<T>(value ^ flip);
      std::memcpy(to + s * kStepBytes, &value, sizeof(T));
    }
  }
  for (std::int64_t s = column.stride == 1 ? whole : 0; s < column.steps; ++s) {
    U parts[kPer] = {};
    for (std::int64_t i = 0; i < kPer; ++i) {
      const std::int64_t k = column.k0 + s * kPer + i;
      if (k < column.k1) parts[i] = in[k * column.stride];
    }
    T value;
    std::memcpy(&value, parts, sizeof(T));
    value = static_cast<T>(value ^ flip);
    std::memcpy(to + s * kStepBytes, &value, sizeof(T));
  }
}

inline unsigned nibble_at(const std::byte* row, std::int64_t k) {
  const auto byte = static_cast<unsigned>(row[k / 2]);
  return k % 2 == 0 ? byte & 15u : byte >> 4;
}

// Nibble columns share bytes: the first writer of a byte clears the rest by assigning.
void fill_u4_pair(const Column& column, std::int64_t c, std::byte* out) {
  const std::int64_t nibble = c / 16;
  auto* words = reinterpret_cast<std::uint16_t*>(out) + c % 16 * 2;
  for (std::int64_t s = 0; s < column.steps; ++s) {
    for (std::int64_t i = 0; i < 2; ++i) {
      const std::int64_t k = column.k0 + 2 * s + i;
      const unsigned q = k < column.k1 ? nibble_at(column.data, k) : 0u;
      std::uint16_t& word = words[s * 32 + i];
      word = static_cast<std::uint16_t>((nibble == 0 ? 0u : word) | q << (4 * nibble));
    }
  }
}

void fill_u4_quad(const Column& column, std::int64_t c, std::byte* out) {
  const bool high = c % kHalf >= 16;
  std::byte* bytes = out + c / kHalf * 64 + c % 16 * 4;
  for (std::int64_t s = 0; s < column.steps; ++s) {
    for (std::int64_t i = 0; i < 4; ++i) {
      const std::int64_t k = column.k0 + 4 * s + i;
      const unsigned q = k < column.k1 ? nibble_at(column.data, k) : 0u;
      std::byte& byte = bytes[s * 128 + i];
      byte = high ? byte | static_cast<std::byte>(q << 4) : static_cast<std::byte>(q);
    }
  }
}

}  // namespace

bool integer_product(const WeightSpec& spec) { return spec.act == ActFormat::kI8; }

PackLayout pack_layout(const WeightSpec& spec) {
  PackLayout l;
  l.kind = pack_kind(spec);
  l.n = spec.n;
  l.k = spec.k;
  l.tiles = spec.gated ? (spec.n / 2 + kHalf - 1) / kHalf : (spec.n + kTileCols - 1) / kTileCols;
  switch (l.kind) {
    case PackKind::kF32: l.step_k = 1, l.step_bytes = 256; break;
    case PackKind::kF16: l.step_k = 1, l.step_bytes = 128; break;
    case PackKind::kB16Pair: l.step_k = 2, l.step_bytes = 256; break;
    case PackKind::kB8Pair: l.step_k = 2, l.step_bytes = 128; break;
    case PackKind::kB8Quad: l.step_k = 4, l.step_bytes = 256; break;
    case PackKind::kU4Pair: l.step_k = 2, l.step_bytes = 64; break;
    case PackKind::kU4Quad: l.step_k = 4, l.step_bytes = 128; break;
  }
  l.segment_k = segment_length(spec);
  l.segments = std::max<std::int64_t>((spec.k + l.segment_k - 1) / l.segment_k, 1);
  l.segment_steps = (l.segment_k + l.step_k - 1) / l.step_k;
  if (spec.scale.has_scale) {
    l.scale = spec.e8m0_scales                   ? ScaleKind::kE8M0
              : scales_by_halves(spec, l.tiles) ? ScaleKind::kHalves
                                                : ScaleKind::kColumns;
    l.header_bytes = l.scale == ScaleKind::kColumns ? 4 * kTileCols : kLine;
  }
  l.zero_points = spec.zero_points;
  l.zero_offset = l.header_bytes;
  if (l.zero_points) l.header_bytes += kTileCols;
  l.segment_bytes = l.header_bytes + l.segment_steps * l.step_bytes;
  l.tile_bytes = (l.segments - 1) * l.segment_bytes + l.header_bytes +
                 l.steps(l.segments - 1) * l.step_bytes;
  l.expert_bytes = l.tiles * l.tile_bytes;
  return l;
}

std::int64_t row_of_column(const WeightSpec& spec, std::int64_t tile, std::int64_t column) {
  if (!spec.gated) {
    const std::int64_t row = tile * kTileCols + column;
    return row < spec.n ? row : -1;
  }
  const std::int64_t i = tile * kHalf + column % kHalf;
  if (i >= spec.n / 2) return -1;
  return column < kHalf ? spec.gate_row(i) : spec.up_row(i);
}

float float_at(const Tensor& tensor, std::int64_t index) {
  switch (tensor.dtype) {
    case DType::kF16: return f16_to_float(tensor.as<const std::uint16_t>()[index]);
    case DType::kBF16: return bf16_to_float(tensor.as<const std::uint16_t>()[index]);
    default: return tensor.as<const float>()[index];
  }
}

void pack_header(const WeightSpec& spec, const PackLayout& layout, const GemmWeights& weights,
                 const PackPart& part, std::byte* header) {
  if (layout.header_bytes == 0) return;
  const std::int64_t group = part.segment * layout.segment_k / spec.scale.group_k;
  const Tensor& scale = weights.scale;
  const auto index = [&](std::int64_t row) {
    return part.expert * scale.strides[0] + row / spec.scale.group_n * scale.strides[1] +
           group * scale.strides[2];
  };
  std::memset(header, 0, static_cast<std::size_t>(layout.header_bytes));
  if (layout.scale == ScaleKind::kE8M0) {
    const auto* bytes = scale.as<const std::uint8_t>();
    for (std::int64_t c = 0; c < kTileCols; ++c) {
      const std::int64_t row = row_of_column(spec, part.tile, c);
      if (row >= 0) header[c] = static_cast<std::byte>(bytes[index(row)]);
    }
  } else if (layout.scale != ScaleKind::kNone) {
    auto* scales = reinterpret_cast<float*>(header);
    const std::int64_t step = layout.scale == ScaleKind::kHalves ? kHalf : 1;
    for (std::int64_t c = 0; c < kTileCols; c += step) {
      const std::int64_t row = row_of_column(spec, part.tile, c);
      scales[c / step] = row >= 0 ? float_at(scale, index(row)) : 0.0f;
    }
  }
  if (layout.zero_points) {
    const Tensor& zero = weights.zero_point;
    const auto* bytes = zero.as<const std::uint8_t>();
    const bool nibbles = spec.format == WeightFormat::kU4;
    for (std::int64_t c = 0; c < kTileCols; ++c) {
      const std::int64_t row = row_of_column(spec, part.tile, c);
      if (row < 0) continue;
      const std::int64_t at = part.expert * zero.strides[0] +
                              (nibbles ? row / 2 : row) * zero.strides[1] + group * zero.strides[2];
      unsigned value = bytes[at];
      if (nibbles) value = row % 2 == 0 ? value & 15u : value >> 4;
      header[layout.zero_offset + c] = static_cast<std::byte>(value);
    }
  }
}

namespace {

// Steps from `first` on, column by column: any strides, padding, a last step that is not full.
void pack_columns(const WeightSpec& spec, const PackLayout& layout, const Tensor& w,
                  const PackPart& part, std::int64_t first, std::byte* out) {
  const auto element = static_cast<std::int64_t>(size_of(w.dtype));
  const std::int64_t segment_begin = part.segment * layout.segment_k;
  const std::int64_t segment_end = segment_begin + layout.length(part.segment);
  const bool is_signed = spec.format == WeightFormat::kI8;
  // Blocks of steps whose 64 columns stay in the first-level cache while they are filled.
  constexpr std::int64_t kBlock = 32;
  for (std::int64_t s = first; s < part.steps; s += kBlock) {
    Column column{.data = nullptr, .stride = w.strides[2], .k0 = 0, .k1 = 0,
                  .steps = std::min(kBlock, part.steps - s)};
    column.k0 = segment_begin + (part.first_step + s) * layout.step_k;
    column.k1 = std::min(segment_end, column.k0 + column.steps * layout.step_k);
    std::byte* to = out + s * layout.step_bytes;
    for (std::int64_t c = 0; c < kTileCols; ++c) {
      const std::int64_t row = row_of_column(spec, part.tile, c);
      Column filled = column;
      if (row >= 0) {
        filled.data = static_cast<const std::byte*>(w.data) +
                      (part.expert * w.strides[0] + row * w.strides[1]) * element;
      } else {
        filled.k1 = filled.k0;  // nothing but zeros
      }
      switch (layout.kind) {
        case PackKind::kF32: fill_plain<std::uint32_t, 256>(filled, c, to); break;
        case PackKind::kF16: fill_plain<std::uint16_t, 128>(filled, c, to); break;
        case PackKind::kB16Pair:
          fill_grouped<std::uint32_t, std::uint16_t, 256>(filled, to, c * 4, 0);
          break;
        case PackKind::kB8Pair:
          fill_grouped<std::uint16_t, std::uint8_t, 128>(filled, to, b8_pair_offset(c),
                                                         is_signed ? 0x8080 : 0);
          break;
        case PackKind::kB8Quad:
          fill_grouped<std::uint32_t, std::uint8_t, 256>(filled, to, c * 4,
                                                         is_signed ? 0x80808080u : 0u);
          break;
        case PackKind::kU4Pair: fill_u4_pair(filled, c, to); break;
        case PackKind::kU4Quad: fill_u4_quad(filled, c, to); break;
      }
    }
  }
}

}  // namespace

void pack_steps(const WeightSpec& spec, const PackLayout& layout, const GemmWeights& weights,
                const PackPart& part, std::byte* out) {
  const Tensor& w = weights.weight;
  const std::int64_t k0 = part.segment * layout.segment_k + part.first_step * layout.step_k;
  const bool nibbles = layout.kind == PackKind::kU4Pair || layout.kind == PackKind::kU4Quad;
  const std::int64_t whole =
      std::min(part.steps, (layout.length(part.segment) - part.first_step * layout.step_k) / layout.step_k);
  std::int64_t fast = whole / TileTransposer::kSteps * TileTransposer::kSteps;
  const auto element = static_cast<std::int64_t>(size_of(w.dtype));
  const std::byte* rows[kTileCols];
  for (std::int64_t c = 0; c < kTileCols; ++c) {
    const std::int64_t row = row_of_column(spec, part.tile, c);
    if (row < 0) {  // padding: the last tile
      fast = 0;
      break;
    }
    rows[c] = static_cast<const std::byte*>(w.data) +
              (part.expert * w.strides[0] + row * w.strides[1]) * element + (nibbles ? k0 / 2 : k0 * element);
  }
  if (w.strides[2] != 1 || (nibbles && k0 % 2 != 0)) fast = 0;
  const std::uint8_t flip = spec.format == WeightFormat::kI8 ? 0x80 : 0;
  if (fast > 0) TileTransposer(layout, rows, out, flip).run(fast);
  pack_columns(spec, layout, w, part, fast, out);
}

bool scales_are_near(const WeightSpec& spec, const PackLayout& layout, const GemmWeights& weights,
                     std::int64_t expert, std::int64_t tile) {
  ColumnSpread spread;
  std::array<std::byte, 5 * kTileCols> header;  // with room for any
  for (std::int64_t segment = 0; segment < layout.segments; ++segment) {
    pack_header(spec, layout, weights, {.expert = expert, .tile = tile, .segment = segment}, header.data());
    spread.add(header.data());
  }
  return spread.near();
}

}  // namespace moesaic
