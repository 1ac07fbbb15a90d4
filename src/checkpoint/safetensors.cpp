// SPDX-License-Identifier: Apache-2.0
// The safetensors reader. A file is  u64 header_bytes | JSON header | tensor bytes  and nothing
// else: the tensors cover the bytes behind the header exactly. Everything is checked at open, so
// that a view can be handed out later without a second thought. The maintained reader is in Rust; a
// C++ one is not packaged, and the format is small.
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <nlohmann/json.hpp>

#include "check.h"
#include "checkpoint/dtypes.h"
#include "checkpoint/files.h"
#include "moesaic/checkpoint.h"

namespace moesaic {
static_assert(std::endian::native == std::endian::little, "safetensors data is little endian");

namespace {

constexpr std::size_t kLengthBytes = 8;
constexpr std::uint64_t kMaxHeaderBytes = 100'000'000;  // the official reader's limit

// What the header says of one tensor.
struct Entry {
  std::string name, dtype;
  std::vector<std::int64_t> shape;
  std::vector<std::int64_t> offsets;
  bool has_dtype = false, has_shape = false, has_offsets = false;
};

// A SAX handler: it accepts the header's grammar and nothing else, so that depth and memory are
// bounded by it. The DOM would first build whatever a hostile header describes.
class HeaderReader {
 public:
  HeaderReader(const std::string& file, std::vector<Entry>& entries,
               std::map<std::string, std::string>& metadata)
      : file_(file), entries_(entries), metadata_(metadata) {}

  bool null() { return unexpected("null"); }
  bool boolean(bool) { return unexpected("a boolean"); }
  bool number_integer(std::int64_t) { return unexpected("a negative number"); }
  bool number_float(double, const std::string&) {
    return unexpected("a fraction or a huge number");
  }
  bool binary(std::vector<std::uint8_t>&) { return unexpected("binary data"); }

  bool number_unsigned(std::uint64_t value) {
    if (list_ == nullptr) return unexpected("a number");
    if (value > static_cast<std::uint64_t>(INT64_MAX)) return unexpected("a huge number");
    list_->push_back(static_cast<std::int64_t>(value));
    return true;
  }
  bool string(std::string& value) {
    if (place_ == Place::kMetadata) {
      if (!metadata_.emplace(key_, value).second)
        fail("metadata key " + show_name(key_) + " appears twice");
      return true;
    }
    if (place_ != Place::kTensor || list_ != nullptr || key_ != "dtype")
      return unexpected("a string");
    entries_.back().dtype = value;
    return true;
  }
  bool start_object(std::size_t) {
    switch (place_) {
      case Place::kOutside:
        place_ = Place::kTop;
        return true;
      case Place::kTop:
        if (key_ == "__metadata__") {
          if (seen_metadata_) fail("__metadata__ appears twice");
          seen_metadata_ = true;
          place_ = Place::kMetadata;
        } else {
          entries_.push_back({.name = key_, .dtype = {}, .shape = {}, .offsets = {}});
          place_ = Place::kTensor;
        }
        return true;
      default:
        return unexpected("an object");
    }
  }
  bool end_object() {
    if (place_ == Place::kTensor) {
      const Entry& e = entries_.back();
      if (!e.has_dtype || !e.has_shape || !e.has_offsets || e.offsets.size() != 2)
        fail("tensor " + show_name(e.name) + " needs dtype, shape and two data_offsets");
    }
    place_ = place_ == Place::kTop ? Place::kDone : Place::kTop;
    return true;
  }
  bool start_array(std::size_t) {
    if (place_ != Place::kTensor || list_ != nullptr) return unexpected("an array");
    if (key_ == "dtype") return unexpected("an array");
    list_ = key_ == "shape" ? &entries_.back().shape : &entries_.back().offsets;
    return true;
  }
  bool end_array() {
    list_ = nullptr;
    return true;
  }
  bool key(std::string& value) {
    key_ = value;
    if (place_ != Place::kTensor) return true;
    Entry& e = entries_.back();
    bool* seen = value == "dtype"          ? &e.has_dtype
                 : value == "shape"        ? &e.has_shape
                 : value == "data_offsets" ? &e.has_offsets
                                           : nullptr;
    if (seen == nullptr)
      fail("tensor " + show_name(e.name) + " has an unknown field " + show_name(value));
    if (*seen) fail("tensor " + show_name(e.name) + " has " + value + " twice");
    *seen = true;
    return true;
  }
  bool parse_error(std::size_t position, const std::string&, const nlohmann::detail::exception& e) {
    fail(fmt::format("invalid JSON near byte {}: {}", position, json_complaint(e)));
  }

