// SPDX-License-Identifier: Apache-2.0
// Products of tiles: a strip's rows against one tile of weights, by blocks of K. A block is read by all rows while it is
// in the first cache, and beside its products the next one is made ready: fetched, or unpacked to memory.
#pragma once

#include <algorithm>

#include "cpu/strip_avx512.h"

namespace moesaic {
namespace {

// A run: 16 steps, a tile of A's columns, four of B.
constexpr std::int64_t kRunSteps = 16, kRunBytes = kRunSteps * 256, kTileRows = 16;
constexpr std::int64_t kBlockRuns = 8;
// What lies ready is fetched twice: from memory into the second cache, and from there into the first. One prefetch alone
// takes a core's few places for lines on their way either too long (from memory to the first cache), or leaves tiles to
// wait for the second cache: products do not run beside loads that wait.
constexpr std::int64_t kMemoryAhead = 32768, kCacheAhead = 2048;

// --- instructions -------------------------------------------------------------------------------------
// Assembly: GCC 12's intrinsics do not say that a tile's load reads memory, and stores before it vanish.
template <int kTile>
inline __attribute__((always_inline)) void load_tile(const void* from, std::int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
inline __attribute__((always_inline)) void store_tile(void* to, std::int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
inline __attribute__((always_inline)) void zero_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
template <Compute kCompute, int kTo, int kA, int kB>
inline __attribute__((always_inline)) void multiply_tiles() {
  if constexpr (kCompute == Compute::kB16)
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kTo), "i"(kA), "i"(kB));
  else
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kTo), "i"(kA), "i"(kB));
}

// --- rows ---------------------------------------------------------------------------------------------
// A strip's rows are dealt to up to three rows of tiles, as evenly as can be: an instruction takes the less time the
// fewer rows it has. The last begins where it ends with the strip, so some rows are multiplied twice, and nothing is
// read that is not the strip's.
struct RowTiles {
  std::int64_t all, count, each;
  explicit RowTiles(std::int64_t rows)
      : all(rows), count((rows + kTileRows - 1) / kTileRows), each((rows + count - 1) / count) {}
  std::int64_t first(std::int64_t tile) const { return std::min(tile * each, all - each); }
  // Where a row's sums wait. Each tile has its own place: of a row that two have, one may have added more than the other.
  std::int64_t place(std::int64_t row) const {
    const std::int64_t tile = std::min(row / each, count - 1);
    return tile * kTileRows + row - first(tile);
  }
};

// Tiles of sums (0-3) and of A (4, 5) have as many rows as a row of tiles; 6 and 7 are B's.
struct alignas(64) TileConfig {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};

  explicit TileConfig(std::int64_t strip_rows) {
    for (int tile = 0; tile < 6; ++tile)
      rows[tile] = static_cast<std::uint8_t>(RowTiles(strip_rows).each);
  }
};

struct alignas(64) TileScratch {
  float sums[3 * kTileRows * kTileCols];
  Unit a[3 * kTileRows * kRunSteps];        // A's last steps, filled up with zeros
  std::uint8_t b[2][kBlockRuns * kRunBytes];  // B's, or blocks that are unpacked, in turns
};

// --- weights ------------------------------------------------------------------------------------------
// Which steps of a segment are multiplied, how many of them come next, and in how many runs of products.
struct Block {
  std::int64_t segment = 0, first = 0, steps = 0, next = 0, products = 0;
};

// Weights that lie as they are multiplied.
class ReadyWeights {
 public:
  static std::int64_t runs(const RowTiles&) { return kBlockRuns; }
  ReadyWeights(const Segments& s, TileScratch& scratch) : s_(s), tail_(scratch.b[0]) {}

