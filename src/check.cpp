// SPDX-License-Identifier: Apache-2.0
#include "check.h"

#include <fmt/format.h>

#include <array>

namespace moesaic {
namespace {

std::string shape_text(std::initializer_list<std::int64_t> shape) {
  std::string text = "[";
  for (const std::int64_t extent : shape) {
    if (text.size() > 1) text += ", ";
    text += extent == kAny ? "*" : std::to_string(extent);
  }
  return text + "]";
}

}  // namespace

void invalid(const std::string& message) { throw Error(ErrorCode::kInvalidArgument, message); }
void unsupported(const std::string& message) { throw Error(ErrorCode::kUnsupported, message); }

Check::Check(std::string_view argument, const Tensor& tensor)
    : argument_(argument), tensor_(tensor) {
  if (!tensor.defined())
    invalid(fmt::format("{}: is required and was not given; pass it", argument));
  if (tensor.rank > Tensor::kMaxRank)
    invalid(fmt::format("{}: expected rank 1 to {}, got {}; reshape it", argument, Tensor::kMaxRank,
                        tensor.rank));
  for (int i = 0; i < tensor.rank; ++i) {
    if (tensor.shape[i] < 0)
      invalid(fmt::format("{}: expected extents of 0 or more, got {} in dimension {}; fix the view",
                          argument, tensor.shape[i], i));
  }
  if (tensor.data == nullptr && tensor.numel() > 0)
    invalid(fmt::format("{}: {} has no data pointer; pass memory for {} elements", argument,
                        to_string(tensor), tensor.numel()));
  const std::size_t element = size_of(tensor.dtype);
  if (element == 0)
    invalid(fmt::format("{}: expected one of the dtypes there are, got number {}; see types.h",
                        argument, static_cast<int>(tensor.dtype)));
  if (reinterpret_cast<std::uintptr_t>(tensor.data) % element != 0)
    invalid(
        fmt::format("{}: {} must be aligned to its elements of {} bytes; copy it to such memory",
                    argument, to_string(tensor), element));
}

const Check& Check::rank(int rank) const {
  if (tensor_.rank != rank)
    invalid(fmt::format("{}: expected rank {}, got {}; reshape it", argument_, rank,
                        to_string(tensor_)));
  return *this;
}

const Check& Check::shape(std::initializer_list<std::int64_t> expected) const {
  bool matches = tensor_.rank == static_cast<int>(expected.size());
  int i = 0;
  for (const std::int64_t extent : expected) {
    matches = matches && (extent == kAny || tensor_.shape[i] == extent);
    ++i;
  }
  if (!matches)
    invalid(fmt::format("{}: expected shape {}, got {}; pass a view of that shape", argument_,
                        shape_text(expected), to_string(tensor_)));
  return *this;
}

const Check& Check::dtype(std::initializer_list<DType> allowed) const {
  std::string names;
  for (const DType d : allowed) {
    if (tensor_.dtype == d) return *this;
    names += (names.empty() ? "" : " or ") + std::string(name(d));
  }
  invalid(fmt::format("{}: expected dtype {}, got {}; convert it", argument_, names,
                      to_string(tensor_)));
}

const Check& Check::inner_contiguous() const {
  const int last = tensor_.rank - 1;
  if (tensor_.numel() > 0 && tensor_.shape[last] > 1 && tensor_.strides[last] != 1)
    invalid(fmt::format(
        "{}: the last dimension must have stride 1, got stride {}; pass a contiguous copy",
        argument_, tensor_.strides[last]));
  return *this;
}

const Check& Check::contiguous() const {
  if (!tensor_.is_contiguous())
    invalid(fmt::format("{}: must be contiguous, got {} with other strides; pass a contiguous copy",
                        argument_, to_string(tensor_)));
  return *this;
}

const Check& Check::on(Device device) const {
  if (!(tensor_.device == device))
    invalid(fmt::format("{}: expected on {}, got {}; copy it there first", argument_,
                        to_string(device), to_string(tensor_)));
  return *this;
}

const Check& Check::within(Device device) const {
  if (tensor_.device.type != DeviceType::kCpu && !(tensor_.device == device))
    invalid(fmt::format("{}: expected on {}, got {}; copy it there first", argument_,
                        device.type == DeviceType::kCpu ? "cpu" : "cpu or " + to_string(device),
                        to_string(tensor_)));
  return *this;
}

const Check& Check::distinct() const {
  if (tensor_.numel() <= 1) return *this;
  // From the smallest stride up: each dimension has to step over all that the ones before it span.
  // (Interleaved views that would pass otherwise are nobody's output.)
  const auto step = [&](int i) {
    const __int128 stride = tensor_.strides[i];
    return stride < 0 ? -stride : stride;
  };
  // No std::sort over it: GCC 12 warns of its unrolled tail.
  std::array<int, Tensor::kMaxRank> order{};
  std::size_t count = 0;
  for (int i = 0; i < tensor_.rank; ++i) {
    if (tensor_.shape[i] <= 1) continue;
    std::size_t at = count++;
    for (; at > 0 && step(order[at - 1]) > step(i); --at) order[at] = order[at - 1];
    order[at] = i;
  }
  __int128 span = 1;
  for (std::size_t i = 0; i < count; ++i) {
    const int d = order[i];
    if (step(d) < span)
      invalid(fmt::format(
          "{}: is written, and its elements overlap: dimension {} of {} has stride {}; pass a "
          "view whose elements each have their own place",
          argument_, d, to_string(tensor_), tensor_.strides[d]));
    span += step(d) * (tensor_.shape[d] - 1);
  }
  return *this;
}

void check_enum(std::string_view argument, std::int64_t value, std::int64_t count) {
  if (value < 0 || value >= count)
    invalid(fmt::format("{}: expected 0 to {}, got {}; take one of its enumerators", argument,
                        count - 1, value));
}

void check_range(std::string_view argument, std::int64_t value, std::int64_t low,
                 std::int64_t high) {
  if (value < low || value > high)
    invalid(fmt::format("{}: expected {}, got {}; choose a value in that range", argument,
                        low == high ? std::to_string(low) : fmt::format("{} to {}", low, high),
                        value));
}

std::int64_t checked_mul(std::int64_t a, std::int64_t b, std::string_view what) {
  std::int64_t product = 0;
  if (__builtin_mul_overflow(a, b, &product))
    invalid(fmt::format("{}: {} x {} does not fit in 64 bits; no such tensor can be", what, a, b));
  return product;
}

void check_workspace(const Workspace& workspace, std::size_t needed, std::string_view query) {
  if (needed == 0) return;
  if (workspace.data == nullptr || workspace.bytes < needed)
    invalid(
        fmt::format("workspace: expected at least {} bytes ({}), got {}; ask for the size first",
                    needed, query, workspace.data == nullptr ? std::size_t{0} : workspace.bytes));
  if (reinterpret_cast<std::uintptr_t>(workspace.data) % kWorkspaceAlignment != 0)
    invalid(
        fmt::format("workspace: expected data aligned to {} bytes, got {} bytes behind that; a "
                    "WorkspaceBuffer is",
                    kWorkspaceAlignment,
                    reinterpret_cast<std::uintptr_t>(workspace.data) % kWorkspaceAlignment));
}

}  // namespace moesaic
