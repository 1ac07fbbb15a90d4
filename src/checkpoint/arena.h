// SPDX-License-Identifier: Apache-2.0
// Memory that lives as long as the views into it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <vector>

#include "moesaic/types.h"

namespace moesaic {

class Arena {
 public:
  // Uninitialized, aligned for every element type and for the widest loads.
  std::byte* allocate(std::size_t bytes) {
    blocks_.push_back(std::make_unique_for_overwrite<std::byte[]>(bytes + kAlignment - 1));
    void* at = blocks_.back().get();
    std::size_t room = bytes + kAlignment - 1;
    return static_cast<std::byte*>(std::align(kAlignment, bytes, at, room));
  }
  // An uninitialized dense tensor.
  Tensor tensor(DType dtype, std::initializer_list<std::int64_t> shape) {
    Tensor t = Tensor::contiguous(nullptr, dtype, shape);
    t.data = allocate(static_cast<std::size_t>(t.numel()) * size_of(dtype));
    return t;
  }

 private:
  // Aligned here and not by aligned operator new: glibc's memalign does not take back the blocks it
  // gave, so that a megabyte per expert, freed each time, grew the heap by eight.
  static constexpr std::size_t kAlignment = 64;
  std::vector<std::unique_ptr<std::byte[]>> blocks_;
};

}  // namespace moesaic
