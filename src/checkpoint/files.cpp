// SPDX-License-Identifier: Apache-2.0
#include "checkpoint/files.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>

namespace moesaic {
namespace {

constexpr std::size_t kMaxJsonBytes = 100'000'000;
constexpr int kMaxJsonDepth = 64;

bool stat_is(const std::string& path, mode_t kind) {
  struct stat info {};
  return ::stat(path.c_str(), &info) == 0 && (info.st_mode & S_IFMT) == kind;
}

}  // namespace

void corrupt(const std::string& message) { throw Error(ErrorCode::kCorruptFile, message); }
void io_error(const std::string& message) { throw Error(ErrorCode::kIo, message); }

std::string show_name(std::string_view text) {
  constexpr std::size_t kShown = 120;
  return fmt::format("'{}{}", printable(text.substr(0, kShown)), text.size() > kShown ? "...'" : "'");
}

std::string json_complaint(const std::exception& error) {
  // "[json.exception.parse_error.101] parse error at ...": what is behind the library's own number.
  std::string_view text = error.what();
  if (const std::size_t end = text.find("] "); text.starts_with('[') && end != text.npos)
    text.remove_prefix(end + 2);
  return printable(text.substr(0, 200));
}

MappedFile::MappedFile(const std::string& path) {
  // Without O_NONBLOCK a FIFO would be waited for; of a regular file it changes nothing.
  const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) io_error(fmt::format("{}: cannot be opened: {}", path, std::strerror(errno)));
  struct stat info {};
  if (::fstat(fd, &info) != 0 || !S_ISREG(info.st_mode)) {
    ::close(fd);
    io_error(fmt::format("{}: is not a regular file", path));
  }
  const auto size = static_cast<std::size_t>(info.st_size);
  if (size == 0) {  // mmap refuses empty maps
    ::close(fd);
    return;
  }
  // MAP_SHARED would show another process's writes; with MAP_PRIVATE that is unspecified, too, and
  // a file truncated while it is mapped kills the process either way. docs/checkpoints.md says so.
  void* data = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, fd, 0);
  const int error = errno;
  ::close(fd);
  if (data == MAP_FAILED)
    io_error(fmt::format("{}: cannot be mapped: {}", path, std::strerror(error)));
  bytes_ = {static_cast<const std::byte*>(data), size};
}

MappedFile::~MappedFile() {
  if (!bytes_.empty()) ::munmap(const_cast<std::byte*>(bytes_.data()), bytes_.size());
}

bool is_directory(const std::string& path) { return stat_is(path, S_IFDIR); }
bool is_file(const std::string& path) { return stat_is(path, S_IFREG); }
bool is_same_file(const std::string& a, const std::string& b) {
  std::error_code missing;
  return std::filesystem::equivalent(a, b, missing);
}

std::string join_path(const std::string& directory, const std::string& file) {
  if (directory.empty()) return file;
  return directory.back() == '/' ? directory + file : directory + "/" + file;
}

std::string parent_directory(const std::string& path) {
  const std::size_t slash = path.rfind('/');
  if (slash == std::string::npos) return ".";
  return slash == 0 ? "/" : path.substr(0, slash);
}

nlohmann::json parse_json_object(std::string_view text, const std::string& what) {
  if (text.size() > kMaxJsonBytes)
    corrupt(
        fmt::format("{}: {} bytes of JSON; at most {} are read", what, text.size(), kMaxJsonBytes));
  const auto guard = [&](int depth, nlohmann::json::parse_event_t, nlohmann::json&) {
    if (depth > kMaxJsonDepth)
      corrupt(fmt::format("{}: JSON nested deeper than {} levels", what, kMaxJsonDepth));
    return true;
  };
  nlohmann::json value;
  try {
    value = nlohmann::json::parse(text.begin(), text.end(), guard);
  } catch (const nlohmann::json::exception& e) {
    corrupt(fmt::format("{}: is not valid JSON: {}", what, json_complaint(e)));
  }
  if (!value.is_object()) corrupt(fmt::format("{}: expected a JSON object", what));
  return value;
}

nlohmann::json read_json_object(const std::string& path) {
  const MappedFile file(path);
  const auto bytes = file.bytes();
  return parse_json_object({reinterpret_cast<const char*>(bytes.data()), bytes.size()}, path);
}

}  // namespace moesaic
