// SPDX-License-Identifier: Apache-2.0
// The dtype names of safetensors.
#pragma once

#include <cstddef>
#include <optional>
#include <string>
#include <string_view>

#include "moesaic/types.h"

namespace moesaic {

struct StoredDType {
  std::string_view name;      // as the file spells it
  int bits = 0;               // per element
  std::optional<DType> view;  // what a Tensor calls it
};
// Null: no such dtype.
const StoredDType* find_stored_dtype(std::string_view name);
std::string_view stored_name(DType dtype);
// Those that have a view, for messages.
std::string read_dtypes();

}  // namespace moesaic