 private:
  enum class Place { kOutside, kTop, kMetadata, kTensor, kDone };

  [[noreturn]] void fail(const std::string& what) const { corrupt(file_ + ": header: " + what); }
  bool unexpected(std::string_view what) const {
    const std::string of =
        place_ == Place::kTensor ? "tensor " + show_name(entries_.back().name) + ": " : "";
    fail(fmt::format("{}did not expect {} at {}", of, what,
                     key_.empty() ? "the start" : show_name(key_)));
  }

  const std::string& file_;
  std::vector<Entry>& entries_;
  std::map<std::string, std::string>& metadata_;
  Place place_ = Place::kOutside;
  std::string key_;
  std::vector<std::int64_t>* list_ = nullptr;
  bool seen_metadata_ = false;
};

// Bytes that dtype and shape take, or nothing when they overflow or end inside a byte.
std::optional<std::uint64_t> bytes_of(const StoredDType& dtype,
                                      const std::vector<std::int64_t>& shape) {
  std::uint64_t bits = static_cast<std::uint64_t>(dtype.bits);
  bool empty = false;
  for (const std::int64_t extent : shape) {
    empty |= extent == 0;
    // An overflow counts even if another extent is 0: nobody writes that in good faith.
    if (extent != 0 && __builtin_mul_overflow(bits, static_cast<std::uint64_t>(extent), &bits))
      return {};
  }
  if (empty) return 0;
  if (bits % 8 != 0) return {};
  return bits / 8;
}

struct Parsed {
  std::vector<StoredTensor> tensors;
  std::map<std::string, std::string> metadata;
};

Parsed parse_file(const std::string& file, std::span<const std::byte> bytes) {
  if (bytes.size() < kLengthBytes)
    corrupt(fmt::format("{}: {} bytes; a safetensors file starts with an 8-byte header length",
                        file, bytes.size()));
  std::uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, bytes.data(), kLengthBytes);
  if (header_bytes > kMaxHeaderBytes)
    corrupt(
        fmt::format("{}: header length {} is beyond the limit of {} bytes; is this a safetensors "
                    "file?",
                    file, header_bytes, kMaxHeaderBytes));
  if (header_bytes > bytes.size() - kLengthBytes)
    corrupt(
        fmt::format("{}: header length {}, but only {} bytes follow: the file is truncated or not "
                    "a safetensors file",
                    file, header_bytes, bytes.size() - kLengthBytes));
  const auto* text = reinterpret_cast<const char*>(bytes.data()) + kLengthBytes;
  if (header_bytes == 0 || text[0] != '{')
    corrupt(fmt::format("{}: header: expected '{{' first", file));

  Parsed parsed;
  std::vector<Entry> entries;
  HeaderReader reader(file, entries, parsed.metadata);
  nlohmann::json::sax_parse(text, text + header_bytes, &reader);

