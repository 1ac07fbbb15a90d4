// SPDX-License-Identifier: Apache-2.0
// What a multiplying warpgroup of the SM90 families is besides its product: where it stands in the
// ring of stages, how it learns its task, how it gives a stage back, who writes its sums out.
#pragma once

#include "cuda/sm90/loader.h"

namespace moesaic::cuda::sm90 {

template <typename S, typename Arguments>
class MultiplierBase {
 public:
  __device__ MultiplierBase(const Arguments& p, const SharedMemory<S>& shared)
      : p_(p), shared_(shared) {}

 protected:
  __device__ static int warpgroup() { return thread_index<S::kKeepsThread>() / 128 - 1; }
  __device__ Epilogue<S> epilogue(int ring, const Task& task) const {
    const int mine = warpgroup();
    return {p_, shared_.epilogue(mine), shared_.table(ring), mine, task.term_place};
  }
  __device__ Task load_task(int ring) const {
    Task task;
    ptx::load_shared_32(ptx::shared_address(shared_.tasks() + ring), &task);
    return task;
  }
  // The r-th task of a run: see Params::run.
  __device__ Task load_task_of_run(int ring, int r) const {
    Task task = load_task(ring);
    if constexpr (S::kHasRuns) {
      task.weight_task += r;
      task.term_place = (task.term_place + r) % S::kTermPlaces;
    }
    return task;
  }
  // A filtered task, or a run of them: zeros, and one stage without bytes.
  __device__ void skip(int ring, Task task) {
    release(cursor_.stage);
    cursor_.advance();
    for (;; ++task.weight_task) {
      epilogue(ring, task).zeros(task);
      if (!S::kHasRuns || --task.run == 0) break;
    }
  }
  // A pair's stage is free when both have read it: each loads into both.
  __device__ void release(int stage) {
    __syncwarp();  // one lane speaks for all, also for what they read of tables and scales
    if constexpr (S::kPair == 2) {
      if (threadIdx.x % 32 < 2) ptx::barrier_arrive_at(shared_.empty(stage), threadIdx.x % 32);
    } else {
      if (threadIdx.x % 32 == 0) ptx::barrier_arrive(shared_.empty(stage));
    }
  }

  const Arguments& p_;
  const SharedMemory<S>& shared_;
  Cursor<S::kStages> cursor_;
};

}  // namespace moesaic::cuda::sm90
