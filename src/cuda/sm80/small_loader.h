// SPDX-License-Identifier: Apache-2.0
// The two warps of a small tile that copy: one the weights and what is scaled along K with them,
// the other tokens, and it says which work there is.
#pragma once

#include "cuda/overlap.h"
#include "cuda/sm80/copy.h"
#include "cuda/sm80/table.h"
#include "cuda/sm80/walk.h"

namespace moesaic::cuda {

// What a CTA keeps in shared memory behind the stages.
template <typename T>
struct Sm80Desk {
  static constexpr int kWorks = T::kStages + 2;  // nobody reads a work that is kStages + 1 behind
  Sm80Table<typename T::Base> tables[2];
  Sm80Work works[kWorks];  // of tile i at i % kWorks; rows = 0: there are no more
  std::int32_t positions[kWorks][T::kTokens];
  std::uint32_t slots[kWorks][T::kTokens];
  std::uint64_t full[T::kStages], empty[T::kStages], posted[kWorks];

  __device__ void begin() {
    for (int i = 0; i < T::kStages; ++i) {
      ptx::mbarrier_init(ptx::shared_address(full + i), 64);
      ptx::mbarrier_init(ptx::shared_address(empty + i), T::kThreads / 32);
    }
    for (int i = 0; i < kWorks; ++i) ptx::mbarrier_init(ptx::shared_address(posted + i), 1);
  }
};

// A place in a ring and the parity of its round.
template <int kPlaces>
struct Sm80Cursor {
  int at = 0;
  std::uint32_t round = 0;
  __device__ __forceinline__ void advance() {
    if (++at == kPlaces) at = 0, round ^= 1;
  }
};

// Chunks of 16 bytes of kRows rows: which a lane of the warp copies, and where they go.
template <int kRows, int kRowBytes, int kUnit>
struct Sm80Chunks {
  static constexpr int kAcross = kRowBytes / 16;  // lanes of one row
  static constexpr int kAtOnce = 32 / kAcross;    // rows of one copy
  static constexpr int kCount = (kRows + kAtOnce - 1) / kAtOnce;
  static constexpr int kAlike =
      kAtOnce < 8 ? 8 / kAtOnce : 1;  // copies until rows are swizzled alike
  static_assert(kAcross <= 32);
  std::uint32_t dst_[kAlike];

  __device__ Sm80Chunks() {
#pragma unroll
    for (int i = 0; i < kAlike; ++i) dst_[i] = Swizzle<kRowBytes, kUnit>::offset(row(i), chunk());
  }
  __device__ static int chunk() { return threadIdx.x % kAcross; }
  __device__ static int row(int i) { return threadIdx.x % 32 / kAcross + i * kAtOnce; }
  __device__ __forceinline__ std::uint32_t dst(int i) const {
    return dst_[i % kAlike] + i / kAlike * (kAtOnce * kAlike * kRowBytes);
  }
};

template <typename T>
class Sm80WeightWarp {
 public:
  __device__ Sm80WeightWarp(const Sm80Params& p, std::uint32_t stages, Sm80Desk<T>& desk)
      : p_(p), desk_(desk), stages_(stages) {
    if constexpr (T::kScales) scales_.place(stages, threadIdx.x % 32);
  }

  __device__ __forceinline__ void run() {
    if (!p_.settled) wait_for_earlier_kernels();
    Sm80Walk<T> walk(p_);
    Sm80Cursor<T::kStages> cursor;
    Sm80Work work;
    while (walk.next(work)) {
      if (work.expert >= 0) begin(work);
      const int end = work.expert >= 0 ? p_.k : 1;
#pragma unroll 1
      for (int k = 0; k < end; k += T::kDepth) {
        ptx::mbarrier_wait(ptx::shared_address(desk_.empty + cursor.at), cursor.round ^ 1);
        if (work.expert >= 0) copy(work, cursor.at * T::kStageBytes, k);
        ptx::mbarrier_arrive_copied(ptx::shared_address(desk_.full + cursor.at));
        cursor.advance();
      }
    }
  }

