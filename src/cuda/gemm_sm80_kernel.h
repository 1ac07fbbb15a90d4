// SPDX-License-Identifier: Apache-2.0
// The grouped product of the SM80 family: one kernel template for every scheme and both formats.
//
// Weights stand on the 16-row side of mma.sync, tokens on the 8-column side: token tiles of 8 to
// 128 without padding to 64, and a dequantized weight goes from registers straight into the
// product, where it is reused for every token of the tile. A persistent CTA walks the tile list;
// its cp.async pipeline runs across tiles and experts and is never drained. Each sum lives in one
// fp32 accumulator (promoting operands: partial sums of 32 of K, scaled and added in fp32), K
// ascending, whatever the tile: the same bits from every tactic.
//
// Which weight row a CTA puts into which row of an mma is free, and chosen so that a lane ends up
// with neighbouring columns of C (16-byte stores without a detour through shared memory), and,
// behind a gated activation, with a gate and its up in the same lane.
#pragma once

#include "cuda/gemm_sm80.h"
#include "cuda/operand.h"
#include "cuda/overlap.h"

namespace moesaic::cuda {

template <typename Op_, int kWarpsM_, int kWarpsN_, int kMFrags_, int kNFrags_, int kDepth_,
          int kStages_, int kCtas_>
struct Sm80Tile {
  using Op = Op_;
  static constexpr int kWarpsM = kWarpsM_, kWarpsN = kWarpsN_, kMFrags = kMFrags_,
                       kNFrags = kNFrags_;
  static constexpr int kDepth = kDepth_, kStages = kStages_, kCtas = kCtas_;
  static constexpr int kThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int kRows = 16 * kWarpsM * kMFrags;  // of weights
  static constexpr int kTokens = 8 * kWarpsN * kNFrags;
  static constexpr int kWeightBytes = kDepth * Op::kWeightBits / 8;  // of one row in a stage
  static constexpr int kActBytes = kDepth * Op::kActBits / 8;
  static constexpr int kGroups = kDepth / 32;  // scale groups that a stage may touch
  static constexpr bool kScales = Op::kPromote;
  static constexpr bool kZeros = Op::kZeros || Op::kE8M0;
  static constexpr bool kActScales = Op::kPromote && Op::kActBits == 8;
  // Layout of a stage.
  // Everything that is addressed by XOR begins at a multiple of the longest row.
  static constexpr int kAlign = kActBytes > kWeightBytes ? kActBytes : kWeightBytes;
  static constexpr int kActOffset = (kRows * kWeightBytes + kAlign - 1) / kAlign * kAlign;
  static constexpr int kScaleOffset = kActOffset + kTokens * kActBytes;
  static constexpr int kZeroOffset = kScaleOffset + (kScales ? kGroups * kRows * 4 : 0);
  static constexpr int kActScaleOffset = kZeroOffset + (kZeros ? kGroups * kRows * 4 : 0);
  static constexpr int kStageBytes =
      (kActScaleOffset + (kActScales ? kGroups * kTokens * 4 : 0) + kAlign - 1) / kAlign * kAlign;
  // Behind the stages: two tables of the tokens and columns of a tile.
  static constexpr int kTableBytes = kTokens * 16 + kRows * 8;
  static constexpr int kSharedBytes = kStages * kStageBytes + 2 * kTableBytes + 16;
  static_assert(kWeightBytes % 16 == 0 && kActBytes % 16 == 0 && kAlign <= 1024);
  static_assert(kCtas * (kSharedBytes + 1024) <= 228 * 1024);  // of an SM90; others hold fewer CTAs
};

// How much there is to do. In shared memory: read once per tile, no register kept.
struct Sm80Extent {
  std::uint32_t token_tiles, total;
};

// A CTA's share of work: `rows` tokens from position `first`, one tile of columns.
struct Sm80Work {
  std::int64_t first;
  std::int32_t expert, rows, column_tile;
};

// Work is counted in strips of 16 token tiles x all columns, token tiles fastest: the CTAs that run
// at one time share both weights and tokens in L2. Returns false for a part behind the tile's last
// row. Fewer than 2^31 items: checked on the host.
__device__ __forceinline__ bool locate(const Sm80Params& p, std::uint32_t index,
                                       std::uint32_t token_tiles, int tokens, Sm80Work& work) {
  constexpr std::uint32_t kStrip = 16;
  const std::uint32_t per_strip = kStrip * p.column_tiles;
  const std::uint32_t strip = index / per_strip, rest = index % per_strip;
  const std::uint32_t width = min(kStrip, token_tiles - strip * kStrip);
  const std::uint32_t token_tile = strip * kStrip + rest % width;
  work.column_tile = rest / width;
  const Tile tile = p.tiles[token_tile / p.parts];
  const int begin = static_cast<int>(token_tile % p.parts) * tokens;
  work.first = tile.first + begin;
  work.rows = min(tile.rows - begin, tokens);
  work.expert = tile.expert >= p.experts ? -1 : tile.expert;
  return work.rows > 0;
}

__device__ __forceinline__ std::uint32_t slot_of(const Sm80Params& p, std::int64_t position) {
  return p.row_slot ? static_cast<std::uint32_t>(p.row_slot[position])
                    : static_cast<std::uint32_t>(position);
}
__device__ __forceinline__ bool is_padding(const Sm80Params& p, std::uint32_t slot) {
  return p.row_slot && slot >= p.slot_count;
}
__device__ __forceinline__ std::uint32_t row_of(RowOf row, std::int64_t position,
                                                std::uint32_t slot, std::uint32_t top_k) {
  if (row == RowOf::kPosition) return static_cast<std::uint32_t>(position);
  return row == RowOf::kSlot ? slot : slot / top_k;
}

// Weight row r (0 .. kRows-1) of a CTA -> column of C and which of gate (0) / up (1).
template <typename T>
__device__ __forceinline__ std::int32_t column_of(const Sm80Params& p, std::int32_t column_tile,
                                                  int r, int& half) {
  constexpr int kPerWarp = 16 * T::kMFrags;
  const int warp = r / kPerWarp, fragment = r % kPerWarp / 16, q = r % 8;
  half = r / 8 % 2;
  if (p.gated)
    return column_tile * (T::kRows / 2) + warp * (kPerWarp / 2) + q * T::kMFrags + fragment;
  return column_tile * T::kRows + warp * kPerWarp + q * 2 * T::kMFrags + fragment * 2 + half;
}
__device__ __forceinline__ std::int64_t weight_row(const Sm80Params& p, std::int32_t column,
                                                   int half) {
  return p.gated ? static_cast<std::int64_t>(column) * p.row_multiple + p.row_offset[half] : column;
}

// Issues the copies of one stage after another, running ahead of the products. All that a stage
// costs is kept in pointers that move along K: at decode a warp has one stage's bytes to hide these
// instructions.
template <typename T>
class Sm80Loader {
 public:
  __device__ Sm80Loader(const Sm80Params& p, std::uint32_t stages, const Sm80Extent& extent)
      : p_(p), extent_(extent), index_(blockIdx.x) {
    const int tid = threadIdx.x;
    weight_dst_ = stages + WeightSwizzle::offset(tid / kWeightChunks, tid % kWeightChunks);
    act_dst_ = stages + T::kActOffset + ActSwizzle::offset(tid / kActChunks, tid % kActChunks);
    scale_dst_ = stages + T::kScaleOffset + tid * 4;
    k_ = p.k;  // "a tile has ended": the first issue looks for one
    index_ -= gridDim.x;
  }

