// SPDX-License-Identifier: Apache-2.0
// wgmma with its first operand in registers: D[64, N] (+)= A[64, 16] * B[N, 16]^T. Lane 4g + q of
// warp w holds of A the pairs (row w*16 + g, k 2q), (row + 8, k 2q), (row, k 2q + 8) and
// (row + 8, k 2q + 8); B and D lie as in sm90/ptx_wgmma.h.
#pragma once

#include "cuda/sm90/ptx_wgmma.h"

namespace moesaic::cuda::ptx {

#define MOESAIC_D8(i)                                                                         \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define MOESAIC_D32(i) MOESAIC_D8(i), MOESAIC_D8(i + 8), MOESAIC_D8(i + 16), MOESAIC_D8(i + 24)
#define MOESAIC_R8(a, b, c, d, e, f, g, h) \
  "%" #a ", %" #b ", %" #c ", %" #d ", %" #e ", %" #f ", %" #g ", %" #h
#define MOESAIC_R0 MOESAIC_R8(0, 1, 2, 3, 4, 5, 6, 7)
#define MOESAIC_R8_ ", " MOESAIC_R8(8, 9, 10, 11, 12, 13, 14, 15)
#define MOESAIC_R16 ", " MOESAIC_R8(16, 17, 18, 19, 20, 21, 22, 23)
#define MOESAIC_R24 ", " MOESAIC_R8(24, 25, 26, 27, 28, 29, 30, 31)
#define MOESAIC_R32 ", " MOESAIC_R8(32, 33, 34, 35, 36, 37, 38, 39)
#define MOESAIC_R40 ", " MOESAIC_R8(40, 41, 42, 43, 44, 45, 46, 47)
#define MOESAIC_R48 ", " MOESAIC_R8(48, 49, 50, 51, 52, 53, 54, 55)
#define MOESAIC_R56 ", " MOESAIC_R8(56, 57, 58, 59, 60, 61, 62, 63)
#define MOESAIC_N16 MOESAIC_R0
#define MOESAIC_N32 MOESAIC_N16 MOESAIC_R8_
#define MOESAIC_N48 MOESAIC_N32 MOESAIC_R16
#define MOESAIC_N64 MOESAIC_N48 MOESAIC_R24
#define MOESAIC_N80 MOESAIC_N64 MOESAIC_R32
#define MOESAIC_N96 MOESAIC_N80 MOESAIC_R40
#define MOESAIC_N112 MOESAIC_N96 MOESAIC_R48
#define MOESAIC_N128 MOESAIC_N112 MOESAIC_R56

#define MOESAIC_WGMMA(n, type, registers, a, b, p, ...)                                   \
  asm volatile("{\n.reg .pred keep;\nsetp.ne.b32 keep, " p                                \
               ", 0;\n"                                                                   \
               "wgmma.mma_async.sync.aligned.m64n" n type " {" registers "}, {" a "}, " b \
               ", keep, 1, 1, 0;\n}\n"                                                    \
               : __VA_ARGS__                                                              \
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(desc_b), "r"(keep_d))
#define MOESAIC_WGMMA_TYPES(n, registers, a, b, p, ...)                     \
  if constexpr (kElement == Element::kBF16)                                 \
    MOESAIC_WGMMA(n, "k16.f32.bf16.bf16", registers, a, b, p, __VA_ARGS__); \
  else                                                                      \
    MOESAIC_WGMMA(n, "k16.f32.f16.f16", registers, a, b, p, __VA_ARGS__)

// keep_d = 0: D = A * B^T, else D += A * B^T. Asynchronous until wgmma_wait: ptxas keeps `a` alive
// so long.
template <Element kElement, int N, int kRegisters>
__device__ __forceinline__ void wgmma(float (&d)[kRegisters], const std::uint32_t (&a)[4],
                                      std::uint64_t desc_b, int keep_d) {
  static_assert(N / 2 <= kRegisters && kElement != Element::kE4M3);
  const std::uint32_t a0 = a[0], a1 = a[1], a2 = a[2], a3 = a[3];
  if constexpr (N == 8) {
    MOESAIC_WGMMA_TYPES("8", "%0, %1, %2, %3", "%4, %5, %6, %7", "%8", "%9", "+f"(d[0]), "+f"(d[1]),
                        "+f"(d[2]), "+f"(d[3]));
  } else if constexpr (N == 16) {
    MOESAIC_WGMMA_TYPES("16", MOESAIC_N16, "%8, %9, %10, %11", "%12", "%13", MOESAIC_D8(0));
  } else if constexpr (N == 32) {
    MOESAIC_WGMMA_TYPES("32", MOESAIC_N32, "%16, %17, %18, %19", "%20", "%21", MOESAIC_D8(0),
                        MOESAIC_D8(8));
  } else if constexpr (N == 48) {
    MOESAIC_WGMMA_TYPES("48", MOESAIC_N48, "%24, %25, %26, %27", "%28", "%29", MOESAIC_D8(0),
                        MOESAIC_D8(8), MOESAIC_D8(16));
  } else if constexpr (N == 64) {
    MOESAIC_WGMMA_TYPES("64", MOESAIC_N64, "%32, %33, %34, %35", "%36", "%37", MOESAIC_D32(0));
  } else if constexpr (N == 80) {
    MOESAIC_WGMMA_TYPES("80", MOESAIC_N80, "%40, %41, %42, %43", "%44", "%45", MOESAIC_D32(0),
                        MOESAIC_D8(32));
  } else if constexpr (N == 96) {
    MOESAIC_WGMMA_TYPES("96", MOESAIC_N96, "%48, %49, %50, %51", "%52", "%53", MOESAIC_D32(0),
                        MOESAIC_D8(32), MOESAIC_D8(40));
  } else if constexpr (N == 112) {
    MOESAIC_WGMMA_TYPES("112", MOESAIC_N112, "%56, %57, %58, %59", "%60", "%61", MOESAIC_D32(0),
                        MOESAIC_D8(32), MOESAIC_D8(40), MOESAIC_D8(48));
  } else {
    static_assert(N == 128, "no such instruction listed");
    MOESAIC_WGMMA_TYPES("128", MOESAIC_N128, "%64, %65, %66, %67", "%68", "%69", MOESAIC_D32(0),
                        MOESAIC_D32(32));
  }
}

#undef MOESAIC_D8
#undef MOESAIC_D32
#undef MOESAIC_R8
#undef MOESAIC_R0
#undef MOESAIC_R8_
#undef MOESAIC_R16
#undef MOESAIC_R24
#undef MOESAIC_R32
#undef MOESAIC_R40
#undef MOESAIC_R48
#undef MOESAIC_R56
#undef MOESAIC_N16
#undef MOESAIC_N32
#undef MOESAIC_N48
#undef MOESAIC_N64
#undef MOESAIC_N80
#undef MOESAIC_N96
#undef MOESAIC_N112
#undef MOESAIC_N128
#undef MOESAIC_WGMMA
#undef MOESAIC_WGMMA_TYPES

}  // namespace moesaic::cuda::ptx
