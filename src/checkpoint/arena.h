// SPDX-License-Identifier: Apache-2.0
// Memory that lives as long as the views into it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <new>
#include <vector>

#include "moesaic/types.h"

namespace moesaic {

class Arena {
 public:
  // Uninitialized, aligned for every element type and for the widest loads.
  std::byte* allocate(std::size_t bytes) {
    blocks_.emplace_back(static_cast<std::byte*>(::operator new(bytes, kAlignment)));
    return blocks_.back().get();
  }
  // An uninitialized dense tensor.
  Tensor tensor(DType dtype, std::initializer_list<std::int64_t> shape) {
    Tensor t = Tensor::contiguous(nullptr, dtype, shape);
    t.data = allocate(static_cast<std::size_t>(t.numel()) * size_of(dtype));
    return t;
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(std::byte* p) const { ::operator delete(p, kAlignment); }
  };
  std::vector<std::unique_ptr<std::byte, Free>> blocks_;
};

}  // namespace moesaic
