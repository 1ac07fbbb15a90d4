// SPDX-License-Identifier: Apache-2.0
// Quantized weights in shared memory, as the caller stores them or as rearrange.h does -> the
// register operand of wgmma (or mma.sync, which takes the same), exact.
//
// K stays in its natural order, so tokens need no rearrangement: of every eight neighbours along K
// a lane of a quad takes pair q. For 4-bit weights that is byte q of each 32-bit word, so the four
// lanes of a quad read the same words and each uses a quarter of them, unless weights have been
// rearranged; the alternative, eight neighbours per lane, would need the tokens of K permuted by
// twos, which neither TMA nor cp.async does.
//
// An integer n of up to 8 bits in the low bits of a bf16 (10 bits: f16) *is* the number n * 2^-133
// (n * 2^-24): subnormals and the first binade are evenly spaced. So masking a pair of integers
// into place and one fused multiply-add, exact, make (n - zero) / kUnit; the scale takes the unit
// back. With the usual magic exponent the upper nibble, four bits higher, would not fit into bf16's
// seven bits of mantissa.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/rearrange.h"
#include "cuda/sm90/ptx_mma.h"

namespace moesaic::cuda::sm90 {

using ptx::Element;

// Factors of a pair (low, high): kBytes where both integers lie in the low bits, kNibbles where the
// high one lies 4 bits higher, kUpper where both do. kMinus = -kBytes.
template <Element E>
struct Half;
template <>
struct Half<Element::kBF16> {
  static constexpr float kUnit = 64.0f;
  static constexpr std::uint32_t kBytes = 0x7f007f00u, kNibbles = 0x7d007f00u;  // 2^127, 2^123
  static constexpr std::uint32_t kUpper = 0x7d007d00u;
  static constexpr std::uint32_t kMinus = 0xff00ff00u;
};
template <>
struct Half<Element::kF16> {
  static constexpr float kUnit = 512.0f;
  static constexpr std::uint32_t kBytes = 0x78007800u, kNibbles = 0x68007800u;  // 2^15, 2^11
  static constexpr std::uint32_t kUpper = 0x68006800u;
  static constexpr std::uint32_t kMinus = 0xf800f800u;
};

// What this lane's fragments need besides the bytes.
struct Unpacking {
  std::uint32_t select;  // byte permutation that finds this lane's pair
  std::uint32_t flip;    // 0x80808080: signed bytes
};

// Words of two rows (g and g + 8 of a warp's 16) that 32 of K need.
struct RawWeights {
  std::uint32_t row[2][4];
};

// Zero points: given, or the middle of the range.
enum class Zeros : unsigned char { kMiddle, kGiven };

// A format gives: the bits of a weight; what its fragments must be multiplied with; where a lane
// reads in rows of kRowBytes, which TMA has swizzled over as many bytes; and fragments: r[0], r[1]
// of rows g and g + 8 at k 2q, r[2], r[3] at 2q + 8, for step s of 16 in the 32 of K.
template <Zeros kGiven, Arrangement kHow>
struct U4 {
  static constexpr int kBits = 4, kMiddle = 8;
  static constexpr bool kRearranged = kHow == Arrangement::kRearranged;
  // Callers' own weights do without some kernels, for the library's size: the bits are the same.
  static constexpr bool kHasAll = kRearranged;
  template <Element E>
  static constexpr float kUnit = Half<E>::kUnit;
  static constexpr bool kZeros = kGiven == Zeros::kGiven;
  __device__ static Unpacking unpacking(int q, std::uint32_t) {
    return {static_cast<std::uint32_t>(q) * 0x1111u, 0};
  }
  // Row g of a warp's rows: its first 16 bytes. Rows 8 apart are swizzled alike.
  template <int kRowBytes>
  __device__ static std::uint32_t lane_offset(int g, int q) {
    return static_cast<std::uint32_t>(g * kRowBytes + g * kRowBytes / 128 % (kRowBytes / 16) * 16 +
                                      (kRearranged ? 4 * q : 0));
  }
  template <int kRowBytes>
  __device__ static void load(RawWeights& raw, std::uint32_t at, int block) {
    if constexpr (kRearranged) {
      raw.row[0][0] = ptx::load_shared(at ^ (block * 16));
      raw.row[1][0] = ptx::load_shared((at ^ (block * 16)) + 8 * kRowBytes);
    } else {
      ptx::load_shared(raw.row[0], at ^ (block * 16));
      ptx::load_shared(raw.row[1], (at ^ (block * 16)) + 8 * kRowBytes);
    }
  }
  template <Element E>
  __device__ static void fragment(std::uint32_t (&r)[4], const RawWeights& raw, int s,
                                  const Unpacking& u, const std::uint32_t (&zero)[2]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (kRearranged) {
        const std::uint32_t word = raw.row[i % 2][0] >> (8 * s);
        r[i] = i < 2 ? ptx::fma_pair<E>(word & 0x000f000fu, Half<E>::kBytes, zero[i % 2])
                     : ptx::fma_pair<E>(word & 0x00f000f0u, Half<E>::kUpper, zero[i % 2]);
      } else {
        const std::uint32_t pair = __byte_perm(raw.row[i % 2][2 * s + i / 2], 0, u.select);
        r[i] = ptx::fma_pair<E>(pair & 0x00f0000fu, Half<E>::kNibbles, zero[i % 2]);
      }
    }
  }
};

