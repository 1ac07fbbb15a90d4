// SPDX-License-Identifier: Apache-2.0
// The one owner of argument checks and of how a complaint reads:
//   "hidden_states: expected bf16[T, 2048], got f32[16, 2048] on cpu; convert it or set input_dtype"
#pragma once

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <string_view>

#include "moesaic/types.h"

namespace moesaic {

[[noreturn]] void invalid(const std::string& message);      // kInvalidArgument
[[noreturn]] void unsupported(const std::string& message);  // kUnsupported

// check(name, tensor).shape({kAny, H}).dtype({...}).rows_contiguous().on(device)
inline constexpr std::int64_t kAny = -1;
class Check {
 public:
  // Throws when it is undefined, or its memory cannot be: no pointer, or between two elements.
  Check(std::string_view argument, const Tensor& tensor);
  const Check& rank(int rank) const;
  const Check& shape(std::initializer_list<std::int64_t> expected) const;  // kAny matches anything
  const Check& dtype(std::initializer_list<DType> allowed) const;
  const Check& inner_contiguous() const;  // unit stride in the last dimension
  const Check& distinct() const;          // no two elements in one place: what is written must be
  const Check& contiguous() const;
  const Check& on(Device device) const;
  const Check& within(Device device) const;  // there, or in the host's memory

 private:
  std::string_view argument_;
  const Tensor& tensor_;
};
inline Check check(std::string_view argument, const Tensor& tensor) { return {argument, tensor}; }

// That a value of an enumeration (of `count`, from 0 on) is one: a caller may have cast any number.
void check_enum(std::string_view argument, std::int64_t value, std::int64_t count);
template <typename E>
void check_enum(std::string_view argument, E value, std::int64_t count) {
  check_enum(argument, static_cast<std::int64_t>(value), count);
}
void check_range(std::string_view argument, std::int64_t value, std::int64_t low, std::int64_t high);
// a * b without overflow, or throws naming `what`.
std::int64_t checked_mul(std::int64_t a, std::int64_t b, std::string_view what);
void check_workspace(const Workspace& workspace, std::size_t needed, std::string_view query);

}  // namespace moesaic
