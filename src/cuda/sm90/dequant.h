// SPDX-License-Identifier: Apache-2.0
// Weight-only schemes on SM90a: the shapes of the kernels, and what they are told beyond Params.
//
// Weights arrive as the caller or rearrange.h has them, are widened in registers to the integers
// (or e4m3 values) and enter wgmma as its register operand; tokens are the other, from shared
// memory. Scales multiply fp32 sums over 128 of K (32, where groups are no multiples of 128), in
// ascending K whatever the tile: the same bits from every tactic.
#pragma once

#include "cuda/sm90/gemm.h"
#include "cuda/sm90/schedule.h"
#include "cuda/sm90/unpack.h"

namespace moesaic::cuda::sm90 {

// How a few tokens are multiplied: kAligned, the warps of a warpgroup meet at the end of a task;
// kFree, they never do; kFreeInRuns, nor do they, and tasks come in runs (Params::run), which costs
// kernels that have none of them up to 4%.
enum class Loop : unsigned char { kAligned, kFree, kFreeInRuns };

// A stage holds kRowBytes of every weight row. kSteps: steps of 16 of K between two promotions, 8
// or 2. Member names that SharedMemory, TokenLoader and Epilogue know are those of Shape.
template <typename Weight_, Element kElement_, int kSteps_, int kTokens_, int kWarpgroups_,
          int kBlocks_, int kRowBytes_, int kMostStages_, int kPerSm_, Loop kLoop_ = Loop::kAligned>
struct DequantShape {
  using Weight = Weight_;
  static constexpr Element kElement = kElement_;
  static constexpr int kSteps = kSteps_;
  static constexpr int kTokens = kTokens_;
  static constexpr int kWarpgroups = kWarpgroups_;
  static constexpr int kBlocks = kBlocks_;
  static constexpr int kRowBytes = kRowBytes_;
  static constexpr int kStageK = kRowBytes * 8 / Weight::kBits;
  static constexpr int kPerSm = kPerSm_;
  static constexpr int kPair = 1;
  static constexpr Loop kLoop = kLoop_;
  // Few tokens: mma.sync, whose warps go their own ways. It gives the same bits.
  static constexpr bool kWarpwise = kTokens <= 16;

  static constexpr bool kPromotes = false;  // for the token loader: no scales of activations
  static constexpr bool kHasBlockScales = false;
  static constexpr bool kKeepsTokens = false;  // not measured
  static constexpr int kBoxWarps = 1;
  static constexpr Tiles kTiles = Tiles::kListed;
  static constexpr Deal kDeal =
      kWarpwise && kSteps == 8 && Weight::kHasAll ? Deal::kByCounter : Deal::kInTurn;
  static constexpr Order kOrder = Order::kListed;
  static constexpr bool kHasRuns = kLoop == Loop::kFreeInRuns, kSmall = kHasRuns;
  static constexpr bool kKeepsThread = false;  // see thread_index
  static constexpr bool kHasGroups = false;    // for the epilogue: C is never quantized
  static constexpr bool kDirect = false;
  static constexpr bool kBringsTerms = false;
  static constexpr int kTermPlaces = 2;
  static constexpr int kChunks = kStageK / 64, kChunkK = 64;
  static constexpr int kWeightRows = 64 * kBlocks * kWarpgroups;
  static constexpr int kThreads = 128 * (kWarpgroups + 1);

  static constexpr int kWeightBytes = kWeightRows * kRowBytes / kChunks;  // of one chunk
  static constexpr int kTokenBytes = kTokens * 128;
  static constexpr int kStageBytes = kChunks * (kWeightBytes + kTokenBytes);
  // Of every row the scales of a stage's groups, or of kScaleStages stages: a copy of 4 bytes holds
  // up everybody who reads shared memory as long as one of 16, and there were 256 of them a stage.
  // (Up to 64 tokens it won at some sizes and lost at others.) Behind them, for each group of one
  // stage, a word of every row that holds its zero point.
  static constexpr int kGroups = kStageK / 16 / kSteps;
  static constexpr int kScaleStages = Weight::kBits == 4 && kGroups == 1 && kTokens > 64 ? 4 : 1;
  static constexpr int kScalePitch = kGroups * kScaleStages;  // of a row
  static constexpr int kScales = kScalePitch * kWeightRows;
  static constexpr int kScalesAtOnce = kScalePitch < 4 ? kScalePitch : 4;  // if they allow it
  static constexpr int kScaleBytes = (kScales + (Weight::kZeros ? kGroups * kWeightRows : 0)) * 4;

