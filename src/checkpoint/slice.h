// SPDX-License-Identifier: Apache-2.0
// One expert's part of one stored tensor.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "checkpoint/stored.h"

namespace moesaic {

enum class Role : std::uint8_t { kWeight, kScale, kZero, kInputScale, kOrder, kShape, kBias };
inline constexpr Role kAllRoles[] = {Role::kWeight, Role::kScale, Role::kZero, Role::kInputScale,
                                     Role::kOrder,  Role::kShape, Role::kBias};

struct Slice {
  const StoredTensor* stored = nullptr;
  std::string_view suffix;
  DType dtype{};
  std::vector<std::int64_t> shape;  // without the experts' dimension
  const std::byte* data = nullptr;
  std::size_t bytes = 0;
  std::int64_t numel() const;
};

// Nothing: no such tensor. Throws when a fused tensor's leading extent is not the number of experts
// or its dtype has no view.
std::optional<Slice> find_slice(const TensorFile& files, const ExpertNames& names,
                                std::string_view projection, Role role, std::int64_t expert);
Slice require_slice(const TensorFile& files, const ExpertNames& names, std::string_view projection,
                    Role role, std::int64_t expert);

// A whole tensor of floats: a view, or a copy in `arena` where the bytes do not lie on a multiple of
// their size (the safetensors library always aligns; others may not) and, in f32, of F64 and of
// F8_E4M3 with the scale beside it.
Tensor read_floats(const TensorFile& files, const std::string& name, Arena& arena);

std::vector<std::int64_t> load_integers(const Slice& slice);  // I32 or I64; small tensors
// Whether column k belongs to group k / group_size (0: all to group 0): no act-order.
bool in_order(const Slice& order, std::int64_t group_size);

}  // namespace moesaic
