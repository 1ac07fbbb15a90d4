// SPDX-License-Identifier: Apache-2.0
// Version, log sink, and the overrides that are forwarded to a backend.
#include "moesaic/runtime.h"

#include <mutex>
#include <utility>

#include "backend.h"
#include "check.h"
#include "log.h"
#include "moesaic/version.h"

namespace moesaic {
namespace {
std::mutex log_mutex;
LogSink log_sink;
}  // namespace

std::string version() { return MOESAIC_VERSION_STRING; }

void set_log_sink(LogSink sink) {
  const std::lock_guard lock(log_mutex);
  log_sink = std::move(sink);
}

void log(std::string_view message) {
  const std::lock_guard lock(log_mutex);
  if (log_sink) log_sink(message);
}

void set_kernels(DeviceType type, std::string_view level) {
  if (type == DeviceType::kCpu) return set_cpu_kernels(level);
#ifdef MOESAIC_HAS_CUDA
  set_cuda_kernels(level);
#else
  unsupported("set_kernels: this library was built without CUDA; configure with MOESAIC_CUDA=ON");
#endif
}

std::vector<std::string> available_kernels(DeviceType type) {
  if (type == DeviceType::kCpu) return available_cpu_kernels();
#ifdef MOESAIC_HAS_CUDA
  return available_cuda_kernels();
#else
  return {};
#endif
}

}  // namespace moesaic
