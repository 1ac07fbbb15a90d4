// SPDX-License-Identifier: Apache-2.0
// The way back from tiles to rows, for callers that gave their own copy away at load.
#include "check.h"
#include "cpu/pack.h"
#include "cpu/thread_pool.h"

namespace moesaic {
namespace {

// Bytes from the start of a step to element `i` of its K, for column c; the inverse of pack_steps.
std::int64_t element_offset(PackKind kind, std::int64_t c, std::int64_t i) {
  switch (kind) {
    case PackKind::kF32: return c * 4;
    case PackKind::kF16: return c * 2;
    case PackKind::kB16Pair: return c * 4 + i * 2;
    case PackKind::kB8Pair: return b8_pair_offset(c) + i;
    default: return c * 4 + i;  // kB8Quad
  }
}

template <typename T>
void unpack_tile(const WeightSpec& spec, const PackLayout& l, const std::byte* tile_base, std::int64_t tile,
                 T flip, const Tensor& weight) {
  for (std::int64_t c = 0; c < kTileCols; ++c) {
    const std::int64_t row = row_of_column(spec, tile, c);
    if (row < 0) continue;
    T* out = weight.as<T>() + row * weight.strides[1];
    for (std::int64_t segment = 0; segment < l.segments; ++segment) {
      const std::byte* steps = tile_base + segment * l.segment_bytes + l.header_bytes;
      const std::int64_t first = segment * l.segment_k;
      for (std::int64_t k = 0; k < l.length(segment); ++k) {
        const std::byte* at = steps + k / l.step_k * l.step_bytes + element_offset(l.kind, c, k % l.step_k);
        out[(first + k) * weight.strides[2]] = static_cast<T>(*reinterpret_cast<const T*>(at) ^ flip);
      }
    }
  }
}

}  // namespace

void PackedCpu::unpack(std::int64_t local_expert, const Tensor& weight) const {
  if (layout_.kind == PackKind::kU4Pair || layout_.kind == PackKind::kU4Quad)
    unsupported("unpack_expert: weights of four bits are not read back; keep the caller's copy");
  const bool is_signed = spec_.format == WeightFormat::kI8;  // those are stored + 128
  parallel_for(nodes_, [&](std::int64_t tile) {
    const std::byte* from = this->tile(local_expert, tile);
    switch (size_of(weight.dtype)) {
      case 1: unpack_tile<std::uint8_t>(spec_, layout_, from, tile, is_signed ? 0x80 : 0, weight); break;
      case 2: unpack_tile<std::uint16_t>(spec_, layout_, from, tile, 0, weight); break;
      default: unpack_tile<std::uint32_t>(spec_, layout_, from, tile, 0, weight);
    }
  });
}

}  // namespace moesaic
