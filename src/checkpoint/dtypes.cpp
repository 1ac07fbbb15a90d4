// SPDX-License-Identifier: Apache-2.0
#include "checkpoint/dtypes.h"

#include <algorithm>
#include <array>

#include "words.h"

namespace moesaic {
namespace {

constexpr std::array<StoredDType, 20> kStoredDTypes{{{"F32", 32, DType::kF32},
                                                     {"F16", 16, DType::kF16},
                                                     {"BF16", 16, DType::kBF16},
                                                     {"F8_E4M3", 8, DType::kF8E4M3},
                                                     {"F8_E8M0", 8, DType::kE8M0},
                                                     {"I8", 8, DType::kI8},
                                                     {"U8", 8, DType::kU8},
                                                     {"I32", 32, DType::kI32},
                                                     {"I64", 64, DType::kI64},
                                                     {"BOOL", 8, {}},
                                                     {"F8_E5M2", 8, {}},
                                                     {"I16", 16, {}},
                                                     {"U16", 16, {}},
                                                     {"U32", 32, {}},
                                                     {"U64", 64, {}},
                                                     {"F64", 64, {}},
                                                     {"C64", 64, {}},
                                                     {"F4", 4, {}},
                                                     {"F6_E2M3", 6, {}},
                                                     {"F6_E3M2", 6, {}}}};

}  // namespace

const StoredDType* find_stored_dtype(std::string_view name) {
  const auto it = std::find_if(kStoredDTypes.begin(), kStoredDTypes.end(),
                               [&](const StoredDType& d) { return d.name == name; });
  return it == kStoredDTypes.end() ? nullptr : &*it;
}

std::string read_dtypes() {
  std::string names;
  for (const StoredDType& d : kStoredDTypes)
    if (d.view) append_word(names, d.name);
  return names;
}

std::string_view stored_name(DType dtype) {
  const auto it = std::find_if(kStoredDTypes.begin(), kStoredDTypes.end(),
                               [&](const StoredDType& d) { return d.view == dtype; });
  return it->name;
}

}  // namespace moesaic
