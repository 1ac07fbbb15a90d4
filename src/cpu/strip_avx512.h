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
  ReadB16(const Segments&, std::int64_t) {}
  template <int kRows>
  void pairs(const std::uint8_t* p, __m512i b[4]) const {
    for (int i = 0; i < 4; ++i) b[i] = _mm512_loadu_si512(p + 64 * i);
  }
};

#if defined(__AVX512VBMI__)
// Tables that the compiler keeps in registers over a loop push the sums of four and more rows out of
// them; a pointer it knows nothing about makes it read them again.
template <int kRows, typename T>
const T* table_for(const T* table) {
  if constexpr (kRows >= 4) asm("" : "+r"(table));
  return table;
}

// 128 bytes to be looked up.
struct alignas(64) ByteTable {
  std::uint8_t bytes[128];
  __m512i operator[](__m512i index) const {  // bit 7 of an index is ignored
    return _mm512_permutex2var_epi8(_mm512_load_si512(bytes), index, _mm512_load_si512(bytes + 64));
  }
};
// One byte of the bf16 of value(first), value(first + 1), ...
template <typename F>
constexpr ByteTable byte_table(int first, int shift, F value) {
  ByteTable table{};
  for (int i = 0; i < 128; ++i)
    table.bytes[i] =
        static_cast<std::uint8_t>(std::bit_cast<std::uint32_t>(value(first + i)) >> (16 + shift));
  return table;
}

constexpr float e4m3_value(int i) { return exact_e4m3(static_cast<std::uint8_t>(i)); }
constexpr ByteTable kE4M3Tables[2] = {byte_table(0, 0, e4m3_value), byte_table(0, 8, e4m3_value)};
struct ReadE4M3 {
  static constexpr std::int64_t kBytes = 128;
  ReadE4M3(const Segments&, std::int64_t) {}
  template <int kRows>
  void pairs(const std::uint8_t* p, __m512i b[4]) const {
    for (int half = 0; half < 2; ++half) {
      const __m512i v = _mm512_loadu_si512(p + 64 * half);
      const ByteTable* tables = table_for<kRows>(kE4M3Tables);
      const __m512i lo = tables[0][v];
      // high | (v & 0x80)
      const __m512i hi = _mm512_ternarylogic_epi32(tables[1][v], v, _mm512_set1_epi8(-128), 0xf8);
      b[2 * half] = _mm512_unpacklo_epi8(lo, hi);
      b[2 * half + 1] = _mm512_unpackhi_epi8(lo, hi);
    }
  }
};

constexpr float byte_value(int i) { return static_cast<float>(i - 128); }
constexpr ByteTable kByteTables[4] = {byte_table(0, 0, byte_value), byte_table(128, 0, byte_value),
                                      byte_table(0, 8, byte_value), byte_table(128, 8, byte_value)};
struct ReadByte {
  static constexpr std::int64_t kBytes = 128;
  ReadByte(const Segments&, std::int64_t) {}
  template <int kRows>
  void pairs(const std::uint8_t* p, __m512i b[4]) const {
    for (int half = 0; half < 2; ++half) {
      const __m512i v = _mm512_loadu_si512(p + 64 * half);
      const ByteTable* tables = table_for<kRows>(kByteTables);
      const __mmask64 upper = _mm512_movepi8_mask(v);
      const __m512i lo = _mm512_mask_mov_epi8(tables[0][v], upper, tables[1][v]);
      const __m512i hi = _mm512_mask_mov_epi8(tables[2][v], upper, tables[3][v]);
      b[2 * half] = _mm512_unpacklo_epi8(lo, hi);
      b[2 * half + 1] = _mm512_unpackhi_epi8(lo, hi);
    }
  }
};
#else
struct ReadE4M3 {
  static constexpr std::int64_t kBytes = 128;
  ReadE4M3(const Segments&, std::int64_t) {}
  template <int kRows>
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
  ReadByteZero(const Segments& s, std::int64_t segment) {
    if (s.code == Code::kByteZero) {
      read_zero_words(s.zero + segment * s.data_stride, zero);
    } else {
      for (__m512i& z : zero) z = _mm512_set1_epi16(128);
    }
  }
  template <int kRows>
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

// 32 words to be looked up: bf16 of value(0), value(1), ...
struct alignas(64) WordTable {
  std::uint16_t words[32];
};
template <typename F>
constexpr WordTable word_table(F value) {
  WordTable table{};
  for (int i = 0; i < 32; ++i)
    table.words[i] = static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(value(i)) >> 16);
  return table;
}

