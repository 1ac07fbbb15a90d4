// SPDX-License-Identifier: Apache-2.0
#include "cuda/backend_cuda.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <mutex>

#include "check.h"
#include "cuda/device.h"
#include "cuda/gemm.h"
#include "cuda/stages.h"
#include "cuda/weights.h"

namespace moesaic::cuda {

DeviceInfo CudaBackend::info() const {
  return {.device = {DeviceType::kCuda, device_.index},
          .name = name_,
          .kernels = device_.use_sm90 ? "sm90a" : "sm80",
          .note = note_};
}

namespace {
Support support_on(const DeviceTraits& device, const LayerConfig& config) {
  for (const Product product : {Product::kFc1, Product::kFc2}) {
    const WeightSpec spec = weight_spec(config, product);
    if (find_family(spec, device) == nullptr) return {.supported = false, .reason = refusal(spec)};
  }
  return {.supported = true, .reason = {}};
}
}  // namespace

Support CudaBackend::supports(const LayerConfig& config, Format) const {
  return support_on(device_, config);
}

// --- memory --------------------------------------------------------------------------------------
void* CudaBackend::allocate(std::size_t bytes) const {
  const DeviceGuard guard(device_.index);
  void* data = nullptr;
  check_cuda(cudaMalloc(&data, bytes > 0 ? bytes : 1), "cudaMalloc");
  return data;
}

void CudaBackend::deallocate(void* data) const noexcept {
  // Not through DeviceGuard, which may throw; cudaFree finds the device by the address.
  if (data != nullptr) (void)cudaFree(data);
}

void CudaBackend::copy(void* dst, const void* src, std::size_t bytes, Stream stream) const {
  if (bytes == 0) return;
  const DeviceGuard guard(device_.index);
  check_cuda(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDefault, native(stream)),
             "cudaMemcpyAsync");
  // Without a stream of its caller's it is done when this returns: what load and set_router copy is
  // read by a forward on any stream, also on one that does not wait for the default stream.
  if (stream.handle == nullptr) check_cuda(cudaStreamSynchronize(nullptr), "copy");
}

namespace {
Arrangement arrangement_for(const WeightSpec& spec, const DeviceTraits& device) {
  const GemmFamily& family = family_for(spec, device);  // refuses by name what no kernel will read
  return family.rearranges_u4 && spec.format == WeightFormat::kU4 ? Arrangement::kRearranged
                                                                  : Arrangement::kPlain;
}
}  // namespace

std::unique_ptr<PackedWeights> CudaBackend::make_packed(const WeightSpec& spec) const {
  return make_cuda_weights(spec, device_, arrangement_for(spec, device_));
}
std::unique_ptr<PackedWeights> CudaBackend::keep_in_place(const WeightSpec& spec,
                                                          const GemmWeights& all) const {
  return keep_cuda_weights(spec, device_, arrangement_for(spec, device_), all);
}

// --- what the plan is made from ------------------------------------------------------------------
DType CudaBackend::slot_dtype(const WeightSpec& fc2) const { return fc2.dtype16; }

