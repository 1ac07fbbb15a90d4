// SPDX-License-Identifier: Apache-2.0
// The experts with the largest keys: by a warp, one after the other, or by a block, all at once. Of
// equal keys the first expert's counts as the larger.
#pragma once

#include <cuda_runtime.h>

#include <climits>

#include "cuda/element.h"

namespace moesaic::cuda {

inline constexpr int kExpertsOfThread = 4, kMostThreads = 2048 / kExpertsOfThread;
inline constexpr int kMostRanked = 128;

// Order as of floats, -0 equal to 0; NaN below all numbers; 0 is free for "not to be chosen".
__device__ __forceinline__ unsigned order_key(float v) {
  if (v != v) return 1u;
  const unsigned u = __float_as_uint(v + 0.0f);
  return u & 0x80000000u ? ~u : u | 0x80000000u;
}

// key[i] is that of expert i * 32 + lane. Lane j gets pick j; -1: fewer keys are not 0.
template <int kPerLane>
__device__ __forceinline__ int pick_experts(unsigned (&key)[kPerLane], int picks) {
  const int lane = threadIdx.x;
  int chosen = -1;
  for (int j = 0; j < picks; ++j) {
    unsigned best = 0;
    int at = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (key[i] > best) {
        best = key[i];
        at = i * 32 + lane;
      }
    }
    const unsigned top = __reduce_max_sync(kAllLanes, best);
    const unsigned mine = best == top && top > 0 ? static_cast<unsigned>(at) : 0x7fffffffu;
    const int pick = static_cast<int>(__reduce_min_sync(kAllLanes, mine));
    const int expert = top > 0 ? pick : -1;
    if (lane == j) chosen = expert;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i)
      if (i * 32 + lane == expert) key[i] = 0;
  }
  return chosen;
}

struct alignas(8) Candidate {
  unsigned key;
  int expert;
};

// One pick after the other among many candidates, by one warp, which takes them out of the list.
__device__ __forceinline__ void pick_candidates(Candidate* candidates, int all, int picks,
                                                int* order) {
  const int lane = threadIdx.x;
  for (int j = 0; j < picks; ++j) {
    Candidate best{0, INT_MAX};
    int at = 0;
    for (int c = lane; c < all; c += 32) {
      const Candidate one = candidates[c];
      if (one.key > best.key || (one.key == best.key && one.expert < best.expert)) {
        best = one;
        at = c;
      }
    }
    const unsigned top = __reduce_max_sync(kAllLanes, best.key);
    const unsigned mine = best.key == top ? static_cast<unsigned>(best.expert) : INT_MAX;
    const unsigned pick = __reduce_min_sync(kAllLanes, mine);
    if (mine == pick) {
      order[j] = best.expert;
      candidates[at].key = 0;
    }
    __syncwarp();
  }
}

// How many lanes have a larger value, or the same in front of this one.
__device__ __forceinline__ int rank_in_warp(unsigned value) {
  const int lane = threadIdx.x % 32;
  int rank = 0;
#pragma unroll 8
  for (int other = 0; other < 32; ++other) {
    const unsigned theirs = __shfl_sync(kAllLanes, value, other);
    rank += theirs > value || (theirs == value && other < lane);
  }
  return rank;
}

// key[i] is that of expert i * threads + this thread. By all threads; then `order` [32] holds the
// picks, and -1 as above. candidates: room for all experts.
//
// In each warp at least `picks` keys reach the bound that so many lanes' largest reach, so the
// largest of these bounds serves all. Of different keys a few dozen reach it (10 picks of 512), and
// each finds its rank among them. With many picks, or equal keys (a token of zeros behind a router
// without bias has no others), they are too many for that.
__device__ __forceinline__ void choose_experts(const unsigned (&key)[kExpertsOfThread], int picks,
                                               Candidate* candidates, int* order) {
  __shared__ unsigned bounds[kMostThreads / 32];
  __shared__ int count;
  const int thread = threadIdx.x, threads = blockDim.x;
  unsigned best = 0;
#pragma unroll
  for (int i = 0; i < kExpertsOfThread; ++i) best = max(best, key[i]);
  const unsigned holder = __ballot_sync(kAllLanes, rank_in_warp(best) == picks - 1);
  const unsigned bound_of_warp = __shfl_sync(kAllLanes, best, __ffs(static_cast<int>(holder)) - 1);
  if (thread % 32 == 0) bounds[thread / 32] = bound_of_warp;
  if (thread < 32) order[thread] = -1;
  if (thread == 0) count = 0;
  __syncthreads();
  unsigned bound = 1;  // 0: not to be chosen
  for (int w = 0; w < threads / 32; ++w) bound = max(bound, bounds[w]);
#pragma unroll
  for (int i = 0; i < kExpertsOfThread; ++i)
    if (key[i] >= bound) candidates[atomicAdd(&count, 1)] = {key[i], i * threads + thread};
  __syncthreads();
  const int all = count;
  if (all > kMostRanked) {
    if (thread < 32) pick_candidates(candidates, all, picks, order);
    __syncthreads();
    return;
  }
  for (int c = thread; c < all; c += threads) {
    const Candidate mine = candidates[c];
    int rank = 0;
#pragma unroll 4
    for (int other = 0; other < all; ++other) {
      const Candidate theirs = candidates[other];
      rank += theirs.key > mine.key || (theirs.key == mine.key && theirs.expert < mine.expert);
    }
    if (rank < picks) order[rank] = mine.expert;
  }
  __syncthreads();
}

}  // namespace moesaic::cuda
