// SPDX-License-Identifier: Apache-2.0
// Packing's fast path: whole steps of 64 rows that lie in memory element by element, transposed sixteen
// bytes at a time in the compiler's generic vectors. (Column by column, each store went to a line of its
// own: a tenth of what memory gives.)
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "cpu/pack.h"

namespace moesaic {

class TileTransposer {
 public:
  // `rows`: the 64 columns' rows at the first step. `out`: where that step goes. `flip`: XORed to each byte.
  TileTransposer(const PackLayout& layout, const std::byte* const* rows, std::byte* out,
                 std::uint8_t flip)
      : layout_(layout), rows_(rows), out_(out), flip_(Bytes{} + flip) {}

  // Steps are taken in multiples of this.
  static constexpr std::int64_t kSteps = 16;

  void run(std::int64_t steps) const {
    for (std::int64_t s = 0; s < steps; s += kSteps) {
      fetch(s + kAhead);
      switch (layout_.kind) {
        case PackKind::kF32:
        case PackKind::kB16Pair:
        case PackKind::kB8Quad: words(s); break;
        case PackKind::kF16: halves(s, [](std::int64_t i) { return i; }); break;
        case PackKind::kB8Pair:
          // [2 x 32 columns][4 lanes][2 x 16 columns][4]
          halves(s, [](std::int64_t i) {
            return i / 32 * 32 + i % 8 / 4 * 16 + i % 32 / 8 * 4 + i % 4;
          });
          break;
        case PackKind::kU4Pair: nibble_pairs(s); break;
        case PackKind::kU4Quad: nibble_quads(s); break;
      }
    }
  }

 private:
  typedef std::uint8_t Bytes __attribute__((vector_size(16)));
  typedef std::uint16_t Halves __attribute__((vector_size(16)));
  typedef std::uint32_t Words __attribute__((vector_size(16)));

  // 64 rows are more streams than a processor's own prefetcher follows. Into the second cache: rows at a distance of
  // 4 KiB share one set of the first.
  static constexpr std::int64_t kAhead = 4 * kSteps;
  void fetch(std::int64_t s) const {
    const std::int64_t at = s * layout_.step_bytes / kTileCols;  // a step has the same bytes of each row
    if (at % 64 != 0) return;                                    // a line of a row is fetched once
    for (std::int64_t c = 0; c < kTileCols; ++c) __builtin_prefetch(rows_[c] + at, 0, 2);
  }

  template <typename V>
  static V load(const void* p) {
    V v;
    std::memcpy(&v, p, sizeof(v));
    return v;
  }
  template <typename V>
  void store(std::byte* p, V v) const {
    const Bytes bytes = reinterpret_cast<Bytes>(v) ^ flip_;
    std::memcpy(p, &bytes, sizeof(bytes));
  }

  // Four columns' words of four steps; unit c of a step at to + 4 c.
  void words4(const std::byte* const* in, std::int64_t offset, std::byte* to) const {
    const auto a = load<Words>(in[0] + offset), b = load<Words>(in[1] + offset);
    const auto c = load<Words>(in[2] + offset), d = load<Words>(in[3] + offset);
    const Words ab = __builtin_shufflevector(a, b, 0, 4, 1, 5), AB = __builtin_shufflevector(a, b, 2, 6, 3, 7);
    const Words cd = __builtin_shufflevector(c, d, 0, 4, 1, 5), CD = __builtin_shufflevector(c, d, 2, 6, 3, 7);
    const std::int64_t step = layout_.step_bytes;
    store(to, __builtin_shufflevector(ab, cd, 0, 1, 4, 5));
    store(to + step, __builtin_shufflevector(ab, cd, 2, 3, 6, 7));
    store(to + 2 * step, __builtin_shufflevector(AB, CD, 0, 1, 4, 5));
    store(to + 3 * step, __builtin_shufflevector(AB, CD, 2, 3, 6, 7));
  }
  void words(std::int64_t s) const {
    for (std::int64_t c = 0; c < kTileCols; c += 4)
      for (std::int64_t i = s; i < s + kSteps; i += 4)
        words4(rows_ + c, 4 * i, out_ + i * layout_.step_bytes + 4 * c);
  }

