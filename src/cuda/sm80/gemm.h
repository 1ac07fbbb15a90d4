// SPDX-License-Identifier: Apache-2.0
// What the host side of the SM80 family and its kernels share: the kernel's argument and the list
// of compiled kernels per operand.
#pragma once

#include <cstdint>
#include <span>

#include "cuda/activation_math.h"
#include "row_map.h"
#include "scheme.h"

namespace moesaic::cuda {

// Element offset of row r of a rank 2 or rank 3 view: (r / inner_rows) * outer + (r % inner_rows) *
// inner.
struct RowStrides {
  std::int64_t outer = 0, inner = 0;
  std::uint32_t inner_rows = 0;  // 0: rank 2, r * inner

  __host__ __device__ std::int64_t operator()(std::uint32_t row) const {
    if (inner_rows == 0) return row * inner;
    return row / inner_rows * outer + row % inner_rows * inner;
  }
};

struct Sm80Params {
  // Rows.
  const Tile* tiles = nullptr;
  const std::int32_t* num_tiles = nullptr;
  const std::int32_t* row_slot = nullptr;
  std::int32_t max_tiles = 0;
  std::int32_t parts = 1;  // token tiles of the kernel per Tile
  std::uint32_t slot_count = 0, top_k = 1;
  std::int32_t experts = 0;
  // In place of tiles and num_tiles, small tiles only: see sm80/walk.h.
  UnlistedRows unlisted;
  std::int32_t tile_rows = 0;  // of unlisted blocks
  std::int32_t settled = 0;    // the lists are older than the kernel in front: ListAge::kSettled

  // The product: C [rows, n_out], n_out = n or, behind a gated activation, n / 2.
  std::int32_t n_out = 0, k = 0;
  std::int32_t column_tiles = 0;

  std::int32_t aligned = 0;  // rows of A and of the weights begin at multiples of 16 bytes

  // Activations. A pitch counts units of 1 << a_shift bytes, which also divide every address.
  const char* a = nullptr;
  RowStrides a_rows;
  RowOf a_row = RowOf::kPosition;
  std::int32_t a_shift = 4;
  const float* a_scale = nullptr;
  std::int64_t a_scale_row = 0, a_scale_group = 0, a_scale_expert = 0;

  // Weights: row r of C's column c is c * row_multiple + row_offset[r], r = 0 gate, 1 up; ungated
  // c.
  const char* w = nullptr;
  std::int64_t w_expert = 0;  // bytes
  std::int64_t w_row = 0;     // units of 1 << w_shift bytes
  std::int32_t w_shift = 4;
  std::int32_t gated = 0, row_multiple = 1, row_offset[2] = {0, 0};

  // Weight scales: scale[e * scale_expert + n / scale_rows * scale_row + g * scale_group].
  // group_blocks: a group's length in 32s of K; scales and zero points change along K and enter the
  // main loop. 0: they do not, the scale waits for the epilogue.
  const float* scale = nullptr;
  std::int64_t scale_expert = 0, scale_row = 0, scale_group = 0;
  std::int32_t scale_rows = 1;
  std::int32_t group_blocks = 0;
  std::int32_t a_scale_grouped = 0;  // a_scale changes along K, with the same groups
  // Zero points (bytes; two rows share one when zero_nibbles), or the E8M0 scales of mxfp4.
  const std::uint8_t* zero = nullptr;
  const std::uint8_t* zero_end = nullptr;
  std::int64_t zero_expert = 0, zero_row = 0, zero_group = 0;
  std::int32_t zero_whole = 0;  // zero_end is a multiple of 4
  std::int32_t zero_nibbles = 0;
  std::uint32_t implicit_zero = 0;
  std::uint32_t byte_flip = 0;  // 0x80808080: signed bytes

  // Epilogue.
  const float* alpha = nullptr;  // [E]
  std::int64_t alpha_stride = 0;
  const void* bias = nullptr;  // [E, N]
  DType bias_dtype = DType::kF32;
  std::int64_t bias_expert = 0, bias_row = 0;
  std::int32_t has_activation = 0;
  ActivationView activation;
  const float* row_weights = nullptr;  // by slot
  void* c = nullptr;
  DType c_dtype = DType::kF32;
  RowOf c_row = RowOf::kPosition;
  RowStrides c_rows;  // elements
  std::int64_t c_column = 1;
  std::int32_t c_vector = 0;  // the elements that one store may write: 1, 2, 4 or 8
};

// A compiled kernel: tokens x weight rows per CTA, K elements per stage, stages.
struct Sm80Kernel {
  std::int32_t tokens, rows, depth, stages, threads, ctas_per_sm;
  std::size_t shared_bytes;
  void (*kernel)(Sm80Params);
};

// One list per operand, ascending in tokens, then rows. sm80/inst/*.cu.
std::span<const Sm80Kernel> sm80_bf16();
std::span<const Sm80Kernel> sm80_f16();
std::span<const Sm80Kernel> sm80_u4_bf16();
std::span<const Sm80Kernel> sm80_u4_f16();
std::span<const Sm80Kernel> sm80_i8_bf16();
std::span<const Sm80Kernel> sm80_i8_f16();
std::span<const Sm80Kernel> sm80_e4m3_bf16();
std::span<const Sm80Kernel> sm80_e4m3_f16();
std::span<const Sm80Kernel> sm80_e4m3_e4m3();
std::span<const Sm80Kernel> sm80_i8_i8();
std::span<const Sm80Kernel> sm80_e2m1_bf16();
std::span<const Sm80Kernel> sm80_e2m1_f16();
std::span<const Sm80Kernel> sm80_f32();

}  // namespace moesaic::cuda
