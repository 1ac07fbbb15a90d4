// SPDX-License-Identifier: Apache-2.0
// The stages in shared memory -> fp32 sums, for large tiles of 16-bit operands: the fragments of
// the next 16 of K are read while those of this one are in the tensor cores, across the border of a
// stage, too.
#pragma once

#include "cuda/sm80/large_loader.h"
#include "cuda/sm80/place.h"

namespace moesaic::cuda {

// The operand: Natural16 with fragments of 16 of K, tokens in pairs of 8.
template <typename T>
struct Ahead16 {
  static constexpr int kWeightBits = 16, kActBits = 16, kBlock = 16;
  static constexpr int kWeightUnit = 16, kActUnit = 16;
  static constexpr bool kPromote = false, kZeros = false, kE8M0 = false;
  struct A {
    std::uint32_t r[4];
  };
  struct B {
    std::uint32_t r[4];
  };
  template <int kRowBytes>
  __device__ static int lane_offset_a(int lane) {
    return Swizzle<kRowBytes, kWeightUnit>::offset(lane % 16, lane / 16);
  }
  template <int kRowBytes>
  __device__ static int lane_offset_b(int lane) {
    return Swizzle<kRowBytes, kActUnit>::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2);
  }
  template <int kRowBytes>
  __device__ static void load_a(A& a, std::uint32_t at, int row) {
    ptx::ldmatrix_x4(a.r, at + row * kRowBytes);
  }
  template <int kRowBytes>
  __device__ static void load_b(B& b, std::uint32_t at, int row) {
    ptx::ldmatrix_x4(b.r, at + row * kRowBytes);
  }
  __device__ static void multiply(float (&d)[4], const A& a, const B& b, int half) {
    ptx::mma_16816(d, a.r, b.r + 2 * half, T{});
  }
};

template <typename T>
class Sm80AheadConsumer : public Sm80Place<T> {
 public:
  using Op = typename T::Op;
  using Loader = Sm80LargeLoader<T>;
  static constexpr int kIssued = T::kStages;  // stages under way when the first products begin
  static constexpr int kM = T::kMFrags, kN = T::kNFrags;
  static constexpr int kBlocks = T::kDepth / Op::kBlock;
  static_assert(kBlocks % 2 == 0, "the two sets of fragments change places with every block");
  float acc[kM][kN][4];

  __device__ explicit Sm80AheadConsumer(const Sm80Params&) {}

  // A tile's first fragments are read here, with nothing to hide them behind: read with the last
  // stage's, as those of every other stage are, they would have to live through the epilogue.
  __device__ __forceinline__ void begin(const Loader& loader) {
    const std::uint32_t stage = loader.template slot<0>();
#pragma unroll
    for (auto& f : acc)
      for (auto& n : f)
        for (float& x : n) x = 0.0f;
#pragma unroll
    for (int i = 0; i < kReads; ++i) read(0, stage, 0, i);
  }

  // One stage, which has landed. Behind the last block's reads of it there is one barrier: then the
  // next stage has landed, too, and this one's slot is free.
  __device__ __forceinline__ void consume(Loader& loader) {
    const std::uint32_t stage = loader.template slot<0>(), next = loader.template slot<1>();
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      const bool last = block == kBlocks - 1;
      if (last) {
        ptx::cp_async_wait<T::kStages - 2>();
        __syncthreads();
      }
      multiply(block % 2, last ? next : stage, last ? 0 : block + 1);
      if (last) loader.issue();
    }
  }

 private:
  // Reads of a block: the weights' fragments, then the tokens' in pairs.
  static constexpr int kReads = kM + kN / 2;
  static_assert(kN % 2 == 0);

  __device__ __forceinline__ void read(int set, std::uint32_t stage, int block, int i) {
    if (i < kM) {
      Op::template load_a<T::kWeightBytes>(a_[set][i], (stage + weights_) ^ (block * 32), i * 16);
    } else {
      const int pair = i - kM;
      Op::template load_b<T::kActBytes>(b_[set][pair], (stage + tokens_) ^ (block * 32), pair * 16);
    }
  }

  // The products of one set; the other is filled from `stage` and `block` meanwhile.
  __device__ __forceinline__ void multiply(int set, std::uint32_t stage, int block) {
    constexpr int kProducts = kM * kN,
                  kEvery = kProducts / 2 / kReads > 0 ? kProducts / 2 / kReads : 1;
    int i = 0;
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int f = 0; f < kM; ++f) {
        if (i % kEvery == 0 && i / kEvery < kReads) read(set ^ 1, stage, block, i / kEvery);
        Op::multiply(acc[f][n], a_[set][f], b_[set][n / 2], n % 2);
        ++i;
      }
    }
  }

  using Sm80Place<T>::tokens_;
  using Sm80Place<T>::weights_;
  typename Op::A a_[2][kM];
  typename Op::B b_[2][kN / 2];
};

}  // namespace moesaic::cuda
