// SPDX-License-Identifier: Apache-2.0
// Tensor views, devices, workspaces.
#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <utility>

#include "backend.h"
#include "check.h"
#include "moesaic/types.h"

namespace moesaic {

std::size_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kI64:
      return 8;
    case DType::kF32:
    case DType::kI32:
      return 4;
    case DType::kF16:
    case DType::kBF16:
      return 2;
    case DType::kF8E4M3:
    case DType::kE8M0:
    case DType::kI8:
    case DType::kU8:
      return 1;
  }
  return 0;
}

std::string to_string(Device device) {
  return device.type == DeviceType::kCpu ? "cpu" : fmt::format("cuda:{}", device.index);
}

Device parse_device(std::string_view text) {
  if (text == "cpu") return {};
  if (text == "cuda") return {DeviceType::kCuda, 0};
  if (text.starts_with("cuda:")) {
    int index = -1;
    const char* end = text.data() + text.size();
    const auto [stop, error] = std::from_chars(text.data() + 5, end, index);
    if (error == std::errc{} && stop == end && index >= 0) return {DeviceType::kCuda, index};
  }
  invalid(fmt::format("device: expected cpu, cuda or cuda:N, got '{}'", text));
}

Tensor Tensor::contiguous(const void* data, DType dtype, std::span<const std::int64_t> shape,
                          Device device) {
  const auto rank = static_cast<int>(std::min<std::size_t>(shape.size(), kMaxRank + 1));
  if (rank < 1 || rank > kMaxRank)
    invalid(
        fmt::format("tensor: expected rank 1 to {}, got {}; reshape it", kMaxRank, shape.size()));
  Tensor t{.data = const_cast<void*>(data), .dtype = dtype, .device = device, .rank = rank};
  std::int64_t stride = 1;
  for (int i = rank - 1; i >= 0; --i) {
    t.shape[i] = shape[i];
    t.strides[i] = stride;
    stride = checked_mul(stride, shape[i] > 0 ? shape[i] : 1, "tensor");
  }
  return t;
}

Tensor Tensor::contiguous(const void* data, DType dtype, std::initializer_list<std::int64_t> shape,
                          Device device) {
  return contiguous(data, dtype, std::span(shape.begin(), shape.size()), device);
}

std::int64_t Tensor::numel() const {
  std::int64_t count = rank > 0 ? 1 : 0;
  for (int i = 0; i < rank; ++i) count = checked_mul(count, shape[i], "tensor");
  return count;
}

bool Tensor::is_contiguous() const {
  if (numel() == 0) return true;
  std::int64_t stride = 1;
  for (int i = rank - 1; i >= 0; --i) {
    if (shape[i] > 1 && strides[i] != stride) return false;
    stride *= shape[i];
  }
  return true;
}

Tensor Tensor::slice(std::int64_t begin, std::int64_t count) const {
  Tensor t = *this;
  t.data =
      static_cast<char*>(data) + begin * strides[0] * static_cast<std::int64_t>(size_of(dtype));
  t.shape[0] = count;
  return t;
}

Tensor Tensor::select(std::int64_t index) const {
  Tensor t = slice(index, 1);
  if (rank == 1) return t;  // a scalar stays [1]
  t.rank = rank - 1;
  for (int i = 0; i < t.rank; ++i) {
    t.shape[i] = shape[i + 1];
    t.strides[i] = strides[i + 1];
  }
  t.shape[t.rank] = t.strides[t.rank] = 0;
  return t;
}

std::string to_string(const Tensor& tensor) {
  if (!tensor.defined()) return "nothing";
  std::string text = fmt::format("{}[", name(tensor.dtype));
  for (int i = 0; i < tensor.rank; ++i) text += fmt::format("{}{}", i ? ", " : "", tensor.shape[i]);
  return text + "] on " + to_string(tensor.device);
}

WorkspaceBuffer::WorkspaceBuffer(Device device, std::size_t bytes) {
  if (bytes == 0) return;
  const Backend& memory = backend(device);
  backend_ = &memory;
  workspace_ = {memory.allocate(bytes), bytes};
}

WorkspaceBuffer::~WorkspaceBuffer() {
  if (workspace_.data != nullptr)
    static_cast<const Backend*>(backend_)->deallocate(workspace_.data);
}

WorkspaceBuffer::WorkspaceBuffer(WorkspaceBuffer&& other) noexcept
    : backend_(other.backend_), workspace_(std::exchange(other.workspace_, {})) {}

WorkspaceBuffer& WorkspaceBuffer::operator=(WorkspaceBuffer&& other) noexcept {
  std::swap(backend_, other.backend_);
  std::swap(workspace_, other.workspace_);
  return *this;
}

}  // namespace moesaic
