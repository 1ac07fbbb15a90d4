// SPDX-License-Identifier: Apache-2.0
// The SM90a family: what the host hands to the kernel, and the closed list of kernels.
//
// One kernel template. The product is computed transposed: weight rows lie on wgmma's 64-row side
// and tokens on its N side (8 to 256), so that a tile with one token wastes 7 columns and not 63
// rows.
//
// Read: run in sm90/gemm.cu (which kernel, with which arguments) -> gemm_kernel at the end of
// sm90/kernel.h (which warp does what) -> Schedule::next -> load_weights and TokenLoader::run
// (to shared memory) -> Multiplier::run, multiply (wgmma) -> Epilogue::finish -> C. What may be
// skipped at first, for none of it changes a bit: Tiles, Order, runs, upright, direct, groups,
// places of terms.
//   tile   token rows of one expert (RowMap); "rows" alone are token rows everywhere
//   task   a tile times a band of weight rows; what a CTA works on at a time
//   run    tasks of one tile, one behind the other
//   stage  a slot of the ring in shared memory: kChunks chunks of 128 bytes of K, of the task's
//          tokens and weight rows
//   group  tiles whose tasks are walked together
//   terms  factor and bias of each weight row
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/activation_math.h"
#include "cuda/sm90/ptx_wgmma.h"
#include "row_map.h"

namespace moesaic::cuda::sm90 {

using ptx::Element;

// --- shapes of the kernels
// What a CTA of a kernel that fits twice into an SM asks for when it wants its SM alone
// (Params::spread): more than half of its shared memory. A CTA of the next product, which asks for
// S::kSharedBytes, still fits beside it.
inline constexpr int kSpreadBytes = 113 * 1024 + 128;

// A stage holds kChunks chunks of 128 bytes of K for kBlocks * 64 weight rows of each multiplying
// warpgroup and for kTokens tokens. kPair CTAs of a cluster share the weight rows of a task (each
// loads half and sends it to both) and halve its tokens: L2 then delivers two thirds of the bytes.
// kAlongK: a kernel without scales along K needs none of what they take (registers of the loading
// warps and the exchange of the sides above all), and has room for a few more tokens.
enum class ScalesAlongK : unsigned char { kPossible, kNever };
// Where tiles come from. Kernels of few rows make them themselves (Backend::makes_tiles), and are
// kernels of their own: that code beside the other's cost decode up to 1% in 16 bit and 6% in int4,
// although it did not run.
enum class Tiles : unsigned char {
  kListed,          // align, or tiles, wrote them
  kFromIds,         // at most as many as a warp has lanes, of the ids or of a caller's blocks
  kFromIdsOrBlocks  // the same, and up to 1024 of a caller's blocks
};
// kFullFirst: of kernels that multiply blocks of 64 tokens (sm90/upright.h), where a tile of
// one block for each CTA takes 0.64 of the time of one of two, however many rows they have. Where K
// is long, and a wave of tasks so a large part of the whole, an expert's rows are divided into as
// few blocks as there can be, and the list is walked twice: first for the full tiles, then for the
// others. Tasks that are dealt out one by one end together only if those of a wave are alike, and
// the last waves consist of short ones. That weights come from memory a second time costs less
// then: GEMM1 of deepseek-v3-ep8 (K = 7168, T = 1024) takes 6% less, but 8% more where K is 2048.
enum class Order : unsigned char { kListed, kFullFirst };

// How a CTA comes by its tasks: see sm90/deal.h.
enum class Deal : unsigned char { kInTurn, kByCounter };
inline constexpr int kDealtRing = 16;  // no loading warp is a whole ring of stages behind
constexpr int dealt_bytes(Deal deal) { return deal == Deal::kByCounter ? 8 * kDealtRing : 0; }

template <Element kElement_, int kTokens_, int kWarpgroups_, int kBlocks_, int kChunks_,
          int kStages_, int kPair_ = 1, ScalesAlongK kAlongK_ = ScalesAlongK::kPossible,
          Tiles kTiles_ = Tiles::kListed>
struct Shape {
  static constexpr Element kElement = kElement_;
  static constexpr int kTokens = kTokens_;
  static constexpr int kWarpgroups = kWarpgroups_;  // that multiply; one more loads
  static constexpr int kBlocks = kBlocks_;
  static constexpr int kChunks = kChunks_;
  static constexpr int kStages = kStages_;
  static constexpr int kPair = kPair_;
  static constexpr Tiles kTiles = kTiles_;

