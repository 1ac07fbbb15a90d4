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

// Groups along K keep their totals in registers beside the sums, with half as many rows, or columns: where integer
// sums end every few hundred products, and few rows of what is unpacked. Not four rows, which leave too few chains by
// halves; not a stream by halves, which would be fetched twice. bf16's five and six rows, twice as long to the end of
// a group, gain nothing; int8's few rows, and codes whose tables push sums out of their registers, lose 3%.
template <Compute kCompute, typename Unpack>
bool keeps_totals(const Panel& p, const Segments& s) {
  if (s.count == 1 || p.sums == Sums::kThroughout || p.end == End::kRaw || p.scale == nullptr)
    return false;
  return p.rows <= 3 ? !std::is_same_v<Unpack, ReadUnits>
                     : kCompute == Compute::kByte && p.rows > 4 && p.ahead != nullptr;
}
template <Compute kCompute, typename Unpack>
void group_blocks(const Panel& p, const Segments& s) {
  switch (p.rows) {
    case 1: return group_block<kCompute, 1, 4, Unpack>(p, s, 0);
    case 2: return group_block<kCompute, 2, 4, Unpack>(p, s, 0);
    case 3: return group_block<kCompute, 3, 4, Unpack>(p, s, 0);
  }
  if constexpr (kCompute == Compute::kByte) {
    for (const std::int64_t half : {0, 1}) {
      if (p.rows == 5) group_block<kCompute, 5, 2, Unpack>(p, s, half);
      if (p.rows == 6) group_block<kCompute, 6, 2, Unpack>(p, s, half);
    }
  }
}

template <Compute kCompute, typename Unpack>
void whole_blocks(const Panel& p, const Segments& s) {
  if constexpr (!Unpack::kTakesHalves)
    if (keeps_totals<kCompute, Unpack>(p, s)) return group_blocks<kCompute, Unpack>(p, s);
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
