// SPDX-License-Identifier: Apache-2.0
// Sums in registers -> rows of C: scales that do not change along K, bias, activation, the token's
// weight, the cast. All in this order, whatever the tile.
#pragma once

#include "cuda/gemm_sm80_consumer.h"

namespace moesaic::cuda {

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

}  // namespace moesaic::cuda
