// SPDX-License-Identifier: Apache-2.0
// Random numbers and the tensors that own their memory.
#include <cmath>
#include <cstring>

#include "backend.h"
#include "check.h"
#include "harness/data.h"
#include "numeric.h"
#include "reference/bounded.h"

namespace moesaic::harness {

// --- random numbers ------------------------------------------------------------------------------

std::uint64_t mix(std::uint64_t a, std::uint64_t b) {
  std::uint64_t z = a + 0x9e3779b97f4a7c15u * (b + 1);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}
std::uint64_t Rng::bits() {
  state_ += 0x9e3779b97f4a7c15u;
  return mix(state_, 0);
}
double Rng::uniform() { return static_cast<double>(bits() >> 11) * 0x1p-53; }
float Rng::normal() {
  const std::uint64_t b = bits();  // four 16-bit uniforms have variance 1/3 together
  const double sum =
      static_cast<double>((b & 0xffff) + ((b >> 16) & 0xffff) + ((b >> 32) & 0xffff) + (b >> 48));
  return static_cast<float>((sum * 0x1p-16 - 2 + 0x1p-15) * 1.7320508);
}
std::int64_t Rng::below(std::int64_t limit) {
  return static_cast<std::int64_t>(bits() % static_cast<std::uint64_t>(limit));
}

// --- host tensors --------------------------------------------------------------------------------

HostTensor::HostTensor(DType dtype, std::vector<std::int64_t> shape)
    : dtype_(dtype), shape_(std::move(shape)) {
  bytes_.resize(static_cast<std::size_t>(numel()) * size_of(dtype_));
}
std::int64_t HostTensor::numel() const {
  std::int64_t n = shape_.empty() ? 0 : 1;
  for (const std::int64_t extent : shape_) n *= extent;
  return n;
}
Tensor HostTensor::view() const {
  if (!defined()) return {};
  return Tensor::contiguous(bytes_.data(), dtype_, shape_);
}

double load_element(const void* data, DType dtype, std::int64_t index) {
  return reference::load(data, dtype, index);
}

void store_element(void* data, DType dtype, std::int64_t index, double value) {
  const auto f = static_cast<float>(value);
  switch (dtype) {
    case DType::kF32:
      static_cast<float*>(data)[index] = f;
      return;
    case DType::kF16:
      static_cast<std::uint16_t*>(data)[index] = float_to_f16(f);
      return;
    case DType::kBF16:
      static_cast<std::uint16_t*>(data)[index] = float_to_bf16(f);
      return;
    case DType::kF8E4M3:
      static_cast<std::uint8_t*>(data)[index] = float_to_e4m3(f);
      return;
    case DType::kE8M0:
      static_cast<std::uint8_t*>(data)[index] = static_cast<std::uint8_t>(std::ilogb(value) + 127);
      return;
    case DType::kI8:
      static_cast<std::int8_t*>(data)[index] = static_cast<std::int8_t>(std::lround(value));
      return;
    case DType::kU8:
      static_cast<std::uint8_t*>(data)[index] = static_cast<std::uint8_t>(std::lround(value));
      return;
    case DType::kI32:
      static_cast<std::int32_t*>(data)[index] = static_cast<std::int32_t>(std::lround(value));
      return;
    case DType::kI64:
      static_cast<std::int64_t*>(data)[index] = std::lround(value);
      return;
  }
}

double distance(const HostTensor& a, const HostTensor& b) {
  double difference = 0, norm = 0;
  for (std::int64_t i = 0; i < b.numel(); ++i) {
    const double x = load_element(a.bytes().data(), a.dtype(), i),
                 y = load_element(b.bytes().data(), b.dtype(), i);
    difference += (x - y) * (x - y);
    norm += y * y;
  }
  return norm > 0 ? std::sqrt(difference / norm) : std::sqrt(difference);
}

double element(const Tensor& host, std::initializer_list<std::int64_t> index) {
  std::int64_t at = 0;
  int d = 0;
  for (const std::int64_t i : index) at += i * host.strides[static_cast<std::size_t>(d++)];
  return load_element(host.data, host.dtype, at);
}

// --- device tensors ------------------------------------------------------------------------------

namespace {

// Calls f(element index of a dense tensor, element offset in `view`) for every element.
template <typename F>
void for_each_element(const Tensor& view, F f) {
  const std::int64_t count = view.numel();
  std::array<std::int64_t, Tensor::kMaxRank> index{};
  for (std::int64_t i = 0; i < count; ++i) {
    std::int64_t at = 0;
    for (int d = 0; d < view.rank; ++d)
      at += index[static_cast<std::size_t>(d)] * view.strides[static_cast<std::size_t>(d)];
    f(i, at);
    for (int d = view.rank - 1; d >= 0; --d) {
      const auto dim = static_cast<std::size_t>(d);
      if (++index[dim] < view.shape[dim]) break;
      index[dim] = 0;
    }
  }
}

}  // namespace

DeviceTensor::DeviceTensor(Device device, DType dtype, std::vector<std::int64_t> shape,
                           Placement placement)
    : shape_(std::move(shape)) {
  view_ = Tensor::contiguous(nullptr, dtype, shape_, device);
  if (placement == Placement::kStrided && view_.rank > 1) {
    std::int64_t stride = shape_.back() + kRowGap;
    for (int d = view_.rank - 2; d >= 0; --d) {
      view_.strides[static_cast<std::size_t>(d)] = stride;
      stride *= shape_[static_cast<std::size_t>(d)];
    }
  }
  block_ = backend(device).allocate(block_bytes());
  view_.data = static_cast<std::byte*>(block_) + kGuardBytes;
  poison();
}

DeviceTensor DeviceTensor::from(const Tensor& host, Device device, Placement placement) {
  if (!host.defined()) return {};
  DeviceTensor t(device, host.dtype, {host.shape.begin(), host.shape.begin() + host.rank},
                 placement);
  t.assign(host);
  return t;
}

DeviceTensor::~DeviceTensor() {
  if (block_ != nullptr) backend(view_.device).deallocate(block_);
}
DeviceTensor::DeviceTensor(DeviceTensor&& other) noexcept { *this = std::move(other); }
DeviceTensor& DeviceTensor::operator=(DeviceTensor&& other) noexcept {
  std::swap(view_, other.view_);
  std::swap(shape_, other.shape_);
  std::swap(block_, other.block_);
  return *this;
}

std::size_t DeviceTensor::block_bytes() const {
  std::int64_t span = 1;  // elements up to the end of the last row, its gap included
  for (int d = 0; d < view_.rank; ++d)
    span = std::max(span, view_.shape[static_cast<std::size_t>(d)] *
                              view_.strides[static_cast<std::size_t>(d)]);
  return 2 * kGuardBytes +
         (static_cast<std::size_t>(span) * size_of(view_.dtype) + kGuardBytes - 1) / kGuardBytes *
             kGuardBytes;
}

void DeviceTensor::poison() {
  // In pieces that stay in the host's cache: batched buffers have gigabytes.
  const std::size_t all = block_bytes();
  const std::vector<std::byte> bytes(std::min<std::size_t>(all, std::size_t{4} << 20), kPoison);
  for (std::size_t at = 0; at < all; at += bytes.size())
    backend(view_.device)
        .copy(static_cast<std::byte*>(block_) + at, bytes.data(), std::min(bytes.size(), all - at),
              {});
}

void DeviceTensor::assign(const Tensor& host) {
  if (host.is_contiguous() && view_.is_contiguous()) {  // gigabytes: not by the element
    const std::size_t bytes = static_cast<std::size_t>(host.numel()) * size_of(view_.dtype);
    if (bytes > 0) backend(view_.device).copy(view_.data, host.data, bytes, {});
    return;
  }
  std::vector<std::byte> bytes(block_bytes(), kPoison);
  const std::size_t size = size_of(view_.dtype);
  std::vector<std::int64_t> from(static_cast<std::size_t>(host.numel()));
  for_each_element(
      host, [&](std::int64_t i, std::int64_t at) { from[static_cast<std::size_t>(i)] = at; });
  for_each_element(view_, [&](std::int64_t i, std::int64_t at) {
    std::memcpy(bytes.data() + kGuardBytes + static_cast<std::size_t>(at) * size,
                static_cast<const std::byte*>(host.data) +
                    static_cast<std::size_t>(from[static_cast<std::size_t>(i)]) * size,
                size);
  });
  backend(view_.device).copy(block_, bytes.data(), bytes.size(), {});
}

HostTensor DeviceTensor::to_host() const {
  if (block_ == nullptr) return {};
  HostTensor out(view_.dtype, shape_);
  if (view_.is_contiguous()) {
    if (!out.bytes().empty())
      backend(view_.device).copy(out.bytes().data(), view_.data, out.bytes().size(), {});
    return out;
  }
  std::vector<std::byte> bytes(block_bytes());
  backend(view_.device).copy(bytes.data(), block_, bytes.size(), {});
  const std::size_t size = size_of(view_.dtype);
  for_each_element(view_, [&](std::int64_t i, std::int64_t at) {
    std::memcpy(out.bytes().data() + static_cast<std::size_t>(i) * size,
                bytes.data() + kGuardBytes + static_cast<std::size_t>(at) * size, size);
  });
  return out;
}

bool DeviceTensor::guards_intact() const {
  if (block_ == nullptr) return true;
  std::vector<std::byte> bytes(block_bytes());
  backend(view_.device).copy(bytes.data(), block_, bytes.size(), {});
  const std::size_t size = size_of(view_.dtype);
  for_each_element(view_, [&](std::int64_t, std::int64_t at) {
    std::memset(bytes.data() + kGuardBytes + static_cast<std::size_t>(at) * size,
                static_cast<int>(kPoison), size);
  });
  for (const std::byte b : bytes)
    if (b != kPoison) return false;
  return true;
}

}  // namespace moesaic::harness
