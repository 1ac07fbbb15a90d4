// SPDX-License-Identifier: Apache-2.0
// The backend of one CUDA device with one choice of kernels. A device has up to two of them (SM90a
// and SM80 kernels); cuda_backend() hands out the one that the override in force asks for, and a
// layer keeps the one it was made with.
#pragma once

#include <string>

#include "backend.h"
#include "cuda/launch.h"

namespace moesaic::cuda {

class CudaBackend final : public Backend {
 public:
  CudaBackend(const DeviceTraits& device, std::string name, std::string note)
      : device_(device), name_(std::move(name)), note_(std::move(note)) {}

  DeviceInfo info() const override;
  Support supports(const LayerConfig& config, Format format) const override;

  void* allocate(std::size_t bytes) const override;
  void deallocate(void* data) const noexcept override;
  void copy(void* dst, const void* src, std::size_t bytes, Stream stream) const override;

  std::unique_ptr<PackedWeights> make_packed(const WeightSpec& spec) const override;
  std::unique_ptr<PackedWeights> keep_in_place(const WeightSpec& spec,
                                               const GemmWeights& all) const override;

  DType slot_dtype(const WeightSpec& fc2) const override;
  std::int64_t tile_rows(const WeightSpec& fc1, std::int64_t slots) const override;
  RowOf input_rows(const WeightSpec& fc1, std::int64_t slots) const override;
  bool scatters_rows(ActScale granularity, std::int64_t slots) const override;
  QuantizedBy intermediate_quantized_by(const WeightSpec& fc1, const WeightSpec& fc2,
                                        const ActivationSpec& activation) const override;
  bool gemm1_quantizes(const GemmStage& stage) const override;
  bool makes_tiles(const WeightSpec& spec, const RowMap& rows, const UnlistedRows& unlisted,
                   bool all_quantized) const override;
  std::size_t align_scratch_bytes(std::int64_t slots, std::int64_t experts) const override;
  std::size_t quantize_scratch_bytes(std::int64_t rows, std::int64_t experts) const override;
  std::size_t gemm_scratch_bytes(const WeightSpec& spec, std::int64_t positions) const override;
  std::vector<Tactic> tactics(const WeightSpec& spec) const override;

  void route(const RouteStage& stage, Stream stream) const override;
  void align(const AlignStage& stage, Stream stream) const override;
  void tiles(const TileStage& stage, Stream stream) const override;
  void quantize(const QuantizeStage& stage, Stream stream) const override;
  void quantize_and_align(const QuantizeStage& quantizer, const AlignStage& align,
                          Stream stream) const override;
  void gemm(const GemmStage& stage, Stream stream) const override;
  void check_rows(const WeightSpec& spec, const Tensor& a) const override;
  void activate(const ActivateStage& stage, Stream stream) const override;
  void combine(const CombineStage& stage, Stream stream) const override;

 private:
  DeviceTraits device_;
  std::string name_, note_;
};

}  // namespace moesaic::cuda
