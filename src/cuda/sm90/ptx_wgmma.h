// SPDX-License-Identifier: Apache-2.0
// wgmma: D[64, N] (+)= A[64, K] * B[N, K]^T, both operands K-major in shared memory under the
// 128-byte swizzle, D in fp32 registers. Row w*16 + g (+8) of D lies in lane 4g + q of warp w, its
// columns 8j + 2q + {0, 1} in d[4j + {0, 1}] (row + 8: d[4j + {2, 3}]).
#pragma once

#include <cstdint>

namespace moesaic::cuda::ptx {

enum class Element : unsigned char { kF16, kBF16, kE4M3 };

// Rows of 128 bytes, eight of which form a swizzle atom of 1024 bytes (the stride 64 = 1024 / 16).
// A step of 32 bytes along K inside the atom adds 2 to the descriptor.
__device__ __forceinline__ std::uint64_t operand_descriptor(std::uint32_t shared_address) {
  return (std::uint64_t{1} << 62) | (std::uint64_t{64} << 32) | (std::uint64_t{1} << 16) |
         ((shared_address & 0x3ffffu) >> 4);
}

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// The instruction names its registers one by one: these lists are the price.
#define MOESAIC_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define MOESAIC_D16(i) MOESAIC_D4(i), MOESAIC_D4(i + 4), MOESAIC_D4(i + 8), MOESAIC_D4(i + 12)
#define MOESAIC_D32(i) MOESAIC_D16(i), MOESAIC_D16(i + 16)
#define MOESAIC_D64(i) MOESAIC_D32(i), MOESAIC_D32(i + 32)
#define MOESAIC_R0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define MOESAIC_R16 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define MOESAIC_R32 ", %32, %33, %34, %35"
#define MOESAIC_R36 ", %36, %37, %38, %39"
#define MOESAIC_R40 ", %40, %41, %42, %43"
#define MOESAIC_R44 ", %44, %45, %46, %47"
#define MOESAIC_R48 ", %48, %49, %50, %51"
#define MOESAIC_R52 ", %52, %53, %54, %55"
#define MOESAIC_R56 ", %56, %57, %58, %59"
#define MOESAIC_R60 ", %60, %61, %62, %63"
#define MOESAIC_R64 ", %64, %65, %66, %67"
#define MOESAIC_R68 ", %68, %69, %70, %71"
#define MOESAIC_N64 MOESAIC_R0 ", " MOESAIC_R16
#define MOESAIC_N72 MOESAIC_N64 MOESAIC_R32
#define MOESAIC_N80 MOESAIC_N72 MOESAIC_R36
#define MOESAIC_N88 MOESAIC_N80 MOESAIC_R40
#define MOESAIC_N96 MOESAIC_N88 MOESAIC_R44
#define MOESAIC_N104 MOESAIC_N96 MOESAIC_R48
#define MOESAIC_N112 MOESAIC_N104 MOESAIC_R52
#define MOESAIC_N120 MOESAIC_N112 MOESAIC_R56
#define MOESAIC_N128 MOESAIC_N120 MOESAIC_R60
#define MOESAIC_N136 MOESAIC_N128 MOESAIC_R64
#define MOESAIC_N144 MOESAIC_N136 MOESAIC_R68

#define MOESAIC_WGMMA(n, type, tail, registers, a, b, p, ...)                           \
  asm volatile("{\n.reg .pred keep;\nsetp.ne.b32 keep, " p                              \
               ", 0;\n"                                                                 \
               "wgmma.mma_async.sync.aligned.m64n" n type " {" registers "}, " a ", " b \
               ", keep, 1, 1" tail ";\n}\n"                                             \
               : __VA_ARGS__                                                            \
               : "l"(desc_a), "l"(desc_b), "r"(keep_d))
#define MOESAIC_WGMMA_TYPES(n, registers, a, b, p, ...)                               \
  if constexpr (kElement == Element::kBF16)                                           \
    MOESAIC_WGMMA(n, "k16.f32.bf16.bf16", ", 0, 0", registers, a, b, p, __VA_ARGS__); \
  else if constexpr (kElement == Element::kF16)                                       \
    MOESAIC_WGMMA(n, "k16.f32.f16.f16", ", 0, 0", registers, a, b, p, __VA_ARGS__);   \
  else                                                                                \
    MOESAIC_WGMMA(n, "k32.f32.e4m3.e4m3", "", registers, a, b, p, __VA_ARGS__)

// keep_d = 0: D = A * B^T, else D += A * B^T. Uses the first N / 2 of d; asynchronous until
// wgmma_wait.
template <Element kElement, int N, int kRegisters>
__device__ __forceinline__ void wgmma(float (&d)[kRegisters], std::uint64_t desc_a,
                                      std::uint64_t desc_b, int keep_d) {
  static_assert(N / 2 <= kRegisters);
  if constexpr (N == 8) {
    MOESAIC_WGMMA_TYPES("8", "%0, %1, %2, %3", "%4", "%5", "%6", MOESAIC_D4(0));
  } else if constexpr (N == 16) {
    MOESAIC_WGMMA_TYPES("16", "%0, %1, %2, %3, %4, %5, %6, %7", "%8", "%9", "%10", MOESAIC_D4(0),
                        MOESAIC_D4(4));
  } else if constexpr (N == 32) {
    MOESAIC_WGMMA_TYPES("32", MOESAIC_R0, "%16", "%17", "%18", MOESAIC_D16(0));
  } else if constexpr (N == 64) {
    MOESAIC_WGMMA_TYPES("64", MOESAIC_N64, "%32", "%33", "%34", MOESAIC_D32(0));
  } else if constexpr (N == 72) {
    MOESAIC_WGMMA_TYPES("72", MOESAIC_N72, "%36", "%37", "%38", MOESAIC_D32(0), MOESAIC_D4(32));
  } else if constexpr (N == 80) {
    MOESAIC_WGMMA_TYPES("80", MOESAIC_N80, "%40", "%41", "%42", MOESAIC_D32(0), MOESAIC_D4(32), MOESAIC_D4(36));
  } else if constexpr (N == 88) {
    MOESAIC_WGMMA_TYPES("88", MOESAIC_N88, "%44", "%45", "%46", MOESAIC_D32(0), MOESAIC_D4(32), MOESAIC_D4(36), MOESAIC_D4(40));
  } else if constexpr (N == 96) {
    MOESAIC_WGMMA_TYPES("96", MOESAIC_N96, "%48", "%49", "%50", MOESAIC_D32(0), MOESAIC_D16(32));
  } else if constexpr (N == 104) {
    MOESAIC_WGMMA_TYPES("104", MOESAIC_N104, "%52", "%53", "%54", MOESAIC_D32(0), MOESAIC_D16(32), MOESAIC_D4(48));
  } else if constexpr (N == 112) {
    MOESAIC_WGMMA_TYPES("112", MOESAIC_N112, "%56", "%57", "%58", MOESAIC_D32(0), MOESAIC_D16(32), MOESAIC_D4(48), MOESAIC_D4(52));
  } else if constexpr (N == 120) {
    MOESAIC_WGMMA_TYPES("120", MOESAIC_N120, "%60", "%61", "%62", MOESAIC_D32(0), MOESAIC_D16(32), MOESAIC_D4(48), MOESAIC_D4(52), MOESAIC_D4(56));
  } else if constexpr (N == 128) {
    MOESAIC_WGMMA_TYPES("128", MOESAIC_N128, "%64", "%65", "%66", MOESAIC_D64(0));
  } else if constexpr (N == 136) {
    MOESAIC_WGMMA_TYPES("136", MOESAIC_N136, "%68", "%69", "%70", MOESAIC_D64(0), MOESAIC_D4(64));
  } else if constexpr (N == 144) {
    MOESAIC_WGMMA_TYPES("144", MOESAIC_N144, "%72", "%73", "%74", MOESAIC_D64(0), MOESAIC_D4(64), MOESAIC_D4(68));
  } else {
    static_assert(N == 8, "no such instruction listed");
  }
}

#undef MOESAIC_D4
#undef MOESAIC_D16
#undef MOESAIC_D32
#undef MOESAIC_D64
#undef MOESAIC_R0
#undef MOESAIC_R16
#undef MOESAIC_R32
#undef MOESAIC_R36
#undef MOESAIC_R40
#undef MOESAIC_R44
#undef MOESAIC_R48
#undef MOESAIC_R52
#undef MOESAIC_R56
#undef MOESAIC_R60
#undef MOESAIC_R64
#undef MOESAIC_R68
#undef MOESAIC_N64
#undef MOESAIC_N72
#undef MOESAIC_N80
#undef MOESAIC_N88
#undef MOESAIC_N96
#undef MOESAIC_N104
#undef MOESAIC_N112
#undef MOESAIC_N120
#undef MOESAIC_N128
#undef MOESAIC_N136
#undef MOESAIC_N144
#undef MOESAIC_WGMMA
#undef MOESAIC_WGMMA_TYPES

}  // namespace moesaic::cuda::ptx