  // The next stage's copies, as one group (empty behind the end, so that the count of groups
  // holds).
  __device__ __forceinline__ void issue() {
    if (k_ >= p_.k) {
      index_ += gridDim.x;
      seek();
    }
    if (k_ >= 0) {
      if (k_ + T::kDepth <= p_.k && p_.aligned) {
        copy_whole();
      } else {
        copy_partial();
      }
      if constexpr (T::kScales) {
        if (p_.group_blocks != 0) copy_scales();
      }
      w_ += T::kWeightBytes;
      a_ += T::kActBytes;
      k_ += T::kDepth;
    }
    ptx::cp_async_commit();
    slot_offset_ = next_slot();
  }

  // Where the slot behind the one that is filled next begins. kStages - 1 stages ahead, that is the
  // one to read.
  __device__ __forceinline__ std::uint32_t next_slot() const {
    return slot_offset_ == (T::kStages - 1) * T::kStageBytes ? 0 : slot_offset_ + T::kStageBytes;
  }

 private:
  static constexpr int kWeightChunks = T::kWeightBytes / 16, kActChunks = T::kActBytes / 16;
  static constexpr int kWeightStep = T::kThreads / kWeightChunks,
                       kActStep = T::kThreads / kActChunks;
  static constexpr int kWeightCount = T::kRows / kWeightStep;
  static constexpr int kActCount = (T::kTokens + kActStep - 1) / kActStep;
  static constexpr std::uint32_t kNone = 0xffffffffu;
  using WeightSwizzle = Swizzle<T::kWeightBytes, T::Op::kWeightUnit>;
  using ActSwizzle = Swizzle<T::kActBytes, T::Op::kActUnit>;
  static_assert(T::kThreads % kWeightChunks == 0 && T::kThreads % kActChunks == 0);
  static_assert(T::kRows % kWeightStep == 0 && kWeightCount > 0);
  static_assert(!T::kScales || T::kRows <= T::kThreads);

