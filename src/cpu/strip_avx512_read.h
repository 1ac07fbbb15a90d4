// SPDX-License-Identifier: Apache-2.0
// The AVX-512 levels' readers: a packed step into the four registers that are multiplied. What a level
// lacks is replaced by a longer sequence with the same numbers.
#pragma once

#include <immintrin.h>

#include "cpu/strip_rows.h"

namespace moesaic {
namespace {

// --- unpackers: one packed step -> the 64 columns' units ------------------------------------------
// pairs(): two bf16 per column. Every code's values are exact in bf16.
struct ReadB16 {
  static constexpr bool kTakesHalves = false;
  static constexpr std::int64_t kBytes = 256, kHalfBytes = 128;
  ReadB16(const Segments&, std::int64_t, std::int64_t) {}
  template <int kRows, int kRegs>
  void pairs(const std::uint8_t* p, __m512i* b) const {
    for (int i = 0; i < kRegs; ++i) b[i] = _mm512_loadu_si512(p + 64 * i);
  }
};

// By way of fp32, whose additions run beside the products: a byte in the lowest bits of 2^23 is 2^23 + byte, from which
// `zero`, 2^23 + zero point, is subtracted. What is left has eight bits: the lower half of its word is zero.
inline constexpr float kByteShift = 0x1p23f;
inline __m512i bytes_to_bf16(__m512i words, __m512 zero) {
  const __m512i shift = _mm512_castps_si512(_mm512_set1_ps(kByteShift));
  const __m512i even = _mm512_castps_si512(_mm512_sub_ps(
      _mm512_castsi512_ps(_mm512_mask_mov_epi16(words, 0xaaaaaaaa, shift)), zero));
  const __m512i odd = _mm512_castps_si512(_mm512_sub_ps(
      _mm512_castsi512_ps(_mm512_or_si512(_mm512_srli_epi32(words, 16), shift)), zero));
  return _mm512_or_si512(_mm512_srli_epi32(even, 16), odd);
}

#if defined(__AVX512VBMI__)
// Tables that the compiler keeps in registers over a loop push many sums out of them; a pointer it knows nothing
// about makes it read them again.
template <int kSums, typename T>
const T* table_for(const T* table) {
  if constexpr (kSums > 20) asm("" : "+r"(table));
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
// What beside_products adds, by place: low bytes, then high bytes.
constexpr ByteTable e4m3_added() {
  ByteTable table{};
  for (int place = 0; place < 64; ++place) {
    const int magnitude = place == 0 ? 0x7f : place - 1;
    const int added =
        static_cast<int>(std::bit_cast<std::uint32_t>(e4m3_value(magnitude)) >> 16) - (magnitude << 4);
    table.bytes[place] = static_cast<std::uint8_t>(added);
    table.bytes[64 + place] = static_cast<std::uint8_t>(added >> 8);
  }
  return table;
}
constexpr ByteTable kE4M3Added = e4m3_added();
struct ReadE4M3 {
  static constexpr bool kTakesHalves = true;
  static constexpr std::int64_t kBytes = 128, kHalfBytes = 64;
  ReadE4M3(const Segments&, std::int64_t, std::int64_t) {}
  template <int kRows, int kRegs>
  void pairs(const std::uint8_t* p, __m512i* b) const {
    if constexpr (kRegs == 2 && kRows > 8) return beside_products(_mm512_loadu_si512(p), b);
    for (int half = 0; half < kRegs / 2; ++half) {
      __m512i v = _mm512_loadu_si512(p + 64 * half);
      // Loads are short beside four and more rows (tables read again took 20 to 40%): not this one three times.
      if constexpr (kRows >= 4) asm("" : "+v"(v));
      const ByteTable* tables = table_for<kRows * kRegs>(kE4M3Tables);
      const __m512i lo = tables[0][v];
      // high | (v & 0x80)
      const __m512i hi = _mm512_ternarylogic_epi32(tables[1][v], v, _mm512_set1_epi8(-128), 0xf8);
      b[2 * half] = _mm512_unpacklo_epi8(lo, hi);
      b[2 * half + 1] = _mm512_unpackhi_epi8(lo, hi);
    }
  }
  // Lookups of 128 bytes take time from the products; more, but simpler instructions do not. The exponent and
  // mantissa are moved to their place, and something is added: the difference of the exponents' offsets for
  // a normal number, another word for NaN (place 0) and for magnitudes 0 to 7 (places 1 to 8).
  static void beside_products(__m512i v, __m512i* b) {
    const __m512i magnitude = _mm512_and_si512(v, _mm512_set1_epi8(0x7f));
    const __m512i place = _mm512_min_epi8(_mm512_add_epi8(magnitude, _mm512_set1_epi8(1)),
                                          _mm512_set1_epi8(63));
    const ByteTable* words = table_for<24>(&kE4M3Added);
    const __m512i lo = _mm512_permutexvar_epi8(place, _mm512_load_si512(words->bytes));
    const __m512i hi = _mm512_permutexvar_epi8(place, _mm512_load_si512(words->bytes + 64));
    const __m512i none = _mm512_setzero_si512();
    const __m512i kept = _mm512_set1_epi16(static_cast<short>(0x87f0));
    b[0] = _mm512_add_epi16(
        _mm512_and_si512(_mm512_srai_epi16(_mm512_unpacklo_epi8(none, v), 4), kept),
        _mm512_unpacklo_epi8(lo, hi));
    b[1] = _mm512_add_epi16(
        _mm512_and_si512(_mm512_srai_epi16(_mm512_unpackhi_epi8(none, v), 4), kept),
        _mm512_unpackhi_epi8(lo, hi));
  }
};

constexpr float byte_value(int i) { return static_cast<float>(i - 128); }
constexpr ByteTable kByteTables[4] = {byte_table(0, 0, byte_value), byte_table(128, 0, byte_value),
                                      byte_table(0, 8, byte_value), byte_table(128, 8, byte_value)};
struct ReadByte {
  static constexpr bool kTakesHalves = true;
  static constexpr std::int64_t kBytes = 128, kHalfBytes = 64;
  ReadByte(const Segments&, std::int64_t, std::int64_t) {}
  template <int kRows, int kRegs>
  void pairs(const std::uint8_t* p, __m512i* b) const {
    for (int half = 0; half < kRegs / 2; ++half) {
      const __m512i v = _mm512_loadu_si512(p + 64 * half);
      if constexpr (kRows >= 3) {
        const __m512i none = _mm512_setzero_si512();
        const __m512 zero = _mm512_set1_ps(kByteShift + 128.0f);
        b[2 * half] = bytes_to_bf16(_mm512_unpacklo_epi8(v, none), zero);
        b[2 * half + 1] = bytes_to_bf16(_mm512_unpackhi_epi8(v, none), zero);
        continue;
      }
      const __mmask64 upper = _mm512_movepi8_mask(v);
      const __m512i lo = _mm512_mask_mov_epi8(kByteTables[0][v], upper, kByteTables[1][v]);
      const __m512i hi = _mm512_mask_mov_epi8(kByteTables[2][v], upper, kByteTables[3][v]);
      b[2 * half] = _mm512_unpacklo_epi8(lo, hi);
      b[2 * half + 1] = _mm512_unpackhi_epi8(lo, hi);
    }
  }
};
#else
struct ReadE4M3 {
  static constexpr bool kTakesHalves = true;
  static constexpr std::int64_t kBytes = 128, kHalfBytes = 64;
  ReadE4M3(const Segments&, std::int64_t, std::int64_t) {}
  template <int kRows, int kRegs>
  void pairs(const std::uint8_t* p, __m512i* b) const {
    for (int half = 0; half < kRegs / 2; ++half) {
      const __m512i v = _mm512_loadu_si512(p + 64 * half);
      b[2 * half] = e4m3_words_to_bf16(_mm512_unpacklo_epi8(v, _mm512_setzero_si512()));
      b[2 * half + 1] = e4m3_words_to_bf16(_mm512_unpackhi_epi8(v, _mm512_setzero_si512()));
    }
  }
};
#endif

// A column's zero point in both words of its pair.
inline void read_zero_words(const std::uint8_t* zero, __m512i out[4]) {
  for (int i = 0; i < 4; ++i) {
    const __m512i z = _mm512_cvtepu8_epi32(
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(zero + 16 * i)));
    out[i] = _mm512_or_si512(z, _mm512_slli_epi32(z, 16));
  }
}

struct ReadByteZero {
  static constexpr bool kTakesHalves = true;
  static constexpr std::int64_t kBytes = 128, kHalfBytes = 64;
  __m512 zero[4];
  ReadByteZero(const Segments& s, std::int64_t segment, std::int64_t half) {
    const std::uint8_t* from = s.zero + segment * s.data_stride + kHalf * half;
    for (int i = 0; i < 4; ++i)
      zero[i] = _mm512_add_ps(
          _mm512_set1_ps(kByteShift),
          s.code != Code::kByteZero
              ? _mm512_set1_ps(128.0f)
              : _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(
                    _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 16 * i)))));
  }
  template <int kRows, int kRegs>
  void pairs(const std::uint8_t* p, __m512i* b) const {
#pragma GCC unroll 2
    for (int half = 0; half < kRegs / 2; ++half) {
      const __m512i v = _mm512_loadu_si512(p + 64 * half), none = _mm512_setzero_si512();
      b[2 * half] = bytes_to_bf16(_mm512_unpacklo_epi8(v, none), zero[2 * half]);
      b[2 * half + 1] = bytes_to_bf16(_mm512_unpackhi_epi8(v, none), zero[2 * half + 1]);
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

// The words of a kU4Pair step with the columns' nibbles lowest; above them is what follows.
struct Nibbles {
  static constexpr std::int64_t kBytes = 64, kHalfBytes = 0;
  __m512i first;
  explicit Nibbles(std::int64_t half) : first(_mm512_set1_epi16(static_cast<short>(8 * half))) {}
  template <int kRegs>
  void split(const std::uint8_t* p, __m512i* q) const {
    const __m512i v = _mm512_loadu_si512(p);
    q[0] = kRegs == 4 ? v : _mm512_srlv_epi16(v, first);
    q[1] = _mm512_srli_epi16(q[0], 4);
    if constexpr (kRegs == 4) {
      q[2] = _mm512_srli_epi16(v, 8);
      q[3] = _mm512_srli_epi16(v, 12);
    }
  }
};

// vpermw looks at five bits of an index. Sixteen values are there twice, so the fifth bit (the next
// nibble's) does not matter and no mask is needed.
constexpr WordTable kInt4Words = word_table([](int i) { return kNibbleInt4[i % 16]; });
constexpr WordTable kE2M1Words = word_table([](int i) { return kE2M1[i % 16]; });
struct ReadNibble : Nibbles {
  static constexpr bool kTakesHalves = false;
  __m512i table;
  ReadNibble(const Segments& s, std::int64_t, std::int64_t half)
      : Nibbles(half), table(_mm512_load_si512(s.e2m1 ? kE2M1Words.words : kInt4Words.words)) {}
  template <int kRows, int kRegs>
  void pairs(const std::uint8_t* p, __m512i* b) const {
    split<kRegs>(p, b);
#pragma GCC unroll 4
    for (int i = 0; i < kRegs; ++i) b[i] = _mm512_permutexvar_epi16(b[i], table);
  }
};

struct ReadE2M1Bytes : ReadNibble {  // their scales: strip_avx512_block.h
  using ReadNibble::ReadNibble;
};
template <typename Unpack>
inline constexpr bool kHasByteScales = std::is_base_of_v<ReadE2M1Bytes, Unpack>;

// q - zero is -15 .. 15: five bits of two's complement, which index a table of 32.
constexpr WordTable kSignedWords =
    word_table([](int i) { return static_cast<float>(i < 16 ? i : i - 32); });
struct ReadNibbleZero : Nibbles {
  static constexpr bool kTakesHalves = true;
  __m512i table, zero[4];
  ReadNibbleZero(const Segments& s, std::int64_t segment, std::int64_t half)
      : Nibbles(half), table(_mm512_load_si512(kSignedWords.words)) {
    read_zero_words(s.zero + segment * s.data_stride + kHalf * half, zero);
  }
  template <int kRows, int kRegs>
  void pairs(const std::uint8_t* p, __m512i* b) const {
    split<kRegs>(p, b);
#pragma GCC unroll 4
    for (int i = 0; i < kRegs; ++i)
      b[i] = _mm512_permutexvar_epi16(
          _mm512_sub_epi16(_mm512_and_si512(b[i], _mm512_set1_epi16(15)), zero[i]), table);
  }
};

// e2m1 times 2^(e - 127): a change of the exponent of what is not zero. Sums then need no scale, and
// run on from group to group; scaling them every 32 of K would cost a fifth. e below 2 counts as 2 (bf16
// products would be flushed anyway); what is above 252 has been made NaN by the caller.
// The table's magnitudes are those for the largest e, 252, and what e lacks is subtracted: saturating, so
// that zero stays zero (minus zero is looked up as plus zero). Testing for zero lost: 12% at one row.
constexpr std::uint16_t e2m1_at_252(int i) {
  const auto bits = static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(kE2M1[i % 16]) >> 16);
  return (bits & 0x7fffu) == 0 ? std::uint16_t{0} : static_cast<std::uint16_t>(bits + (125u << 7));
}
constexpr WordTable e2m1_words_at_252() {
  WordTable table{};
  for (int i = 0; i < 32; ++i) table.words[i] = e2m1_at_252(i);
  return table;
}
constexpr WordTable kE2M1WordsAt252 = e2m1_words_at_252();
struct ReadE2M1Scaled : Nibbles {
  static constexpr bool kTakesHalves = true;
  __m512i table, lacks[4];
  ReadE2M1Scaled(const Segments& s, std::int64_t segment, std::int64_t half)
      : Nibbles(half), table(_mm512_load_si512(kE2M1WordsAt252.words)) {
    const std::uint8_t* scales = s.zero + segment * s.data_stride + kHalf * half;
    for (int i = 0; i < 4; ++i) {  // column c's, times 2^7, in both words of its pair
      const __m128i e = _mm_max_epu8(
          _mm_loadu_si128(reinterpret_cast<const __m128i*>(scales + 16 * i)), _mm_set1_epi8(2));
      const __m512i wide = _mm512_cvtepu8_epi32(_mm_subs_epu8(_mm_set1_epi8(-4), e));
      lacks[i] = _mm512_or_si512(_mm512_slli_epi32(wide, 7), _mm512_slli_epi32(wide, 23));
    }
  }
  template <int kRows, int kRegs>
  void pairs(const std::uint8_t* p, __m512i* b) const {
    split<kRegs>(p, b);
#pragma GCC unroll 4
    for (int i = 0; i < kRegs; ++i) {
      b[i] = _mm512_permutexvar_epi16(b[i], table);
      if constexpr (kRows <= 2)  // one instruction, but on a port of the products
        b[i] = _mm512_subs_epu16(b[i], lacks[i]);
      else
        b[i] = _mm512_sub_epi16(_mm512_max_epu16(b[i], lacks[i]), lacks[i]);
    }
  }
};

// --- what a block multiplies: `units` per packed step, each four registers -------------------------
template <typename Read>
struct AsPairs : Read {  // Compute::kB16
  using Read::Read;
  static constexpr int kUnits = 1;
  template <int kRows, int kRegs>
  void unit(const std::uint8_t* p, int, __m512i* b) const {
    Read::template pairs<kRows, kRegs>(p, b);
  }
};
template <typename Read>
struct AsFloats : Read {  // Compute::kF32: the pair's first, then its second
  using Read::Read;
  static constexpr int kUnits = 2;
  template <int kRows, int kRegs>
  void unit(const std::uint8_t* p, int which, __m512i* b) const {
    Read::template pairs<kRows, kRegs>(p, b);
    for (int i = 0; i < kRegs; ++i)
      b[i] = which == 0 ? _mm512_slli_epi32(b[i], 16)
                        : _mm512_and_si512(b[i], _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
  }
};
struct ReadF16 {  // Compute::kF32
  static constexpr bool kTakesHalves = false;
  static constexpr std::int64_t kBytes = 128, kHalfBytes = 64;
  static constexpr int kUnits = 1;
  ReadF16(const Segments&, std::int64_t, std::int64_t) {}
  template <int kRows, int kRegs>
  void unit(const std::uint8_t* p, int, __m512i* b) const {
    for (int i = 0; i < kRegs; ++i)
      b[i] = _mm512_castps_si512(
          _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32 * i))));
  }
};
struct ReadUnits {  // ready in memory
  static constexpr bool kTakesHalves = false;
  static constexpr std::int64_t kBytes = 256, kHalfBytes = 128;
  static constexpr int kUnits = 1;
  ReadUnits(const Segments&, std::int64_t, std::int64_t) {}
  template <int kRows, int kRegs>
  void unit(const std::uint8_t* p, int, __m512i* b) const {
    for (int i = 0; i < kRegs; ++i) b[i] = _mm512_loadu_si512(p + 64 * i);
  }
};
struct ReadNibbleQuad {  // Compute::kByte
  static constexpr bool kTakesHalves = false;
  static constexpr std::int64_t kBytes = 128, kHalfBytes = 64;
  static constexpr int kUnits = 1;
  ReadNibbleQuad(const Segments&, std::int64_t, std::int64_t) {}
  template <int kRows, int kRegs>
  void unit(const std::uint8_t* p, int, __m512i* b) const {
    const __m512i mask = _mm512_set1_epi8(15);
    for (int half = 0; half < kRegs / 2; ++half) {
      const __m512i v = _mm512_loadu_si512(p + 64 * half);
      b[2 * half] = _mm512_and_si512(v, mask);
      b[2 * half + 1] = _mm512_and_si512(_mm512_srli_epi16(v, 4), mask);
    }
  }
};

}  // namespace
}  // namespace moesaic
