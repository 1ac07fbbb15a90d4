// SPDX-License-Identifier: Apache-2.0
#include "cpu/backend_cpu.h"

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>

#include "cpu/activate.h"
#include "cpu/align.h"
#include "cpu/combine.h"
#include "cpu/gemm.h"
#include "cpu/quantize.h"
#include "cpu/route.h"
#include "cpu/tiles.h"

namespace moesaic {
namespace {

std::string processor_name() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    const std::size_t colon = line.find(": ");
    if (line.starts_with("model name") && colon != std::string::npos) return line.substr(colon + 2);
  }
  return "CPU";
}

}  // namespace

DeviceInfo CpuBackend::info() const {
  return {.device = {DeviceType::kCpu, 0},
          .name = processor_name(),
          .kernels = std::string(cpu_kernels_name()),
          .note = {}};
}

// Every scheme, format, activation and routing method has a body on the CPU.
Support CpuBackend::supports(const LayerConfig& config, Format) const {
  if (config.weight_storage == WeightStorage::kInPlace)
    return {.supported = false,
            .reason =
                "weight_storage: in_place is for CUDA; the CPU reads weights packed in tiles. Take "
                "copied (load_expert never holds more than one expert twice), or pass your own "
                "weights to the stages"};
  return {.supported = true, .reason = {}};
}

void* CpuBackend::allocate(std::size_t bytes) const {
  const std::size_t rounded =
      (bytes + kWorkspaceAlignment - 1) / kWorkspaceAlignment * kWorkspaceAlignment;
  void* data = rounded < bytes ? nullptr : std::aligned_alloc(kWorkspaceAlignment, rounded);
  if (data == nullptr && bytes > 0)
    throw Error(ErrorCode::kOutOfMemory,
                "cpu: could not allocate " + std::to_string(bytes) + " bytes");
  return data;
}
void CpuBackend::deallocate(void* data) const noexcept { std::free(data); }
void CpuBackend::copy(void* dst, const void* src, std::size_t bytes, Stream) const {
  if (bytes > 0) std::memmove(dst, src, bytes);
}

std::unique_ptr<PackedWeights> CpuBackend::make_packed(const WeightSpec& spec) const {
  return make_packed_cpu(spec);
}

// Slots stay in fp32 until the sum: memory is cheap next to one more rounding.
DType CpuBackend::slot_dtype(const WeightSpec&) const { return DType::kF32; }
std::int64_t CpuBackend::tile_rows(const WeightSpec&, std::int64_t) const { return kCpuTileRows; }
std::size_t CpuBackend::align_scratch_bytes(std::int64_t slots, std::int64_t experts) const {
  return align_scratch_bytes_cpu(slots, experts);
}
std::size_t CpuBackend::quantize_scratch_bytes(std::int64_t rows, std::int64_t experts) const {
  return quantize_scratch_bytes_cpu(rows, experts);
}
std::size_t CpuBackend::gemm_scratch_bytes(const WeightSpec& spec, std::int64_t positions) const {
  return gemm_scratch_bytes_cpu(spec, positions);
}
// One design per ISA level: nothing to choose.
std::vector<Tactic> CpuBackend::tactics(const WeightSpec&) const {
  return {{.id = 0, .description = std::string(cpu_kernels_name())}};
}

void CpuBackend::route(const RouteStage& stage, Stream) const { route_cpu(stage); }
void CpuBackend::align(const AlignStage& stage, Stream) const { align_cpu(stage); }
void CpuBackend::tiles(const TileStage& stage, Stream) const { tiles_cpu(stage); }
void CpuBackend::quantize(const QuantizeStage& stage, Stream) const { quantize_cpu(stage); }
void CpuBackend::gemm(const GemmStage& stage, Stream) const { gemm_cpu(stage); }
void CpuBackend::activate(const ActivateStage& stage, Stream) const { activate_cpu(stage); }
void CpuBackend::combine(const CombineStage& stage, Stream) const { combine_cpu(stage); }

const Backend* cpu_backend() {
  static const CpuBackend instance;
  return &instance;
}

}  // namespace moesaic