// vpermw looks at five bits of an index. Sixteen values are there twice, so the fifth bit (the next
// nibble's) does not matter and no mask is needed.
constexpr WordTable kInt4Words = word_table([](int i) { return kNibbleInt4[i % 16]; });
constexpr WordTable kE2M1Words = word_table([](int i) { return kE2M1[i % 16]; });
struct ReadNibble {
  static constexpr std::int64_t kBytes = 64;
  __m512i table;
  ReadNibble(const Segments& s, std::int64_t)
      : table(_mm512_load_si512(s.e2m1 ? kE2M1Words.words : kInt4Words.words)) {}
  template <int kRows>
  void pairs(const std::uint8_t* p, __m512i b[4]) const {
    const __m512i v = _mm512_loadu_si512(p);
    b[0] = _mm512_permutexvar_epi16(v, table);
    b[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(v, 4), table);
    b[2] = _mm512_permutexvar_epi16(_mm512_srli_epi16(v, 8), table);
    b[3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(v, 12), table);
  }
};

// q - zero is -15 .. 15: five bits of two's complement, which index a table of 32.
constexpr WordTable kSignedWords =
    word_table([](int i) { return static_cast<float>(i < 16 ? i : i - 32); });
struct ReadNibbleZero {
  static constexpr std::int64_t kBytes = 64;
  __m512i table, zero[4];
  ReadNibbleZero(const Segments& s, std::int64_t segment)
      : table(_mm512_load_si512(kSignedWords.words)) {
    read_zero_words(s.zero + segment * s.data_stride, zero);
  }
  template <int kRows>
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

// e2m1 times 2^(e - 127): an addition to the exponent of what is not zero. Sums then need no scale, and
// run on from group to group; scaling them every 32 of K would cost a fifth. e below 2 counts as 2 (bf16
// products would be flushed anyway); what is above 252 has been made NaN by the caller.
struct ReadE2M1Scaled {
  static constexpr std::int64_t kBytes = 64;
  __m512i table, add[4];
  ReadE2M1Scaled(const Segments& s, std::int64_t segment)
      : table(_mm512_load_si512(kE2M1Words.words)) {
    const std::uint8_t* scales = s.zero + segment * s.data_stride;
    __m512i e = _mm512_loadu_si512(scales);
    e = _mm512_min_epu8(_mm512_max_epu8(e, _mm512_set1_epi8(2)), _mm512_set1_epi8(-4));  // 2 .. 252
    for (int i = 0; i < 4; ++i) {  // column c's in both words of its pair
      const __m512i wide = _mm512_cvtepu8_epi32(_mm512_castsi512_si128(e));
      const __m512i both = _mm512_or_si512(wide, _mm512_slli_epi32(wide, 16));
      add[i] = _mm512_slli_epi16(_mm512_sub_epi16(both, _mm512_set1_epi16(127)), 7);
      e = _mm512_alignr_epi64(e, e, 2);
    }
  }
  template <int kRows>
  void pairs(const std::uint8_t* p, __m512i b[4]) const {
    const __m512i v = _mm512_loadu_si512(p);
    const __m512i q[4] = {v, _mm512_srli_epi16(v, 4), _mm512_srli_epi16(v, 8),
                          _mm512_srli_epi16(v, 12)};
    for (int i = 0; i < 4; ++i) {
      const __mmask32 not_zero =
          _mm512_test_epi16_mask(v, _mm512_set1_epi16(static_cast<std::int16_t>(7 << (4 * i))));
      b[i] = _mm512_maskz_add_epi16(not_zero, _mm512_permutexvar_epi16(q[i], table), add[i]);
    }
  }
};

// --- what a block multiplies: `units` per packed step, each four registers -------------------------
template <typename Read>
struct AsPairs : Read {  // Compute::kB16
  using Read::Read;
  static constexpr int kUnits = 1;
  template <int kRows>
  void unit(const std::uint8_t* p, int, __m512i b[4]) const {
    Read::template pairs<kRows>(p, b);
  }
};
template <typename Read>
struct AsFloats : Read {  // Compute::kF32: the pair's first, then its second
  using Read::Read;
  static constexpr int kUnits = 2;
  template <int kRows>
  void unit(const std::uint8_t* p, int which, __m512i b[4]) const {
    Read::template pairs<kRows>(p, b);
    for (int i = 0; i < 4; ++i)
      b[i] = which == 0 ? _mm512_slli_epi32(b[i], 16)
                        : _mm512_and_si512(b[i], _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
  }
};
struct ReadF16 {  // Compute::kF32
  static constexpr std::int64_t kBytes = 128;
  static constexpr int kUnits = 1;
  ReadF16(const Segments&, std::int64_t) {}
  template <int kRows>
  void unit(const std::uint8_t* p, int, __m512i b[4]) const {
    for (int i = 0; i < 4; ++i)
      b[i] = _mm512_castps_si512(
          _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32 * i))));
  }
};
struct ReadUnits {  // ready in memory
  static constexpr std::int64_t kBytes = 256;
  static constexpr int kUnits = 1;
  ReadUnits(const Segments&, std::int64_t) {}
  template <int kRows>
  void unit(const std::uint8_t* p, int, __m512i b[4]) const {
    for (int i = 0; i < 4; ++i) b[i] = _mm512_loadu_si512(p + 64 * i);
  }
};
struct ReadNibbleQuad {  // Compute::kByte
  static constexpr std::int64_t kBytes = 128;
  static constexpr int kUnits = 1;
  ReadNibbleQuad(const Segments&, std::int64_t) {}
  template <int kRows>
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
  static Sum begin(const Panel& p, std::int64_t, std::int64_t r, std::int64_t c) {
    return p.begin == Begin::kRaw ? _mm512_loadu_ps(p.raw + r * p.c_stride + c)
                                  : _mm512_setzero_ps();
  }
  static Sum add(Sum sum, __m512i b, __m512i a) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
  }
  static void store(float* p, Sum sum) { _mm512_storeu_ps(p, sum); }
  static __m512 value(Sum sum) { return sum; }
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
  // Starts at -zero * the sum of the activations: integers, so the order does not matter.
  static Sum begin(const Panel& p, std::int64_t segment, std::int64_t r, std::int64_t c) {
    const std::int32_t sum = p.row_sum[r * p.row_stride + segment];
    const __m512i shift =
        p.zero == nullptr
            ? _mm512_set1_epi32(p.implicit_zero * sum)
            : _mm512_mullo_epi32(_mm512_loadu_si512(p.zero + segment * kTileCols + c),
                                 _mm512_set1_epi32(sum));
    return _mm512_sub_epi32(p.begin == Begin::kRaw
                                ? _mm512_loadu_si512(p.raw + r * p.c_stride + c)
                                : _mm512_setzero_si512(),
                            shift);
  }
  static Sum add(Sum sum, __m512i b, __m512i a) {
#if defined(__AVX512VNNI__)
    // Not the intrinsic: around it GCC 12 copies each sum twice per product.
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(b), "v"(a));
    return sum;