  // Moves to the next work item that has a product to compute.
  __device__ __forceinline__ void seek() {
    Sm80Work work;
    for (; index_ < extent_.total; index_ += gridDim.x) {
      if (locate(p_, index_, extent_.token_tiles, T::kTokens, work) && work.expert >= 0) break;
    }
    if (index_ >= extent_.total) {
      k_ = -1;  // nothing more
      return;
    }
    k_ = 0;
    const int tid = threadIdx.x;
    w_ = p_.w + work.expert * p_.w_expert + tid % kWeightChunks * 16;
    a_ = p_.a + tid % kActChunks * 16;
#pragma unroll
    for (int i = 0; i < kWeightCount;
         ++i) {  // rows behind the last one: any row, the result is dropped
      int half;
      const std::int32_t column =
          min(column_of<T>(p_, work.column_tile, tid / kWeightChunks + i * kWeightStep, half),
              p_.n_out - 1);
      weight_[i] = static_cast<std::uint32_t>(weight_row(p_, column, half) * p_.w_row);
    }
#pragma unroll
    for (int i = 0; i < kActCount; ++i) {  // tokens that are not there: nothing, columns do not mix
      const int row = tid / kActChunks + i * kActStep;
      act_[i] = kNone;
      if (row < work.rows) {
        const std::int64_t position = work.first + row;
        const std::uint32_t slot = slot_of(p_, position);
        if (!is_padding(p_, slot)) {
          act_[i] =
              static_cast<std::uint32_t>(p_.a_rows(row_of(p_.a_row, position, slot, p_.top_k)));
        }
      }
    }
    if constexpr (T::kScales) {
      if (p_.group_blocks == 0) return;
      in_group_ = 0;
      if (tid < T::kRows) {
        int half;
        const std::int32_t column =
            min(column_of<T>(p_, work.column_tile, tid, half), p_.n_out - 1);
        const std::int64_t n = weight_row(p_, column, half);
        scale_ = p_.scale + work.expert * p_.scale_expert + n / p_.scale_rows * p_.scale_row;
        if constexpr (T::kZeros) {
          zero_ =
              p_.zero + work.expert * p_.zero_expert + (p_.zero_nibbles ? n / 2 : n) * p_.zero_row;
        }
      }
      if constexpr (T::kActScales) {
        act_scale_ = nullptr;
        if (p_.a_scale_grouped && tid < work.rows) {
          const std::int64_t position = work.first + tid;
          const std::uint32_t slot = slot_of(p_, position);
          if (!is_padding(p_, slot)) {
            act_scale_ = p_.a_scale + work.expert * p_.a_scale_expert +
                         row_of(p_.a_row, position, slot, p_.top_k) * p_.a_scale_row;
          }
        }
      }
    }
  }

  // Shared address of this thread's i-th chunk: rows a multiple of 8 apart are swizzled alike.
  __device__ __forceinline__ std::uint32_t weight_dst(int i) const {
    if constexpr (kWeightStep % 8 == 0)
      return weight_dst_ + slot_offset_ + i * kWeightStep * T::kWeightBytes;
    const int tid = threadIdx.x;
    return weight_dst_ - WeightSwizzle::offset(tid / kWeightChunks, tid % kWeightChunks) +
           slot_offset_ +
           WeightSwizzle::offset(tid / kWeightChunks + i * kWeightStep, tid % kWeightChunks);
  }
  __device__ __forceinline__ std::uint32_t act_dst(int i) const {
    if constexpr (kActStep % 8 == 0) return act_dst_ + slot_offset_ + i * kActStep * T::kActBytes;
    const int tid = threadIdx.x;
    return act_dst_ - ActSwizzle::offset(tid / kActChunks, tid % kActChunks) + slot_offset_ +
           ActSwizzle::offset(tid / kActChunks + i * kActStep, tid % kActChunks);
  }

  __device__ __forceinline__ void copy_whole() {
#pragma unroll
    for (int i = 0; i < kWeightCount; ++i) {
      ptx::cp_async16(weight_dst(i), w_ + static_cast<std::uint64_t>(weight_[i]) * 16);
    }
#pragma unroll
    for (int i = 0; i < kActCount; ++i) {
      if (act_[i] != kNone)
        ptx::cp_async16(act_dst(i), a_ + static_cast<std::uint64_t>(act_[i]) * 16);
    }
  }

