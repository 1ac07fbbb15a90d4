// SPDX-License-Identifier: Apache-2.0
// The SM90a family: what the host hands to the kernel, and the closed list of kernels.
//
// One kernel template. The product is computed transposed: weight rows lie on wgmma's 64-row side and
// tokens on its N side (8 to 256), so that a tile with one token wastes 7 columns and not 63 rows.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/activation_math.h"
#include "cuda/ptx_wgmma_sm90.h"
#include "row_map.h"

namespace moesaic::cuda::sm90 {

using ptx::Element;

// --- shapes of the kernels ------------------------------------------------------------------------
// A stage holds kChunks chunks of 128 bytes of K for kBlocks * 64 weight rows of each consumer
// warpgroup and for kTokens tokens.
template <Element kElement_, int kTokens_, int kWarpgroups_, int kBlocks_, int kChunks_, int kStages_>
struct Shape {
  static constexpr Element kElement = kElement_;
  static constexpr int kTokens = kTokens_;
  static constexpr int kWarpgroups = kWarpgroups_;  // consumers; one more warpgroup loads
  static constexpr int kBlocks = kBlocks_;
  static constexpr int kChunks = kChunks_;
  static constexpr int kStages = kStages_;

  static constexpr bool kPromotes = kElement == Element::kE4M3;
  static constexpr int kElementBytes = kPromotes ? 1 : 2;
  static constexpr int kChunkK = 128 / kElementBytes;
  static constexpr int kRows = 64 * kBlocks * kWarpgroups;  // weight rows of a task
  static constexpr int kThreads = 128 * (kWarpgroups + 1);

  // Shared memory. Matrices are aligned to the swizzle atom.
  static constexpr int kWeightBytes = kRows * 128;  // of one chunk
  static constexpr int kTokenBytes = kTokens * 128;
  static constexpr int kStageBytes = kChunks * (kWeightBytes + kTokenBytes);
  static constexpr int kScaleBytes = kPromotes ? kChunks * kTokens * 4 : 0;  // of one stage
  // Epilogue of one warpgroup: two buffers of up to 32 tokens x 64 rows, what it must know of its
  // tokens (offset of the C row; two factors), and of its rows (factor, bias).
  static constexpr int kPitch = 144;  // bytes per token: 128 and 16, so that eight rows hit all banks
  static constexpr int kBufferBytes = 32 * kPitch;
  static constexpr int kEpilogueBytes = 2 * kBufferBytes + kTokens * 16 + kBlocks * 64 * 8;
  static constexpr int kTaskBytes = 32;
  static constexpr int kGatherBytes = (kTokens + 15) / 12 * 12 * 4;  // offsets of gathered rows
  static constexpr int kSharedBytes = 1024 + kStages * (kStageBytes + kScaleBytes) +
                                      kWarpgroups * kEpilogueBytes + (kStages + 1) * kTaskBytes +
                                      2 * kStages * 8 + kGatherBytes;
  static_assert(kSharedBytes <= 227 * 1024);
  static_assert(kTokenBytes % 1024 == 0);
};

// Element-independent names of the kernels, in the order of their tactics.
//                                             tokens  wg  blocks  chunks  stages
template <Element E> using Narrow = Shape<E,       16,  1,      1,      2,     10>;
template <Element E> using Middle = Shape<E,       64,  2,      1,      1,      8>;
template <Element E> using Wide = Shape<E,        128,  2,      1,      1,      6>;
template <Element E> using Widest = Shape<E,      256,  2,      1,      1,      4>;  // 16-bit only
// e4m3: promoted sums need a second set of accumulators, so 256 rows x 128 tokens, not 128 x 256.
template <Element E> using WidestFp8 = Shape<E,   128,  2,      2,      1,      4>;

// --- arguments ------------------------------------------------------------------------------------
// Offset of row r: r * stride, or with inner > 0: (r / inner) * outer + (r % inner) * stride.
struct RowLayout {
  std::int64_t stride = 0, inner = 0, outer = 0;
  __host__ __device__ std::int64_t operator()(std::int64_t row) const {
    return inner == 0 ? row * stride : row / inner * outer + row % inner * stride;
  }
};

enum class OutType : unsigned char { kF32, kF16, kBF16 };
enum class TokenLoad : unsigned char { kGather, kTma };
// How C is written: 16-byte rows through stmatrix; four elements at once; one element at once.
enum class StorePath : unsigned char { kMatrix, kVector, kScalar };

struct SmallView {  // of f32, f16 or bf16
  const void* data = nullptr;
  OutType type = OutType::kF32;
  std::int64_t expert_stride = 0, stride = 0;
};

struct Params {
  CUtensorMap weights;  // {K, 8 or rows, 2 or 1, chunks of 16 rows or 1, E}: see weight_map
  CUtensorMap tokens;   // {K, positions}, TokenLoad::kTma only

  RowMap rows;
  std::int32_t experts, sub_tiles;  // sub_tiles: pieces of kTokens rows that one tile may have
  std::int32_t row_tasks;           // tasks along the weight rows
  std::int32_t task_rows;           // weight rows of a task: kRows, or 32 of 64
  std::int32_t group_tiles;         // tiles that are walked together: see Schedule
  bool settled;                     // the tile list is older than the previous kernel

  TokenLoad token_load;
  RowOf a_row, c_row;
  std::int64_t top_k;
  const char* a;
  RowLayout a_rows;        // in units of 16 bytes
  std::int64_t k_bytes;    // of one row
  std::int32_t k_chunks;   // of 128 bytes

  bool gated, up_first, interleaved, activates;
  ActivationView activation;
  SmallView bias;
  const float* alpha;        // [E]
  const float* weight_scale; // cell (row / scale_group, k group) of expert e
  std::int64_t scale_expert, scale_row, scale_k, scale_group;
  bool block_scaled;         // weight and activation scales change along K
  const float* a_scale;
  std::int64_t a_scale_row, a_scale_group, a_scale_expert;
  const float* row_weights;

  void* c;
  RowLayout c_rows;        // in elements
  std::int64_t c_column;   // element stride inside a row
  std::int64_t columns;    // of C
  OutType c_type;
  StorePath store;
};

template <typename S>
void launch_gemm(const Params& params, int grid, cudaStream_t stream);

}  // namespace moesaic::cuda::sm90
