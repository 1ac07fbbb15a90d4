// SPDX-License-Identifier: Apache-2.0
// How much of a tile a strip takes at once, and the memory it does that in.
#pragma once

#include <algorithm>

#include "cpu/strip_scales.h"

namespace moesaic {
namespace {

// A piece of a tile: in units of A, and in segments.
struct PieceLimit {
  std::int64_t units = 0, segments = 0;
};
inline constexpr PieceLimit kPlainPiece{256, 32};       // packed on the fly
inline constexpr PieceLimit kUnpackedPiece{128, 32};    // kept unpacked between panels
inline constexpr PieceLimit kNativePiece{512, 128};     // read again from where it lies
inline constexpr PieceLimit kFourBitPiece{1024, 128};   // the same, where steps are short
inline constexpr PieceLimit kStreamedPiece{1 << 16, 128};  // a single panel: no reason to cut but scales
inline constexpr std::int64_t kUnpackedUnits = std::max(kPlainPiece.units, kUnpackedPiece.units);

inline constexpr std::int64_t kUnitPadding = 16;  // keeps rows off one cache set
inline constexpr std::int64_t kRowUnits = kStripRows * (1024 + kUnitPadding);
inline constexpr std::int64_t kRowSegments = kStripRows * 128;
// When K takes several chunks, sums of this many tiles wait between them.
inline constexpr std::int64_t kWaitingTiles = 8;
inline constexpr std::int64_t kWaitingCols = kWaitingTiles * kTileCols;

// Lines of the rows that the thread needs next: fetched beside the last tiles of a strip.
inline constexpr std::int64_t kMostLines = 4096;
inline constexpr std::int64_t kForecastTiles = 2;

// All of it on the stack of the thread that runs the strip: no allocation, and no scratch whose size
// would depend on the number of threads.
struct alignas(64) StripBuffers {
  Unit rows[kRowUnits];
  float total[kStripRows * kWaitingCols];
  float raw[kStripRows * kWaitingCols];
  std::int32_t row_begins[kRowSegments];
  float row_scales[kRowSegments];
  const std::byte* lines[kMostLines];
  PieceScales scales;
  // A caller's weights, packed on the fly.
  std::uint8_t plain[kPlainPiece.units * 256 + kPlainPiece.segments * (5 * kTileCols)];
  std::uint8_t before[5 * kTileCols];  // the header in front of it
  std::uint8_t unpacked[kUnpackedUnits * 256];
};

// A run of whole segments, or part of one.
struct Chunk {
  std::int64_t segment = 0, segments = 0;
  std::int64_t first_step = 0, steps = 0;  // of each segment; the last may have fewer
};

}  // namespace
}  // namespace moesaic
