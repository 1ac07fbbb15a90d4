// SPDX-License-Identifier: Apache-2.0
// Operand loaders of the SM80 family: how 32 elements of K of 16 weight rows, or of 8 tokens,
// become mma fragments. An operand is all that a scheme adds to the kernel.
//
// A lane of a warp is (row g = lane / 4, t = lane % 4). Two ways to hand out K:
//   natural: ldmatrix, K in the order the instruction names it. 16-bit weights: the wgmma kernels
//   walk K
//            in the same order, and then the bits agree.
//   direct:  within each 32 of K, lane t takes the eight neighbours 8t .. 8t+7 of its row, of
//   weights and of
//            tokens alike. Which k stands at which place of an mma does not matter as long as both
//            sides agree, and so the caller's plain layout *is* fragment order: one 4, 8 or 16 byte
//            read per row, no shuffles, no repacking.
// Quantized weights enter the product as the exact integers (or e4m3 values) they store; their
// scales multiply fp32 partial sums of 64 elements, or 32 (see sm80/consumer.h). Rounding
// w = round16(q * scale) would be less exact and, at decode, cost more instructions than the memory
// leaves time for.
#pragma once

#include "cuda/sm80/ptx.h"

namespace moesaic::cuda {

// --- where a 16-byte chunk of a row lies in shared memory ----------------------------------------
// Chunks are XORed with a function of the row so that one read of a warp touches every bank once.
// kUnit: the bytes that four lanes of one row read together.
template <int kRowBytes, int kUnit>
struct Swizzle {
  static constexpr int kLine = kRowBytes < 128 ? kRowBytes : 128;
  static constexpr int kRowsPerLine = 128 / kLine;
  static constexpr int kUnitsPerLine = kLine / kUnit;
  __device__ static constexpr int flip(int row) {
    return (row / kRowsPerLine) % kUnitsPerLine * (kUnit / 16);
  }
  // Rows 8 apart flip alike: callers may add multiples of 8 rows to the result.
  __device__ static constexpr int offset(int row, int chunk) {
    return row * kRowBytes + ((chunk ^ flip(row)) * 16);
  }
};

// --- small conversions ---------------------------------------------------------------------------
template <typename T>
struct Half2Of;
template <>
struct Half2Of<__nv_bfloat16> {
  using type = __nv_bfloat162;
  static constexpr std::uint32_t kMagic = 0x43004300u;      // 128 + n for a 4-bit n in the low bits
  static constexpr std::uint32_t kE2M1Scale = 0x7e807e80u;  // 2^126
  static constexpr int kE2M1Shift = 6;
};
template <>
struct Half2Of<__half> {
  using type = __half2;
  static constexpr std::uint32_t kMagic = 0x64006400u;      // 1024 + n
  static constexpr std::uint32_t kE2M1Scale = 0x74007400u;  // 2^14
  static constexpr int kE2M1Shift = 9;
};
template <typename T>
__device__ __forceinline__ std::uint32_t sub2(std::uint32_t a, std::uint32_t b) {
  using H = typename Half2Of<T>::type;
  const H r = __hsub2(reinterpret_cast<const H&>(a), reinterpret_cast<const H&>(b));
  return reinterpret_cast<const std::uint32_t&>(r);
}
template <typename T>
__device__ __forceinline__ std::uint32_t mul2(std::uint32_t a, std::uint32_t b) {
  using H = typename Half2Of<T>::type;
  const H r = __hmul2(reinterpret_cast<const H&>(a), reinterpret_cast<const H&>(b));
  return reinterpret_cast<const std::uint32_t&>(r);
}
// Two floats whose low 16 bits are zero -> bf16x2, exact.
__device__ __forceinline__ std::uint32_t pack_bf16_exact(float lo, float hi) {
  return __byte_perm(__float_as_uint(lo), __float_as_uint(hi), 0x7632);
}

// --- weights: one lane's eight elements of one row -> four 16-bit pairs --------------------------
// `zero` is what the kernel computed with make_zero from the zero point, once per group.
template <typename T>
struct WeightU4 {
  static constexpr int kBits = 4;
  static constexpr bool kZeros = true;
  using Raw = std::uint32_t;
  __device__ static Raw load(std::uint32_t at) { return ptx::load_shared4(at); }
  __device__ static std::uint32_t make_zero(std::uint32_t z) {
    return Half2Of<T>::kMagic | (z * 0x10001u);
  }
  __device__ static void unpack(std::uint32_t (&pair)[4], Raw w, std::uint32_t zero,
                                std::uint32_t) {
    const std::uint32_t high = w >> 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const std::uint32_t bytes =
          __byte_perm(w, high, 0x4400 | (i << 12) | (i << 8) | (i << 4) | i);
      pair[i] = sub2<T>(ptx::and_or(bytes, 0x000f000fu, Half2Of<T>::kMagic), zero);
    }
  }
};

