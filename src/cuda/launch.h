// SPDX-License-Identifier: Apache-2.0
// How every kernel is launched and every CUDA error reported. Host side only.
#pragma once

#include <cuda_runtime.h>

#include <string>
#include <utility>

#include "moesaic/types.h"

namespace moesaic::cuda {

// Throws Error(kDevice / kOutOfMemory) naming `what`.
inline void check_cuda(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  (void)cudaGetLastError();  // a failed call must not haunt the next one
  throw Error(status == cudaErrorMemoryAllocation ? ErrorCode::kOutOfMemory : ErrorCode::kDevice,
              std::string(what) + ": " + cudaGetErrorString(status));
}

// kOverlap: a programmatic dependent launch. The kernel may start before its predecessor in the
// stream has ended, and keeps to what overlap.h says.
enum class Dependency : unsigned char { kFull, kOverlap };

struct LaunchShape {
  dim3 grid{1}, block{1};
  std::size_t shared_bytes = 0;
  std::size_t most_shared_bytes = 0;          // of any launch of this kernel, where they differ
  Dependency dependency = Dependency::kFull;  // kOverlap has no effect below SM90
};

// `arguments`: where each parameter lies. Throws by the kernel's name. (launch.cpp)
void launch_kernel(const char* what, const void* kernel, void** arguments, const LaunchShape& shape,
                   cudaStream_t stream);

template <typename... Params, typename... Args>
void launch(const char* what, void (*kernel)(Params...), const LaunchShape& shape,
            cudaStream_t stream, Args&&... args) {
  [&](Params... exact) {
    void* arguments[] = {&exact...};
    launch_kernel(what, reinterpret_cast<const void*>(kernel), arguments, shape, stream);
  }(std::forward<Args>(args)...);
}

// What the policies need to know of the device.
struct DeviceTraits {
  int index = 0;
  int sm_count = 0;
  int compute_capability = 0;        // 90, 80, ...
  std::size_t shared_per_block = 0;  // opt-in maximum
  std::size_t l2_bytes = 0;
  bool use_sm90 = false;  // wgmma / TMA kernels; else the SM80 family
};

}  // namespace moesaic::cuda