  const std::uint64_t data_bytes = bytes.size() - kLengthBytes - header_bytes;
  const std::byte* data = bytes.data() + kLengthBytes + header_bytes;
  parsed.tensors.reserve(entries.size());
  for (Entry& e : entries) {
    const auto fail = [&](const std::string& what) {
      corrupt(fmt::format("{}: tensor {}: {}", file, show_name(e.name), what));
    };
    const StoredDType* dtype = find_stored_dtype(e.dtype);
    if (dtype == nullptr) fail("unknown dtype " + show_name(e.dtype));
    const auto begin = static_cast<std::uint64_t>(e.offsets[0]);
    const auto end = static_cast<std::uint64_t>(e.offsets[1]);
    if (begin > end || end > data_bytes)
      fail(fmt::format(
          "data_offsets [{}, {}] lie outside the {} bytes of data; the file is truncated "
          "or corrupt",
          begin, end, data_bytes));
    const auto expected = bytes_of(*dtype, e.shape);
    if (!expected) fail("dtype and shape describe an impossible size");
    if (*expected != end - begin)
      fail(fmt::format("{} elements of {} take {} bytes, data_offsets hold {}",
                       *expected * 8 / static_cast<std::uint64_t>(dtype->bits), dtype->name,
                       *expected, end - begin));
    parsed.tensors.push_back({.name = std::move(e.name),
                              .dtype = std::string(dtype->name),
                              .shape = std::move(e.shape),
                              .data = data + begin,
                              .bytes = end - begin});
  }

  // In the order of their bytes they must follow each other without holes or overlaps.
  std::sort(parsed.tensors.begin(), parsed.tensors.end(), [](const auto& a, const auto& b) {
    return a.data != b.data ? a.data < b.data : a.bytes < b.bytes;
  });
  const std::byte* expected = data;
  for (const StoredTensor& t : parsed.tensors) {
    if (t.data != expected)
      corrupt(fmt::format("{}: tensor {} starts at byte {} of the data, expected {}: {}", file,
                          show_name(t.name), t.data - data, expected - data,
                          t.data < expected ? "tensors overlap" : "there is a hole before it"));
    expected += t.bytes;
  }
  if (expected != data + data_bytes)
    corrupt(fmt::format("{}: {} bytes behind the last tensor", file, data + data_bytes - expected));
  return parsed;
}

}  // namespace

struct TensorFile::Impl {
  std::vector<std::unique_ptr<MappedFile>> maps;
  std::vector<std::string> paths;     // of the maps, and of the index
  std::vector<StoredTensor> tensors;  // sorted by name
  std::map<std::string, std::string> metadata;

  void add(const std::string& file, std::span<const std::byte> bytes) {
    Parsed parsed = parse_file(file, bytes);
    if (metadata.empty()) metadata = std::move(parsed.metadata);
    tensors.insert(tensors.end(), std::make_move_iterator(parsed.tensors.begin()),
                   std::make_move_iterator(parsed.tensors.end()));
  }
  void map(const std::string& path) {
    maps.push_back(std::make_unique<MappedFile>(path));
    paths.push_back(path);
    add(path, maps.back()->bytes());
  }
  void finish(const std::string& what) {
    const auto by_name = [](const auto& a, const auto& b) { return a.name < b.name; };
    std::sort(tensors.begin(), tensors.end(), by_name);
    const auto twice =
        std::adjacent_find(tensors.begin(), tensors.end(),
                           [](const auto& a, const auto& b) { return a.name == b.name; });
    if (twice != tensors.end())
      corrupt(fmt::format("{}: tensor {} appears twice", what, show_name(twice->name)));
  }
  const StoredTensor* find(std::string_view name) const {
    const auto it =
        std::lower_bound(tensors.begin(), tensors.end(), name,
                         [](const StoredTensor& t, std::string_view n) { return t.name < n; });
    return it != tensors.end() && it->name == name ? &*it : nullptr;
  }
  void map_index(const std::string& path) {
    const nlohmann::json index = read_json_object(path);
    const auto it = index.find("weight_map");
    if (it == index.end())
      corrupt(path +
              ": is no index; name the folder, a .safetensors file or "
              "model.safetensors.index.json");
    if (!it->is_object())
      corrupt(path + ": expected an object 'weight_map' from tensor names to files");
    paths.push_back(path);
    std::vector<std::string> shards;
    for (const auto& [tensor, shard] : it->items()) {
      if (!shard.is_string())
        corrupt(fmt::format("{}: weight_map: {} has no file name", path, show_name(tensor)));
      shards.push_back(shard.get<std::string>());
    }
    std::sort(shards.begin(), shards.end());
    shards.erase(std::unique(shards.begin(), shards.end()), shards.end());
    for (const std::string& shard : shards) {
      // A shard lies beside its index; a path out of the directory is not a checkpoint's business.
      if (shard.empty() || shard == "." || shard == ".." || shard.find('/') != std::string::npos ||
          shard.find('\0') != std::string::npos)
        corrupt(fmt::format("{}: weight_map: {} is not a plain file name", path, show_name(shard)));
      const std::string file = join_path(parent_directory(path), shard);
      if (!is_file(file))
        io_error(fmt::format("{}: the shard {} is missing", path, show_name(shard)));
      map(file);
    }
    finish(path);
    for (const auto& [tensor, shard] : it->items())
      if (find(tensor) == nullptr)
        corrupt(fmt::format("{}: tensor {} is not in {}", path, show_name(tensor),
                            show_name(shard.get<std::string>())));
  }
};

