// SPDX-License-Identifier: Apache-2.0
// The experts of a layer in one tensor each.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "checkpoint/arena.h"
#include "checkpoint/writer.h"
#include "moesaic/checkpoint.h"

namespace moesaic {

// Views on [leading, ...] filled one expert at a time.
class Stack {
 public:
  Stack(std::int64_t count, Arena& arena) : count_(count), arena_(arena) {}
  void put(std::int64_t i, const LayerWeights& one) {
    for (const auto product : {&LayerWeights::fc1, &LayerWeights::fc2})
      for (const auto member :
           {&GemmWeights::weight, &GemmWeights::scale, &GemmWeights::zero_point, &GemmWeights::bias,
            &GemmWeights::input_scale, &GemmWeights::prequant, &GemmWeights::alpha})
        put(i, one.*product.*member, all_.*product.*member);
  }
  const LayerWeights& all() const { return all_; }

 private:
  void put(std::int64_t i, const Tensor& one, Tensor& all) {
    if (!one.defined()) return;
    if (!all.defined()) {
      std::array<std::int64_t, Tensor::kMaxRank> shape = one.shape;
      shape[0] = count_;
      all = Tensor::contiguous(nullptr, one.dtype,
                               std::span(shape).first(static_cast<std::size_t>(one.rank)));
      all.data = arena_.allocate(static_cast<std::size_t>(all.numel()) * size_of(all.dtype));
    }
    const auto bytes = static_cast<std::size_t>(one.numel()) * size_of(one.dtype);
    copy_dense(one, all.as<std::byte>() + static_cast<std::size_t>(i) * bytes);
  }

  std::int64_t count_;
  Arena& arena_;
  LayerWeights all_{};
};

}  // namespace moesaic