  static constexpr bool kPromotes = kElement == Element::kE4M3;
  static constexpr bool kHasBlockScales = kPromotes && kAlongK_ == ScalesAlongK::kPossible;
  static constexpr bool kHasUpright = kHasBlockScales && kBlocks == 2;  // see sm90/upright.h
  static constexpr bool kSmall = kTokens <= 64;           // registers to spare, tasks short
  static constexpr bool kKeepsThread = kSmall;            // see thread_index
  static constexpr bool kHasRuns = kSmall || kPair == 2;  // see Params::run
  static constexpr Deal kDeal =
      kSmall && kTiles == Tiles::kListed ? Deal::kByCounter : Deal::kInTurn;
  static constexpr Order kOrder = kHasUpright ? Order::kFullFirst : Order::kListed;
  // A task has a group of 128 columns of a gated row: see sm90/groups.h.
  static constexpr bool kHasGroups = kHasUpright && kWarpgroups == 2;
  // Rows of C leave without shared memory: see sm90/direct.h.
  static constexpr bool kDirect = kPair == 2;
  static constexpr int kElementBytes = kPromotes ? 1 : 2;
  static constexpr int kChunkK = 128 / kElementBytes;
  static constexpr int kWeightRows = 64 * kBlocks * kWarpgroups;  // weight rows of a task
  static constexpr int kThreads = 128 * (kWarpgroups + 1);
  static constexpr int kPerSm = kWarpgroups == 1 ? 2 : 1;

