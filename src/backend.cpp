// SPDX-License-Identifier: Apache-2.0
// Which backends this process has. Each is made once, when it is first asked for.
#include "backend.h"

#include <string>

#include "check.h"

namespace moesaic {

const Backend& backend(Device device) {
  check_enum("device.type", device.type, 2);
  if (device.type == DeviceType::kCpu) {
    if (device.index != 0)
      invalid("device: there is one CPU device, cpu:0; got cpu:" + std::to_string(device.index));
    return *cpu_backend();
  }
#ifdef MOESAIC_HAS_CUDA
  if (const Backend* found = cuda_backend(device.index)) return *found;
  unsupported("device: this machine has no usable " + to_string(device) + " (" + cuda_absence() +
              "); moesaic info lists what there is. Use cpu");
#else
  unsupported(
      "device: " + to_string(device) +
      " asked of a library that was built without CUDA; configure with MOESAIC_CUDA=ON or use cpu");
#endif
}

std::vector<DeviceInfo> devices() {
  std::vector<DeviceInfo> found{cpu_backend()->info()};
#ifdef MOESAIC_HAS_CUDA
  for (int index = 0;; ++index) {
    const Backend* next = cuda_backend(index);
    if (next == nullptr) break;
    found.push_back(next->info());
  }
#endif
  return found;
}

}  // namespace moesaic