std::int64_t CudaBackend::tile_rows(const WeightSpec& fc1, std::int64_t slots) const {
  return family_for(fc1, device_).tile_rows(fc1, slots, device_);
}
RowOf CudaBackend::input_rows(const WeightSpec& fc1, std::int64_t slots) const {
  // A family with boxes gathers other rows by cp.async, which holds the product up a little; a copy
  // of the rows in order, for boxes, pays where a tile's rows are many and each meets enough
  // weights: of 4096 and more in e4m3 (deepseek-v3-ep8 T = 8192: 7.3 ms instead of 8.0; at 1536 and
  // fewer the copy costs what it brings, at 512 a tenth more), of 28672 in 16 bit (4 to 5% won; at
  // 4096 and 5760 2 to 13% lost). Without scales along K three warps gather, and of 256 rows per
  // expert 4096 are too few (3% lost; 5760: 1% won, 28672: 9%).
  const GemmFamily& family = family_for(fc1, device_);
  if (!family.boxes) return RowOf::kToken;
  const std::int64_t rows = family.tile_rows(fc1, slots, device_);
  const bool e4m3 = fc1.act == ActFormat::kE4M3;
  const bool few = fc1.act_scale != ActScale::kGroup && slots < 512 * fc1.experts;
  const std::int64_t least = !e4m3 ? 8192 : few ? 5120 : 2048;  // weight rows
  const bool pays = rows > (e4m3 ? 128 : 64) && fc1.n >= least;
  return pays ? RowOf::kPosition : RowOf::kToken;
}
bool CudaBackend::scatters_rows(ActScale granularity, std::int64_t slots) const {
  // Few rows are quantized sooner position by position (docs/log_cuda_stages.md). Scales per tensor
  // are an expert's in the batched format, so a token's rows are not all alike.
  const bool of_row = granularity == ActScale::kToken || granularity == ActScale::kGroup;
  return granularity == ActScale::kDefault || (of_row && slots > 128);
}
QuantizedBy CudaBackend::intermediate_quantized_by(const WeightSpec& fc1, const WeightSpec& fc2,
                                                   const ActivationSpec& activation) const {
  const auto by = family_for(fc1, device_).intermediate_quantized_by;
  return by != nullptr ? by(fc1, fc2, activation) : QuantizedBy::kStage;
}
bool CudaBackend::gemm1_quantizes(const GemmStage& stage) const {
  return family_for(stage.b->spec, device_).gemm1_quantizes(stage, device_);
}
bool CudaBackend::makes_tiles(const WeightSpec& spec, const RowMap& rows,
                              const UnlistedRows& unlisted, bool all_quantized) const {
  const GemmFamily& family = family_for(spec, device_);
  if (family.makes_tiles == nullptr || !unlisted.any()) return false;
  // Quantizing many rows of no slot costs more than a list (docs/log_cuda_stages.md).
  constexpr std::int64_t kFewPositions = 512;
  if (all_quantized && rows.positions > kFewPositions) return false;
  constexpr std::int64_t kLanes = 32;
  const std::int64_t lanes = unlisted.ids != nullptr ? rows.slot_count : rows.max_tiles;
  // More blocks than lanes only as large as tiles are wanted: of smaller ones an expert has
  // several.
  const bool blocks = unlisted.ids == nullptr && rows.max_tiles <= family.most_blocks &&
                      rows.max_tiles == ceil_div(rows.positions, rows.tile_rows);
  return rows.slot_count > 0 && (lanes <= kLanes || blocks) &&
         rows.tile_rows <= kUnlistedTileRows && family.makes_tiles(spec, rows, device_);
}
std::size_t CudaBackend::align_scratch_bytes(std::int64_t slots, std::int64_t experts) const {
  return align_scratch(slots, experts);
}
std::size_t CudaBackend::quantize_scratch_bytes(std::int64_t rows, std::int64_t experts) const {
  return quantize_scratch(rows, experts);
}
std::size_t CudaBackend::gemm_scratch_bytes(const WeightSpec&, std::int64_t) const { return 0; }

std::vector<Tactic> CudaBackend::tactics(const WeightSpec& spec) const {
  return family_for(spec, device_).tactics(spec, device_);
}

// --- the stages ----------------------------------------------------------------------------------
void CudaBackend::route(const RouteStage& stage, Stream stream) const {
  const DeviceGuard guard(device_.index);
  run_route(stage, device_, native(stream));
}
void CudaBackend::align(const AlignStage& stage, Stream stream) const {
  const DeviceGuard guard(device_.index);
  run_align(stage, device_, native(stream));
}
void CudaBackend::tiles(const TileStage& stage, Stream stream) const {
  const DeviceGuard guard(device_.index);
  run_tiles(stage, device_, native(stream));
}
void CudaBackend::quantize(const QuantizeStage& stage, Stream stream) const {
  const DeviceGuard guard(device_.index);
  run_quantize(stage, device_, native(stream));
}
void CudaBackend::quantize_and_align(const QuantizeStage& quantizer, const AlignStage& align,
                                     Stream stream) const {
  const DeviceGuard guard(device_.index);
  if (!run_quantize(quantizer, device_, native(stream), &align))
    run_align(align, device_, native(stream));
}
void CudaBackend::gemm(const GemmStage& stage, Stream stream) const {
  const DeviceGuard guard(device_.index);
  check_views(stage);
  family_for(stage.b->spec, device_).run(stage, device_, native(stream));
}
void CudaBackend::check_rows(const WeightSpec& spec, const Tensor& a) const {
  check_ascending("a", a);
  family_for(spec, device_).check_rows(a);
}
void CudaBackend::activate(const ActivateStage& stage, Stream stream) const {
  const DeviceGuard guard(device_.index);
  run_activate(stage, device_, native(stream));
}
void CudaBackend::combine(const CombineStage& stage, Stream stream) const {
  const DeviceGuard guard(device_.index);
  run_combine(stage, device_, native(stream));
}

// --- which backends there are --------------------------------------------------------------------
namespace {

int attribute(cudaDeviceAttr which, int index) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, which, index), "cudaDeviceGetAttribute");
  return value;
}

