// SPDX-License-Identifier: Apache-2.0
// The same buffer twice, in host memory for the CPU backend and in a device's for the CUDA backend,
// with the same contents and guard bands: a stage runs on both and the twins are compared.
#pragma once

#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "backend.h"
#include "harness/data.h"
#include "numeric.h"

namespace moesaic {

inline const Backend* device_backend() { return cuda_backend(0); }
#define MOESAIC_NEEDS_CUDA()       \
  if (device_backend() == nullptr) \
  GTEST_SKIP() << "no CUDA device of compute capability 8.0 or above"

inline constexpr Device kGpu{DeviceType::kCuda, 0};

template <typename T>
class Twin {
 public:
  static constexpr std::size_t kGuard = 64;  // elements on either side
  // Poison unless `contents` says otherwise.
  explicit Twin(std::size_t count) : host_(count + 2 * kGuard) {
    std::memset(host_.data(), 0xdb, host_.size() * sizeof(T));
    data_ = static_cast<T*>(device_backend()->allocate(host_.size() * sizeof(T)));
    upload();
  }
  explicit Twin(const std::vector<T>& contents) : Twin(contents.size()) {
    std::copy(contents.begin(), contents.end(), cpu());
    upload();
  }
  ~Twin() { device_backend()->deallocate(data_); }
  Twin(const Twin&) = delete;
  Twin& operator=(const Twin&) = delete;

  std::size_t size() const { return host_.size() - 2 * kGuard; }
  T* cpu() { return host_.data() + kGuard; }
  T* gpu() { return data_ + kGuard; }
  T* on(Device device) { return device.type == DeviceType::kCpu ? cpu() : gpu(); }
  void upload() { device_backend()->copy(data_, host_.data(), host_.size() * sizeof(T), {}); }
  // The device's contents; also checks its guards.
  std::vector<T> download() {
    std::vector<T> all(host_.size());
    device_backend()->copy(all.data(), data_, all.size() * sizeof(T), {});
    unsigned char poison[sizeof(T)];
    std::memset(poison, 0xdb, sizeof(T));
    for (std::size_t i = 0; i < kGuard; ++i) {
      EXPECT_EQ(std::memcmp(&all[i], poison, sizeof(T)), 0) << "guard before, element " << i;
      EXPECT_EQ(std::memcmp(&all[all.size() - 1 - i], poison, sizeof(T)), 0)
          << "guard behind, element " << i;
    }
    return {all.begin() + kGuard, all.end() - kGuard};
  }
  // How many elements differ, and where the first does.
  std::string differences() {
    const std::vector<T> device = download();
    std::size_t count = 0, first = 0;
    for (std::size_t i = size(); i-- > 0;) {
      if (std::memcmp(&device[i], cpu() + i, sizeof(T)) == 0) continue;
      ++count;
      first = i;
    }
    if (count == 0) return {};
    return std::to_string(count) + " of " + std::to_string(size()) + " differ, the first at " +
           std::to_string(first) + ": cpu " + std::to_string(+cpu()[first]) + ", cuda " +
           std::to_string(+device[first]);
  }

 private:
  std::vector<T> host_;
  T* data_ = nullptr;
};

// Random numbers of a float dtype as its storage bytes.
inline std::vector<std::uint8_t> random_storage(DType dtype, std::size_t count, std::uint64_t seed,
                                                float scale = 1.0f) {
  harness::Rng rng(seed);
  std::vector<std::uint8_t> bytes(count * size_of(dtype));
  for (std::size_t i = 0; i < count; ++i)
    harness::store_element(bytes.data(), dtype, static_cast<std::int64_t>(i), rng.normal() * scale);
  return bytes;
}

inline Tensor on(Device device, Twin<std::uint8_t>& twin, DType dtype,
                 std::initializer_list<std::int64_t> shape) {
  return Tensor::contiguous(twin.on(device), dtype, shape, device);
}

inline const Backend& of(Device device) {
  return device.type == DeviceType::kCpu ? *cpu_backend() : *device_backend();
}
inline constexpr Device kBoth[] = {Device{}, kGpu};

// Scratch on either side.
class Scratch {
 public:
  Scratch(Device device, std::size_t bytes)
      : backend_(of(device)), data_(backend_.allocate(bytes + 256)) {}
  ~Scratch() { backend_.deallocate(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* get() const { return data_; }

 private:
  const Backend& backend_;
  void* data_;
};

}  // namespace moesaic
