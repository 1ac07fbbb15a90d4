// SPDX-License-Identifier: Apache-2.0
// The process: devices, threads, ISA and architecture overrides, log sink, support matrix.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "moesaic/layer.h"
#include "moesaic/stages.h"
#include "moesaic/types.h"

namespace moesaic {

MOESAIC_API std::string version();

// --- devices ------------------------------------------------------------------------------------
struct DeviceInfo {
  Device device;
  std::string name;      // "AMD EPYC ..." or "NVIDIA H100 80GB HBM3"
  std::string kernels;   // "avx512_bf16" | "sm90a" | "sm80"
  std::string note;      // e.g. that the driver compiles PTX once on this part
};
MOESAIC_API std::vector<DeviceInfo> devices();  // the CPU first

// --- CPU threads --------------------------------------------------------------------------------
// Default: the MOESAIC_THREADS environment variable, else the cores this process may run on.
// Throw kInvalidArgument for a count (or a variable) that is not 1 to 4096.
MOESAIC_API void set_num_threads(int threads);
MOESAIC_API int num_threads();
// Run on a host program's own threads instead of Moesaic's pool: `hook` must call body(i) once for
// every i in [0, n), concurrently or not, and return when all are done. An empty hook: own pool.
using ParallelHook = std::function<void(int n, const std::function<void(int)>& body)>;
MOESAIC_API void set_parallel_hook(ParallelHook hook);

// --- kernel overrides, for tests and timings ----------------------------------------------------
// CPU: "scalar", "avx2", "avx512", "avx512_bf16", ... ; CUDA: "sm80", "sm90a"; "" : the best one.
// Also MOESAIC_CPU_ISA and MOESAIC_CUDA_ARCH. Affects layers made afterwards. Throws kUnsupported
// for a level this machine has not, and in a build without CUDA.
MOESAIC_API void set_kernels(DeviceType type, std::string_view level);
MOESAIC_API std::vector<std::string> available_kernels(DeviceType type);  // best last

// --- log ----------------------------------------------------------------------------------------
// The library never prints. What it has to say goes to this sink; default: none.
using LogSink = std::function<void(std::string_view message)>;
MOESAIC_API void set_log_sink(LogSink sink);

// --- the support matrix -------------------------------------------------------------------------
struct Support {
  bool supported = false;
  std::string reason;  // when not: why, and what to use instead
};
// Whether `device` can run `config` in `format`. What a Layer's constructor throws is this reason.
MOESAIC_API Support supports(const LayerConfig& config, Format format, Device device = {});

}  // namespace moesaic