  // K's tail (zeros behind its end, of weights and tokens both), or rows that are not aligned to 16
  // bytes.
  __device__ __forceinline__ void copy_partial() {
    const int tid = threadIdx.x;
    const int w_left = (p_.k - k_) * T::Op::kWeightBits / 8 - tid % kWeightChunks * 16;
    const int a_left = (p_.k - k_) * T::Op::kActBits / 8 - tid % kActChunks * 16;
#pragma unroll
    for (int i = 0; i < kWeightCount; ++i) {
      copy_chunk(weight_dst(i), w_, static_cast<std::uint64_t>(weight_[i]) << p_.w_shift, w_left,
                 p_.w_shift, p_.w);
    }
#pragma unroll
    for (int i = 0; i < kActCount; ++i) {
      if (act_[i] == kNone) continue;
      copy_chunk(act_dst(i), a_, static_cast<std::uint64_t>(act_[i]) << p_.a_shift, a_left,
                 p_.a_shift, p_.a);
    }
  }
  __device__ __forceinline__ static void copy_chunk(std::uint32_t dst, const char* base,
                                                    std::uint64_t offset, int left, int shift,
                                                    const char* valid) {
    const char* src = base + offset;
    if (shift == 4) {
      ptx::cp_async16(dst, left > 0 ? src : valid, left > 16 ? 16 : (left > 0 ? left : 0));
    } else {
#pragma unroll
      for (int i = 0; i < 16; i += 4) {
        ptx::cp_async4(dst + i, left > i ? src + i : valid, left > i ? 4 : 0);
      }
    }
  }

  // One row of scales (zero points, token scales) per group that the stage touches.
  __device__ __forceinline__ void copy_scales() {
    const std::uint32_t cell = scale_dst_ + slot_offset_;
    if (in_group_ == p_.group_blocks) next_group();
    copy_group(cell, 0);
    if (p_.group_blocks % T::kGroups == 0) {  // whole stages: one group
      in_group_ += T::kGroups;
      return;
    }
    int row = 0;
#pragma unroll 1
    for (int block = 1; block < T::kGroups && k_ + block * 32 < p_.k; ++block) {
      if (++in_group_ == p_.group_blocks) {
        next_group();
        copy_group(cell, ++row);
      }
    }
    ++in_group_;
  }
  __device__ __forceinline__ void next_group() {
    in_group_ = 0;
    scale_ += p_.scale_group;
    if constexpr (T::kZeros) zero_ += p_.zero_group;
    if constexpr (T::kActScales) {
      if (act_scale_) act_scale_ += p_.a_scale_group;
    }
  }
  __device__ __forceinline__ void copy_group(std::uint32_t cell, int row) {
    if (T::kRows == T::kThreads || threadIdx.x < T::kRows) {
      if constexpr (!T::Op::kE8M0) ptx::cp_async4(cell + row * T::kRows * 4, scale_);
      if constexpr (T::kZeros) {
        if (p_.zero) {  // the aligned word that holds the byte, never beyond the tensor
          const auto word = reinterpret_cast<std::uintptr_t>(zero_) & ~std::uintptr_t{3};
          const std::uint32_t dst = cell + T::kZeroOffset - T::kScaleOffset + row * T::kRows * 4;
          if (p_.zero_whole) {
            ptx::cp_async4(dst, reinterpret_cast<const void*>(word));
          } else {
            const auto left = reinterpret_cast<std::uintptr_t>(p_.zero_end) - word;
            ptx::cp_async4(dst, reinterpret_cast<const void*>(word),
                           left < 4 ? static_cast<int>(left) : 4);
          }
        }
      }
    }
    if constexpr (T::kActScales) {
      if (act_scale_ && threadIdx.x < T::kTokens) {
        ptx::cp_async4(cell + T::kActScaleOffset - T::kScaleOffset + row * T::kTokens * 4,
                       act_scale_);
      }
    }
  }

  const Sm80Params& p_;
  const Sm80Extent& extent_;
  std::uint32_t index_;
  std::uint32_t weight_dst_, act_dst_, scale_dst_, slot_offset_ = 0;
  int k_ = 0, in_group_ = 0;
  const char* w_ = nullptr;  // this thread's chunk of row 0, and of A's row 0, at k_
  const char* a_ = nullptr;
  std::uint32_t weight_[kWeightCount], act_[kActCount];  // rows, in units of the row's alignment
  const float* scale_ = nullptr;                         // of the current group
  const std::uint8_t* zero_ = nullptr;
  const float* act_scale_ = nullptr;
};

// The products of one stage.
template <typename T>
class Sm80Consumer {
 public:
  using Op = typename T::Op;
  static constexpr int kM = T::kMFrags, kN = T::kNFrags;
  static constexpr int kBlocks = T::kDepth / Op::kBlock;
  float acc[kM][kN][4];

  __device__ Sm80Consumer(const Sm80Params& p) : p_(p), lane_(threadIdx.x % 32) {
    const int warp = threadIdx.x / 32;
    warp_m_ = warp % T::kWarpsM;
    warp_n_ = warp / T::kWarpsM;
    weights_ =
        warp_m_ * kM * 16 * T::kWeightBytes + Op::template lane_offset_a<T::kWeightBytes>(lane_);
    tokens_ = T::kActOffset + warp_n_ * kN * 8 * T::kActBytes +
              Op::template lane_offset_b<T::kActBytes>(lane_);
  }
  __device__ int warp_m() const { return warp_m_; }
  __device__ int warp_n() const { return warp_n_; }
  __device__ int lane() const { return lane_; }

