// SPDX-License-Identifier: Apache-2.0
// The AVX-512 levels' register blocks: 1 to 6 rows x 64 columns or up to 12 rows x 32, with weights either ready in
// memory or unpacked in registers on the way (strip_avx512_read.h).
#pragma once

#include <immintrin.h>

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

// How a single panel's stream is fetched. What is read as it lies, and what unpacks faster than memory delivers, is best
// left to the processor, which fetches it by itself: asking for it took 4 to 23% of the time. What takes as long as
// memory does is fetched into the second cache: the first has too few lines in flight (5 to 20% slower from memory).
enum class StreamFetch : std::uint8_t { kNot, kNear, kFar };
constexpr std::int64_t kNearAhead = 4096, kFarAhead = 8192;
template <typename Unpack, int kRows>
constexpr StreamFetch stream_fetch() {
  if constexpr (std::is_same_v<Unpack, ReadUnits>) return StreamFetch::kNot;
  if constexpr (std::is_same_v<Unpack, ReadF16> || std::is_same_v<Unpack, ReadNibbleQuad>)
    return kRows <= 3 ? StreamFetch::kNot : StreamFetch::kFar;
  if constexpr (std::is_base_of_v<ReadE4M3, Unpack>)
    return kRows == 1 ? StreamFetch::kNear : StreamFetch::kFar;
  return StreamFetch::kFar;
}

// A segment's scales by column. What lies in a header is read behind the segment's products, when it has come;
// expanding a whole piece's in front of them waited for memory, line by line: 6% of fp8_block at T = 64.
inline bool has_scales(const Panel& p) {
  return p.header != nullptr || p.scale != nullptr;
}
template <typename Unpack>
struct ScalesOf {
  const float* floats;         // [64]
  const std::uint8_t* header;  // or this: f32 [2], or E8M0 [64]

  ScalesOf(const Panel& p, std::int64_t segment)
      : floats(p.scale != nullptr ? p.scale + segment * p.scale_stride : nullptr),
        header(p.header != nullptr ? p.header + segment * p.header_stride : nullptr) {}
  inline __attribute__((always_inline)) __m512 operator[](std::int64_t c) const {
    if constexpr (kHasByteScales<Unpack>) {
      // 2^(e - 127): an exponent as it is, but 2^-127, which is subnormal. (NaN is the caller's matter.)
      const __m512i e =
          _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(header + c)));
      return _mm512_castsi512_ps(
          _mm512_max_epu32(_mm512_slli_epi32(e, 23), _mm512_set1_epi32(0x400000)));
    }
    if (header == nullptr) return _mm512_loadu_ps(floats + c);
    float half;
    std::memcpy(&half, header + c / kHalf * static_cast<std::int64_t>(sizeof(half)), sizeof(half));
    return _mm512_set1_ps(half);
  }
};

// By which powers of two sums that run on from one segment's E8M0 scales to the next one's are multiplied: near ones, with
// the exponent's offset, in bytes; those of 16 columns. Multiplying costs a third of what scaling each segment into totals
// does. (vscalefps, which takes no time from products, waits longer: 3% slower.)
inline __attribute__((always_inline)) __m512i exponent_steps(const std::uint8_t* from, const std::uint8_t* to) {
  return _mm512_sub_epi8(_mm512_add_epi8(_mm512_loadu_si512(from), _mm512_set1_epi8(127)), _mm512_loadu_si512(to));
}
inline __attribute__((always_inline)) __m512 power_of_two(__m512i steps, int i) {
  const __m128i e = i == 0   ? _mm512_castsi512_si128(steps)
                    : i == 1 ? _mm512_extracti32x4_epi32(steps, 1)
                    : i == 2 ? _mm512_extracti32x4_epi32(steps, 2)
                             : _mm512_extracti32x4_epi32(steps, 3);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu8_epi32(e), 23));
}

// Where one segment's sums go.
struct Finish {
  float* total;
  std::int64_t c_stride;
  End end;
  const float* row_scale;  // at row_stride, or none
  std::int64_t row_stride;

  inline __attribute__((always_inline)) void add(std::int64_t r, std::int64_t c, __m512 v,
                                                 __m512 scale) const {
    float* to = total + r * c_stride + c;
    _mm512_storeu_ps(to, _mm512_fmadd_ps(v, scale, _mm512_loadu_ps(to)));
  }
  inline __attribute__((always_inline)) void operator()(std::int64_t r, std::int64_t c, __m512 v,
                                                        __m512 scale) const {
    float* to = total + r * c_stride + c;
    if (row_scale != nullptr) v = _mm512_mul_ps(v, _mm512_set1_ps(row_scale[r * row_stride]));
    _mm512_storeu_ps(to, end == End::kAdd ? _mm512_fmadd_ps(v, scale, _mm512_loadu_ps(to))
                                          : _mm512_mul_ps(v, scale));
  }
};

// Where a run of steps reads. Rows by fours behind one pointer: twelve pointers would not fit the registers.
template <typename Unpack>
struct Walk {
  std::int64_t stride, stride3;  // bytes
  std::int64_t ahead_step, ahead_line;
  const std::uint8_t* ahead;
  LineFetch* lines;