// Signed or unsigned bytes: `flip` is 0x80808080 for signed ones, which makes them q + 128.
template <typename T>
struct WeightI8;
template <>
struct WeightI8<__half> {
  static constexpr int kBits = 8;
  static constexpr bool kZeros = true;
  struct Raw {
    std::uint32_t w[2];
  };
  __device__ static Raw load(std::uint32_t at) {
    Raw raw;
    ptx::load_shared8(raw.w, at);
    return raw;
  }
  __device__ static std::uint32_t make_zero(std::uint32_t z) {
    return 0x64006400u | (z * 0x10001u);
  }
  __device__ static void unpack(std::uint32_t (&pair)[4], Raw raw, std::uint32_t zero,
                                std::uint32_t flip) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // 1024 + q, minus 1024 + zero: both exact in f16
      const std::uint32_t bytes = __byte_perm(raw.w[i / 2] ^ flip, 0x64u, i % 2 ? 0x4342 : 0x4140);
      pair[i] = sub2<__half>(bytes, zero);
    }
  }
};
template <>
struct WeightI8<__nv_bfloat16> {
  static constexpr int kBits = 8;
  static constexpr bool kZeros = true;
  using Raw = WeightI8<__half>::Raw;
  __device__ static Raw load(std::uint32_t at) { return WeightI8<__half>::load(at); }
  __device__ static std::uint32_t make_zero(std::uint32_t z) { return 0x4b000000u | z; }
  // bf16 has 8 significant bits: 256 + q would not fit. So through fp32, where 2^23 + q does, and
  // the difference (at most 255 in magnitude) is exact in bf16 again.
  __device__ static void unpack(std::uint32_t (&pair)[4], Raw raw, std::uint32_t zero,
                                std::uint32_t flip) {
    const float z = __uint_as_float(zero);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const std::uint32_t w = raw.w[i / 2] ^ flip;
      const float lo = __uint_as_float(__byte_perm(w, 0x4b000000u, i % 2 ? 0x7442 : 0x7440)) - z;
      const float hi = __uint_as_float(__byte_perm(w, 0x4b000000u, i % 2 ? 0x7443 : 0x7441)) - z;
      pair[i] = pack_bf16_exact(lo, hi);
    }
  }
};

template <typename T>
struct WeightE4M3 {
  static constexpr int kBits = 8;
  static constexpr bool kZeros = false;
  using Raw = WeightI8<__half>::Raw;
  __device__ static Raw load(std::uint32_t at) { return WeightI8<__half>::load(at); }
  __device__ static std::uint32_t make_zero(std::uint32_t) { return 0; }
  __device__ static void unpack(std::uint32_t (&pair)[4], Raw raw, std::uint32_t, std::uint32_t) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const std::uint32_t h =
          ptx::e4m3x2_to_f16x2((i % 2 ? raw.w[i / 2] >> 16 : raw.w[i / 2]) & 0xffffu);
      if constexpr (std::is_same_v<T, __half>) {
        pair[i] = h;
      } else {  // four significant bits: exact in bf16, too
        const float2 f = __half22float2(reinterpret_cast<const __half2&>(h));
        pair[i] = pack_bf16_exact(f.x, f.y);
      }
    }
  }
};

// e2m1: sign, two exponent bits, one of mantissa, placed at the top of a 16-bit float's fields; a
// power of two repairs the exponent bias, subnormal 0.5 included.
template <typename T>
struct WeightE2M1 {
  static constexpr int kBits = 4;
  static constexpr bool kZeros = false;
  using Raw = std::uint32_t;
  __device__ static Raw load(std::uint32_t at) { return ptx::load_shared4(at); }
  __device__ static std::uint32_t make_zero(std::uint32_t) { return 0; }
  __device__ static void unpack(std::uint32_t (&pair)[4], Raw w, std::uint32_t, std::uint32_t) {
    const std::uint32_t high = w >> 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const std::uint32_t v = __byte_perm(w, high, 0x4400 | (i << 12) | (i << 8) | (i << 4) | i);
      const std::uint32_t magnitude = (v & 0x00070007u) << Half2Of<T>::kE2M1Shift;
      pair[i] = mul2<T>(magnitude | ((v & 0x00080008u) << 12), Half2Of<T>::kE2M1Scale);
    }
  }
};

