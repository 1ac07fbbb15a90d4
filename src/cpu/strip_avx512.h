// SPDX-License-Identifier: Apache-2.0
// The AVX-512 levels: one register block of 1 to 6 rows x 64 columns, with weights either ready in
// memory or unpacked in registers on the way. Compiled at three levels: F/BW/VL/DQ, +VNNI/VBMI, +BF16;
// what a level lacks is replaced by a longer sequence with the same numbers.
#pragma once

#include <immintrin.h>

#include "cpu/strip.h"

namespace moesaic {
namespace {

// --- unpackers: one packed step -> the 64 columns' units ------------------------------------------
// pairs(): two bf16 per column. Every code's values are exact in bf16.
struct ReadB16 {
  static constexpr std::int64_t kBytes = 256;
  explicit ReadB16(const Segment&) {}
  void pairs(const std::uint8_t* p, __m512i b[4]) const {
    for (int i = 0; i < 4; ++i) b[i] = _mm512_loadu_si512(p + 64 * i);
  }
};

#if defined(__AVX512VBMI__)
// A table of 128 bytes.
struct ByteTable {
  __m512i low, high;
  template <typename F>
  explicit ByteTable(F entry) {
    alignas(64) std::uint8_t bytes[128];
    for (int i = 0; i < 128; ++i) bytes[i] = entry(i);
    low = _mm512_load_si512(bytes);
    high = _mm512_load_si512(bytes + 64);
  }
  __m512i operator[](__m512i index) const {  // bit 7 of an index is ignored
    return _mm512_permutex2var_epi8(low, index, high);
  }
};
inline std::uint32_t bf16_bits(float f) { return std::bit_cast<std::uint32_t>(f) >> 16; }

struct ReadE4M3 {
  static constexpr std::int64_t kBytes = 128;
  ByteTable low, high;
  explicit ReadE4M3(const Segment&)
      : low([](int i) { return static_cast<std::uint8_t>(bf16_bits(exact_e4m3(i & 127))); }),
        high([](int i) { return static_cast<std::uint8_t>(bf16_bits(exact_e4m3(i & 127)) >> 8); }) {}
  void pairs(const std::uint8_t* p, __m512i b[4]) const {
    for (int half = 0; half < 2; ++half) {
      const __m512i v = _mm512_loadu_si512(p + 64 * half);
      const __m512i lo = low[v];
      // high | (v & 0x80)
      const __m512i hi = _mm512_ternarylogic_epi32(high[v], v, _mm512_set1_epi8(-128), 0xf8);
      b[2 * half] = _mm512_unpacklo_epi8(lo, hi);
      b[2 * half + 1] = _mm512_unpackhi_epi8(lo, hi);
    }
  }
};

struct ReadByte {
  static constexpr std::int64_t kBytes = 128;
  ByteTable low0, low1, high0, high1;
  static std::uint8_t part(int i, int shift) {
    return static_cast<std::uint8_t>(bf16_bits(static_cast<float>(i - 128)) >> shift);
  }
  explicit ReadByte(const Segment&)
      : low0([](int i) { return part(i, 0); }),
        low1([](int i) { return part(i + 128, 0); }),
        high0([](int i) { return part(i, 8); }),
        high1([](int i) { return part(i + 128, 8); }) {}
  void pairs(const std::uint8_t* p, __m512i b[4]) const {
    for (int half = 0; half < 2; ++half) {
      const __m512i v = _mm512_loadu_si512(p + 64 * half);
      const __mmask64 upper = _mm512_movepi8_mask(v);
      const __m512i lo = _mm512_mask_mov_epi8(low0[v], upper, low1[v]);
      const __m512i hi = _mm512_mask_mov_epi8(high0[v], upper, high1[v]);
      b[2 * half] = _mm512_unpacklo_epi8(lo, hi);
      b[2 * half + 1] = _mm512_unpackhi_epi8(lo, hi);
    }
  }
};
#else
struct ReadE4M3 {
  static constexpr std::int64_t kBytes = 128;
  explicit ReadE4M3(const Segment&) {}
  void pairs(const std::uint8_t* p, __m512i b[4]) const {
    for (int half = 0; half < 2; ++half) {
      const __m512i v = _mm512_loadu_si512(p + 64 * half);
      b[2 * half] = e4m3_words_to_bf16(_mm512_unpacklo_epi8(v, _mm512_setzero_si512()));
      b[2 * half + 1] = e4m3_words_to_bf16(_mm512_unpackhi_epi8(v, _mm512_setzero_si512()));
    }
  }
};
#endif

// Words of -255 .. 255 -> bf16.
inline __m512i words_to_bf16(__m512i words) {
  const __m512i even = _mm512_castps_si512(
      _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(words, 16), 16)));
  const __m512i odd = _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_srai_epi32(words, 16)));
  return _mm512_mask_mov_epi16(_mm512_srli_epi32(even, 16), 0xaaaaaaaa, odd);
}
// A column's zero point in both words of its pair.
inline void read_zero_words(const std::uint8_t* zero, __m512i out[4]) {
  for (int i = 0; i < 4; ++i) {
    const __m512i z = _mm512_cvtepu8_epi32(
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(zero + 16 * i)));
    out[i] = _mm512_or_si512(z, _mm512_slli_epi32(z, 16));
  }
}

