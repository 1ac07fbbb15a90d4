// SPDX-License-Identifier: Apache-2.0
// How the CPU keeps weights: tiles of 64 output columns, contiguous over K, in the order in which the
// dot-product instructions want them. One layout for every ISA level, so that the level is a matter of
// kernels alone. A grouped K is cut into segments (one scale each); a segment is a header (scales, zero
// points) and its steps, so that a kernel streams one run of memory and nothing beside it.
//
// 64 columns, and not the 32 that 12 x 2 registers would take: a token alone then has four chains of
// dependent dot products instead of two, which int4 needs to keep up with memory, and 6 x 4 blocks
// load less per product than 12 x 2.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "backend.h"
#include "cpu/numa.h"

namespace moesaic {

inline constexpr std::int64_t kTileCols = 64;

// A step is what lies between two loads of A: 32 bits per row.
enum class PackKind : std::uint8_t {
  kF32,     // 1 k:  f32 [64]
  kF16,     // 1 k:  f16 [64]
  kB16Pair, // 2 k:  bf16 [64][2]
  kB8Pair,  // 2 k:  bytes, so that interleaving low and high halves of 16-bit values gives [16][2]:
            //       [2 x 32 columns][4 lanes][2 x 16 columns][4][2]
  kB8Quad,  // 4 k:  bytes [64][4]; signed weights are stored + 128
  kU4Pair,  // 2 k:  words [16][2]; nibble j of a word belongs to columns 16 j ...
  kU4Quad,  // 4 k:  [2 x 32 columns] bytes [16][4], low nibble columns 0-15, high nibble 16-31
};

// How a segment's header holds the 64 columns' scales.
enum class ScaleKind : std::uint8_t {
  kNone,
  kColumns,  // f32 [64]
  kHalves,   // f32 [2]: one for columns 0-31, one for 32-63 (tensor and most block scales)
  kE8M0,     // u8 [64]
};

struct PackLayout {
  PackKind kind = PackKind::kF32;
  ScaleKind scale = ScaleKind::kNone;
  bool zero_points = false;       // u8 [64] in the header, behind the scales
  std::int64_t n = 0, k = 0;
  std::int64_t tiles = 0;         // of 64 columns
  std::int64_t step_k = 1;        // elements of K per step
  std::int64_t step_bytes = 0;
  std::int64_t segment_k = 0;     // elements of K per segment (the last may have fewer)
  std::int64_t segments = 0;
  std::int64_t segment_steps = 0; // of all but the last
  std::int64_t header_bytes = 0, zero_offset = 0;
  std::int64_t segment_bytes = 0; // of all but the last
  std::int64_t tile_bytes = 0, expert_bytes = 0;

  std::int64_t length(std::int64_t segment) const {  // elements of K
    return segment + 1 < segments ? segment_k : k - segment * segment_k;
  }
  std::int64_t steps(std::int64_t segment) const {
    return (length(segment) + step_k - 1) / step_k;
  }
};

// Products of 8-bit activations and integer weights are summed as integers.
bool integer_product(const WeightSpec& spec);
PackLayout pack_layout(const WeightSpec& spec);

// The caller's row of column `column` of tile `tile`, or -1 for padding. Gated: columns 0-31 are
// gates and 32-63 the ups of the same 32 outputs.
std::int64_t row_of_column(const WeightSpec& spec, std::int64_t tile, std::int64_t column);

// Part of a segment: its header and some of its steps.
struct PackPart {
  std::int64_t expert = 0, tile = 0, segment = 0;
  std::int64_t first_step = 0, steps = 0;
};
void pack_header(const WeightSpec& spec, const PackLayout& layout, const GemmWeights& weights,
                 const PackPart& part, std::byte* header);
void pack_steps(const WeightSpec& spec, const PackLayout& layout, const GemmWeights& weights,
                const PackPart& part, std::byte* out);

// Whether in each column of a tile all E8M0 scales lie within 2^kNearScales of each other. Sums may then run on from
// segment to segment in the units of the scale at hand: nothing that fp32 can hold leaves it by that.
inline constexpr int kNearScales = 32;
bool scales_are_near(const WeightSpec& spec, const PackLayout& layout, const GemmWeights& weights,
                     std::int64_t expert, std::int64_t tile);

inline constexpr std::int64_t kHalf = kTileCols / 2;
// Where a column's two bytes of a kB8Pair step lie.
constexpr std::int64_t b8_pair_offset(std::int64_t c) {
  const std::int64_t within = c % 16;
  return c / kHalf * 64 + within / 4 * 16 + c % kHalf / 16 * 8 + within % 4 * 2;
}

struct CpuKernels;

class PackedCpu final : public PackedWeights {
 public:
  explicit PackedCpu(const WeightSpec& spec);
  void load(std::int64_t local_expert, const GemmWeights& one) override;
  void unpack(std::int64_t local_expert, const Tensor& weight) const override;  // unpack.cpp
  std::size_t bytes() const override { return bytes_; }

  const PackLayout& layout() const { return layout_; }
  const CpuKernels& kernels() const { return *kernels_; }  // chosen when the layer was made
  // Which tiles lie at which node: decided when the layer was made, from the threads of that moment.
  const NodeRuns& nodes() const { return nodes_; }
  // A node's tiles of an expert follow each other in memory. (Not inline: the ISA levels' translation units call it.)
  const std::byte* tile(std::int64_t expert, std::int64_t tile) const;
  bool scales_are_near(std::int64_t expert, std::int64_t tile) const;  // decided when the tile was loaded

 private:
  std::byte* place_of(std::int64_t expert, std::int64_t tile) const;
  void load_tile(std::int64_t local_expert, std::int64_t tile, const GemmWeights& one);

  struct Free {
    void operator()(std::byte* data) const;
  };
  WeightSpec spec_;
  PackLayout layout_;
  const CpuKernels* kernels_;
  NodeRuns nodes_;
  std::array<std::int64_t, kMaxNodes> regions_{};  // where a node's tiles begin, all experts'
  std::size_t bytes_;
  std::unique_ptr<std::byte, Free> data_;
  std::vector<std::uint8_t> near_;  // [experts][tiles], for E8M0 scales
};

// Reads element `index` of a float tensor's data, whatever its float dtype.
float float_at(const Tensor& tensor, std::int64_t index);

}  // namespace moesaic