DeviceTraits read_traits(int index) {
  return {.index = index,
          .sm_count = attribute(cudaDevAttrMultiProcessorCount, index),
          .compute_capability = attribute(cudaDevAttrComputeCapabilityMajor, index) * 10 +
                                attribute(cudaDevAttrComputeCapabilityMinor, index),
          .shared_per_block =
              static_cast<std::size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index)),
          .l2_bytes = static_cast<std::size_t>(attribute(cudaDevAttrL2CacheSize, index))};
}

// The library holds SASS for sm_80 (which every 8.x part runs) and 9.0, and PTX for what is newer.
bool has_sass(int compute_capability) {
  return (compute_capability >= 80 && compute_capability < 90) || compute_capability == 90;
}

struct DeviceBackends {
  std::unique_ptr<CudaBackend> sm80, sm90;  // sm90 only where wgmma is
};

DeviceBackends make_backends(int index) {
  DeviceTraits device = read_traits(index);
  DeviceBackends made;
  if (device.compute_capability < 80) return made;
  cudaDeviceProp properties{};
  check_cuda(cudaGetDeviceProperties(&properties, index), "cudaGetDeviceProperties");
  const std::string note = has_sass(device.compute_capability)
                               ? std::string()
                               : "no machine code for this part in the library: the driver "
                                 "compiles its PTX once and caches it";
  made.sm80 = std::make_unique<CudaBackend>(device, properties.name, note);
  if (device.compute_capability == 90) {
    device.use_sm90 = true;
    made.sm90 = std::make_unique<CudaBackend>(device, properties.name, note);
  }
  return made;
}

// What the runtime says of the machine: no driver, one that is too old, no device.
cudaError_t count_devices(int& count) {
  count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) (void)cudaGetLastError();
  return status;
}

// Made once for all devices, when the first of them is asked for; contexts are not created here.
const std::vector<DeviceBackends>& all_backends() {
  static const std::vector<DeviceBackends> all = [] {
    std::vector<DeviceBackends> made;
    int count;
    if (count_devices(count) != cudaSuccess) return made;  // not an error here
    for (int index = 0; index < count; ++index) made.push_back(make_backends(index));
    return made;
  }();
  return all;
}

enum class Level : int { kBest, kSm80, kSm90 };

Level parse_level(std::string_view text, std::string_view argument) {
  if (text.empty()) return Level::kBest;
  if (text == "sm80") return Level::kSm80;
  if (text == "sm90a") return Level::kSm90;
  invalid(std::string(argument) + ": unknown CUDA kernels '" + std::string(text) +
          "'; known: sm80, sm90a");
}

std::atomic<Level>& level() {
  static std::atomic<Level> current = [] {
    const char* text = std::getenv("MOESAIC_CUDA_ARCH");
    return parse_level(text != nullptr ? text : "", "MOESAIC_CUDA_ARCH");
  }();
  return current;
}

}  // namespace
}  // namespace moesaic::cuda

namespace moesaic {

std::string cuda_absence() {
  int count;
  const cudaError_t status = cuda::count_devices(count);
  if (status != cudaSuccess) return cudaGetErrorString(status);
  return std::to_string(count) + " CUDA devices, which must be SM80 or newer";
}

const Backend* cuda_backend(int index) {
  const auto& all = cuda::all_backends();
  if (index < 0 || index >= static_cast<int>(all.size())) return nullptr;
  const cuda::DeviceBackends& device = all[static_cast<std::size_t>(index)];
  const cuda::Level level = cuda::level();
  if (level != cuda::Level::kSm80 && device.sm90) return device.sm90.get();
  if (level == cuda::Level::kSm90 && device.sm80)
    unsupported("kernels: sm90a kernels run on compute capability 9.0 only, and " +
                to_string(Device{DeviceType::kCuda, index}) + " is another part; use sm80");
  return device.sm80.get();
}

Support cuda_support(const LayerConfig& config) {
  return cuda::support_on({.compute_capability = 90, .use_sm90 = true}, config);
}

void set_cuda_kernels(std::string_view level) {
  const std::vector<std::string> here = available_cuda_kernels();
  if (!level.empty() && std::find(here.begin(), here.end(), level) == here.end())
    unsupported(fmt::format("set_kernels: no device of this machine runs {} kernels; it has: {}",
                            level, here.empty() ? "none" : fmt::to_string(fmt::join(here, ", "))));
  cuda::level() = cuda::parse_level(level, "set_kernels");
}

std::vector<std::string> available_cuda_kernels() {
  std::vector<std::string> levels;
  for (const cuda::DeviceBackends& device : cuda::all_backends()) {
    if (device.sm80 && levels.empty()) levels.push_back("sm80");
    if (device.sm90 && levels.size() < 2) levels.push_back("sm90a");
  }
  return levels;
}

}  // namespace moesaic
