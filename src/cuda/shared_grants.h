// SPDX-License-Identifier: Apache-2.0
// Which kernels may use more than 48 KiB of shared memory, and how much, on which device. The
// runtime has to be told once; telling it on every launch cost a tenth of the launch, and another
// thread's smaller wish took away what this one was about to use. Knows nothing of CUDA.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>

namespace moesaic::cuda {

// An open-addressed table that only grows: looking up takes no lock. What was granted ends with the
// device's primary context; resetting that under a loaded layer frees its weights as well, and
// serves nobody.
class SharedGrants {
 public:
  // grant(), which may throw, is called when `kernel` has less than `bytes` on `device`. Sizes
  // never fall: a thread that was granted more may be about to launch.
  template <typename Grant>
  void require(const void* kernel, int device, std::size_t bytes, Grant&& grant) {
    const Slot* known = find(kernel, device);
    if (known != nullptr && known->bytes.load(std::memory_order_acquire) >= bytes) return;
    const std::lock_guard lock(mutex_);
    Slot* slot = claim(kernel, device);
    if (slot != nullptr && slot->bytes.load(std::memory_order_relaxed) >= bytes) return;
    grant();
    if (slot != nullptr) slot->bytes.store(bytes, std::memory_order_release);
  }

 private:
  struct Slot {
    std::atomic<const void*> kernel{nullptr};
    int device = 0;  // written before `kernel` is
    std::atomic<std::size_t> bytes{0};
  };
  // Kernels of one build times devices that need it: hundreds. Were it full, every launch would
  // tell.
  static constexpr std::size_t kSlots = 4096;

  static std::size_t home(const void* kernel, int device) {
    const auto bits = reinterpret_cast<std::uintptr_t>(kernel) >> 4;
    return (bits * 0x9e3779b97f4a7c15u >> 40) + static_cast<std::size_t>(device) * 61;
  }
  // Null: nothing is known of it.
  const Slot* find(const void* kernel, int device) const {
    const std::size_t from = home(kernel, device);
    for (std::size_t i = 0; i < kSlots; ++i) {
      const Slot& slot = slots_[(from + i) % kSlots];
      const void* holder = slot.kernel.load(std::memory_order_acquire);
      if (holder == nullptr) return nullptr;
      if (holder == kernel && slot.device == device) return &slot;
    }
    return nullptr;
  }
  // Its slot, a new one if it has none; null where there is no more. Under the lock.
  Slot* claim(const void* kernel, int device) {
    const std::size_t from = home(kernel, device);
    for (std::size_t i = 0; i < kSlots; ++i) {
      Slot& slot = slots_[(from + i) % kSlots];
      const void* holder = slot.kernel.load(std::memory_order_relaxed);
      if (holder == kernel && slot.device == device) return &slot;
      if (holder != nullptr) continue;
      slot.device = device;
      slot.kernel.store(kernel, std::memory_order_release);
      return &slot;
    }
    return nullptr;
  }

  std::array<Slot, kSlots> slots_{};
  std::mutex mutex_;
};

}  // namespace moesaic::cuda