  __device__ void begin(const Sm80Work& work) {
#pragma unroll
    for (auto& f : acc)
      for (auto& n : f)
        for (float& x : n) x = 0.0f;
    if constexpr (T::kScales) {
      in_group_ = 0;
      group_ = 0;
#pragma unroll
      for (int f = 0; f < kM; ++f) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          scale_[f][h] = 1.0f;
          if constexpr (Op::kZeros) zero_[f][h] = Op::make_zero(p_.implicit_zero);
          if constexpr (T::kZeros) {  // which byte (and nibble) of the copied word: its bit
                                      // position
            zero_byte_[f][h] = 0;
            if (p_.zero == nullptr) continue;
            int half;
            const int row = (warp_m_ * kM + f) * 16 + h * 8 + lane_ / 4;
            const std::int32_t column =
                min(column_of<T>(p_, work.column_tile, row, half), p_.n_out - 1);
            const std::int64_t n = weight_row(p_, column, half);
            const auto low = static_cast<std::uint32_t>(
                reinterpret_cast<std::uintptr_t>(p_.zero) + work.expert * p_.zero_expert +
                (p_.zero_nibbles ? n / 2 : n) * p_.zero_row);
            zero_byte_[f][h] = (low & 3) | (p_.zero_nibbles && n % 2 ? 4u : 0u);
          }
        }
      }
    }
  }

  // Large tiles copy between the two halves of a stage: the tensor cores then have work in hand
  // while the addresses are computed. Small ones copy first: their bytes must be on the way early.
  __device__ __forceinline__ void consume(std::uint32_t stage, int k, Sm80Loader<T>& loader) {
    if constexpr (kM * kN >= 16) {
      int row = -1;
#pragma unroll 1
      for (int block = 0; block < kBlocks; ++block) {
        if (block == kBlocks / 2) loader.issue();
        if constexpr (T::kScales) {
          if (p_.group_blocks != 0) advance_group(stage, k + block * 32, row);
        }
        multiply(stage, block, row);
      }
    } else {
      loader.issue();
      if constexpr (T::kScales) {
        int row = -1;
        if (p_.group_blocks % T::kGroups !=
            0) {  // several groups in a stage, or one that ends within
#pragma unroll 1
          for (int block = 0; block < kBlocks; ++block) {
            advance_group(stage, k + block * 32, row);
            multiply(stage, block, row);
          }
          return;
        }
        if (p_.group_blocks != 0) {
          advance_group(stage, k, row);
          in_group_ += T::kGroups - 1;
        }
      }
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) multiply(stage, block, 0);
    }
  }

 private:
  // One block of K; its token scales are in row `group` of the stage.
  __device__ __forceinline__ void multiply(std::uint32_t stage, int block, int group) {
    typename Op::A a[kM];
    const std::uint32_t weights = (stage + weights_) ^ (block * (Op::kBlock * Op::kWeightBits / 8));
    const std::uint32_t tokens = (stage + tokens_) ^ (block * (Op::kBlock * Op::kActBits / 8));
#pragma unroll
    for (int f = 0; f < kM; ++f) {
      Op::template load_a<T::kWeightBytes>(a[f], weights, f * 16, zero_[f], p_.byte_flip);
    }
    // A pair of token fragments (or one) at a time: the next pair is read, and the last pair's sums
    // are added, while this pair's products are in the tensor cores.
    constexpr int kPair = kN % 2 != 0 || (Op::kPromote && kM * kN >= 32) ? 1 : 2;  // 1: registers
    typename Op::B b[2][kPair];
    typename Op::Sum part[2][kM][kPair][4];
#pragma unroll
    for (int j = 0; j < kPair; ++j) Op::template load_b<T::kActBytes>(b[0][j], tokens, j * 8);
#pragma unroll
    for (int n0 = 0; n0 < kN; n0 += kPair) {
      constexpr int kNext = kPair;
      const int now = n0 / kPair % 2;
      if (n0 + kNext < kN) {
#pragma unroll
        for (int j = 0; j < kPair; ++j) {
          Op::template load_b<T::kActBytes>(b[now ^ 1][j], tokens, (n0 + kNext + j) * 8);
        }
      }
      if constexpr (Op::kPromote) {
#pragma unroll
        for (int f = 0; f < kM; ++f)
#pragma unroll
          for (int j = 0; j < kPair; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) part[now][f][j][i] = 0;
      }
#pragma unroll
      for (int s = 0; s < Op::kSteps; ++s)
#pragma unroll
        for (int j = 0; j < kPair; ++j)
#pragma unroll
          for (int f = 0; f < kM; ++f) {
            if constexpr (Op::kPromote) {
              Op::step(s, part[now][f][j], a[f], b[now][j]);
            } else {
              Op::step(s, acc[f][n0 + j], a[f], b[now][j]);
            }
          }
      if constexpr (Op::kPromote) {
        if (n0 > 0) promote(part[now ^ 1], n0 - kPair, stage, group);
      }
    }
    if constexpr (Op::kPromote) promote(part[(kN / kPair - 1) % 2], kN - kPair, stage, group);
  }

  // acc += scale * part, of kPair fragments from n0 on.
  template <int kPair>
  __device__ __forceinline__ void promote(const typename Op::Sum (&part)[kM][kPair][4], int n0,
                                          std::uint32_t stage, int group) {
#pragma unroll
    for (int j = 0; j < kPair; ++j) {
      float token_scale[2] = {1.0f, 1.0f};
      if constexpr (T::kActScales) {
        if (p_.a_scale_grouped) {
          std::uint32_t s[2];
          const int token = (warp_n_ * kN + n0 + j) * 8 + lane_ % 4 * 2;
          ptx::load_shared8(s, stage + T::kActScaleOffset + (group * T::kTokens + token) * 4);
          token_scale[0] = __uint_as_float(s[0]), token_scale[1] = __uint_as_float(s[1]);
        }
      }
#pragma unroll
      for (int f = 0; f < kM; ++f) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float s = scale_[f][i / 2];
          if constexpr (T::kActScales) s = __fmul_rn(s, token_scale[i % 2]);
          acc[f][n0 + j][i] = __fmaf_rn(static_cast<float>(part[f][j][i]), s, acc[f][n0 + j][i]);
        }
      }
    }
  }

  // Enters the next block: fetches scales at the begin of a stage (row < 0) and of a group. Behind
  // the end of K (tokens are zero there) the last ones stay.
  __device__ __forceinline__ void advance_group(std::uint32_t stage, int k, int& row) {
    const bool ended = in_group_ == p_.group_blocks;
    if (k < p_.k && (ended || row < 0)) {
      if (ended) in_group_ = 0, ++group_;
      load_group(stage, ++row);
    }
    ++in_group_;
  }
  __device__ __forceinline__ void load_group(std::uint32_t stage, int row) {
    const int row0 = warp_m_ * kM * 16 + lane_ / 4;
#pragma unroll
    for (int f = 0; f < kM; ++f) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const std::uint32_t cell = stage + (row * T::kRows + row0 + f * 16 + h * 8) * 4;
        if constexpr (!Op::kE8M0) {
          scale_[f][h] = ptx::load_shared_float(cell + T::kScaleOffset);
        }
        if constexpr (T::kZeros) {
          if (p_.zero == nullptr) continue;
          const std::uint32_t byte =
              (zero_byte_[f][h] + static_cast<std::uint32_t>(group_ * p_.zero_group)) & 3;
          std::uint32_t z = (ptx::load_shared4(cell + T::kZeroOffset) >> (byte * 8)) & 0xffu;
          if constexpr (Op::kE8M0) {  // 2^(z - 127); 0 is 2^-127, 255 is NaN
            scale_[f][h] =
                __uint_as_float(z == 0 ? 0x00400000u : (z == 255 ? 0x7fc00000u : z << 23));
          } else {
            if (p_.zero_nibbles) z = (z >> (zero_byte_[f][h] & 4)) & 0xfu;
            zero_[f][h] = Op::make_zero(z);
          }
        }
      }
    }
  }

  const Sm80Params& p_;
  int lane_, warp_m_, warp_n_;
  int weights_, tokens_;
  int group_ = 0, in_group_ = 0;
  float scale_[kM][2];
  std::uint32_t zero_[kM][2];
  std::uint32_t zero_byte_[kM][2];
};

