// SPDX-License-Identifier: Apache-2.0
// The stages in shared memory -> fp32 sums in registers.
#pragma once

#include "cuda/sm80/loader.h"
#include "cuda/sm80/place.h"

namespace moesaic::cuda {

// The products of one stage.
template <typename T, typename Loader = Sm80Loader<T>>
class Sm80Consumer : public Sm80Place<T> {
 public:
  static constexpr int kIssued = T::kStages - 1;  // stages under way when the first products begin
  using Op = typename T::Op;
  static constexpr int kM = T::kMFrags, kN = T::kNFrags;
  static constexpr int kBlocks = T::kDepth / Op::kBlock;
  float acc[kM][kN][4];

  __device__ explicit Sm80Consumer(const Sm80Params& p) : p_(p) {}

  __device__ void begin(const Sm80Work& work) {
#pragma unroll
    for (auto& f : acc)
      for (auto& n : f)
        for (float& x : n) x = 0.0f;
    if constexpr (T::kScales) {
      in_group_ = 0;
      group_ = 0;
#pragma unroll
      for (int f = 0; f < kM; ++f) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          scale_[f][h] = 1.0f;
          if constexpr (Op::kZeros) zero_[f][h] = Op::make_zero(p_.implicit_zero);
          if constexpr (T::kZeros) {  // which byte (and nibble) of the copied word: its bit
                                      // position
            zero_byte_[f][h] = 0;
            if (p_.zero == nullptr) continue;
            int half;
            const int row = (warp_m_ * kM + f) * 16 + h * 8 + lane_ / 4;
            const std::int32_t column =
                min(column_of<T>(p_, work.column_tile, row, half), p_.n_out - 1);
            const std::int64_t n = weight_row(p_, column, half);
            const auto low = static_cast<std::uint32_t>(
                reinterpret_cast<std::uintptr_t>(p_.zero) + work.expert * p_.zero_expert +
                (p_.zero_nibbles ? n / 2 : n) * p_.zero_row);
            zero_byte_[f][h] = (low & 3) | (p_.zero_nibbles && n % 2 ? 4u : 0u);
          }
        }
      }
    }
  }

  // Where the multiplying warps copy, too: large tiles between the two halves of a stage, or behind
  // it: the tensor cores then have work in hand while the addresses are computed. Smaller ones copy
  // first: their bytes must be on the way early.
  __device__ __forceinline__ void consume(std::uint32_t stage, int k, Loader& loader) {
    if constexpr (kM * kN >= 16) {
      int row = -1;
#pragma unroll 1
      for (int block = 0; block < kBlocks; block += kPart) {
        if (kBlocks > kPart && block == kBlocks / 2) loader.issue();
        multiply_part(stage, k, block, row);
      }
      if constexpr (kBlocks == kPart) loader.issue();  // there is no middle
    } else {
      loader.issue();
      consume(stage, k);
    }
  }
  __device__ __forceinline__ void consume(std::uint32_t stage, int k) {
    if constexpr (T::kScales) {
      int row = -1;
      if (p_.group_blocks % T::kGroups !=
          0) {  // several groups in a stage, or one that ends within
#pragma unroll 1
        for (int block = 0; block < kBlocks; block += kPart) multiply_part(stage, k, block, row);
        return;
      }
      if (p_.group_blocks != 0) {
        advance_group(stage, k, row);
        in_group_ += T::kGroups - 1;
      }
    }
#pragma unroll
    for (int block = 0; block < kBlocks; block += kPart) multiply<kPart>(stage, block, 0);
  }

 private:
  // Partial sums run over 64 of K, unless a group ends within: half the additions of sums over 32.
  // (Over 128: the fragments that large tiles hold then would not leave room for the next ones.)
  static constexpr int kPart = Op::kPartBlocks;
  static_assert(kBlocks % kPart == 0);

  __device__ __forceinline__ void multiply_part(std::uint32_t stage, int k, int block, int& row) {
    if constexpr (T::kScales) {
      if (p_.group_blocks % kPart != 0) {
#pragma unroll 1
        for (int i = block; i < block + kPart; ++i) {
          advance_group(stage, k + i * 32, row);
          multiply<1>(stage, i, row);
        }
        return;
      }
      if (p_.group_blocks != 0) {
        advance_group(stage, k + block * 32, row);
        in_group_ += kPart - 1;
      }
    }
    multiply<kPart>(stage, block, row);
  }

  // kCount blocks of K, of one group; its token scales are in row `group` of the stage.
  template <int kCount>
  __device__ __forceinline__ void multiply(std::uint32_t stage, int block, int group) {
    typename Op::A a[kCount][kM];
    std::uint32_t tokens[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const std::uint32_t weights =
          (stage + weights_) ^ ((block + i) * (Op::kBlock * Op::kWeightBits / 8));
      tokens[i] = (stage + tokens_) ^ ((block + i) * (Op::kBlock * Op::kActBits / 8));
#pragma unroll
      for (int f = 0; f < kM; ++f) {
        Op::template load_a<T::kWeightBytes>(a[i][f], weights, f * 16, zero_[f], p_.byte_flip);
      }
    }
    // A pair of token fragments (or one) at a time: the next pair is read, and the last pair's sums
    // are added, while this pair's products are in the tensor cores.
    constexpr bool kFew = kM * kN >= 32 || (kM * kN >= 16 && T::kThreads * T::kCtas > 256);
    constexpr int kPair = kN % 2 != 0 || (Op::kPromote && kFew) ? 1 : 2;  // kFew: registers
    typename Op::B b[2][kCount][kPair];
    typename Op::Sum part[2][kM][kPair][4];
    const auto read = [&](int n, int set) {
#pragma unroll
      for (int i = 0; i < kCount; ++i)
#pragma unroll
        for (int j = 0; j < kPair; ++j)
          Op::template load_b<T::kActBytes>(b[set][i][j], tokens[i], (n + j) * 8);
    };
    read(0, 0);
#pragma unroll
    for (int n0 = 0; n0 < kN; n0 += kPair) {
      const int now = n0 / kPair % 2;
      if (n0 + kPair < kN) read(n0 + kPair, now ^ 1);
      if constexpr (Op::kPromote) {
#pragma unroll
        for (int f = 0; f < kM; ++f)
#pragma unroll
          for (int j = 0; j < kPair; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i) part[now][f][j][i] = 0;
      }
#pragma unroll
      for (int i = 0; i < kCount; ++i)
#pragma unroll
        for (int s = 0; s < Op::kSteps; ++s)
#pragma unroll
          for (int j = 0; j < kPair; ++j)
#pragma unroll
            for (int f = 0; f < kM; ++f) {
              if constexpr (Op::kPromote) {
                Op::step(s, part[now][f][j], a[i][f], b[now][i][j]);
              } else {
                Op::step(s, acc[f][n0 + j], a[i][f], b[now][i][j]);
              }
            }
      if constexpr (Op::kPromote) {
        if (n0 > 0) promote(part[now ^ 1], n0 - kPair, stage, group);
      }
    }
    if constexpr (Op::kPromote) promote(part[(kN / kPair - 1) % 2], kN - kPair, stage, group);
  }

  // acc += scale * part, of kPair fragments from n0 on.
  template <int kPair>
  __device__ __forceinline__ void promote(const typename Op::Sum (&part)[kM][kPair][4], int n0,
                                          std::uint32_t stage, int group) {
#pragma unroll
    for (int j = 0; j < kPair; ++j) {
      float token_scale[2] = {1.0f, 1.0f};
      if constexpr (T::kActScales) {
        if (p_.a_scale_grouped) {
          std::uint32_t s[2];
          const int token = (warp_n_ * kN + n0 + j) * 8 + lane_ % 4 * 2;
          ptx::load_shared8(s, stage + T::kActScaleOffset + (group * T::kTokens + token) * 4);
          token_scale[0] = __uint_as_float(s[0]), token_scale[1] = __uint_as_float(s[1]);
        }
      }
#pragma unroll
      for (int f = 0; f < kM; ++f) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float s = scale_[f][i / 2];
          if constexpr (T::kActScales) s = __fmul_rn(s, token_scale[i % 2]);
          acc[f][n0 + j][i] = __fmaf_rn(static_cast<float>(part[f][j][i]), s, acc[f][n0 + j][i]);
        }
      }
    }
  }

  // Enters the next block: fetches scales at the begin of a stage (row < 0) and of a group. Behind
  // the end of K (tokens are zero there) the last ones stay.
  __device__ __forceinline__ void advance_group(std::uint32_t stage, int k, int& row) {
    const bool ended = in_group_ == p_.group_blocks;
    if (k < p_.k && (ended || row < 0)) {
      if (ended) in_group_ = 0, ++group_;
      load_group(stage, ++row);
    }
    ++in_group_;
  }
  __device__ __forceinline__ void load_group(std::uint32_t stage, int row) {
    const int row0 = warp_m_ * kM * 16 + lane_ / 4;
#pragma unroll
    for (int f = 0; f < kM; ++f) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const std::uint32_t cell = stage + (row * T::kRows + row0 + f * 16 + h * 8) * 4;
        if constexpr (!Op::kE8M0) {
          scale_[f][h] = ptx::load_shared_float(cell + T::kScaleOffset);
        }
        if constexpr (T::kZeros) {
          if (p_.zero == nullptr) continue;
          const std::uint32_t byte =
              (zero_byte_[f][h] + static_cast<std::uint32_t>(group_ * p_.zero_group)) & 3;
          std::uint32_t z = (ptx::load_shared4(cell + T::kZeroOffset) >> (byte * 8)) & 0xffu;
          if constexpr (Op::kE8M0) {  // 2^(z - 127); 0 is 2^-127, 255 is NaN
            scale_[f][h] =
                __uint_as_float(z == 0 ? 0x00400000u : (z == 255 ? 0x7fc00000u : z << 23));
          } else {
            if (p_.zero_nibbles) z = (z >> (zero_byte_[f][h] & 4)) & 0xfu;
            zero_[f][h] = Op::make_zero(z);
          }
        }
      }
    }
  }

  using Sm80Place<T>::lane_;
  using Sm80Place<T>::tokens_;
  using Sm80Place<T>::warp_m_;
  using Sm80Place<T>::warp_n_;
  using Sm80Place<T>::weights_;
  const Sm80Params& p_;
  int group_ = 0, in_group_ = 0;
  float scale_[kM][2];
  std::uint32_t zero_[kM][2];
  std::uint32_t zero_byte_[kM][2];
};

}  // namespace moesaic::cuda