struct ReadByteZero {
  static constexpr std::int64_t kBytes = 128;
  __m512i zero[4];
  explicit ReadByteZero(const Segment& s) {
    if (s.code == Code::kByteZero) {
      read_zero_words(s.zero, zero);
    } else {
      for (__m512i& z : zero) z = _mm512_set1_epi16(128);
    }
  }
  void pairs(const std::uint8_t* p, __m512i b[4]) const {
    for (int half = 0; half < 2; ++half) {
      const __m512i v = _mm512_loadu_si512(p + 64 * half);
      const __m512i none = _mm512_setzero_si512();
      b[2 * half] =
          words_to_bf16(_mm512_sub_epi16(_mm512_unpacklo_epi8(v, none), zero[2 * half]));
      b[2 * half + 1] =
          words_to_bf16(_mm512_sub_epi16(_mm512_unpackhi_epi8(v, none), zero[2 * half + 1]));
    }
  }
};
#if !defined(__AVX512VBMI__)
using ReadByte = ReadByteZero;
#endif

// vpermw looks up 32 words; the table is there twice, so the fifth bit (the next nibble's) is ignored
// and no mask is needed.
struct ReadNibble {
  static constexpr std::int64_t kBytes = 64;
  __m512i table;
  explicit ReadNibble(const Segment& s) {
    alignas(64) std::uint16_t words[32];
    const float* values = s.e2m1 ? kE2M1 : kNibbleInt4;
    for (int i = 0; i < 32; ++i)
      words[i] = static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(values[i % 16]) >> 16);
    table = _mm512_load_si512(words);
  }
  void pairs(const std::uint8_t* p, __m512i b[4]) const {
    const __m512i v = _mm512_loadu_si512(p);
    b[0] = _mm512_permutexvar_epi16(v, table);
    b[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(v, 4), table);
    b[2] = _mm512_permutexvar_epi16(_mm512_srli_epi16(v, 8), table);
    b[3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(v, 12), table);
  }
};

// q - zero is -15 .. 15: five bits of two's complement, which index a table of 32.
struct ReadNibbleZero {
  static constexpr std::int64_t kBytes = 64;
  __m512i table, zero[4];
  explicit ReadNibbleZero(const Segment& s) {
    alignas(64) std::uint16_t words[32];
    for (int i = 0; i < 32; ++i)
      words[i] = static_cast<std::uint16_t>(
          std::bit_cast<std::uint32_t>(static_cast<float>(i < 16 ? i : i - 32)) >> 16);
    table = _mm512_load_si512(words);
    read_zero_words(s.zero, zero);
  }
  void pairs(const std::uint8_t* p, __m512i b[4]) const {
    const __m512i v = _mm512_loadu_si512(p), mask = _mm512_set1_epi16(15);
    const __m512i q[4] = {_mm512_and_si512(v, mask),
                          _mm512_and_si512(_mm512_srli_epi16(v, 4), mask),
                          _mm512_and_si512(_mm512_srli_epi16(v, 8), mask),
                          _mm512_srli_epi16(v, 12)};
    for (int i = 0; i < 4; ++i)
      b[i] = _mm512_permutexvar_epi16(_mm512_sub_epi16(q[i], zero[i]), table);
  }
};