// Two bytes of each eight: a word holds those of lanes 2i and 2i + 1.
struct Bytes {
  static constexpr int kBits = 8;
  static constexpr bool kHasAll = true;
  template <int kRowBytes>
  __device__ static std::uint32_t lane_offset(int g, int q) {
    static_assert(kRowBytes == 128);
    return static_cast<std::uint32_t>(g * 128 + g % 8 * 16 + q / 2 * 4);
  }
  template <int kRowBytes>
  __device__ static void load(RawWeights& raw, std::uint32_t at, int block) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        raw.row[h][i] =
            ptx::load_shared((at ^ ((block * 2 + i / 2) * 16)) + h * 8 * 128 + i % 2 * 8);
      }
    }
  }
  __device__ static std::uint32_t select(int q) { return q % 2 ? 0x7632u : 0x5410u; }
};

template <Zeros kGiven>
struct I8 : Bytes {  // signed ones are flipped, which makes them q + 128
  static constexpr int kMiddle = 128;
  template <Element E>
  static constexpr float kUnit = Half<E>::kUnit;
  static constexpr bool kZeros = kGiven == Zeros::kGiven;
  __device__ static Unpacking unpacking(int q, std::uint32_t flip) { return {select(q), flip}; }
  template <Element E>
  __device__ static void fragment(std::uint32_t (&r)[4], const RawWeights& raw, int s,
                                  const Unpacking& u, const std::uint32_t (&zero)[2]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const std::uint32_t four =
          __byte_perm(raw.row[h][2 * s], raw.row[h][2 * s + 1], u.select) ^ u.flip;
      r[h] = ptx::fma_pair<E>(__byte_perm(four, 0, 0x4140), Half<E>::kBytes, zero[h]);
      r[h + 2] = ptx::fma_pair<E>(__byte_perm(four, 0, 0x4342), Half<E>::kBytes, zero[h]);
    }
  }
};

struct E4M3 : Bytes {
  static constexpr int kMiddle = 0;
  template <Element>
  static constexpr float kUnit = 1.0f;
  static constexpr bool kZeros = false;
  __device__ static Unpacking unpacking(int q, std::uint32_t) { return {select(q), 0}; }
  template <Element E>
  __device__ static std::uint32_t widen(std::uint32_t two) {
    const std::uint32_t h = ptx::e4m3_pair_to_f16(two);
    if constexpr (E == Element::kF16) return h;
    const float2 f = __half22float2(reinterpret_cast<const __half2&>(h));
    // Four significant bits: the upper halves are all there is. NaN stays NaN.
    return __byte_perm(__float_as_uint(f.x), __float_as_uint(f.y), 0x7632);
  }
  template <Element E>
  __device__ static void fragment(std::uint32_t (&r)[4], const RawWeights& raw, int s,
                                  const Unpacking& u, const std::uint32_t (&)[2]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const std::uint32_t four = __byte_perm(raw.row[h][2 * s], raw.row[h][2 * s + 1], u.select);
      r[h] = widen<E>(four & 0xffffu);
      r[h + 2] = widen<E>(four >> 16);
    }
  }
};

}  // namespace moesaic::cuda::sm90
