// SPDX-License-Identifier: Apache-2.0
// What lies in the shared memory of an SM90 kernel, and the ring of stages that its warps pass on.
#pragma once

#include "cuda/sm90/epilogue.h"

namespace moesaic::cuda::sm90 {

template <typename S>
inline constexpr int kLoaders = 32 * S::kLoaderWarps;  // threads that gather tokens

extern __shared__ __align__(1024) unsigned char shared_bytes[];  // it begins aligned so: no padding

template <typename S>
struct SharedMemory {
  __device__ unsigned char* weights(int stage) const {
    return shared_bytes + stage * S::kStageBytes;
  }
  __device__ unsigned char* tokens(int stage) const {
    return weights(stage) + S::kChunks * S::kWeightBytes;
  }
  __device__ float* scales(int stage) const {
    return reinterpret_cast<float*>(shared_bytes + S::kStages * S::kStageBytes +
                                    stage * S::kScaleBytes);
  }
  __device__ unsigned char* epilogue(int warpgroup) const {
    return shared_bytes + S::kStages * (S::kStageBytes + S::kScaleBytes) +
           warpgroup * S::kEpilogueBytes;
  }
  __device__ unsigned char* table(int ring) const {
    return epilogue(S::kWarpgroups) + ring * S::kTableBytes;
  }
  __device__ std::uint32_t* gathered() const {
    return reinterpret_cast<std::uint32_t*>(table(S::kRing));
  }
  __device__ Task* tasks() const {
    return reinterpret_cast<Task*>(table(S::kRing) + S::kGatherBytes);
  }
  __device__ std::uint32_t full(int stage) const {
    return ptx::shared_address(tasks() + S::kRing) + stage * 8;
  }
  __device__ std::uint32_t empty(int stage) const { return full(S::kStages + stage); }
  // Deal::kByCounter: see sm90/deal.h.
  __device__ std::uint32_t dealt() const { return full(2 * S::kStages); }
};

// A position in the ring of stages and the parity of its round.
template <int kStages>
struct Cursor {
  int stage = 0;
  std::uint32_t round = 0;
  __device__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      round ^= 1;
    }
  }
};

template <typename S>
__device__ int stages_of(const Params& p, const Task& task) {
  return task.expert < 0 ? 1 : (p.k_chunks + S::kChunks - 1) / S::kChunks;
}
// How many tasks' stages come, of a run.
template <typename S>
__device__ int loaded_run(const Task& task) {
  return S::kHasRuns && task.expert >= 0 ? task.run : 1;
}

}  // namespace moesaic::cuda::sm90