// --- operands ------------------------------------------------------------------------------------
// An operand gives: bits per weight and activation element, the swizzle units, the fragments of 32
// of K (A: 16 weight rows, B: 8 tokens), and their product in kSteps mma, which depend on each
// other: the kernel interleaves those of several fragments. kPromote: the product starts from zero
// and the kernel adds it, scaled, to the sums; otherwise it accumulates in place. kPartBlocks: how
// many blocks such a product runs over, where scales allow it.
template <typename T>
struct Natural16 {
  static constexpr int kWeightBits = 16, kActBits = 16, kBlock = 32, kPartBlocks = 1;
  static constexpr int kWeightUnit = 16, kActUnit = 16;
  static constexpr bool kPromote = false, kZeros = false, kE8M0 = false;
  struct A {
    std::uint32_t r[kBlock / 16][4];
  };
  struct B {
    std::uint32_t r[kBlock / 8];
  };
  // Where this lane reads in block 0 of a fragment's rows. Rows begin at multiples of their (power
  // of two) size, so another block's place is one XOR away: swizzle and block number meet in the
  // same bits.
  template <int kRowBytes>
  __device__ static int lane_offset_a(int lane) {
    return Swizzle<kRowBytes, kWeightUnit>::offset(lane % 16, lane / 16);
  }
  template <int kRowBytes>
  __device__ static int lane_offset_b(int lane) {
    return Swizzle<kRowBytes, kActUnit>::offset(lane % 8, lane / 8);
  }
  // `at`: the fragment's first row + lane_offset, for block 0 ^ block * the bytes of a block.
  template <int kRowBytes>
  __device__ static void load_a(A& a, std::uint32_t at, int row, const std::uint32_t (&)[2],
                                std::uint32_t) {
#pragma unroll
    for (int h = 0; h < kBlock / 16; ++h)
      ptx::ldmatrix_x4(a.r[h], (at ^ (h * 32)) + row * kRowBytes);
  }
  template <int kRowBytes>
  __device__ static void load_b(B& b, std::uint32_t at, int row) {
    ptx::ldmatrix_x4(b.r, at + row * kRowBytes);
  }
  using Sum = float;
  static constexpr int kSteps = kBlock / 16;
  __device__ static void step(int s, float (&d)[4], const A& a, const B& b) {
    ptx::mma_16816(d, a.r[s], b.r + 2 * s, T{});
  }
};

// Quantized weights of loader W; activations of 16 bit, or e4m3 widened to f16 (exact).
template <typename T, typename W, int kActBits_ = 16>
struct Direct16 {
  static constexpr int kWeightBits = W::kBits, kActBits = kActBits_, kBlock = 32, kPartBlocks = 2;
  static constexpr int kWeightUnit = W::kBits * 4, kActUnit = kActBits * 4;
  static constexpr bool kPromote = true, kZeros = W::kZeros;
  static constexpr bool kE8M0 = std::is_same_v<W, WeightE2M1<T>>;
  struct A {
    std::uint32_t r[2][4];
  };
  struct B {
    std::uint32_t r[4];
  };
  __device__ static std::uint32_t make_zero(std::uint32_t z) { return W::make_zero(z); }
  template <int kRowBytes>
  __device__ static int lane_offset_a(int lane) {
    return Swizzle<kRowBytes, kWeightUnit>::offset(lane / 4, 0) + lane % 4 * kWeightBits;
  }
  template <int kRowBytes>
  __device__ static int lane_offset_b(int lane) {
    return (Swizzle<kRowBytes, kActUnit>::offset(lane / 4, 0)) + lane % 4 * kActBits;
  }
  template <int kRowBytes>
  __device__ static void load_a(A& a, std::uint32_t at, int row, const std::uint32_t (&zero)[2],
                                std::uint32_t flip) {
    const auto low = W::load(at + row * kRowBytes), high = W::load(at + (row + 8) * kRowBytes);
    std::uint32_t pair[4];
    W::unpack(pair, low, zero[0], flip);
    a.r[0][0] = pair[0], a.r[0][2] = pair[1], a.r[1][0] = pair[2], a.r[1][2] = pair[3];
    W::unpack(pair, high, zero[1], flip);
    a.r[0][1] = pair[0], a.r[0][3] = pair[1], a.r[1][1] = pair[2], a.r[1][3] = pair[3];
  }
  template <int kRowBytes>
  __device__ static void load_b(B& b, std::uint32_t at, int row) {
    if constexpr (kActBits == 16) {
      ptx::load_shared16(b.r, at + row * kRowBytes);
    } else {
      WeightE4M3<T>::unpack(b.r, WeightE4M3<T>::load(at + row * kRowBytes), 0, 0);
    }
  }
  using Sum = float;
  static constexpr int kSteps = 2;
  __device__ static void step(int s, float (&d)[4], const A& a, const B& b) {
    ptx::mma_16816(d, a.r[s], b.r + 2 * s, T{});
  }
};