// --- epilogue ------------------------------------------------------------------------------------
__device__ __forceinline__ float load_as_float(const void* data, DType dtype, std::int64_t i) {
  if (dtype == DType::kF32) return static_cast<const float*>(data)[i];
  if (dtype == DType::kF16) return __half2float(static_cast<const __half*>(data)[i]);
  return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
}

template <int kCount>
__device__ __forceinline__ void store_words(void* dst, const std::uint32_t (&words)[kCount]) {
  if constexpr (kCount == 1) *static_cast<std::uint32_t*>(dst) = words[0];
  if constexpr (kCount == 2) *static_cast<uint2*>(dst) = make_uint2(words[0], words[1]);
  if constexpr (kCount >= 4) {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      static_cast<uint4*>(dst)[i / 4] =
          make_uint4(words[i], words[i + 1], words[i + 2], words[i + 3]);
    }
  }
}

// kCount neighbouring columns of one row.
template <int kCount>
__device__ __forceinline__ void store_columns(const Sm80Params& p, std::int64_t row,
                                              std::int32_t column, const float (&v)[kCount]) {
  const std::int64_t at = row + column * p.c_column;
  const bool vector = p.c_vector >= kCount && column + kCount <= p.n_out;
  if (p.c_dtype == DType::kF32) {
    float* c = static_cast<float*>(p.c) + at;
    if (vector) {
      std::uint32_t words[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i) words[i] = __float_as_uint(v[i]);
      store_words(c, words);
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (column + i < p.n_out) c[i * p.c_column] = v[i];
      }
    }
    return;
  }
  std::uint16_t h[kCount];
  const bool bf16 = p.c_dtype == DType::kBF16;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    h[i] = bf16 ? __bfloat16_as_ushort(__float2bfloat16_rn(v[i]))
                : __half_as_ushort(__float2half_rn(v[i]));
  }
  std::uint16_t* c = static_cast<std::uint16_t*>(p.c) + at;
  if constexpr (kCount > 1) {
    if (vector) {
      std::uint32_t words[kCount / 2];
#pragma unroll
      for (int i = 0; i < kCount / 2; ++i)
        words[i] = h[2 * i] | static_cast<std::uint32_t>(h[2 * i + 1]) << 16;
      store_words(c, words);
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (column + i < p.n_out) c[i * p.c_column] = h[i];
  }
}