#else
    const __m512i even = _mm512_madd_epi16(_mm512_and_si512(b, _mm512_set1_epi16(0xff)),
                                           _mm512_srai_epi16(_mm512_slli_epi16(a, 8), 8));
    const __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16(b, 8), _mm512_srai_epi16(a, 8));
    return _mm512_add_epi32(sum, _mm512_add_epi32(even, odd));
#endif
  }
  static void store(float* p, Sum sum) { _mm512_storeu_si512(p, sum); }
  static __m512 value(Sum sum) { return _mm512_cvtepi32_ps(sum); }
};

// How far in front of a single panel its stream is fetched.
constexpr std::int64_t kStreamAhead = 4096;

// Where one segment's sums go.
struct Finish {
  float* total;
  std::int64_t c_stride;
  End end;
  const float* scale;      // [64], or none
  const float* row_scale;  // at row_stride, or none
  std::int64_t row_stride;

  inline __attribute__((always_inline)) void operator()(std::int64_t r, std::int64_t c,
                                                        __m512 v) const {
    float* to = total + r * c_stride + c;
    if (row_scale != nullptr) v = _mm512_mul_ps(v, _mm512_set1_ps(row_scale[r * row_stride]));
    const __m512 factor = scale != nullptr ? _mm512_loadu_ps(scale + c) : _mm512_set1_ps(1.0f);
    _mm512_storeu_ps(to, end == End::kAdd ? _mm512_fmadd_ps(v, factor, _mm512_loadu_ps(to))
                                          : _mm512_mul_ps(v, factor));
  }
};

