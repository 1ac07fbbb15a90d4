// SPDX-License-Identifier: Apache-2.0
// The safetensors writer: shapes first (they fix the whole file), then the bytes, in any order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "moesaic/types.h"

namespace moesaic {

class SafetensorsWriter {
 public:
  struct Entry {
    std::string name;
    DType dtype{};
    std::vector<std::int64_t> shape;
  };
  // Creates a temporary file beside `path`. Throws kIo, and kInvalidArgument for a name twice.
  SafetensorsWriter(const std::string& path, std::vector<Entry> entries,
                    const std::map<std::string, std::string>& metadata);
  ~SafetensorsWriter();  // without finish(): removes the temporary file
  SafetensorsWriter(const SafetensorsWriter&) = delete;
  SafetensorsWriter& operator=(const SafetensorsWriter&) = delete;

  // A host tensor of the entry's dtype and shape (rank 1 and up; any strides).
  void write(std::string_view name, const Tensor& tensor);
  void finish();  // every entry must have been written; the file appears under its own name

 private:
  struct Slot {
    Entry entry;
    std::uint64_t begin = 0, bytes = 0;
    bool written = false;
  };
  void write_at(const void* data, std::size_t bytes, std::uint64_t offset);

  std::string path_, temporary_;
  int fd_ = -1;
  std::uint64_t data_offset_ = 0;
  std::map<std::string, Slot, std::less<>> slots_;
};

// Copies any strided host tensor into dense row-major memory of numel * size_of bytes.
void copy_dense(const Tensor& tensor, std::byte* out);

}  // namespace moesaic