// --- what a block multiplies: `units` per packed step, each four registers -------------------------
template <typename Read>
struct AsPairs : Read {  // Compute::kB16
  using Read::Read;
  static constexpr int kUnits = 1;
  void unit(const std::uint8_t* p, int, __m512i b[4]) const { Read::pairs(p, b); }
};
template <typename Read>
struct AsFloats : Read {  // Compute::kF32: the pair's first, then its second
  using Read::Read;
  static constexpr int kUnits = 2;
  void unit(const std::uint8_t* p, int which, __m512i b[4]) const {
    Read::pairs(p, b);
    for (int i = 0; i < 4; ++i)
      b[i] = which == 0 ? _mm512_slli_epi32(b[i], 16)
                        : _mm512_and_si512(b[i], _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
  }
};
struct ReadF16 {  // Compute::kF32
  static constexpr std::int64_t kBytes = 128;
  static constexpr int kUnits = 1;
  explicit ReadF16(const Segment&) {}
  void unit(const std::uint8_t* p, int, __m512i b[4]) const {
    for (int i = 0; i < 4; ++i)
      b[i] = _mm512_castps_si512(
          _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32 * i))));
  }
};
struct ReadUnits {  // ready in memory
  static constexpr std::int64_t kBytes = 256;
  static constexpr int kUnits = 1;
  void unit(const std::uint8_t* p, int, __m512i b[4]) const {
    for (int i = 0; i < 4; ++i) b[i] = _mm512_loadu_si512(p + 64 * i);
  }
};
struct ReadNibbleQuad {  // Compute::kByte
  static constexpr std::int64_t kBytes = 128;
  static constexpr int kUnits = 1;
  explicit ReadNibbleQuad(const Segment&) {}
  void unit(const std::uint8_t* p, int, __m512i b[4]) const {
    const __m512i mask = _mm512_set1_epi8(15);
    for (int half = 0; half < 2; ++half) {
      const __m512i v = _mm512_loadu_si512(p + 64 * half);
      b[2 * half] = _mm512_and_si512(v, mask);
      b[2 * half + 1] = _mm512_and_si512(_mm512_srli_epi16(v, 4), mask);
    }
  }
};

// --- dot products -----------------------------------------------------------------------------------
template <Compute kCompute>
struct Dot;
template <>
struct Dot<Compute::kF32> {
  using Sum = __m512;
  static Sum zero() { return _mm512_setzero_ps(); }
  static Sum add(Sum sum, __m512i b, __m512i a) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
  }
  static Sum load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Sum sum) { _mm512_storeu_ps(p, sum); }
  static __m512 value(const Panel&, std::int64_t, std::int64_t, Sum sum) { return sum; }
};
#if defined(__AVX512BF16__)
template <>
struct Dot<Compute::kB16> : Dot<Compute::kF32> {
  static Sum add(Sum sum, __m512i b, __m512i a) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
};
#endif
template <>
struct Dot<Compute::kByte> {
  using Sum = __m512i;
  static Sum zero() { return _mm512_setzero_si512(); }
  static Sum add(Sum sum, __m512i b, __m512i a) {
#if defined(__AVX512VNNI__)
    return _mm512_dpbusd_epi32(sum, b, a);
#else
    const __m512i even = _mm512_madd_epi16(_mm512_and_si512(b, _mm512_set1_epi16(0xff)),
                                           _mm512_srai_epi16(_mm512_slli_epi16(a, 8), 8));
    const __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16(b, 8), _mm512_srai_epi16(a, 8));
    return _mm512_add_epi32(sum, _mm512_add_epi32(even, odd));
#endif
  }
  static Sum load(const float* p) { return _mm512_loadu_si512(p); }
  static void store(float* p, Sum sum) { _mm512_storeu_si512(p, sum); }
  static __m512 value(const Panel& p, std::int64_t r, std::int64_t c, Sum sum) {
    const __m512i shift = _mm512_mullo_epi32(_mm512_loadu_si512(p.zero + c),
                                             _mm512_set1_epi32(p.row_sum[r * p.row_sum_stride]));
    return _mm512_cvtepi32_ps(_mm512_sub_epi32(sum, shift));
  }
};

