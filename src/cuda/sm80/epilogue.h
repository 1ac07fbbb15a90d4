// SPDX-License-Identifier: Apache-2.0
// Sums in registers -> rows of C: scales that do not change along K, bias, activation, the token's
// weight, the cast. All in this order, whatever the tile.
#pragma once

#include "cuda/sm80/table.h"

namespace moesaic::cuda {

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

template <typename T, typename Sums, typename Table>
__device__ __forceinline__ void finish(const Sm80Params& p, const Sm80Work& work, Sums& sums,
                                       const Table& table) {
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
  constexpr int kWindow =
      kN > 4 && kN % 4 == 0 ? 4 : kN;  // what rotates; the others follow when it is through
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
#pragma unroll
    for (int f = 0; f < kM; ++f) {
#pragma unroll
      for (int n = 0; n + kBlock < kWindow; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums.acc[f][n][i] = sums.acc[f][n + kBlock][i];
      }
    }
    if (kWindow < kN && (n0 + kBlock) % kWindow == 0) {
#pragma unroll
      for (int f = 0; f < kM; ++f) {
#pragma unroll
        for (int n = 0; n + kWindow < kN; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) sums.acc[f][n][i] = sums.acc[f][n + kWindow][i];
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
