// SPDX-License-Identifier: Apache-2.0
// What the epilogue has to know of a tile's tokens and columns, gathered in shared memory before it
// is needed.
#pragma once

#include "cuda/sm80/tile.h"

namespace moesaic::cuda {

__device__ __forceinline__ float load_as_float(const void* data, DType dtype, std::int64_t i) {
  if (dtype == DType::kF32) return static_cast<const float*>(data)[i];
  if (dtype == DType::kF16) return __half2float(static_cast<const __half*>(data)[i]);
  return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
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

// row_at(i): the position and slot of the work's i-th row.
template <typename T, typename RowAt>
__device__ __forceinline__ void fill_table(const Sm80Params& p, const Sm80Work& work,
                                           Sm80Table<T>& table, const RowAt& row_at) {
  static_assert(sizeof(Sm80Table<T>) == T::kTableBytes);
  for (int i = threadIdx.x; i < T::kRows; i += T::kThreads) {
    int half;
    const std::int32_t column = column_of<T>(p, work.column_tile, i, half);
    const std::int64_t n = weight_row(p, column, half);
    ColumnEntry entry{p.alpha ? p.alpha[work.expert * p.alpha_stride] : 1.0f, 0.0f};
    if (column < p.n_out) {
      if (p.scale && p.group_blocks == 0) {
        const std::int64_t cell =
            static_cast<std::uint32_t>(n) / static_cast<std::uint32_t>(p.scale_rows);
        entry.factor =
            __fmul_rn(entry.factor, p.scale[work.expert * p.scale_expert + cell * p.scale_row]);
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
      const auto [position, slot] = row_at(i);
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

}  // namespace moesaic::cuda
