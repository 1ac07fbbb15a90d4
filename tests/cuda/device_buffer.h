// SPDX-License-Identifier: Apache-2.0
// Device memory of an exact size, what this device is, and numbers as a dtype stores them: what
// tests of one kernel start from.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <vector>

#include "cuda/gemm.h"
#include "numeric.h"

namespace moesaic::test {

inline void cuda_ok(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(cudaGetErrorString(status));
}

// Exactly sized device memory: compute-sanitizer sees every byte beyond.
class DeviceBuffer {
 public:
  explicit DeviceBuffer(std::size_t bytes) : bytes_(bytes) {
    if (bytes) cuda_ok(cudaMalloc(&data_, bytes));
  }
  DeviceBuffer(const void* host, std::size_t bytes) : DeviceBuffer(bytes) {
    if (bytes) cuda_ok(cudaMemcpy(data_, host, bytes, cudaMemcpyHostToDevice));
  }
  DeviceBuffer(const DeviceBuffer&) = delete;
  ~DeviceBuffer() { cudaFree(data_); }
  void* data() const { return data_; }
  std::vector<std::uint8_t> read() const {
    std::vector<std::uint8_t> host(bytes_);
    if (bytes_) cuda_ok(cudaMemcpy(host.data(), data_, bytes_, cudaMemcpyDeviceToHost));
    return host;
  }

 private:
  void* data_ = nullptr;
  std::size_t bytes_ = 0;
};
using Buffer = std::unique_ptr<DeviceBuffer>;
template <typename T>
Buffer upload(const std::vector<T>& v) {
  return std::make_unique<DeviceBuffer>(v.data(), v.size() * sizeof(T));
}

inline cuda::DeviceTraits device_traits() {
  cuda::DeviceTraits traits;
  int major = 0, minor = 0, shared = 0, l2 = 0;
  cudaDeviceGetAttribute(&traits.sm_count, cudaDevAttrMultiProcessorCount, 0);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0);
  cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0);
  cudaDeviceGetAttribute(&l2, cudaDevAttrL2CacheSize, 0);
  traits.compute_capability = major * 10 + minor;
  traits.shared_per_block = static_cast<std::size_t>(shared);
  traits.l2_bytes = static_cast<std::size_t>(l2);
  return traits;
}
inline bool have_device() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
}

// A float as `dtype` stores it, and back.
inline double put(std::vector<std::uint8_t>& bytes, std::size_t i, DType dtype, float x) {
  switch (dtype) {
    case DType::kF32:
      std::memcpy(&bytes[i * 4], &x, 4);
      return x;
    case DType::kF16: {
      const std::uint16_t h = float_to_f16(x);
      std::memcpy(&bytes[i * 2], &h, 2);
      return f16_to_float(h);
    }
    case DType::kBF16: {
      const std::uint16_t h = float_to_bf16(x);
      std::memcpy(&bytes[i * 2], &h, 2);
      return bf16_to_float(h);
    }
    case DType::kF8E4M3:
      bytes[i] = float_to_e4m3(x);
      return e4m3_to_float(bytes[i]);
    default: {
      const auto q =
          static_cast<std::int8_t>(std::lrint(std::fmin(std::fmax(x * 40.0f, -128.0f), 127.0f)));
      bytes[i] = static_cast<std::uint8_t>(q);
      return q;
    }
  }
}
inline double get(const std::vector<std::uint8_t>& bytes, std::size_t i, DType dtype) {
  if (dtype == DType::kF32) {
    float f;
    std::memcpy(&f, &bytes[i * 4], 4);
    return f;
  }
  std::uint16_t h;
  std::memcpy(&h, &bytes[i * 2], 2);
  return dtype == DType::kF16 ? f16_to_float(h) : bf16_to_float(h);
}

}  // namespace moesaic::test
