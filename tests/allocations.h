// SPDX-License-Identifier: Apache-2.0
// Every C++ allocation of the process, the library's own included, passes here: counted, or
// failing. For one file of a test, which defines the operators by including this.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace moesaic::testing {

inline std::atomic<bool> watching{false};
inline std::atomic<int> allocations{0};               // while watching
inline thread_local std::int64_t until_failure = -1;  // that many succeed on this thread; < 0: all

inline void* counted(std::size_t bytes, std::size_t alignment) {
  if (watching.load(std::memory_order_relaxed)) ++allocations;
  if (until_failure >= 0 && until_failure-- == 0) throw std::bad_alloc();
  const std::size_t whole = (bytes + alignment - 1) / alignment * alignment;
  if (void* p = std::aligned_alloc(alignment, whole == 0 ? alignment : whole)) return p;
  throw std::bad_alloc();
}

}  // namespace moesaic::testing

void* operator new(std::size_t bytes) {
  return moesaic::testing::counted(bytes, alignof(std::max_align_t));
}
void* operator new(std::size_t bytes, std::align_val_t alignment) {
  return moesaic::testing::counted(bytes, static_cast<std::size_t>(alignment));
}
void operator delete(void* p) noexcept { std::free(p); }
void operator delete(void* p, std::size_t) noexcept { std::free(p); }
void operator delete(void* p, std::align_val_t) noexcept { std::free(p); }
void operator delete(void* p, std::size_t, std::align_val_t) noexcept { std::free(p); }