  // Sixteen-bit units: `column(i)` lies at place i of a step.
  template <typename Column>
  void halves(std::int64_t s, Column column) const {
    for (std::int64_t place = 0; place < kTileCols; place += 8) {
      for (std::int64_t i = s; i < s + kSteps; i += 8) {
        Halves v[8], w[8];
        for (int r = 0; r < 8; ++r) v[r] = load<Halves>(rows_[column(place + r)] + 2 * i);
        for (int r = 0; r < 4; ++r) {  // pairs of rows
          w[r] = __builtin_shufflevector(v[2 * r], v[2 * r + 1], 0, 8, 1, 9, 2, 10, 3, 11);
          w[r + 4] = __builtin_shufflevector(v[2 * r], v[2 * r + 1], 4, 12, 5, 13, 6, 14, 7, 15);
        }
        for (int h = 0; h < 2; ++h) {  // steps 0-3, 4-7
          const auto p = reinterpret_cast<Words>(w[4 * h]), q = reinterpret_cast<Words>(w[4 * h + 1]);
          const auto r = reinterpret_cast<Words>(w[4 * h + 2]), t = reinterpret_cast<Words>(w[4 * h + 3]);
          const Words pq = __builtin_shufflevector(p, q, 0, 4, 1, 5), PQ = __builtin_shufflevector(p, q, 2, 6, 3, 7);
          const Words rt = __builtin_shufflevector(r, t, 0, 4, 1, 5), RT = __builtin_shufflevector(r, t, 2, 6, 3, 7);
          std::byte* to = out_ + (i + 4 * h) * layout_.step_bytes + 2 * place;
          const std::int64_t step = layout_.step_bytes;
          store(to, __builtin_shufflevector(pq, rt, 0, 1, 4, 5));
          store(to + step, __builtin_shufflevector(pq, rt, 2, 3, 6, 7));
          store(to + 2 * step, __builtin_shufflevector(PQ, RT, 0, 1, 4, 5));
          store(to + 3 * step, __builtin_shufflevector(PQ, RT, 2, 3, 6, 7));
        }
      }
    }
  }

  static Bytes low(Bytes a, Bytes b) {
    return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  }
  static Bytes high(Bytes a, Bytes b) {
    return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  }
  // Nibbles of two rows in one byte: the even elements', the odd ones'.
  static Bytes even(Bytes a, Bytes b) { return (a & 15) | (b << 4); }
  static Bytes odd(Bytes a, Bytes b) { return (a >> 4) | (b & 0xf0); }

  // Words [16][2], nibble j of columns 16 j ...: sixteen bytes of four rows are sixteen steps.
  void nibble_pairs(std::int64_t s) const {
    alignas(16) std::byte units[16][kSteps * 4];
    const std::byte* rows[16];
    for (std::int64_t c = 0; c < 16; ++c) {
      const auto a = load<Bytes>(rows_[c] + s), b = load<Bytes>(rows_[c + 16] + s);
      const auto d = load<Bytes>(rows_[c + 32] + s), e = load<Bytes>(rows_[c + 48] + s);
      const Bytes first[2] = {low(even(a, b), even(d, e)), high(even(a, b), even(d, e))};
      const Bytes second[2] = {low(odd(a, b), odd(d, e)), high(odd(a, b), odd(d, e))};
      for (int h = 0; h < 2; ++h) {
        const auto x = reinterpret_cast<Halves>(first[h]), y = reinterpret_cast<Halves>(second[h]);
        const Halves l = __builtin_shufflevector(x, y, 0, 8, 1, 9, 2, 10, 3, 11);
        const Halves u = __builtin_shufflevector(x, y, 4, 12, 5, 13, 6, 14, 7, 15);
        std::memcpy(units[c] + 32 * h, &l, 16);
        std::memcpy(units[c] + 32 * h + 16, &u, 16);
      }
      rows[c] = units[c];
    }
    for (std::int64_t c = 0; c < 16; c += 4)
      for (std::int64_t i = 0; i < kSteps; i += 4)
        words4(rows + c, 4 * i, out_ + (s + i) * layout_.step_bytes + 4 * c);
  }

  // Bytes [2 x 32 columns][16][4], low nibble columns 0-15: sixteen bytes of two rows are eight steps.
  void nibble_quads(std::int64_t s) const {
    for (std::int64_t half = 0; half < 2; ++half) {
      alignas(16) std::byte units[16][kSteps * 4];
      const std::byte* rows[16];
      for (std::int64_t c = 0; c < 16; ++c) {
        const std::byte* const* in = rows_ + 32 * half + c;
        for (std::int64_t h = 0; h < 2; ++h) {
          const auto a = load<Bytes>(in[0] + 2 * s + 16 * h), b = load<Bytes>(in[16] + 2 * s + 16 * h);
          const Bytes l = low(even(a, b), odd(a, b)), u = high(even(a, b), odd(a, b));
          std::memcpy(units[c] + 32 * h, &l, 16);
          std::memcpy(units[c] + 32 * h + 16, &u, 16);
        }
        rows[c] = units[c];
      }
      for (std::int64_t c = 0; c < 16; c += 4)
        for (std::int64_t i = 0; i < kSteps; i += 4)
          words4(rows + c, 4 * i, out_ + (s + i) * layout_.step_bytes + 64 * half + 4 * c);
    }
  }

  const PackLayout& layout_;
  const std::byte* const* rows_;
  std::byte* out_;
  Bytes flip_;
};

}  // namespace moesaic