 private:
  using Chunks = Sm80Chunks<T::kRows, T::kWeightBytes, T::Op::kWeightUnit>;

  __device__ __forceinline__ std::uint32_t row_at(const Sm80Work& work, int i) const {
    int half;  // rows behind the last one: any row, the result is dropped
    const std::int32_t column =
        min(column_of<T>(p_, work.column_tile, Chunks::row(i), half), p_.n_out - 1);
    return static_cast<std::uint32_t>(weight_row(p_, column, half) * p_.w_row);
  }
  __device__ __forceinline__ void begin(const Sm80Work& work) {
    w_ = p_.w + work.expert * p_.w_expert + Chunks::chunk() * 16;
#pragma unroll
    for (int i = 0; i < Chunks::kCount; ++i) row_[i] = row_at(work, i);
    if constexpr (T::kScales) scales_.begin(p_, work);
  }
  __device__ __forceinline__ void copy(const Sm80Work& work, std::uint32_t slot, int k) {
    const std::uint32_t to = stages_ + slot;
    if (p_.aligned && k + T::kDepth <= p_.k) {
#pragma unroll
      for (int i = 0; i < Chunks::kCount; ++i)
        ptx::cp_async16(to + chunks_.dst(i), w_ + static_cast<std::uint64_t>(row_[i]) * 16);
    } else {
      const int left = (p_.k - k) * T::Op::kWeightBits / 8 - Chunks::chunk() * 16;
      if (p_.aligned) {  // K's tail: zeros behind its end
        const char* from = left > 0 ? w_ : p_.w;
#pragma unroll
        for (int i = 0; i < Chunks::kCount; ++i)
          ptx::cp_async16(to + chunks_.dst(i), from + static_cast<std::uint64_t>(row_[i]) * 16,
                          max(min(left, 16), 0));
      } else {
#pragma unroll 1
        for (int i = 0; i < Chunks::kCount; ++i) {
          const std::uint32_t dst = to + Swizzle<T::kWeightBytes, T::Op::kWeightUnit>::offset(
                                             Chunks::row(i), Chunks::chunk());
          copy_partial_chunk(dst, w_, static_cast<std::uint64_t>(row_at(work, i)) << p_.w_shift,
                             left, p_.w_shift, p_.w);
        }
      }
    }
    if constexpr (T::kScales) {
      if (p_.group_blocks != 0) scales_.copy(p_, slot, k);
    }
    w_ += T::kWeightBytes;
  }

  const Sm80Params& p_;
  Sm80Desk<T>& desk_;
  const std::uint32_t stages_;
  Chunks chunks_;
  const char* w_ = nullptr;  // this lane's chunk of row 0, at k
  std::uint32_t row_[Chunks::kCount];
  Sm80ScaleCopier<T, 32, Sm80Scales::kOfWeights> scales_;
};

template <typename T>
class Sm80TokenWarp {
 public:
  __device__ Sm80TokenWarp(const Sm80Params& p, std::uint32_t stages, Sm80Desk<T>& desk)
      : p_(p), desk_(desk), stages_(stages) {
    if constexpr (T::kActScales) scales_.place(stages, lane());
  }

