// SPDX-License-Identifier: Apache-2.0
// Packed steps into the form a level multiplies, into scratch: plain C++, for every level. AVX-512 has
// its own in strip_avx512.h; the numbers are the same, every conversion is exact.
#pragma once

#include "cpu/strip_rows.h"

namespace moesaic {
namespace {

// Units of A that one packed step takes.
template <Compute kCompute>
constexpr std::int64_t units_per_step(PackKind kind) {
  const bool pair =
      kind == PackKind::kB16Pair || kind == PackKind::kB8Pair || kind == PackKind::kU4Pair;
  return kCompute == Compute::kF32 && pair ? 2 : 1;
}

// Whether the packed steps already are what is multiplied.
template <Compute kCompute>
constexpr bool is_native(Code code) {
  return kCompute == Compute::kF32    ? code == Code::kF32
         : kCompute == Compute::kB16 ? code == Code::kB16
                                     : code == Code::kByteQuad;
}

// Two values of column c, step by step, through `value(step data, column, which of two)`: as fp32, two
// units of 64, or as bf16, one unit of 64 pairs.
template <typename Value>
void unpack_pairs(const Segments& s, std::int64_t step_bytes, float* out, Value value) {
  for (std::int64_t step = 0; step < s.steps; ++step, out += 2 * kTileCols) {
    const std::uint8_t* data = s.data + step * step_bytes;
    for (std::int64_t i = 0; i < 2; ++i)
      for (std::int64_t c = 0; c < kTileCols; ++c) out[i * kTileCols + c] = value(data, c, i);
  }
}
template <typename Value>
void unpack_pairs(const Segments& s, std::int64_t step_bytes, std::uint16_t* out, Value value) {
  for (std::int64_t step = 0; step < s.steps; ++step, out += 2 * kTileCols) {
    const std::uint8_t* data = s.data + step * step_bytes;
    for (std::int64_t c = 0; c < kTileCols; ++c)
      for (std::int64_t i = 0; i < 2; ++i)
        out[2 * c + i] = static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(value(data, c, i)) >> 16);
  }
}

inline std::int64_t byte_of(std::int64_t c, std::int64_t i) {  // in a kB8Pair step
  return c / 32 * 64 + c % 16 / 4 * 16 + c % 32 / 16 * 8 + c % 4 * 2 + i;
}
inline unsigned nibble_of(const std::uint8_t* data, std::int64_t c, std::int64_t i) {  // kU4Pair
  const std::int64_t nibble = c / 16;
  return data[(c % 16 * 2 + i) * 2 + nibble / 2] >> (nibble % 2 * 4) & 15u;
}

template <typename Out>  // float, or std::uint16_t for bf16
void unpack_values(const Segments& s, Out* out) {
  switch (s.code) {
    case Code::kF16:
      if constexpr (sizeof(Out) == sizeof(float))
        row_to_f32(DType::kF16, reinterpret_cast<const std::byte*>(s.data), s.steps * kTileCols, out);
      return;
    case Code::kB16:
      unpack_pairs(s, 256, out, [](const std::uint8_t* data, std::int64_t c, std::int64_t i) {
        std::uint32_t pair;
        std::memcpy(&pair, data + c * 4, 4);
        return std::bit_cast<float>(i == 0 ? pair << 16 : pair & 0xffff0000u);
      });
      return;
    case Code::kE4M3:
      unpack_pairs(s, 128, out, [](const std::uint8_t* data, std::int64_t c, std::int64_t i) {
        return exact_e4m3(data[byte_of(c, i)]);
      });
      return;
    case Code::kByte:
      unpack_pairs(s, 128, out, [](const std::uint8_t* data, std::int64_t c, std::int64_t i) {
        return static_cast<float>(static_cast<int>(data[byte_of(c, i)]) - 128);
      });
      return;
    case Code::kByteZero:
      unpack_pairs(s, 128, out, [&](const std::uint8_t* data, std::int64_t c, std::int64_t i) {
        return static_cast<float>(static_cast<int>(data[byte_of(c, i)]) - s.zero[c]);
      });
      return;
    case Code::kNibble: {
      const float* table = s.e2m1 ? kE2M1 : kNibbleInt4;
      unpack_pairs(s, 64, out, [&](const std::uint8_t* data, std::int64_t c, std::int64_t i) {
        return table[nibble_of(data, c, i)];
      });
      return;
    }
    case Code::kNibbleZero:
      unpack_pairs(s, 64, out, [&](const std::uint8_t* data, std::int64_t c, std::int64_t i) {
        return static_cast<float>(static_cast<int>(nibble_of(data, c, i)) - s.zero[c]);
      });
      return;
    default: return;
  }
}

inline void unpack_bytes(const Segments& s, std::uint8_t* out) {  // kNibbleQuad
  for (std::int64_t step = 0; step < s.steps; ++step, out += 256) {
    for (std::int64_t half = 0; half < 2; ++half) {
      const std::uint8_t* data = s.data + step * 128 + half * 64;
      for (std::int64_t i = 0; i < 64; ++i) {
        out[half * 128 + i] = data[i] & 15u;
        out[half * 128 + 64 + i] = static_cast<std::uint8_t>(data[i] >> 4);
      }
    }
  }
}

}  // namespace
}  // namespace moesaic