TensorFile TensorFile::open(const std::string& path) {
  auto impl = std::make_shared<Impl>();
  if (is_directory(path)) {
    const std::string index = join_path(path, "model.safetensors.index.json");
    const std::string single = join_path(path, "model.safetensors");
    if (is_file(index)) {
      impl->map_index(index);
    } else if (is_file(single)) {
      impl->map(single);
      impl->finish(single);
    } else {
      io_error(path + ": holds neither model.safetensors.index.json nor model.safetensors");
    }
  } else if (path.ends_with(".json")) {
    impl->map_index(path);
  } else {
    impl->map(path);
    impl->finish(path);
  }
  TensorFile file;
  file.impl_ = std::move(impl);
  return file;
}

TensorFile TensorFile::from_bytes(std::span<const std::byte> bytes) {
  auto impl = std::make_shared<Impl>();
  impl->add("bytes", bytes);
  impl->finish("bytes");
  TensorFile file;
  file.impl_ = std::move(impl);
  return file;
}

std::span<const StoredTensor> TensorFile::tensors() const { return impl_->tensors; }
const std::map<std::string, std::string>& TensorFile::metadata() const { return impl_->metadata; }
bool TensorFile::is_mapped(const std::string& path) const {
  return std::any_of(impl_->paths.begin(), impl_->paths.end(),
                     [&](const std::string& mapped) { return is_same_file(mapped, path); });
}
const StoredTensor* TensorFile::find(std::string_view name) const { return impl_->find(name); }

Tensor TensorFile::tensor(std::string_view name) const {
  const StoredTensor* stored = find(name);
  if (stored == nullptr) invalid("there is no tensor " + show_name(name) + " in this file");
  const auto dtype = find_stored_dtype(stored->dtype)->view;
  if (!dtype)
    unsupported(
        fmt::format("tensor {}: dtype {} has no view; convert it", show_name(name), stored->dtype));
  if (stored->shape.size() > static_cast<std::size_t>(Tensor::kMaxRank))
    unsupported(fmt::format("tensor {}: rank {}, at most {} dimensions have a view",
                            show_name(name), stored->shape.size(), Tensor::kMaxRank));
  if (reinterpret_cast<std::uintptr_t>(stored->data) % size_of(*dtype) != 0)
    unsupported(
        fmt::format("tensor {}: its bytes are not aligned to {}; save the file again with the "
                    "safetensors library",
                    show_name(name), stored->dtype));
  if (stored->shape.empty())  // a scalar: rank 0 means "not given" here
    return Tensor::contiguous(stored->data, *dtype, {1});
  return Tensor::contiguous(stored->data, *dtype, stored->shape);
}

void TensorFile::release(const StoredTensor& tensor) const {
  if (impl_->maps.empty() || tensor.bytes == 0) return;  // bytes in memory are not ours
  // Whole pages inside the tensor only: its neighbours may be in use.
  const auto page = static_cast<std::uintptr_t>(::sysconf(_SC_PAGESIZE));
  const auto address = reinterpret_cast<std::uintptr_t>(tensor.data);
  const std::uintptr_t begin = (address + page - 1) / page * page;
  const std::uintptr_t end = (address + tensor.bytes) / page * page;
  if (begin < end) ::madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
}

}  // namespace moesaic
