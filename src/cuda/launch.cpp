// SPDX-License-Identifier: Apache-2.0
// Where every launch ends up: the shared memory a kernel may use is asked for once, then it runs.
#include "cuda/launch.h"

#include <algorithm>

#include "cuda/shared_grants.h"

namespace moesaic::cuda {
namespace {

SharedGrants& grants() {
  static SharedGrants all;
  return all;
}

// What every kernel may use without being granted it.
constexpr std::size_t kFreeSharedBytes = 48 << 10;

}  // namespace

void launch_kernel(const char* what, const void* kernel, void** arguments, const LaunchShape& shape,
                   cudaStream_t stream) {
  const std::size_t most = std::max(shape.shared_bytes, shape.most_shared_bytes);
  if (most > kFreeSharedBytes) {
    int device = 0;
    check_cuda(cudaGetDevice(&device), what);
    grants().require(kernel, device, most, [&] {
      check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      static_cast<int>(most)),
                 what);
      if (shape.most_shared_bytes == 0) return;
      // Else the driver may divide an SM's memory by what one launch needs, and the others' blocks
      // wait until the SM is empty.
      check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                      cudaSharedmemCarveoutMaxShared),
                 what);
    });
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
  check_cuda(cudaLaunchKernelExC(&config, kernel, arguments), what);
}

}  // namespace moesaic::cuda