  __device__ __forceinline__ void run() {
    // Where the lists are old enough, what they say is known, and the other warp's copies are on
    // their way, when the kernel in front ends.
    if (!p_.settled) begin_kernel();
    bool waits = p_.settled;
    Sm80Walk<T> walk(p_);
    Sm80Cursor<T::kStages> cursor;
    Sm80Cursor<Sm80Desk<T>::kWorks> place;
    for (;;) {
      Sm80Work work;
      const bool more = walk.next(work);
      Sm80Row row{};
      if (more && lane() < work.rows) row = walk.row(work, lane());
      if (waits) {
        begin_kernel();
        waits = false;
      }
      if (lane() < T::kTokens) {
        desk_.positions[place.at][lane()] = static_cast<std::int32_t>(row.position);
        desk_.slots[place.at][lane()] = row.slot;
      }
      if (lane() == 0) desk_.works[place.at] = work;
      __syncwarp();
      if (lane() == 0) ptx::mbarrier_arrive(ptx::shared_address(desk_.posted + place.at));
      if (!more) return;
      place.advance();
      if (work.expert >= 0) begin(work, row);
      const int end = work.expert >= 0 ? p_.k : 1;
#pragma unroll 1
      for (int k = 0; k < end; k += T::kDepth) {
        ptx::mbarrier_wait(ptx::shared_address(desk_.empty + cursor.at), cursor.round ^ 1);
        if (work.expert >= 0) copy(cursor.at * T::kStageBytes, k);
        ptx::mbarrier_arrive_copied(ptx::shared_address(desk_.full + cursor.at));
        cursor.advance();
      }
    }
  }

 private:
  using Chunks = Sm80Chunks<T::kTokens, T::kActBytes, T::Op::kActUnit>;
  static constexpr std::uint32_t kNone =
      0xffffffffu;  // tokens that are not there: columns do not mix
  __device__ static int lane() { return threadIdx.x % 32; }

  __device__ __forceinline__ void begin(const Sm80Work& work, const Sm80Row& row) {
    a_ = p_.a + Chunks::chunk() * 16;
    const bool live = lane() < work.rows && !is_padding(p_, row.slot);
    const std::uint32_t a_row = row_of(p_.a_row, row.position, row.slot, p_.top_k);
    mine_ = live ? static_cast<std::uint32_t>(p_.a_rows(a_row)) : kNone;
#pragma unroll
    for (int i = 0; i < Chunks::kCount; ++i) row_[i] = __shfl_sync(~0u, mine_, Chunks::row(i) % 32);
    if constexpr (T::kActScales) {
      scales_.begin(p_, work);
      scales_.no_token();
      if (live) scales_.begin_token(p_, work.expert, a_row);
    }
  }
  __device__ __forceinline__ void copy(std::uint32_t slot, int k) {
    const std::uint32_t to = stages_ + T::kActOffset + slot;
    if (p_.aligned && k + T::kDepth <= p_.k) {
#pragma unroll
      for (int i = 0; i < Chunks::kCount; ++i) {
        if (row_[i] != kNone)
          ptx::cp_async16(to + chunks_.dst(i), a_ + static_cast<std::uint64_t>(row_[i]) * 16);
      }
    } else {  // K's tail, or rows that are not aligned to 16 bytes
      const int left = (p_.k - k) * T::Op::kActBits / 8 - Chunks::chunk() * 16;
#pragma unroll 1
      for (int i = 0; i < Chunks::kCount; ++i) {
        const std::uint32_t row = __shfl_sync(~0u, mine_, Chunks::row(i) % 32);
        if (row == kNone) continue;
        const std::uint32_t dst =
            to + Swizzle<T::kActBytes, T::Op::kActUnit>::offset(Chunks::row(i), Chunks::chunk());
        copy_partial_chunk(dst, a_, static_cast<std::uint64_t>(row) << p_.a_shift, left, p_.a_shift,
                           p_.a);
      }
    }
    if constexpr (T::kActScales) {
      if (p_.group_blocks != 0) scales_.copy(p_, slot, k);
    }
    a_ += T::kActBytes;
  }

  const Sm80Params& p_;
  Sm80Desk<T>& desk_;
  const std::uint32_t stages_;
  Chunks chunks_;
  const char* a_ = nullptr;
  std::uint32_t mine_ = kNone;  // token `lane`
  std::uint32_t row_[Chunks::kCount];
  Sm80ScaleCopier<T, 32, Sm80Scales::kOfTokens> scales_;
};

}  // namespace moesaic::cuda