// int8 x int8: the sum over 64 of K is an exact integer below 2^21, and exact in fp32.
struct Int8 {
  static constexpr int kWeightBits = 8, kActBits = 8, kBlock = 32, kPartBlocks = 2;
  static constexpr int kWeightUnit = 32, kActUnit = 32;
  static constexpr bool kPromote = true, kZeros = false, kE8M0 = false;
  struct A {
    std::uint32_t r[4];
  };
  struct B {
    std::uint32_t r[2];
  };
  template <int kRowBytes>
  __device__ static int lane_offset_a(int lane) {
    return Swizzle<kRowBytes, kWeightUnit>::offset(lane / 4, 0) + lane % 4 * 8;
  }
  template <int kRowBytes>
  __device__ static int lane_offset_b(int lane) {
    return lane_offset_a<kRowBytes>(lane);
  }
  template <int kRowBytes>
  __device__ static void load_a(A& a, std::uint32_t at, int row, const std::uint32_t (&)[2],
                                std::uint32_t) {
    std::uint32_t low[2], high[2];
    ptx::load_shared8(low, at + row * kRowBytes);
    ptx::load_shared8(high, at + (row + 8) * kRowBytes);
    a.r[0] = low[0], a.r[1] = high[0], a.r[2] = low[1], a.r[3] = high[1];
  }
  template <int kRowBytes>
  __device__ static void load_b(B& b, std::uint32_t at, int row) {
    ptx::load_shared8(b.r, at + row * kRowBytes);
  }
  using Sum = int;
  static constexpr int kSteps = 1;
  __device__ static void step(int, int (&d)[4], const A& a, const B& b) {
    ptx::mma_16832_s8(d, a.r, b.r);
  }
};

// f32 as three TF32 products of high and low parts (21 significant bits or more; low * low, below
// 2^-22 of the product, is left out). SIMT fused multiply-adds would be exact per product but a
// third as fast.
struct Tf32x3 {
  static constexpr int kWeightBits = 32, kActBits = 32, kBlock = 32, kPartBlocks = 1;
  static constexpr int kWeightUnit = 16, kActUnit = 16;
  static constexpr bool kPromote = true, kZeros = false, kE8M0 = false;
  struct Parts {
    std::uint32_t high[8], low[8];
  };
  struct A {
    Parts row[2];
  };
  using B = Parts;
  template <int kRowBytes>
  __device__ static int lane_offset_a(int lane) {
    return Swizzle<kRowBytes, kWeightUnit>::offset(lane / 4, lane % 4 * 2);
  }
  template <int kRowBytes>
  __device__ static int lane_offset_b(int lane) {
    return lane_offset_a<kRowBytes>(lane);
  }
  __device__ static void load_row(Parts& out, std::uint32_t at, int row_offset) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      std::uint32_t raw[4];
      ptx::load_shared16(raw, (at ^ (h * 16)) + row_offset);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        // To 11 bits by an addition to the bits (nearest, ties away) and a mask: cvt.rna.tf32 is a
        // dozen integer instructions, for NaN and infinity. A NaN that this takes for a number is
        // still one in the rest, and so is infinity: setting its rest to zero costs two
        // instructions in five and helps where the other operand has a rest of the same sign, only.
        // The rest needs no rounding: the product ignores what lies behind 11 bits.
        const float x = __uint_as_float(raw[i]);
        const std::uint32_t high = (raw[i] + 0x1000u) & 0xffffe000u;
        out.high[h * 4 + i] = high;
        out.low[h * 4 + i] = __float_as_uint(x - __uint_as_float(high));
      }
    }
  }
  template <int kRowBytes>
  __device__ static void load_a(A& a, std::uint32_t at, int row, const std::uint32_t (&)[2],
                                std::uint32_t) {
    load_row(a.row[0], at, row * kRowBytes);
    load_row(a.row[1], at, (row + 8) * kRowBytes);
  }
  template <int kRowBytes>
  __device__ static void load_b(B& b, std::uint32_t at, int row) {
    load_row(b, at, row * kRowBytes);
  }
  using Sum = float;
  static constexpr int kSteps = 12;
  __device__ static void step(int s, float (&d)[4], const A& a, const B& b) {
    const int j = s % 4 * 2,
              pass = s / 4;  // low * high, high * low, high * high: small terms first
    const auto& low = pass == 0 ? a.row[0].low : a.row[0].high;
    const auto& high = pass == 0 ? a.row[1].low : a.row[1].high;
    const auto& token = pass == 1 ? b.low : b.high;
    ptx::mma_1688_tf32(d, low[j], high[j], low[j + 1], high[j + 1], token[j], token[j + 1]);
  }
};

}  // namespace moesaic::cuda
