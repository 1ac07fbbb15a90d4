// SPDX-License-Identifier: Apache-2.0
// What the weight-only family needs beside wgmma: reads of shared memory, mma.sync (it gives the
// bits of wgmma, in tiles of 16 rows and without a warpgroup's meeting), and arithmetic on pairs.
#pragma once

#include <cstdint>

#include "cuda/sm90/ptx_wgmma.h"

namespace moesaic::cuda::ptx {

// --- shared memory. Volatile: the barriers order them.
__device__ __forceinline__ void load_shared(std::uint32_t (&w)[4], std::uint32_t at) {
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
               : "r"(at));
}
__device__ __forceinline__ std::uint32_t load_shared(std::uint32_t at) {
  std::uint32_t w;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(w) : "r"(at));
  return w;
}
// Four 8x8 matrices of 16-bit elements: lane l gives the address of row l % 8 of matrix l / 8, lane
// 4g + q gets elements 2q, 2q + 1 of row g of each.
__device__ __forceinline__ void load_matrices(std::uint32_t (&r)[4], std::uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at));
}

// One 8x8 matrix of 16-bit elements, stored transposed: lane l < 8 gives the address of row l.
__device__ __forceinline__ void store_matrix_transposed(std::uint32_t dst, std::uint32_t a) {
  asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" ::"r"(dst), "r"(a)
               : "memory");
}

// --- mma.sync: d[16, 8] += a[16, 16] * b[8, 16]^T; a and d lie as in one warp's part of wgmma.
template <Element kElement>
__device__ __forceinline__ void mma_16x8(float* d, const std::uint32_t (&a)[4], std::uint32_t b0,
                                         std::uint32_t b1) {
  if constexpr (kElement == Element::kBF16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// --- pairs of 16-bit numbers, subnormals kept
template <Element kElement>
__device__ __forceinline__ std::uint32_t fma_pair(std::uint32_t a, std::uint32_t b,
                                                  std::uint32_t c) {
  std::uint32_t d;
  if constexpr (kElement == Element::kBF16) {
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  } else {
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  }
  return d;
}
// Two e4m3 in the low 16 bits -> f16 pair, exact, NaN kept.
__device__ __forceinline__ std::uint32_t e4m3_pair_to_f16(std::uint32_t two) {
  std::uint32_t h;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(h) : "h"(static_cast<std::uint16_t>(two)));
  return h;
}

}  // namespace moesaic::cuda::ptx