  // Shared memory. Matrices are aligned to the swizzle atom.
  static constexpr int kWeightBytes = kWeightRows * 128;  // of one chunk
  static constexpr int kTokenBytes = kTokens * 128;
  static constexpr int kStageBytes = kChunks * (kWeightBytes + kTokenBytes);
  // Block scales of one stage: of each token, and of each eight weight rows.
  static constexpr int kScales = kTokens + kWeightRows / 8;
  static constexpr int kScaleBytes = kHasBlockScales ? kChunks * kScales * 4 : 0;
  // A task on its way to the multiplying warps, and its tokens: their rows of C and two factors.
  // Every task fills at least one stage, so a ring of one more than the stages cannot be overtaken.
  static constexpr int kTaskBytes = 32;
  static constexpr int kTableBytes = kTokens * 12;
  static constexpr int kRing = kStages + 1;
  // Epilogue of one warpgroup: two buffers of some tokens x 64 columns of 16 bits, or both together
  // 16 tokens in fp32 or the largest of tokens' groups; and what it must know of its weight rows
  // (factor, bias), of this task and of the next. Where tasks are short, the loading warps bring
  // these with a task's first stage, ahead as that is: as many places as the ring has, and one
  // more, for a run's next task is begun before its stage is seen to be free.
  static constexpr bool kBringsTerms = kPromotes && kTokens <= 16;
  static constexpr int kTermPlaces = kBringsTerms ? kRing + 1 : 2;
  static constexpr int kPitch =
      144;  // bytes per token: 128 and 16, so that eight rows hit all banks
  static constexpr int kEpilogueTokens = kTokens % 32 == 0 ? 32 : 16;
  static constexpr int kBufferBytes = kEpilogueTokens * kPitch;
  // (In e4m3 also by what C is multiplied before it is quantized; and an activation's terms, for
  // which registers are too few beside the sums.)
  static constexpr int kEpilogueBytes = 2 * kBufferBytes + kTermPlaces * kBlocks * 64 * 8 +
                                        (kPromotes ? (kTermPlaces + 3) / 4 * 16 : 0) +
                                        (kBringsTerms ? (kTermPlaces + 3) / 4 * 16 : 0) +
                                        (kDirect ? 32 : 0);
  static_assert(2 * kBufferBytes >= 16 * 68 * 4);
  // Warps that gather tokens, four rows of each at a time. A copy takes its warp 40 to 57 cycles
  // whoever else copies, so two were not enough for 128 rows in the 1024 cycles of a 16-bit stage.
  // (Pairs with scales along K have rows by TMA as a rule, and registers for two.)
  static constexpr int kLoaderWarps = kTokens >= 128 && !kHasUpright ? 3 : 2;
  // Boxes of tokens are asked for by so many warps: one takes its warp 200 to 300 cycles. (In 16
  // bit more than one warp gained nothing.)
  static constexpr int kBoxWarps = kPromotes && kPair == 1 ? kLoaderWarps : 1;
  // L2 keeps gathered tokens for all their row tasks and experts, while weights pass through it.
  static constexpr bool kKeepsTokens = kPair == 1;
  static constexpr int kPassRows = 4 * kLoaderWarps;
  static constexpr int kPasses = (kTokens + kPassRows - 1) / kPassRows;
  // Offsets of gathered rows: for each row of a pass those of all passes, in fours.
  static constexpr int kPassRoom = (kPasses + 3) / 4 * 4;
  static constexpr int kGatherBytes = kPassRows * kPassRoom * 4;
  static constexpr int kSharedBytes =
      kStages * (kStageBytes + kScaleBytes) + kWarpgroups * kEpilogueBytes +
      kRing * (kTableBytes + kTaskBytes) + kGatherBytes + 2 * kStages * 8 + dealt_bytes(kDeal);
  static_assert(kStages < kDealtRing);
  static_assert((kSharedBytes + 1024) * kPerSm <= 228 * 1024);
  static_assert(kPerSm == 1 || kSharedBytes <= kSpreadBytes);
  static_assert(kTokenBytes % 1024 == 0);
  // Tokens of a TMA load; where it is all of them, rows are gathered.
  static constexpr int kBox = kTokens % 32 == 0 ? 32 : kTokens % 48 == 0 ? 48 : 16;
  static_assert(kTokens % kBox == 0);
};

// Whether rows behind this activation can leave directly. (Pairs in e4m3 spill beside their partial
// sums, and each function is a copy of the whole way.)
template <typename S>
__host__ __device__ constexpr bool leaves_directly(Activation kind) {
  const bool usual = kind == Activation::kIdentity || is_gated(kind);
  const bool most = !S::kHasBlockScales && !(S::kPromotes && kind == Activation::kGelu);
  return S::kDirect && (usual || most);
}

// Element-independent names of the kernels, in the order of their tactics (but NarrowUnlisted).
// Narrow fits twice into an SM: at decode few tasks then run side by side instead of one and a half
// after another, and CTAs of GEMM2 fetch weights as soon as the first of GEMM1 are done.
// Widest takes a little more than 256 tokens where registers allow it: round numbers of tokens mean
// 256 or a multiple for each expert on the average, and with room for just so many every second
// expert would need one tile more. In e4m3 promotion needs them; without scales along K (Flat) it
// takes more than 128 tokens of a CTA in two halves.
// clang-format off
//                                           tokens  wg  blocks  chunks  stages  pair
template <Element E> using Narrow = Shape<E,     16,  1,      1,      2,      5>;
template <Element E> using NarrowUnlisted =
                   Shape<E,      16,  1,      1,      2,      5,      1, ScalesAlongK::kPossible,
                                                                         Tiles::kFromIdsOrBlocks>;
template <Element E> using Middle = Shape<E,     64,  2,      1,      1,      8>;
template <Element E> using Wide = Shape<E,      128,  2,      1,      1,  E == Element::kE4M3 ? 5 : 6>;
template <Element E> using Widest = Shape<E, E == Element::kE4M3 ? 128 : 144, 2, 2, 1, 4, 2>;
using WidestFlat =
           Shape<Element::kE4M3, 144,  2,      2,      1,      4,      2, ScalesAlongK::kNever>;
// clang-format on

// --- arguments
// Offset of row r: r * stride, or with inner > 0: (r / inner) * outer + (r % inner) * stride.
struct RowLayout {
  std::int64_t stride = 0, inner = 0, outer = 0;
  __host__ __device__ std::int64_t operator()(std::int64_t row) const {
    return inner == 0 ? row * stride : row / inner * outer + row % inner * stride;
  }
};

enum class OutType : unsigned char { kF32, kF16, kBF16 };
enum class TokenLoad : unsigned char { kGather, kTma };
// How C is written: 16 bytes at once, through stmatrix or directly; four elements; one element.
enum class StorePath : unsigned char { kMatrix, kVector, kScalar };

struct SmallView {  // of f32, f16 or bf16
  const void* data = nullptr;
  OutType type = OutType::kF32;
  std::int64_t expert_stride = 0, stride = 0;
};

// C in e4m3: what would be stored in 16 bit is quantized on its way out.
enum class Quantizes : unsigned char { kNo, kStatic, kGroup };
struct QuantizerView {
  Quantizes kind = Quantizes::kNo;
  const float* given = nullptr;  // kStatic: scale of expert e, at e * expert_stride
  std::int64_t expert_stride = 0;
  float* scale = nullptr;  // kGroup: of row r of C and columns 128 g ..., at r * row_stride + g
  std::int64_t row_stride = 0;
};
// Rows of C that leave without shared memory. Plain is what layers ask for, and takes half of the
// instructions: no token has a factor of its own (what all have is in the rows' terms), gate comes
// first, C has the type that the operands suggest, and the activation is none or gated.
enum class Direct : unsigned char { kNo, kAny, kPlain };
constexpr OutType plain_type(Element element) {
  return element == Element::kF16 ? OutType::kF16 : OutType::kBF16;
}
// What is known of a task's weight rows beside block scales: nothing; one factor, of all rows of
// the expert; or something of each row.
enum class Terms : unsigned char { kNone, kOne, kRows };
inline constexpr std::uint32_t kNoRow = 0xffffffffu;  // in place of a row of C: not stored

struct Params {
  CUtensorMap weights;  // {K, rows, halves, units of rows, E} or the like: see set_weights
  union {
    CUtensorMap tokens;     // {K, positions}, TokenLoad::kTma only
    UnlistedRows unlisted;  // not Tiles::kListed, whose tokens are gathered
  };

