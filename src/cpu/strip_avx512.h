// SPDX-License-Identifier: Apache-2.0
// The AVX-512 levels: register blocks of 1 to 6 rows x 64 columns or 7 to 12 rows x 32, with weights
// either ready in memory or unpacked in registers on the way (strip_avx512_read.h). Compiled at three levels:
// F/BW/VL/DQ, +VNNI/VBMI, +BF16.
#pragma once

#include <immintrin.h>

#include "cpu/strip.h"
#include "cpu/strip_avx512_read.h"

namespace moesaic {
namespace {

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
  static Sum begin(const Panel& p, std::int64_t segment, std::int64_t r, std::int64_t c) {
    if (p.begin == Begin::kRaw) return _mm512_loadu_si512(p.raw + r * p.c_stride + c);
    const __m512i begin = _mm512_set1_epi32(p.row_begin[r * p.row_stride + segment]);
    return p.zero == nullptr ? begin
                             : _mm512_mullo_epi32(
                                   _mm512_loadu_si512(p.zero + segment * kTileCols + c), begin);
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
  static __m512 value(Sum sum) {
    // Opaque, or GCC 12 converts all sums in front of a segment's several ends and keeps them in memory.
    asm volatile("" : "+v"(sum));
    return _mm512_cvtepi32_ps(sum);
  }
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

  inline __attribute__((always_inline)) void add(std::int64_t r, std::int64_t c, __m512 v) const {
    float* to = total + r * c_stride + c;
    _mm512_storeu_ps(to, _mm512_fmadd_ps(v, _mm512_loadu_ps(scale + c), _mm512_loadu_ps(to)));
  }
  inline __attribute__((always_inline)) void operator()(std::int64_t r, std::int64_t c,
                                                        __m512 v) const {
    float* to = total + r * c_stride + c;
    if (row_scale != nullptr) v = _mm512_mul_ps(v, _mm512_set1_ps(row_scale[r * row_stride]));
    const __m512 factor = scale != nullptr ? _mm512_loadu_ps(scale + c) : _mm512_set1_ps(1.0f);
    _mm512_storeu_ps(to, end == End::kAdd ? _mm512_fmadd_ps(v, factor, _mm512_loadu_ps(to))
                                          : _mm512_mul_ps(v, factor));
  }
};

// kRows rows x 16 kRegs columns, from column 32 `half` on, over a run of segments. Every loop over sums is
// unrolled by name: GCC 12 would otherwise keep them in memory around the main loop.
template <Compute kCompute, int kRows, int kRegs, typename Unpack>
__attribute__((noinline)) void block(const Panel& p, const Segments& s, std::int64_t half) {
  using D = Dot<kCompute>;
  constexpr int kUnits = Unpack::kUnits;
  const std::int64_t column = kHalf * half;
  // Rows by fours behind one pointer: twelve pointers would not fit the registers.
  std::int64_t stride = p.a_stride * 4, stride3 = p.a_stride * 12;
  const std::int64_t ahead_step = p.ahead_step, ahead_line = ahead_step * kRegs / 8;
  const std::uint8_t* ahead = p.ahead != nullptr ? p.ahead + half * 2 * ahead_line : nullptr;
  typename D::Sum sums[kRows][kRegs];
  for (std::int64_t segment = 0; segment < s.count; ++segment) {
    const std::uint8_t* data = s.data + segment * s.data_stride;
    if (ahead == nullptr && s.count > 1) {  // the lines of a header, which no step below asks for
      const std::int64_t header = s.data_stride - s.steps * Unpack::kBytes;
      for (std::int64_t line = 0; line < header; line += 64)
        _mm_prefetch(reinterpret_cast<const char*>(data + kStreamAhead - header + line), _MM_HINT_T0);
    }
    data += half * Unpack::kHalfBytes;
    const Unpack unpack(s, segment, half);
    if (segment == 0 || p.sums == Sums::kPerSegment) {
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int i = 0; i < kRegs; ++i) sums[r][i] = D::begin(p, segment, r, column + 16 * i);
    }
    const std::int64_t steps = s.steps_of(segment);
    const auto* a0 = reinterpret_cast<const char*>(p.a + segment * p.segment_units);
    const char* a4 = a0 + 4 * stride;
    const char* a8 = a4 + 4 * stride;
    for (std::int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 2
      for (int which = 0; which < kUnits; ++which) {
        __m512i b[kRegs];
        unpack.template unit<kRows, kRegs>(data, which, b);
        if (ahead != nullptr) {
          _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T1);
          _mm_prefetch(reinterpret_cast<const char*>(ahead + ahead_line), _MM_HINT_T1);
          ahead += ahead_step;
        } else if (which == 0) {
#pragma GCC unroll 4
          for (int line = 0; line < Unpack::kBytes; line += 64)
            _mm_prefetch(reinterpret_cast<const char*>(data + kStreamAhead + line), _MM_HINT_T0);
        }
        // Opaque, or the compiler would count with a pointer for each row.
        asm("" : "+r"(a0), "+r"(a4), "+r"(a8), "+r"(stride), "+r"(stride3));
#pragma GCC unroll 12
        for (int r = 0; r < kRows; ++r) {
          const char* from = r < 4 ? a0 : r < 8 ? a4 : a8;
          from += r % 4 == 0 ? 0 : r % 4 == 1 ? stride : r % 4 == 2 ? 2 * stride : stride3;
          Unit unit;
          std::memcpy(&unit, from, sizeof(unit));
          const __m512i x = _mm512_set1_epi32(static_cast<int>(unit));
#pragma GCC unroll 4
          for (int i = 0; i < kRegs; ++i) sums[r][i] = D::add(sums[r][i], b[i], x);
        }
        a0 += 4;
        a4 += 4;
        a8 += 4;
      }
      data += Unpack::kBytes;
    }
    if (p.sums == Sums::kThroughout && segment + 1 < s.count) continue;
    if (p.end == End::kRaw) {
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int i = 0; i < kRegs; ++i)
          D::store(p.raw + r * p.c_stride + column + 16 * i, sums[r][i]);
      continue;
    }
    const Finish finish{.total = p.total,
                        .c_stride = p.c_stride,
                        .end = segment == 0 || p.sums == Sums::kThroughout ? p.end : End::kAdd,
                        .scale = p.scale != nullptr ? p.scale + segment * p.scale_stride : nullptr,
                        .row_scale = p.row_scale != nullptr ? p.row_scale + segment : nullptr,
                        .row_stride = p.row_stride};
    // Groups along K end here, every few hundred products: what is the same for all is asked once.
    if (finish.end == End::kAdd && finish.scale != nullptr && finish.row_scale != nullptr) {
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) {
        const __m512 row = _mm512_set1_ps(finish.row_scale[r * finish.row_stride]);
#pragma GCC unroll 4
        for (int i = 0; i < kRegs; ++i)
          finish.add(r, column + 16 * i, _mm512_mul_ps(D::value(sums[r][i]), row));
      }
      continue;
    }
    if (finish.end == End::kAdd && finish.scale != nullptr) {
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int i = 0; i < kRegs; ++i) finish.add(r, column + 16 * i, D::value(sums[r][i]));
      continue;
    }
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int i = 0; i < kRegs; ++i) finish(r, column + 16 * i, D::value(sums[r][i]));
  }
}

