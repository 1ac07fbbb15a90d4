// SPDX-License-Identifier: Apache-2.0
// Files as this directory needs them: complaints that name the file, a read-only memory map, and
// JSON text that may be hostile.
#pragma once

#include <cstddef>
#include <exception>
#include <nlohmann/json_fwd.hpp>
#include <span>
#include <string>
#include <string_view>

#include "moesaic/types.h"
#include "printable.h"

namespace moesaic {

[[noreturn]] void corrupt(const std::string& message);   // kCorruptFile
[[noreturn]] void io_error(const std::string& message);  // kIo

// A name from a file, safe to put into a message: quoted, short, printable.
std::string show_name(std::string_view text);
// What the JSON library has to say, without its own numbers and bytes that no terminal should see.
std::string json_complaint(const std::exception& error);

// A whole file, mapped read-only. An empty file maps to an empty span.
class MappedFile {
 public:
  explicit MappedFile(const std::string& path);  // throws kIo
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  std::span<const std::byte> bytes() const { return bytes_; }

 private:
  std::span<const std::byte> bytes_;
};

bool is_directory(const std::string& path);
bool is_file(const std::string& path);
// By whatever spelling or link; a path where nothing is yet is no file's.
bool is_same_file(const std::string& a, const std::string& b);
std::string join_path(const std::string& directory, const std::string& file);
std::string parent_directory(const std::string& path);

// Parses a JSON object, at most 100 MB of text and 64 levels deep. Throws kIo and kCorruptFile.
nlohmann::json read_json_object(const std::string& path);
nlohmann::json parse_json_object(std::string_view text, const std::string& what);

}  // namespace moesaic
