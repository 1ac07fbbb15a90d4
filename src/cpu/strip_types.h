// SPDX-License-Identifier: Apache-2.0
// What the pieces of an ISA level's kernel hand to each other. The strip_*.h headers are the generic
// code of the levels: each src/cpu/isa/gemm_<level>.cpp includes them once, and everything in them has
// internal linkage, so that code compiled for one level can never be linked into another.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "cpu/kernels.h"
#include "numeric.h"

namespace moesaic {
namespace {

// A row of A is a run of 32-bit units, whatever they hold: a caller's own numbers, when they lie well.
typedef std::uint32_t Unit __attribute__((may_alias));

// What a level multiplies.
enum class Compute : std::uint8_t {
  kF32,   // fused multiply-add of fp32; unit: one f32
  kB16,   // vdpbf16ps; unit: two bf16
  kByte,  // u8 weights x s8 activations, summed as int32; unit: four bytes
};

// What a packed number means.
enum class Code : std::uint8_t {
  kF32,
  kF16,
  kB16,
  kE4M3,
  kByte,        // b - 128
  kByteZero,    // b - zero point
  kNibble,      // through a table of 16 values: int4 - 8, or e2m1
  kNibbleZero,  // q - zero point
  kE2M1Bytes,   // e2m1, with the bytes of its E8M0 scales
  kE2M1Scaled,  // e2m1 times its E8M0 scale, which bf16 holds exactly
  kByteQuad,    // integers as they are
  kNibbleQuad,
};

// A run of segments of one tile, all but the last of the same length; or part of one segment.
struct Segments {
  Code code = Code::kF32;
  std::int64_t count = 1;
  std::int64_t steps = 0, last_steps = 0;  // packed steps of each, and of the last
  const std::uint8_t* data = nullptr;
  std::int64_t data_stride = 0;            // bytes from one segment's steps to the next one's
  const std::uint8_t* zero = nullptr;      // [64] at data_stride: kByteZero and kNibbleZero;
                                           // kE2M1Scaled: the scales
  bool e2m1 = false;                       // kNibble's table

  std::int64_t steps_of(std::int64_t i) const { return i + 1 < count ? steps : last_steps; }
  Segments at(std::int64_t i) const {      // the i-th alone
    Segments s = *this;
    s.count = 1;
    s.steps = s.last_steps = steps_of(i);
    s.data += i * data_stride;
    s.zero += i * data_stride;
    return s;
  }
};

// What a level does with scales that are not one fp32 per column: those are made in front of the products (kFloats), or
// they are read as they lie, when a segment ends (kAsTheyLie), or E8M0's are folded into the weights (kFolded).
enum class OddScales : std::uint8_t { kFloats, kAsTheyLie, kFolded };

enum class Begin : std::uint8_t { kZero, kRaw };        // sums start at 0, or go on
enum class End : std::uint8_t { kRaw, kFirst, kAdd };   // sums are kept, or scaled into the total
enum class Sums : std::uint8_t { kPerSegment, kThroughout };  // what is summed before scaling

// Lines to be fetched, some in front of each run of steps.
struct LineFetch {
  static constexpr std::int64_t kSteps = 16;
  const std::byte* const* lines = nullptr;
  std::int64_t count = 0, at_once = 0;

  template <typename Fetch>
  void fetch(const Fetch& line) {
    const std::int64_t now = at_once < count ? at_once : count;
    for (std::int64_t i = 0; i < now; ++i) line(lines[i]);
    lines += now;
    count -= now;
  }
};

// Some rows of A against such a run. Behind each segment its sums are scaled and added to the total;
// only a part of a segment begins or ends with raw sums.
struct Panel {
  const Unit* a = nullptr;
  std::int64_t a_stride = 0;       // units between rows
  std::int64_t segment_units = 0;  // units between segments
  std::int64_t rows = 0;
  float* total = nullptr;          // [rows][64] at c_stride
  float* raw = nullptr;            // same shape; int32 for Compute::kByte
  std::int64_t c_stride = 0;
  Begin begin = Begin::kZero;
  End end = End::kRaw;             // of the first segment; kAdd of all others
  Sums sums = Sums::kPerSegment;
  const float* scale = nullptr;    // [segments][64] at scale_stride, or none
  std::int64_t scale_stride = 0;
  const std::uint8_t* header = nullptr;  // OddScales::kAsTheyLie: instead of it, at header_stride
  std::int64_t header_stride = 0;
  const std::uint8_t* header_before = nullptr;  // Sums::kThroughout: of what sums that go on were last scaled by
  const float* row_scale = nullptr;        // [rows][segments] at row_stride, or none
  // kByte: where sums begin (Begin::kZero), same shape; times the column's zero point if there is one.
  const std::int32_t* row_begin = nullptr;
  std::int64_t row_stride = 0;
  const std::int32_t* zero = nullptr;      // kByte: [segments][64] zero points, or none
  const std::uint8_t* ahead = nullptr;     // weights that are needed next, to be fetched meanwhile:
  std::int64_t ahead_step = 0;             // bytes per unit
  LineFetch* lines = nullptr;              // likewise, beside `ahead`, or none

  Panel at(std::int64_t i) const {         // the i-th segment alone
    Panel p = *this;
    p.a += i * segment_units;
    if (p.scale != nullptr) p.scale += i * scale_stride;
    if (p.row_scale != nullptr) p.row_scale += i;
    p.row_begin += i;
    if (p.zero != nullptr) p.zero += i * kTileCols;
    if (i > 0) p.end = End::kAdd;
    return p;
  }
};

constexpr float kNibbleInt4[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};

}  // namespace
}  // namespace moesaic