  RowMap rows;
  std::int32_t experts, sub_tiles;  // sub_tiles: pieces of kTokens rows that one tile may have
  std::int32_t weight_tasks;        // tasks along the weight rows
  // So many of them are walked as one, for the same tokens: what the loading warps have to find out
  // for each walk takes them longer than a task of short K lasts. 1, unless S::kHasRuns.
  std::int32_t run, weight_runs;  // weight_runs: along the weight rows
  std::int32_t task_weight_rows;  // weight rows of a task: kWeightRows, or 32 of 64
  std::int32_t group_tiles;       // tiles that are walked together, if experts allow: see Schedule
  std::int32_t* next_task;        // Deal::kByCounter: zero at first; null: all tasks come in turn
  bool even_tiles;                // give the tiles of an expert the same number of rows
  bool settled;                   // the tile list is older than the previous kernel
  bool weights_once;              // L2 need not keep weights: see reads_weights_once
  // No SM takes two CTAs. Where there are no more of them than SMs, those of GEMM2 would otherwise
  // go, two by two, to the SMs where GEMM1 ends first, and these would be waited for.
  bool spread;

  TokenLoad token_load;
  RowOf a_row, c_row;
  std::int64_t top_k;
  const char* a;
  RowLayout a_rows;       // in units of 16 bytes
  std::int64_t k_bytes;   // of one row
  std::int32_t k_chunks;  // of 128 bytes

  bool gated, up_first, interleaved, activates;
  ActivationView activation;
  SmallView bias;
  const float* alpha;         // [E]
  const float* weight_scale;  // cell (row / scale_group, k group) of expert e
  std::int64_t scale_expert, scale_row, scale_k, scale_group;
  Terms terms;        // S::kBringsTerms
  bool block_scaled;  // weight and activation scales change along K
  bool scale_quads;   // scales of four chunks can be loaded at once: see TokenLoader::store_scales
  bool upright;       // tokens may take the 64-row side: see sm90/upright.h
  Direct direct;      // S::kDirect, and C, the activation and the weights' layout allow it
  const float* a_scale;
  std::int64_t a_scale_row, a_scale_group, a_scale_expert;
  const float* row_weights;

  void* c;
  RowLayout c_rows;       // in elements
  std::int64_t c_column;  // element stride inside a row
  std::int64_t columns;   // of C
  OutType c_type;         // quantized: what is quantized, f16 or bf16
  StorePath store;
  QuantizerView quantizer;
};

// Whether the loading warps bring anything for the epilogue, S::kBringsTerms. (Found out anew by
// every task from what it follows from, it cost block scales 3% where GEMM2's K is 256 or 512.)
__device__ __forceinline__ bool brings_terms(const Params& p) {
  return p.terms != Terms::kNone || p.quantizer.kind == Quantizes::kStatic;
}

template <typename S>
std::size_t shared_size(const Params& p) {
  return static_cast<std::size_t>(S::kPerSm == 2 && p.spread ? kSpreadBytes : S::kSharedBytes);
}

template <typename S>
void launch_gemm(const Params& params, int grid, cudaStream_t stream);

}  // namespace moesaic::cuda::sm90