// kRows rows x 64 columns over a run of segments. Every loop over sums is unrolled by name: GCC 12
// would otherwise keep them in memory around the main loop.
template <Compute kCompute, int kRows, typename Unpack>
__attribute__((noinline)) void block(const Panel& p, const Segments& s) {
  using D = Dot<kCompute>;
  const std::uint32_t* a[kRows];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) a[r] = p.a + r * p.a_stride;
  const std::uint8_t* ahead = p.ahead;
  const std::int64_t ahead_step = p.ahead_step;
  typename D::Sum sums[kRows][4];
  for (std::int64_t segment = 0; segment < s.count; ++segment) {
    const std::uint8_t* data = s.data + segment * s.data_stride;
    const Unpack unpack(s, segment);
    if (segment == 0 || p.sums == Sums::kPerSegment) {
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) sums[r][i] = D::begin(p, segment, r, 16 * i);
    }
    const std::int64_t steps = s.steps_of(segment);
    std::int64_t u = segment * p.segment_units;
    for (std::int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 2
      for (int which = 0; which < Unpack::kUnits; ++which, ++u) {
        __m512i b[4];
        unpack.template unit<kRows>(data, which, b);
        if (ahead != nullptr) {
          _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T1);
          _mm_prefetch(reinterpret_cast<const char*>(ahead + ahead_step / 2), _MM_HINT_T1);
          ahead += ahead_step;
        } else if (which == 0) {
#pragma GCC unroll 4
          for (int line = 0; line < Unpack::kBytes; line += 64)
            _mm_prefetch(reinterpret_cast<const char*>(data + kStreamAhead + line), _MM_HINT_T0);
        }
#pragma GCC unroll 6
        for (int r = 0; r < kRows; ++r) {
          const __m512i x = _mm512_set1_epi32(static_cast<int>(a[r][u]));
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) sums[r][i] = D::add(sums[r][i], b[i], x);
        }
      }
      data += Unpack::kBytes;
    }
    if (p.sums == Sums::kThroughout && segment + 1 < s.count) continue;
    if (p.end == End::kRaw) {
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) D::store(p.raw + r * p.c_stride + 16 * i, sums[r][i]);
      continue;
    }
    const Finish finish{.total = p.total,
                        .c_stride = p.c_stride,
                        .end = segment == 0 || p.sums == Sums::kThroughout ? p.end : End::kAdd,
                        .scale = p.scale != nullptr ? p.scale + segment * p.scale_stride : nullptr,
                        .row_scale = p.row_scale != nullptr ? p.row_scale + segment : nullptr,
                        .row_stride = p.row_stride};
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) finish(r, 16 * i, D::value(sums[r][i]));
  }
}

template <Compute kCompute, typename Unpack>
void blocks(const Panel& p, const Segments& s) {
  switch (p.rows) {
    case 1: return block<kCompute, 1, Unpack>(p, s);
    case 2: return block<kCompute, 2, Unpack>(p, s);
    case 3: return block<kCompute, 3, Unpack>(p, s);
    case 4: return block<kCompute, 4, Unpack>(p, s);
    case 5: return block<kCompute, 5, Unpack>(p, s);
    case 6: return block<kCompute, 6, Unpack>(p, s);
  }
}

// The type of a code's unpacker, to a generic lambda.
template <Compute kCompute, typename F>
void with_unpacker(Code code, F&& f) {
  if constexpr (kCompute == Compute::kByte) {
    f(std::type_identity<ReadNibbleQuad>());
  } else {
    const auto pairs = [&]<typename Read>(std::type_identity<Read>) {
      if constexpr (kCompute == Compute::kB16)
        f(std::type_identity<AsPairs<Read>>());
      else
        f(std::type_identity<AsFloats<Read>>());
    };
    switch (code) {
      case Code::kB16:  // what is multiplied as it lies never gets here
        if constexpr (kCompute == Compute::kF32) pairs(std::type_identity<ReadB16>());
        return;
      case Code::kE4M3: return pairs(std::type_identity<ReadE4M3>());
      case Code::kByte: return pairs(std::type_identity<ReadByte>());
      case Code::kByteZero: return pairs(std::type_identity<ReadByteZero>());
      case Code::kNibble: return pairs(std::type_identity<ReadNibble>());
      case Code::kE2M1Scaled: return pairs(std::type_identity<ReadE2M1Scaled>());
      case Code::kNibbleZero: return pairs(std::type_identity<ReadNibbleZero>());
      case Code::kF16:
        if constexpr (kCompute == Compute::kF32) f(std::type_identity<ReadF16>());
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

  static constexpr bool can_fuse() { return true; }
  static constexpr bool can_fold_e8m0() { return true; }

  template <Compute kCompute>
  static void native(const Panel& p, const Segments& s) {
    blocks<kCompute, ReadUnits>(p, s);
  }

  template <Compute kCompute>
  static void fused(const Panel& p, const Segments& s) {
    with_unpacker<kCompute>(
        s.code, [&]<typename Unpack>(std::type_identity<Unpack>) { blocks<kCompute, Unpack>(p, s); });
  }

  template <Compute kCompute>
  static void unpack(const Segments& s, void* out) {
    with_unpacker<kCompute>(s.code, [&]<typename Unpack>(std::type_identity<Unpack>) {
      const Unpack unpack(s, 0);
      auto* to = static_cast<std::uint8_t*>(out);
      const std::uint8_t* data = s.data;
      for (std::int64_t step = 0; step < s.steps; ++step, data += Unpack::kBytes) {
        for (int which = 0; which < Unpack::kUnits; ++which, to += 256) {
          __m512i b[4];
          unpack.template unit<1>(data, which, b);
          for (int i = 0; i < 4; ++i) _mm512_store_si512(to + 64 * i, b[i]);
        }
      }
    });
  }
};

}  // namespace
}  // namespace moesaic