  Walk(const Panel& p, std::int64_t half, int regs)
      : stride(p.a_stride * 4), stride3(p.a_stride * 12), ahead_step(p.ahead_step),
        ahead_line(ahead_step * regs / 8),
        ahead(p.ahead != nullptr ? p.ahead + half * 2 * ahead_line : nullptr),
        lines(p.lines) {}

  // The lines of headers in a stream, which no step asks for: without them each segment waited for memory.
  template <StreamFetch kFetch>
  void fetch_header(const Segments& s, const std::uint8_t* data) const {
    if (ahead != nullptr || s.count <= 1) return;
    constexpr std::int64_t kAhead = kFetch == StreamFetch::kFar    ? kFarAhead
                                    : kFetch == StreamFetch::kNear ? kNearAhead
                                                                   : 0;
    const std::uint8_t* header = data + kAhead - (s.data_stride - s.steps * Unpack::kBytes);
    for (; header < data + kAhead; header += 64) {
      // Not the intrinsic: GCC 12 finds no effect in a loop of it, in a function of its own, and deletes that.
      if constexpr (kFetch == StreamFetch::kFar)
        asm volatile("prefetcht1 %0" : : "m"(*header));
      else
        asm volatile("prefetcht0 %0" : : "m"(*header));
    }
  }
};

// Every loop over sums is unrolled by name: GCC 12 would otherwise keep them in memory around the main loop.
template <Compute kCompute, int kRows, int kRegs, typename Unpack>
inline __attribute__((always_inline)) void run_steps(
    const Unpack& unpack, Walk<Unpack>& walk, const std::uint8_t* data, const Unit* a,
    std::int64_t steps, typename Dot<kCompute>::Sum (&sums)[kRows][kRegs]) {
  constexpr StreamFetch kFetch = stream_fetch<Unpack, kRows>();
  std::int64_t stride = walk.stride, stride3 = walk.stride3;
  const std::uint8_t* ahead = walk.ahead;
  const auto* a0 = reinterpret_cast<const char*>(a);
  const char* a4 = a0 + 4 * stride;
  const char* a8 = a4 + 4 * stride;
  for (std::int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 2
    for (int which = 0; which < Unpack::kUnits; ++which) {
      __m512i b[kRegs];
      unpack.template unit<kRows, kRegs>(data, which, b);
      if (ahead != nullptr) {
        _mm_prefetch(reinterpret_cast<const char*>(ahead), _MM_HINT_T1);
        _mm_prefetch(reinterpret_cast<const char*>(ahead + walk.ahead_line), _MM_HINT_T1);
        ahead += walk.ahead_step;
      } else if (kFetch != StreamFetch::kNot && which == 0) {
#pragma GCC unroll 4
        for (int line = 0; line < Unpack::kBytes; line += 64)
          if constexpr (kFetch == StreamFetch::kFar)
            _mm_prefetch(reinterpret_cast<const char*>(data + kFarAhead + line), _MM_HINT_T1);
          else
            _mm_prefetch(reinterpret_cast<const char*>(data + kNearAhead + line), _MM_HINT_T0);
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
        for (int i = 0; i < kRegs; ++i) sums[r][i] = Dot<kCompute>::add(sums[r][i], b[i], x);
      }
      a0 += 4;
      a4 += 4;
      a8 += 4;
    }
    data += Unpack::kBytes;
  }
  walk.ahead = ahead;
}

template <Compute kCompute, int kRows, int kRegs, typename Unpack>
inline __attribute__((always_inline)) void multiply_steps(
    const Unpack& unpack, Walk<Unpack>& walk, const std::uint8_t* data, const Unit* a,
    std::int64_t steps, typename Dot<kCompute>::Sum (&sums)[kRows][kRegs]) {
  // Listed lines are fetched between runs of steps: asking in each step cost all tiles 1.5%.
  LineFetch* const list = walk.lines;
  for (std::int64_t run = list == nullptr ? steps : LineFetch::kSteps; steps > 0; steps -= run) {
    if (list != nullptr)
      list->fetch([](const std::byte* line) {
        _mm_prefetch(reinterpret_cast<const char*>(line), _MM_HINT_T1);
      });
    const std::int64_t now = std::min(run, steps);
    run_steps<kCompute, kRows, kRegs>(unpack, walk, data, a, now, sums);
    data += now * Unpack::kBytes;
    a += now * Unpack::kUnits;
  }
}