  static constexpr int kPitch = 144;
  static constexpr int kEpilogueTokens = kTokens % 32 == 0 ? 32 : 16;
  static constexpr int kBufferBytes = kEpilogueTokens * kPitch;
  static constexpr int kEpilogueBytes = 2 * (kBufferBytes + kBlocks * 64 * 8);
  static constexpr int kTaskBytes = 32;
  static constexpr int kTableBytes = kTokens * 12;
  static constexpr int kLoaderWarps = 2, kPassRows = 8;  // for the token loader
  static constexpr int kPasses = kTokens / 8;
  static constexpr int kPassRoom = (kPasses + 3) / 4 * 4;
  static constexpr int kGatherBytes = 8 * kPassRoom * 4;
  static constexpr int kBox = kTokens % 32 == 0 ? 32 : 16;

  // As many stages as fit.
  static constexpr int kFixedBytes =
      kWarpgroups * kEpilogueBytes + kTableBytes + kTaskBytes + kGatherBytes + dealt_bytes(kDeal);
  static constexpr int kPerStage = kStageBytes + kScaleBytes + kTableBytes + kTaskBytes + 16;
  static constexpr int kFitting = (228 * 1024 / kPerSm - 1024 - kFixedBytes) / kPerStage;
  static constexpr int kStages = kFitting < kMostStages_ ? kFitting : kMostStages_;
  static constexpr int kRing = kStages + 1;
  static constexpr int kSharedBytes = kFixedBytes + kStages * kPerStage;
  static_assert(kStages >= 2 && kStages < kDealtRing && kStageBytes % 1024 == 0);
  static_assert(kPerSm == 1 || kSharedBytes <= kSpreadBytes);
};

// In the order of their tactics; Twin, two warpgroups that each do what Narrow's does, comes last.
// clang-format off
//                                                 tokens wg blocks   row bytes   stages per SM
template <typename W, Element E, int kSteps>
using DequantNarrow = DequantShape<W, E, kSteps,     16,  1,    1,           128,      8,    2>;
template <typename W, Element E, int kSteps>
using DequantMiddle = DequantShape<W, E, kSteps,     64,  2,    2, W::kBits * 16,      5,    1>;
template <typename W, Element E, int kSteps>
using DequantWide = DequantShape<W, E, kSteps,      112,  2,    2, W::kBits * 16,      4,    1>;
template <typename W, Element E, int kSteps>
using DequantTwin = DequantShape<W, E, kSteps,       16,  2,    1,           128,      8,    2,
                                                                                    Loop::kFree>;
template <typename W, Element E, int kSteps>
using DequantTwinRuns = DequantShape<W, E, kSteps,   16,  2,    1,           128,      8,    2,
                                                                              Loop::kFreeInRuns>;
// clang-format on
// Few rows, which have no list of tiles: see Tiles.
template <typename W, Element E, int kSteps>
struct DequantNarrowUnlisted : DequantNarrow<W, E, kSteps> {
  static constexpr Tiles kTiles = Tiles::kFromIds;
  static constexpr Deal kDeal = Deal::kInTurn;
};
// Not for every scheme, for the library's size: each of these kernels is 0.1 MB.
template <typename W, int kSteps>
inline constexpr bool kHasFew = kSteps == 8 && !(W::kBits == 8 && W::kZeros);
template <typename W, int kSteps>
inline constexpr bool kHasRuns = kSteps == 8 && W::kHasAll;

template <typename W, Element E, int kSteps, int kTokens, int kWarpgroups, int kBlocks,
          int kRowBytes, int kMostStages, int kPerSm, Loop kLoop>
inline constexpr Walk kWalk<DequantShape<W, E, kSteps, kTokens, kWarpgroups, kBlocks, kRowBytes,
                                         kMostStages, kPerSm, kLoop>> =
    kLoop == Loop::kAligned ? Walk::kAsNeeded : Walk::kAhead;

struct DequantParams : Params {
  std::uint32_t flip;  // 0x80808080: signed bytes, stored q + 128 behind it

  // Cells: scale of row n, group g of expert e. Offsets fit 32 bits.
  const float* scale;
  bool scales_together;  // a group per promotion, neighbours in memory, aligned to kScalesAtOnce
  std::uint32_t cell_expert, cell_row, cell_group, cell_rows;  // cell_rows: rows of one cell
  std::uint32_t groups, group_blocks;                          // group_blocks: in 32s of K
  const std::uint8_t* zero;                                    // aligned to 4 bytes
  std::uint32_t zero_expert, zero_row, zero_group, zero_bytes;
  std::uint32_t zero_nibbles;  // 1: two rows share a byte, the even one has its low half
};

template <typename S>
void launch_dequant(const DequantParams& params, int grid, cudaStream_t stream);

}  // namespace moesaic::cuda::sm90
