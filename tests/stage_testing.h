// SPDX-License-Identifier: Apache-2.0
// What the tests of the CPU's stages share: fresh seeds, every ISA level, several thread counts.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "harness/data.h"
#include "moesaic/moesaic.h"

namespace moesaic::testing {

// A new seed each run, or MOESAIC_TEST_SEED to repeat one. Failures print it (see FRESH_RNG).
inline std::uint64_t fresh_seed() {
  if (const char* given = std::getenv("MOESAIC_TEST_SEED"))
    return std::strtoull(given, nullptr, 10);
  return std::random_device{}();
}
#define FRESH_RNG(rng)                                               \
  const std::uint64_t rng##_seed = ::moesaic::testing::fresh_seed(); \
  SCOPED_TRACE("MOESAIC_TEST_SEED=" + std::to_string(rng##_seed));   \
  ::moesaic::harness::Rng rng(rng##_seed)

// Calls body() once per ISA level that this machine has, then restores the best one.
template <typename Body>
void for_each_level(const Body& body) {
  for (const std::string& level : available_kernels(DeviceType::kCpu)) {
    SCOPED_TRACE("kernels " + level);
    set_kernels(DeviceType::kCpu, level);
    body();
  }
  set_kernels(DeviceType::kCpu, "");
}

template <typename Body>
void for_each_thread_count(const Body& body) {
  const int before = num_threads();
  for (const int threads : {1, 2, 3, 7}) {
    SCOPED_TRACE("threads " + std::to_string(threads));
    set_num_threads(threads);
    body();
  }
  set_num_threads(before);
}

// A dense tensor of normal numbers.
inline harness::HostTensor random_tensor(harness::Rng& rng, DType dtype,
                                         std::vector<std::int64_t> shape, double scale = 1) {
  harness::HostTensor t(dtype, std::move(shape));
  for (std::int64_t i = 0; i < t.numel(); ++i)
    harness::store_element(t.bytes().data(), dtype, i, rng.normal() * scale);
  return t;
}

// Bytes that no kernel writes by accident: NaN as a float, -1 or less as an id.
template <typename T>
std::vector<T> poisoned(std::int64_t n) {
  std::vector<T> v(static_cast<std::size_t>(n));
  std::fill_n(reinterpret_cast<unsigned char*>(v.data()), v.size() * sizeof(T),
              static_cast<unsigned char>(0xfb));
  return v;
}

}  // namespace moesaic::testing