  void prepare(std::int64_t) {}
  void begin(const Block& block) {
    b_ = s_.data + block.segment * s_.data_stride + block.first * 256;
    const std::int64_t more = block.steps % kRunSteps;
    tail_run_ = more == 0 ? -1 : block.steps / kRunSteps;
    if (more != 0) {
      std::memcpy(tail_, b_ + tail_run_ * kRunBytes, static_cast<std::size_t>(more) * 256);
      std::memset(tail_ + more * 256, 0, static_cast<std::size_t>(kRunSteps - more) * 256);
    }
    ahead_ = b_ + kMemoryAhead;
    end_ = ahead_ + block.steps * 256;
    if (block.first == 0 && s_.count > 1) ahead_ -= s_.data_stride - s_.steps * 256;  // the header's lines, too
    share_ = (end_ - ahead_ + block.products * 256 - 1) / (block.products * 256) * 64;
  }
  const std::uint8_t* run(std::int64_t i) const { return i == tail_run_ ? tail_ : b_ + i * kRunBytes; }
  // A quarter of what is done beside a run's products.
  void beside(int) {
    const std::uint8_t* const to = std::min(ahead_ + share_, end_);
    for (; ahead_ < to; ahead_ += 64)
      asm volatile("prefetcht1 (%0)\n prefetcht0 (%1)" ::"r"(ahead_), "r"(ahead_ - (kMemoryAhead - kCacheAhead)));
  }
  void end() {}

 private:
  const Segments& s_;
  std::uint8_t* const tail_;
  const std::uint8_t *b_ = nullptr, *ahead_ = nullptr, *end_ = nullptr;
  std::int64_t tail_run_ = -1, share_ = 0;
};

// Weights that are unpacked to memory, a block beside the products of the one before.
template <typename Unpack>
class UnpackedWeights {
 public:
  // In front of a tile's first products there is nothing to do beside: short blocks where they are short.
  static std::int64_t runs(const RowTiles& rows) { return rows.count == 1 ? 2 : 4; }
  UnpackedWeights(const Segments& s, TileScratch& scratch)
      : s_(s), buffers_{scratch.b[0], scratch.b[1]}, data_(s.data), left_(s.steps_of(0)) {}

  void prepare(std::int64_t steps) {
    to_ = buffers_[which_];
    next_ = steps;
    end();
  }
  void begin(const Block& block) {
    b_ = buffers_[which_];
    which_ = 1 - which_;
    to_ = buffers_[which_];
    next_ = block.next;
    share_ = (block.next + block.products - 1) / block.products;
  }
  const std::uint8_t* run(std::int64_t i) const { return b_ + i * kRunBytes; }
  void beside(int quarter) {
    if (quarter == 0) unpack(std::min(share_, next_));
  }
  void end() {
    unpack(next_);
    const std::int64_t more = (to_ - buffers_[which_]) / 256 % kRunSteps;
    if (more != 0) std::memset(to_, 0, static_cast<std::size_t>(kRunSteps - more) * 256);
  }

 private:
  void unpack(std::int64_t steps) {
    next_ -= steps;
    while (steps > 0) {
      if (left_ == 0) {
        ++segment_;
        data_ = s_.data + segment_ * s_.data_stride;
        left_ = s_.steps_of(segment_);
      }
      const std::int64_t now = std::min(steps, left_);
      if (left_ == s_.steps_of(segment_) && s_.count > 1)
        for (const std::uint8_t* line = data_ + kNearAhead - (s_.data_stride - s_.steps * Unpack::kBytes);
             line < data_ + kNearAhead; line += 64)
          asm volatile("prefetcht0 (%0)" ::"r"(line));
      const Unpack one(s_, segment_, 0);
      const std::uint8_t* data = data_;
      std::uint8_t* to = to_;
      for (std::int64_t i = 0; i < now; ++i, data += Unpack::kBytes) {
        for (std::int64_t line = 0; line < Unpack::kBytes; line += 64)
          _mm_prefetch(reinterpret_cast<const char*>(data + kNearAhead + line), _MM_HINT_T0);
        for (int which = 0; which < Unpack::kUnits; ++which, to += 256) {
          __m512i b[4];
          one.template unit<1, 4>(data, which, b);
          for (int c = 0; c < 4; ++c) _mm512_store_si512(to + 64 * c, b[c]);
        }
      }
      data_ = data;
      to_ = to;
      left_ -= now;
      steps -= now;
    }
  }