// Per token of a tile: where its row of C begins (or -1), and its factors. Per weight row: its
// factor and bias. Fetched while the first stages are still on their way, and kept out of the
// registers until needed.
struct TokenEntry {
  std::int64_t c_row;
  float scale, weight;
};
struct ColumnEntry {
  float factor, bias;
};
template <typename T>
struct Sm80Table {
  TokenEntry tokens[T::kTokens];
  ColumnEntry columns[T::kRows];
};

template <typename T>
__device__ __forceinline__ void fill_table(const Sm80Params& p, const Sm80Work& work,
                                           Sm80Table<T>& table) {
  static_assert(sizeof(Sm80Table<T>) == T::kTableBytes);
  for (int i = threadIdx.x; i < T::kRows; i += T::kThreads) {
    int half;
    const std::int32_t column = column_of<T>(p, work.column_tile, i, half);
    const std::int64_t n = weight_row(p, column, half);
    ColumnEntry entry{p.alpha ? p.alpha[work.expert * p.alpha_stride] : 1.0f, 0.0f};
    if (column < p.n_out) {
      if (p.scale && p.group_blocks == 0) {
        entry.factor = __fmul_rn(
            entry.factor, p.scale[work.expert * p.scale_expert + n / p.scale_rows * p.scale_row]);
      }
      if (p.bias)
        entry.bias =
            load_as_float(p.bias, p.bias_dtype, work.expert * p.bias_expert + n * p.bias_row);
    }
    table.columns[i] = entry;
  }
  for (int i = threadIdx.x; i < T::kTokens; i += T::kThreads) {
    TokenEntry entry{-1, 1.0f, 1.0f};
    if (i < work.rows) {
      const std::int64_t position = work.first + i;
      const std::uint32_t slot = slot_of(p, position);
      if (!is_padding(p, slot)) {
        entry.c_row = p.c_rows(row_of(p.c_row, position, slot, p.top_k));
        if (p.row_weights) entry.weight = p.row_weights[slot];
        if (p.a_scale && !p.a_scale_grouped && work.expert >= 0) {
          entry.scale = p.a_scale[row_of(p.a_row, position, slot, p.top_k) * p.a_scale_row +
                                  work.expert * p.a_scale_expert];
        }
      }
    }
    table.tokens[i] = entry;
  }
}

template <typename T>
__device__ __forceinline__ void finish(const Sm80Params& p, const Sm80Work& work,
                                       Sm80Consumer<T>& sums, const Sm80Table<T>& table) {
  constexpr int kM = T::kMFrags, kN = T::kNFrags;
  const int lane = sums.lane(), g = lane / 4, t = lane % 4;
  // This lane's columns: 2 * kM of them, or kM pairs of gate and up.
  const ColumnEntry* columns = table.columns + sums.warp_m() * kM * 16 + g;
  int half;
  const std::int32_t column0 = column_of<T>(p, work.column_tile, sums.warp_m() * kM * 16 + g, half);
  ActivationTerms terms{};
  if (p.has_activation) terms = p.activation.terms(work.expert);

  // One or two token fragments at a time in a loop that is not unrolled, the others rotating down
  // through the registers: the switch over the activations is compiled once, not once per fragment.
  constexpr int kBlock = kN < 2 || kM >= 4 ? 1 : 2;
#pragma unroll 1
  for (int n0 = 0; n0 < kN; n0 += kBlock) {
    const TokenEntry* entry = table.tokens + (sums.warp_n() * kN + n0) * 8 + t * 2;
#pragma unroll
    for (int f = 0; f < kM; ++f) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const ColumnEntry column = columns[f * 16 + h * 8];
#pragma unroll
        for (int n = 0; n < kBlock; ++n) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            float& v = sums.acc[f][n][h * 2 + j];
            v = __fadd_rn(__fmul_rn(__fmul_rn(v, column.factor), entry[n * 8 + j].scale),
                          column.bias);
          }
        }
      }
    }
    if (p.has_activation) {
      with_activation(p.activation.kind, [&](auto tag) {
        constexpr Activation kKind = decltype(tag)::value;
#pragma unroll
        for (int f = 0; f < kM; ++f) {
#pragma unroll
          for (int n = 0; n < kBlock; ++n) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
              float& gate = sums.acc[f][n][j];
              float& up = sums.acc[f][n][2 + j];
              gate = activate<kKind>(gate, up, terms);
              if constexpr (!is_gated(kKind)) up = activate<kKind>(up, 0.0f, terms);
            }
          }
        }
      });
    }
