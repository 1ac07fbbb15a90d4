// SPDX-License-Identifier: Apache-2.0
// Deal::kByCounter: a CTA's first task is its own number; all others are dealt out by a counter in
// memory, for among CTAs with equally many the first are done when a fifth (int4, T = 16) to a
// third (T = 128) of the time is left. Warp 0 asks for the next task when it begins to load one,
// and hands the answer on where all loading warps look: a ring of entries, each with its own number
// in front of the task's.
#pragma once

#include "cuda/sm90/gemm.h"
#include "cuda/sm90/ptx.h"

namespace moesaic::cuda::sm90 {

// Where the ring lies; 0: all tasks come in turn.
template <typename S, typename Shared>
__device__ std::uint32_t dealt_ring(const Params& p, const Shared& shared) {
  return S::kDeal == Deal::kByCounter && p.next_task != nullptr ? shared.dealt() : 0;
}
// By all threads, once: no entry has been written.
template <typename S, typename Shared>
__device__ __forceinline__ void clear_dealt(const Shared& shared) {
  if constexpr (S::kDeal == Deal::kByCounter) {
    if (threadIdx.x < kDealtRing) ptx::store_shared_pair(shared.dealt() + threadIdx.x * 8, 0, 0);
  }
}

// The side that every loading warp has.
template <Deal kDeal>
class DealtTasks {  // kInTurn
 public:
  __device__ explicit DealtTasks(std::uint32_t) {}
  __device__ static bool deals() { return false; }
  __device__ static unsigned dealt() { return 0; }
};
template <>
class DealtTasks<Deal::kByCounter> {
 public:
  __device__ explicit DealtTasks(std::uint32_t ring) : ring_(ring) {}
  __device__ bool deals() const { return ring_ != 0; }
  __device__ unsigned dealt() {
    const unsigned mine = number_++;
    if (mine == 0) return blockIdx.x;
    unsigned number, task;
    do {
      ptx::load_shared_pair(ring_ + mine % kDealtRing * 8, number, task);
    } while (number != mine);
    return task;
  }

 private:
  std::uint32_t ring_;
  unsigned number_ = 0;
};

// Warp 0's, by one thread: ask where a task begins, hand_on when its stages are nearly all asked
// for. (In between, the counter's answer is on its way.)
template <Deal kDeal>
class Dealer {
 public:
  __device__ Dealer(const Params&, std::uint32_t) {}
  __device__ void ask() {}
  __device__ void hand_on(int) {}
};
template <>
class Dealer<Deal::kByCounter> {
 public:
  __device__ Dealer(const Params& p, std::uint32_t ring) : p_(p), ring_(ring) {}
  __device__ void ask() {
    if (ring_ != 0) next_ = static_cast<unsigned>(atomicAdd(p_.next_task, 1)) + gridDim.x;
  }
  // `left`: stages of the task that have not been asked for.
  __device__ void hand_on(int left) {
    if (ring_ == 0 || next_ == kNone || left > 1) return;
    ++number_;
    ptx::store_shared_pair(ring_ + number_ % kDealtRing * 8, number_, next_);
    next_ = kNone;
  }

 private:
  static constexpr unsigned kNone = ~0u;
  const Params& p_;
  std::uint32_t ring_;
  unsigned next_ = kNone, number_ = 0;
};

}  // namespace moesaic::cuda::sm90