  const Segments& s_;
  std::uint8_t* const buffers_[2];
  const std::uint8_t *data_, *b_ = nullptr;
  std::uint8_t* to_ = nullptr;
  std::int64_t left_, segment_ = 0, next_ = 0, share_ = 0;
  int which_ = 0;
};

// --- products -----------------------------------------------------------------------------------------
// Some of a panel's sums, as many as there are tiles for.
struct Part {
  const Unit* a;
  std::int64_t tile;        // its first row of tiles
  std::int64_t second = 0;  // units to the second row of tiles, and the same in the last steps
  std::int64_t second_last = 0;
  float* sums = nullptr;
  std::int64_t column = 0;  // bytes
  bool begun = false;
};
struct RunOfA {
  const Unit* a;
  std::int64_t stride, second;  // bytes, units
};

// One row of tiles x 64 columns: sums in tiles 0-3.
struct Wide {
  static constexpr std::int64_t kThird = 32;
  template <Compute kCompute, typename Source>
  static void run(const RunOfA& a, const std::uint8_t* b, Source& source) {
    load_tile<4>(a.a, a.stride);
    load_tile<6>(b, 256);
    source.beside(0);
    multiply_tiles<kCompute, 0, 4, 6>();
    load_tile<7>(b + 64, 256);
    source.beside(1);
    multiply_tiles<kCompute, 1, 4, 7>();
    load_tile<6>(b + 128, 256);
    source.beside(2);
    multiply_tiles<kCompute, 2, 4, 6>();
    load_tile<7>(b + 192, 256);
    source.beside(3);
    multiply_tiles<kCompute, 3, 4, 7>();
  }
};
// Two rows of tiles x 32 columns: sums in tiles 0, 1 (first row) and 2, 3.
struct Square {
  static constexpr std::int64_t kThird = kTileRows * kTileCols;
  template <Compute kCompute, typename Source>
  static void run(const RunOfA& a, const std::uint8_t* b, Source& source) {
    load_tile<4>(a.a, a.stride);
    load_tile<6>(b, 256);
    source.beside(0);
    multiply_tiles<kCompute, 0, 4, 6>();
    load_tile<7>(b + 64, 256);
    source.beside(1);
    multiply_tiles<kCompute, 1, 4, 7>();
    load_tile<5>(a.a + a.second, a.stride);
    source.beside(2);
    multiply_tiles<kCompute, 2, 5, 6>();
    source.beside(3);
    multiply_tiles<kCompute, 3, 5, 7>();
  }
};

template <typename Shape>
void take_sums(const Part& part) {
  load_tile<0>(part.sums, kTileCols * 4);
  load_tile<1>(part.sums + 16, kTileCols * 4);
  load_tile<2>(part.sums + Shape::kThird, kTileCols * 4);
  load_tile<3>(part.sums + Shape::kThird + 16, kTileCols * 4);
}
template <typename Shape>
void leave_sums(const Part& part) {
  store_tile<0>(part.sums, kTileCols * 4);
  store_tile<1>(part.sums + 16, kTileCols * 4);
  store_tile<2>(part.sums + Shape::kThird, kTileCols * 4);
  store_tile<3>(part.sums + Shape::kThird + 16, kTileCols * 4);
}