// kRows rows x 64 columns over `steps` packed steps.
template <Compute kCompute, int kRows, typename Unpack>
void block(const Panel& p, const Unpack& unpack, const std::uint8_t* data, std::int64_t steps) {
  using D = Dot<kCompute>;
  typename D::Sum sums[kRows][4];
  for (int r = 0; r < kRows; ++r)
    for (int i = 0; i < 4; ++i)
      sums[r][i] = p.begin == Begin::kRaw ? D::load(p.raw + r * p.c_stride + 16 * i) : D::zero();
  const std::uint32_t* a[kRows];
  for (int r = 0; r < kRows; ++r) a[r] = p.a + r * p.a_stride;
  std::int64_t u = 0;
  for (std::int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 2
    for (int which = 0; which < Unpack::kUnits; ++which, ++u) {
      __m512i b[4];
      unpack.unit(data, which, b);
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) {
        const __m512i x = _mm512_set1_epi32(static_cast<int>(a[r][u]));
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) sums[r][i] = D::add(sums[r][i], b[i], x);
      }
    }
    data += Unpack::kBytes;
  }
  if (p.end == End::kRaw) {
    for (int r = 0; r < kRows; ++r)
      for (int i = 0; i < 4; ++i) D::store(p.raw + r * p.c_stride + 16 * i, sums[r][i]);
    return;
  }
  for (int r = 0; r < kRows; ++r) {
    float* total = p.total + r * p.c_stride;
    for (int i = 0; i < 4; ++i) {
      __m512 v = D::value(p, r, 16 * i, sums[r][i]);
      if (p.row_scale != nullptr)
        v = _mm512_mul_ps(v, _mm512_set1_ps(p.row_scale[r][p.row_scale_at]));
      if (p.scale == nullptr) {
        if (p.end == End::kAdd) v = _mm512_add_ps(v, _mm512_loadu_ps(total + 16 * i));
      } else if (p.end == End::kAdd) {
        v = _mm512_fmadd_ps(v, _mm512_loadu_ps(p.scale + 16 * i), _mm512_loadu_ps(total + 16 * i));
      } else {
        v = _mm512_mul_ps(v, _mm512_loadu_ps(p.scale + 16 * i));
      }
      _mm512_storeu_ps(total + 16 * i, v);
    }
  }
}

template <Compute kCompute, int kMaxRows, typename Unpack>
void blocks(const Panel& p, const Unpack& unpack, const std::uint8_t* data, std::int64_t steps) {
  switch (p.rows) {
    case 1: return block<kCompute, 1>(p, unpack, data, steps);
    case 2: return block<kCompute, 2>(p, unpack, data, steps);
    case 3: return block<kCompute, 3>(p, unpack, data, steps);
    case 4: return block<kCompute, 4>(p, unpack, data, steps);
    case 5:
      if constexpr (kMaxRows >= 5) return block<kCompute, 5>(p, unpack, data, steps);
      return;
    case 6:
      if constexpr (kMaxRows >= 6) return block<kCompute, 6>(p, unpack, data, steps);
      return;
  }
}

// The unpacker of a code, made for one segment, to a generic lambda.
template <Compute kCompute, typename F>
void with_unpacker(const Segment& s, F&& f) {
  if constexpr (kCompute == Compute::kByte) {
    f(ReadNibbleQuad(s));
  } else {
    const auto pairs = [&]<typename Read>(std::type_identity<Read>) {
      if constexpr (kCompute == Compute::kB16)
        f(AsPairs<Read>(s));
      else
        f(AsFloats<Read>(s));
    };
    switch (s.code) {
      case Code::kB16: return pairs(std::type_identity<ReadB16>());
      case Code::kE4M3: return pairs(std::type_identity<ReadE4M3>());
      case Code::kByte: return pairs(std::type_identity<ReadByte>());
      case Code::kByteZero: return pairs(std::type_identity<ReadByteZero>());
      case Code::kNibble: return pairs(std::type_identity<ReadNibble>());
      case Code::kNibbleZero: return pairs(std::type_identity<ReadNibbleZero>());
      case Code::kF16:
        if constexpr (kCompute == Compute::kF32) f(ReadF16(s));
        return;
      default: return;
    }
  }
}

struct Level {
  static constexpr bool has_b16() {
#if defined(__AVX512BF16__)
    return true;
#else
    return false;
#endif
  }

  template <Compute kCompute>
  static void native(const Panel& p, const void* b, std::int64_t units) {
    blocks<kCompute, kPanelRows>(p, ReadUnits(), static_cast<const std::uint8_t*>(b), units);
  }

  template <Compute kCompute>
  static bool fused(const Panel& p, const Segment& s) {
    with_unpacker<kCompute>(
        s, [&](const auto& unpack) { blocks<kCompute, kFusedRows>(p, unpack, s.data, s.steps); });
    return true;
  }

  template <Compute kCompute>
  static void unpack(const Segment& s, void* out) {
    with_unpacker<kCompute>(s, [&](const auto& unpack) {
      auto* to = static_cast<std::uint8_t*>(out);
      const std::uint8_t* data = s.data;
      using U = std::remove_cvref_t<decltype(unpack)>;
      for (std::int64_t step = 0; step < s.steps; ++step, data += U::kBytes) {
        for (int which = 0; which < U::kUnits; ++which, to += 256) {
          __m512i b[4];
          unpack.unit(data, which, b);
          for (int i = 0; i < 4; ++i) _mm512_store_si512(to + 64 * i, b[i]);
        }
      }
    });
  }
};

}  // namespace
}  // namespace moesaic