// Up to six rows take all 64 columns at once, so that weights are read once. Where unpacking takes more than
// the six products of a register hide, up to twelve rows take the columns by halves.
inline constexpr std::int64_t kWholeRows = 6, kHalfRows = 12;

template <Compute kCompute, typename Unpack>
void whole_blocks(const Panel& p, const Segments& s) {
  switch (p.rows) {
    case 1: return block<kCompute, 1, 4, Unpack>(p, s, 0);
    case 2: return block<kCompute, 2, 4, Unpack>(p, s, 0);
    case 3: return block<kCompute, 3, 4, Unpack>(p, s, 0);
    case 4: return block<kCompute, 4, 4, Unpack>(p, s, 0);
    case 5: return block<kCompute, 5, 4, Unpack>(p, s, 0);
    case 6: return block<kCompute, 6, 4, Unpack>(p, s, 0);
  }
}
template <Compute kCompute, typename Unpack>
void half_blocks(const Panel& p, const Segments& s) {
  for (std::int64_t half = 0; half < 2; ++half) {
    switch (p.rows) {
      case 7: block<kCompute, 7, 2, Unpack>(p, s, half); break;
      case 8: block<kCompute, 8, 2, Unpack>(p, s, half); break;
      case 9: block<kCompute, 9, 2, Unpack>(p, s, half); break;
      case 10: block<kCompute, 10, 2, Unpack>(p, s, half); break;
      case 11: block<kCompute, 11, 2, Unpack>(p, s, half); break;
      case 12: block<kCompute, 12, 2, Unpack>(p, s, half); break;
    }
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

  template <Compute kCompute>
  static std::int64_t panel_rows(Code code) {
    std::int64_t rows = kWholeRows;
    with_unpacker<kCompute>(code, [&]<typename Unpack>(std::type_identity<Unpack>) {
      if (Unpack::kTakesHalves) rows = kHalfRows;
    });
    return rows;
  }
  template <Compute>
  static constexpr std::int64_t streamed_rows() {
    return kWholeRows;
  }
  template <Compute>
  static constexpr std::int64_t readable_rows() {
    return 1;
  }
  template <Compute>
  static constexpr bool can_fuse() {
    return true;
  }
  static constexpr bool can_fold_e8m0() { return true; }

  template <Compute kCompute>
  static void native(const Panel& p, const Segments& s) {
    whole_blocks<kCompute, ReadUnits>(p, s);
  }

  template <Compute kCompute>
  static void fused(const Panel& p, const Segments& s) {
    with_unpacker<kCompute>(s.code, [&]<typename Unpack>(std::type_identity<Unpack>) {
      if constexpr (Unpack::kTakesHalves)
        if (p.rows > kWholeRows) return half_blocks<kCompute, Unpack>(p, s);
      whole_blocks<kCompute, Unpack>(p, s);
    });
  }
  template <Compute kCompute>
  static void unpack(const Segments&, void*) {}
};

}  // namespace
}  // namespace moesaic
