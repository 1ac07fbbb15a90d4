// SPDX-License-Identifier: Apache-2.0
// What the stages share on the host: the current device, how a dependent kernel is launched, and
// the closed switch from a dtype to a type.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/launch.h"
#include "divide.h"
#include "moesaic/types.h"

namespace moesaic::cuda {

// Makes `index` the calling thread's device and puts the old one back.
class DeviceGuard {
 public:
  explicit DeviceGuard(int index) {
    check_cuda(cudaGetDevice(&previous_), "cudaGetDevice");
    if (previous_ == index) return;
    check_cuda(cudaSetDevice(index), "cudaSetDevice");
    changed_ = true;
  }
  ~DeviceGuard() {
    if (changed_) (void)cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

inline cudaStream_t native(Stream stream) { return static_cast<cudaStream_t>(stream.handle); }

// Every kernel of this backend waits for its predecessors itself, so on SM90 all launches overlap.
inline Dependency overlap(const DeviceTraits& device) {
  return device.compute_capability >= 90 ? Dependency::kOverlap : Dependency::kFull;
}

// Blocks for `work` blocks' worth of a grid-stride loop: enough to fill the machine a few times
// over.
inline dim3 strided_grid(std::int64_t work, const DeviceTraits& device, int blocks_per_sm) {
  const std::int64_t most = static_cast<std::int64_t>(device.sm_count) * blocks_per_sm;
  return dim3(static_cast<unsigned>(work < 1 ? 1 : work < most ? work : most));
}

// Calls f(T{}) with the float type of `dtype`; callers have checked that it is one.
template <typename F>
void for_float_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kF16:
      return f(__half{});
    case DType::kBF16:
      return f(__nv_bfloat16{});
    default:
      return f(float{});
  }
}

}  // namespace moesaic::cuda
