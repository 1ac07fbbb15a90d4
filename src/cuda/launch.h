// SPDX-License-Identifier: Apache-2.0
// How every kernel is launched and every CUDA error reported. Host side only.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
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

template <typename... Params, typename... Args>
void launch(const char* what, void (*kernel)(Params...), const LaunchShape& shape,
            cudaStream_t stream, Args&&... args) {
  const std::size_t most = std::max(shape.shared_bytes, shape.most_shared_bytes);
  if (most > 48 * 1024) {
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(most)),
               what);
  }
  if (shape.most_shared_bytes > 0) {
    // Else the driver may divide an SM's memory by what one launch needs, and the others' blocks
    // wait until the SM is empty.
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                    cudaSharedmemCarveoutMaxShared),
               what);
  }
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = shape.dependency == Dependency::kOverlap ? 1 : 0;
  check_cuda(cudaLaunchKernelEx(&config, kernel, Params(std::forward<Args>(args))...), what);
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