// kRows rows x 16 kRegs columns, from column 32 `half` on, over a run of segments.
template <Compute kCompute, int kRows, int kRegs, typename Unpack>
__attribute__((noinline)) void block(const Panel& p, const Segments& s, std::int64_t half) {
  using D = Dot<kCompute>;
  const std::int64_t column = kHalf * half;
  Walk<Unpack> walk(p, half, kRegs);
  typename D::Sum sums[kRows][kRegs];
  __m512i steps = _mm512_setzero_si512();
  if constexpr (kHasByteScales<Unpack>)
    if (p.sums == Sums::kThroughout && p.begin == Begin::kRaw)
      steps = exponent_steps(p.header_before + column, p.header + column);
  for (std::int64_t segment = 0; segment < s.count; ++segment) {
    const std::uint8_t* data = s.data + segment * s.data_stride;
    walk.template fetch_header<stream_fetch<Unpack, kRows>()>(s, data);
    const Unpack unpack(s, segment, half);
    if (segment == 0 || p.sums == Sums::kPerSegment) {
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int i = 0; i < kRegs; ++i) sums[r][i] = D::begin(p, segment, r, column + 16 * i);
    }
    if constexpr (kHasByteScales<Unpack>) {
      if (p.sums == Sums::kThroughout && (segment > 0 || p.begin == Begin::kRaw)) {
#pragma GCC unroll 4
        for (int i = 0; i < kRegs; ++i) {
          const __m512 step = power_of_two(steps, i);
#pragma GCC unroll 12
          for (int r = 0; r < kRows; ++r) sums[r][i] = _mm512_mul_ps(sums[r][i], step);
        }
      }
      // The next segment's, while there is time: read when it begins, its first products wait for them (8% at 3 rows).
      if (p.sums == Sums::kThroughout && segment + 1 < s.count) {
        const std::uint8_t* header = p.header + segment * p.header_stride + column;
        steps = exponent_steps(header, header + p.header_stride);
      }
    }
    multiply_steps<kCompute, kRows, kRegs>(unpack, walk, data + half * Unpack::kHalfBytes,
                                           p.a + segment * p.segment_units, s.steps_of(segment), sums);
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
                        .row_scale = p.row_scale != nullptr ? p.row_scale + segment : nullptr,
                        .row_stride = p.row_stride};
    const ScalesOf<Unpack> scales(p, segment);
    __m512 scale[kRegs];
#pragma GCC unroll 4
    for (int i = 0; i < kRegs; ++i)
      scale[i] = has_scales(p) ? scales[column + 16 * i] : _mm512_set1_ps(1.0f);
    // Groups along K end here, every few hundred products: what is the same for all is asked once.
    if (finish.end == End::kAdd && finish.row_scale != nullptr) {
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) {
        const __m512 row = _mm512_set1_ps(finish.row_scale[r * finish.row_stride]);
#pragma GCC unroll 4
        for (int i = 0; i < kRegs; ++i)
          finish.add(r, column + 16 * i, _mm512_mul_ps(D::value(sums[r][i]), row), scale[i]);
      }
      continue;
    }
    if (finish.end == End::kAdd) {
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int i = 0; i < kRegs; ++i)
          finish.add(r, column + 16 * i, D::value(sums[r][i]), scale[i]);
      continue;
    }
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int i = 0; i < kRegs; ++i)
        finish(r, column + 16 * i, D::value(sums[r][i]), scale[i]);
  }
}

// The same for groups along K, where every few hundred products all sums are scaled and added: the totals stay in
// registers. Kept in memory, their loads and stores took a tenth of the products' time.
template <Compute kCompute, int kRows, int kRegs, typename Unpack>
__attribute__((noinline)) void group_block(const Panel& p, const Segments& s, std::int64_t half) {
  using D = Dot<kCompute>;
  const std::int64_t column = kHalf * half;
  Walk<Unpack> walk(p, half, kRegs);
  __m512 totals[kRows][kRegs];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < kRegs; ++i)  // to -0 a product is added without a change
      totals[r][i] = p.end == End::kFirst ? _mm512_set1_ps(-0.0f)
                                          : _mm512_loadu_ps(p.total + r * p.c_stride + column + 16 * i);
  for (std::int64_t segment = 0; segment < s.count; ++segment) {
    const std::uint8_t* data = s.data + segment * s.data_stride;
    walk.template fetch_header<stream_fetch<Unpack, kRows>()>(s, data);
    const Unpack unpack(s, segment, half);
    typename D::Sum sums[kRows][kRegs];
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int i = 0; i < kRegs; ++i) sums[r][i] = D::begin(p, segment, r, column + 16 * i);
    multiply_steps<kCompute, kRows, kRegs>(unpack, walk, data + half * Unpack::kHalfBytes,
                                           p.a + segment * p.segment_units, s.steps_of(segment), sums);
    const ScalesOf<Unpack> scales(p, segment);
#pragma GCC unroll 4
    for (int i = 0; i < kRegs; ++i) {
      const __m512 scale = scales[column + 16 * i];
      if (p.row_scale == nullptr) {
#pragma GCC unroll 6
        for (int r = 0; r < kRows; ++r)
          totals[r][i] = _mm512_fmadd_ps(D::value(sums[r][i]), scale, totals[r][i]);
        continue;
      }
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) {
        const __m512 row = _mm512_set1_ps(p.row_scale[r * p.row_stride + segment]);
        totals[r][i] = _mm512_fmadd_ps(_mm512_mul_ps(D::value(sums[r][i]), row), scale, totals[r][i]);
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int i = 0; i < kRegs; ++i)
      _mm512_storeu_ps(p.total + r * p.c_stride + column + 16 * i, totals[r][i]);
}

}  // namespace
}  // namespace moesaic
