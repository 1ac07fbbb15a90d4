// SPDX-License-Identifier: Apache-2.0
// The AVX-512 levels: which register block (strip_avx512_block.h) takes how many rows of what. Compiled at three
// levels: F/BW/VL/DQ, +VNNI/VBMI, +BF16.
#pragma once

#include <immintrin.h>

#include "cpu/strip.h"
#include "cpu/strip_avx512_block.h"

namespace moesaic {
namespace {

// Up to six rows take all 64 columns at once, so that weights are read once. Where unpacking takes more than
// the six products of a register hide, up to twelve rows take the columns by halves.
inline constexpr std::int64_t kWholeRows = 6, kHalfRows = 12;

// Groups along K may keep their totals in registers beside the sums, with half as many rows, or columns: few rows of
// what is unpacked, and five or six rows of what ends a group every few hundred products (int8's sums). MXFP4's sums
// run on (or, with scales far from each other, which nobody trains, end in memory).
// Not four rows, which leave too few chains by halves; not a stream by halves, which would be fetched twice; and not
// tables of 128 bytes, which push sums out of their registers. bf16's five and six rows gain nothing.
template <Compute kCompute, typename Unpack>
struct Totals {
  static constexpr std::int64_t kFewRows =
      std::is_same_v<Unpack, ReadUnits> || kHasByteScales<Unpack> ? 0 : kCompute == Compute::kByte ? 2 : 3;
  static constexpr bool kEndsOften = kCompute == Compute::kByte;

  static bool stay(const Panel& p, const Segments& s) {
    if (s.count == 1 || p.sums == Sums::kThroughout || p.end == End::kRaw || !has_scales(p))
      return false;
    return p.rows <= kFewRows || (kEndsOften && p.rows > 4 && p.ahead != nullptr);
  }
};
template <Compute kCompute, typename Unpack>
void group_blocks(const Panel& p, const Segments& s) {
  using T = Totals<kCompute, Unpack>;
  if constexpr (T::kFewRows >= 2) {
    if (p.rows == 1) group_block<kCompute, 1, 4, Unpack>(p, s, 0);
    if (p.rows == 2) group_block<kCompute, 2, 4, Unpack>(p, s, 0);
  }
  if constexpr (T::kFewRows >= 3)
    if (p.rows == 3) group_block<kCompute, 3, 4, Unpack>(p, s, 0);
  if constexpr (T::kEndsOften) {
    for (std::int64_t half = 0; half < 2; ++half) {
      if (p.rows == 5) group_block<kCompute, 5, 2, Unpack>(p, s, half);
      if (p.rows == 6) group_block<kCompute, 6, 2, Unpack>(p, s, half);
    }
  }
}

template <Compute kCompute, typename Unpack>
void whole_blocks(const Panel& p, const Segments& s) {
  if constexpr (!Unpack::kTakesHalves)
    if (Totals<kCompute, Unpack>::stay(p, s)) return group_blocks<kCompute, Unpack>(p, s);
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

// Tiles unpack to memory, and are read out for each scale: there, folding costs less. In registers folding took a third
// longer at one row, and as long as scaling every 32 of K at 4 and more; sums that run on take a tenth less.
#if defined(__AMX_BF16__)
inline constexpr OddScales kOddScales = OddScales::kFolded;
#else
inline constexpr OddScales kOddScales = OddScales::kAsTheyLie;
#endif

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
      case Code::kE2M1Bytes:
        if constexpr (kOddScales == OddScales::kAsTheyLie) pairs(std::type_identity<ReadE2M1Bytes>());
        return;
      case Code::kE2M1Scaled:
        if constexpr (kOddScales == OddScales::kFolded) pairs(std::type_identity<ReadE2M1Scaled>());
        return;
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
  static constexpr OddScales odd_scales() { return kOddScales; }

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