#pragma unroll
    for (int n = 0; n < kBlock; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const TokenEntry token = entry[n * 8 + j];
        if (token.c_row < 0) continue;
        if (p.gated) {
          float v[kM];
#pragma unroll
          for (int f = 0; f < kM; ++f) v[f] = __fmul_rn(sums.acc[f][n][j], token.weight);
          store_columns(p, token.c_row, column0, v);
        } else {
          float v[2 * kM];
#pragma unroll
          for (int f = 0; f < kM; ++f) {
            v[2 * f] = __fmul_rn(sums.acc[f][n][j], token.weight);
            v[2 * f + 1] = __fmul_rn(sums.acc[f][n][2 + j], token.weight);
          }
          store_columns(p, token.c_row, column0, v);
        }
      }
    }
    if constexpr (kN > kBlock) {
#pragma unroll
      for (int f = 0; f < kM; ++f) {
#pragma unroll
        for (int n = 0; n + kBlock < kN; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) sums.acc[f][n][i] = sums.acc[f][n + kBlock][i];
        }
      }
    }
  }
}

// A filtered tile: its rows become zero.
template <typename T>
__device__ __noinline__ void write_zeros(const Sm80Params& p, const Sm80Work& work) {
  const int columns = p.gated ? T::kRows / 2 : T::kRows;
  for (int i = threadIdx.x; i < T::kTokens * columns; i += T::kThreads) {
    const int row = i / columns;
    if (row >= work.rows) break;
    const std::int64_t position = work.first + row;
    const std::uint32_t slot = slot_of(p, position);
    if (is_padding(p, slot)) continue;
    const float zero[1] = {0.0f};
    store_columns(p, p.c_rows(row_of(p.c_row, position, slot, p.top_k)),
                  work.column_tile * columns + i % columns, zero);
  }
}

// --- the kernel ----------------------------------------------------------------------------------
template <typename T>
__global__ void __launch_bounds__(T::kThreads, T::kCtas)
    gemm_sm80(const __grid_constant__ Sm80Params p) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const std::uint32_t stages = ptx::shared_address(shared);
  Sm80Table<T>* tables = reinterpret_cast<Sm80Table<T>*>(shared + T::kStages * T::kStageBytes);
  Sm80Extent& extent = *reinterpret_cast<Sm80Extent*>(tables + 2);

  begin_kernel();
  if (threadIdx.x == 0) {
    extent.token_tiles = min(*p.num_tiles, p.max_tiles) * p.parts;
    extent.total = extent.token_tiles * p.column_tiles;
  }
  __syncthreads();

  Sm80Loader<T> loader(p, stages, extent);
#pragma unroll 1
  for (int i = 0; i < T::kStages - 1; ++i) loader.issue();

  Sm80Consumer<T> sums(p);
  int parity = 0;
#pragma unroll 1
  for (std::uint32_t index = blockIdx.x; index < extent.total; index += gridDim.x) {
    Sm80Work work;
    if (!locate(p, index, extent.token_tiles, T::kTokens, work)) continue;
    if (work.expert < 0) {
      write_zeros<T>(p, work);
      continue;
    }
    Sm80Table<T>& table = tables[parity];  // two: a slow warp may still read the last one
    parity ^= 1;
    fill_table<T>(p, work, table);
    sums.begin(work);
#pragma unroll 1
    for (int k = 0; k < p.k; k += T::kDepth) {
      ptx::cp_async_wait<T::kStages - 2>();
      __syncthreads();  // this stage has landed, and everyone is done with the one that is refilled
                        // next
      sums.consume(stages + loader.next_slot(), k, loader);
    }
    finish<T>(p, work, sums, table);
  }
  ptx::cp_async_wait<0>();
}

template <typename T>
constexpr Sm80Kernel sm80_kernel() {
  return {T::kTokens,  T::kRows, T::kDepth,       T::kStages,
          T::kThreads, T::kCtas, T::kSharedBytes, &gemm_sm80<T>};
}

}  // namespace moesaic::cuda
