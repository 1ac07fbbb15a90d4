// SPDX-License-Identifier: Apache-2.0
#include "checkpoint/writer.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "check.h"
#include "checkpoint/dtypes.h"
#include "checkpoint/files.h"
#include "moesaic/checkpoint.h"

namespace moesaic {
namespace {

void copy_dense(const Tensor& t, int dim, const std::byte* from, std::byte*& out) {
  const auto size = static_cast<std::int64_t>(size_of(t.dtype));
  const std::int64_t extent = t.shape[static_cast<std::size_t>(dim)];
  const std::int64_t stride = t.strides[static_cast<std::size_t>(dim)];
  if (dim == t.rank - 1 && stride == 1) {
    if (extent > 0) std::memcpy(out, from, static_cast<std::size_t>(extent * size));
    out += extent * size;
    return;
  }
  for (std::int64_t i = 0; i < extent; ++i) {
    const std::byte* element = from + i * stride * size;
    if (dim == t.rank - 1) {
      std::memcpy(out, element, static_cast<std::size_t>(size));
      out += size;
    } else {
      copy_dense(t, dim + 1, element, out);
    }
  }
}

}  // namespace

void copy_dense(const Tensor& tensor, std::byte* out) {
  if (tensor.numel() == 0) return;
  copy_dense(tensor, 0, tensor.as<const std::byte>(), out);
}

SafetensorsWriter::SafetensorsWriter(const std::string& path, std::vector<Entry> entries,
                                     const std::map<std::string, std::string>& metadata)
    : path_(path), temporary_(fmt::format("{}.{}.partial", path, ::getpid())) {
  // Wide elements first, so that every tensor is aligned without padding (which the format
  // forbids).
  std::stable_sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) {
    return size_of(a.dtype) > size_of(b.dtype);
  });
  nlohmann::ordered_json header = nlohmann::ordered_json::object();
  if (!metadata.empty()) header["__metadata__"] = metadata;
  std::uint64_t end = 0;
  for (Entry& e : entries) {
    std::int64_t bytes = static_cast<std::int64_t>(size_of(e.dtype));
    for (const std::int64_t extent : e.shape) {
      check_range(e.name + ": extent", extent, 0, INT64_MAX);
      bytes = checked_mul(bytes, extent, e.name);
    }
    const std::uint64_t begin = end;
    end += static_cast<std::uint64_t>(bytes);
    header[e.name] = {
        {"dtype", stored_name(e.dtype)}, {"shape", e.shape}, {"data_offsets", {begin, end}}};
    Slot slot{.entry = e, .begin = begin, .bytes = static_cast<std::uint64_t>(bytes)};
    if (e.name == "__metadata__" || !slots_.emplace(e.name, std::move(slot)).second)
      invalid(
          fmt::format("{}: tensor name {} appears twice or is reserved", path, show_name(e.name)));
  }
  std::string text;
  try {
    text = header.dump();
  } catch (const nlohmann::json::exception&) {
    invalid(path + ": tensor names and metadata must be UTF-8");
  }
  while (text.size() % 8 != 0) text += ' ';

  // The file takes the place of what is there: never that of a folder, a device or a pipe.
  std::error_code ignored;
  const std::filesystem::file_status there = std::filesystem::status(path_, ignored);
  if (std::filesystem::exists(there) && !std::filesystem::is_regular_file(there))
    io_error(fmt::format("{}: cannot be replaced, it is no regular file; name another", path_));
  fd_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  if (fd_ < 0) io_error(fmt::format("{}: cannot be written: {}", path_, std::strerror(errno)));
  const std::uint64_t length = text.size();
  data_offset_ = sizeof(length) + length;
  try {
    write_at(&length, sizeof(length), 0);
    write_at(text.data(), text.size(), sizeof(length));
  } catch (...) {  // a constructor that throws has no destructor
    ::close(fd_);
    std::remove(temporary_.c_str());
    throw;
  }
}

SafetensorsWriter::~SafetensorsWriter() {
  if (fd_ < 0) return;
  ::close(fd_);
  std::remove(temporary_.c_str());
}

void SafetensorsWriter::write_at(const void* data, std::size_t bytes, std::uint64_t offset) {
  const auto* from = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t n = ::pwrite(fd_, from, bytes, static_cast<off_t>(offset));
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) io_error(fmt::format("{}: writing failed: {}", path_, std::strerror(errno)));
    from += n;
    bytes -= static_cast<std::size_t>(n);
    offset += static_cast<std::uint64_t>(n);
  }
}

void SafetensorsWriter::write(std::string_view name, const Tensor& tensor) {
  const auto it = slots_.find(name);
  if (it == slots_.end())
    invalid(fmt::format("{}: no entry {} was declared", path_, show_name(name)));
  Slot& slot = it->second;
  const std::vector<std::int64_t> shape(tensor.shape.begin(), tensor.shape.begin() + tensor.rank);
  if (tensor.dtype != slot.entry.dtype || shape != slot.entry.shape)
    invalid(fmt::format("{}: {} was declared with another dtype or shape than {}", path_,
                        show_name(name), to_string(tensor)));
  if (tensor.device.type != DeviceType::kCpu)
    invalid(fmt::format("{}: {} lies on {}; copy it to the host first", path_, show_name(name),
                        to_string(tensor.device)));
  if (tensor.is_contiguous()) {
    write_at(tensor.data, slot.bytes, data_offset_ + slot.begin);
  } else {
    std::vector<std::byte> dense(slot.bytes);
    copy_dense(tensor, dense.data());
    write_at(dense.data(), slot.bytes, data_offset_ + slot.begin);
  }
  slot.written = true;
}

void SafetensorsWriter::finish() {
  for (const auto& [name, slot] : slots_)
    if (!slot.written)
      invalid(fmt::format("{}: {} was declared and not written", path_, show_name(name)));
  const int closed = ::close(fd_);
  fd_ = -1;
  if (closed != 0 || std::rename(temporary_.c_str(), path_.c_str()) != 0) {
    const int error = errno;
    std::remove(temporary_.c_str());
    io_error(fmt::format("{}: cannot be written: {}", path_, std::strerror(error)));
  }
}

void save_safetensors(const std::string& path, std::span<const NamedTensor> tensors,
                      const std::map<std::string, std::string>& metadata) {
  std::vector<SafetensorsWriter::Entry> entries;
  for (const NamedTensor& t : tensors) {
    if (!t.tensor.defined())
      invalid(fmt::format("{}: tensor {} is undefined", path, show_name(t.name)));
    entries.push_back(
        {t.name, t.tensor.dtype, {t.tensor.shape.begin(), t.tensor.shape.begin() + t.tensor.rank}});
  }
  SafetensorsWriter writer(path, std::move(entries), metadata);
  for (const NamedTensor& t : tensors) writer.write(t.name, t.tensor);
  writer.finish();
}

}  // namespace moesaic