// The sums of one segment (or of several that run on) into scratch.sums.
template <Compute kCompute, typename Source>
class TileSums {
 public:
  TileSums(const Panel& p, const RowTiles& rows, TileScratch& scratch)
      : p_(p), rows_(rows), scratch_(scratch) {
    const bool begun = p.begin == Begin::kRaw;
    if (rows.count == 1) {
      parts_[0] = {.a = p.a, .sums = scratch.sums, .begun = begun};
    } else {
      const std::int64_t second = rows.first(1);
      for (int half = 0; half < 2; ++half)
        parts_[half] = {.a = p.a, .second = second * p.a_stride, .second_last = second * kRunSteps,
                        .sums = scratch.sums + 32 * half, .column = 128 * half, .begun = begun};
      const std::int64_t third = rows.first(2);
      parts_[2] = {.a = p.a + third * p.a_stride, .tile = third,
                   .sums = scratch.sums + 2 * kTileRows * kTileCols, .begun = begun};
    }
    if (!begun) return;
    for (std::int64_t tile = 0; tile < rows.count; ++tile)
      for (std::int64_t r = 0; r < rows.each; ++r)
        std::memcpy(scratch.sums + (tile * kTileRows + r) * kTileCols,
                    p.raw + (rows.first(tile) + r) * p.c_stride, kTileCols * 4);
  }

  // `following`: steps of the segment behind this one.
  void run(std::int64_t segment, std::int64_t steps, std::int64_t following, Source& source) {
    const std::int64_t most = Source::runs(rows_) * kRunSteps, tail = steps % kRunSteps;
    if (tail > 0) copy_last_steps(steps - tail, tail);
    // There and back through the parts: of two blocks, the one that ends the first begins the second.
    const int parts = static_cast<int>(rows_.count);
    int part = 0, direction = 1;
    for (std::int64_t first = 0; first < steps; first += most) {
      Block block{.segment = segment, .first = first, .steps = std::min(most, steps - first)};
      const std::int64_t behind = steps - first - block.steps;
      block.next = std::min(most, behind > 0 ? behind : following);
      const std::int64_t runs = (block.steps + kRunSteps - 1) / kRunSteps;
      block.products = runs * parts;
      source.begin(block);
      for (int i = 0; i < parts; ++i, part += direction) {
        take(part);
        const Part& q = parts_[part];
        const bool wide = is_wide(part);
        for (std::int64_t r = 0; r < runs; ++r) {
          const std::int64_t step = first + r * kRunSteps;
          RunOfA a{.a = q.a + step, .stride = p_.a_stride * 4, .second = q.second};
          if (step + kRunSteps > steps)
            a = {.a = scratch_.a + q.tile * kRunSteps, .stride = kRunSteps * 4, .second = q.second_last};
          if (wide)
            Wide::run<kCompute>(a, source.run(r), source);
          else
            Square::run<kCompute>(a, source.run(r) + q.column, source);
        }
      }
      source.end();
      direction = -direction;
      part += direction;
    }
    leave();
  }

 private:
  bool is_wide(int part) const { return part == 2 || rows_.count == 1; }
  void leave() {
    if (held_ < 0) return;
    is_wide(held_) ? leave_sums<Wide>(parts_[held_]) : leave_sums<Square>(parts_[held_]);
    held_ = -1;
  }
  void take(int part) {
    if (held_ == part) return;
    leave();
    held_ = part;
    if (parts_[part].begun)
      return is_wide(part) ? take_sums<Wide>(parts_[part]) : take_sums<Square>(parts_[part]);
    parts_[part].begun = true;
    zero_tile<0>();
    zero_tile<1>();
    zero_tile<2>();
    zero_tile<3>();
  }
  void copy_last_steps(std::int64_t first, std::int64_t count) {
    std::memset(scratch_.a, 0, sizeof(scratch_.a));
    for (std::int64_t r = 0; r < p_.rows; ++r)
      std::memcpy(scratch_.a + r * kRunSteps, p_.a + r * p_.a_stride + first,
                  static_cast<std::size_t>(count) * sizeof(Unit));
  }

  const Panel& p_;
  const RowTiles& rows_;
  TileScratch& scratch_;
  Part parts_[3];
  int held_ = -1;
};

}  // namespace
}  // namespace moesaic
