// SPDX-License-Identifier: Apache-2.0
// The safetensors reader and writer: round trips, sharded files, and every way a file can lie.
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>

#include "moesaic/checkpoint.h"

namespace moesaic {
namespace {

namespace fs = std::filesystem;

class Directory {
 public:
  Directory() {
    std::string pattern = (fs::temp_directory_path() / "moesaic-safetensors-XXXXXX").string();
    path_ = ::mkdtemp(pattern.data());
  }
  ~Directory() { fs::remove_all(path_); }
  std::string operator/(const std::string& name) const { return (path_ / name).string(); }
  std::string str() const { return path_.string(); }

 private:
  fs::path path_;
};

std::string file_bytes(const std::string& header, std::size_t data_bytes) {
  std::string out(8, '\0');
  const std::uint64_t length = header.size();
  std::memcpy(out.data(), &length, 8);
  return out + header + std::string(data_bytes, '\1');
}

void write_text(const std::string& path, const std::string& text) {
  std::ofstream(path, std::ios::binary) << text;
}

// Opens bytes of exactly their own size (so that a read behind them is seen by AddressSanitizer).
void open_bytes(const std::string& text) {
  std::vector<char> exact(text.begin(), text.end());
  TensorFile::from_bytes(std::as_bytes(std::span(exact)));
}

void expect_corrupt(const std::string& text, const std::string& words) {
  try {
    open_bytes(text);
    FAIL() << "accepted: expected a complaint with '" << words << "'";
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ErrorCode::kCorruptFile) << e.what();
    EXPECT_NE(std::string(e.what()).find(words), std::string::npos) << e.what();
  }
}

ErrorCode open_error(const std::string& path) {
  try {
    TensorFile::open(path);
  } catch (const Error& e) {
    return e.code();
  }
  return ErrorCode::kInternal;
}

TEST(Safetensors, RoundTripKeepsBytesNamesAndMetadata) {
  Directory dir;
  std::mt19937 random(std::random_device{}());
  std::vector<float> a(6);
  for (float& v : a) v = std::uniform_real_distribution<float>(-1, 1)(random);
  std::vector<std::uint8_t> b = {1, 2, 3, 4, 5};
  Tensor transposed = Tensor::contiguous(a.data(), DType::kF32, {2, 3});
  std::swap(transposed.shape[0], transposed.shape[1]);
  std::swap(transposed.strides[0], transposed.strides[1]);
  const NamedTensor tensors[] = {{"bytes", Tensor::contiguous(b.data(), DType::kU8, {5})},
                                 {"a", Tensor::contiguous(a.data(), DType::kF32, {2, 3})},
                                 {"at", transposed},
                                 {"none", Tensor::contiguous(nullptr, DType::kBF16, {0, 7})}};
  save_safetensors(dir / "x.safetensors", tensors, {{"format", "pt"}});

  const TensorFile file = TensorFile::open(dir / "x.safetensors");
  ASSERT_EQ(file.tensors().size(), 4u);
  EXPECT_EQ(file.metadata().at("format"), "pt");
  const Tensor ra = file.tensor("a");
  EXPECT_EQ(to_string(ra), to_string(tensors[1].tensor));
  EXPECT_EQ(std::memcmp(ra.data, a.data(), 24), 0);
  const auto* at = file.tensor("at").as<const float>();
  EXPECT_EQ(at[1], a[3]);
  EXPECT_EQ(at[2], a[1]);
  EXPECT_EQ(std::memcmp(file.tensor("bytes").data, b.data(), 5), 0);
  EXPECT_EQ(file.tensor("none").numel(), 0);
  file.release(*file.find("a"));
  EXPECT_EQ(file.tensor("a").as<const float>()[0], a[0]);
  EXPECT_THROW(file.tensor("nobody"), Error);
  // Nothing is left beside the file.
  EXPECT_EQ(std::distance(fs::directory_iterator(dir.str()), fs::directory_iterator{}), 1);
}

TEST(Safetensors, WriterRefusesDuplicatesAndBadPaths) {
  Directory dir;
  const float v = 1;
  const Tensor t = Tensor::contiguous(&v, DType::kF32, {1});
  const NamedTensor twice[] = {{"a", t}, {"a", t}};
  EXPECT_THROW(save_safetensors(dir / "x", twice), Error);
  const NamedTensor one[] = {{"a", t}};
  EXPECT_THROW(save_safetensors(dir / "missing/x", one), Error);
  EXPECT_TRUE(fs::is_empty(dir.str()));
  // What is there is replaced only if it is a file: not a device (as root, /dev/null!), pipe, folder.
  ASSERT_EQ(::mkfifo((dir / "pipe").c_str(), 0600), 0);
  fs::create_directory(dir / "folder");
  for (const std::string& path : {dir / "pipe", dir / "folder", std::string("/dev/null")})
    EXPECT_THROW(save_safetensors(path, one), Error) << path;
  EXPECT_TRUE(fs::is_fifo(dir / "pipe"));
  EXPECT_TRUE(fs::is_character_file("/dev/null"));
  save_safetensors(dir / "x", one);
  save_safetensors(dir / "x", one);
}

TEST(Safetensors, AcceptsWhatTheFormatAllows) {
  open_bytes(file_bytes("{}", 0));
  open_bytes(file_bytes("{}    ", 0));
  open_bytes(
      file_bytes(R"({"__metadata__":{},"s":{"dtype":"F32","shape":[],"data_offsets":[0,4]}})", 4));
  open_bytes(file_bytes(R"({"s":{"dtype":"F4","shape":[3,2],"data_offsets":[0,3]}})", 3));
  open_bytes(file_bytes(R"({"z":{"dtype":"F32","shape":[0,5],"data_offsets":[4,4]},)"
                        R"("s":{"data_offsets":[0,4],"shape":[2,2,1,1,1],"dtype":"I8"}})",
                        4));
}

TEST(Safetensors, HostileHeaders) {
  const auto one = [](const std::string& fields) {
    return file_bytes("{\"x\":{" + fields + "}}", 8);
  };
  expect_corrupt("", "8-byte header length");
  expect_corrupt("\1\0\0", "8-byte header length");
  expect_corrupt(std::string(8, '\xff') + "{}", "beyond the limit");
  expect_corrupt(std::string("\x7f\0\0\0\0\0\0\0{}", 10), "truncated");
  expect_corrupt(std::string(8, '\0'), "expected '{'");
  expect_corrupt(file_bytes("[]", 0), "expected '{'");
  expect_corrupt(file_bytes("{\"a\":", 0), "invalid JSON");
  expect_corrupt(file_bytes("{}{}", 0), "invalid JSON");
  expect_corrupt(file_bytes("{\"a\":\xff}", 0), "invalid JSON");
  expect_corrupt(file_bytes("{\"a\":1}", 0), "did not expect a number");
  expect_corrupt(file_bytes("{\"a\":null}", 0), "did not expect null");
  expect_corrupt(file_bytes("{\"a\":\"b\"}", 0), "did not expect a string");
  expect_corrupt(file_bytes("{\"__metadata__\":{\"a\":1}}", 0), "did not expect a number");
  expect_corrupt(one("\"shape\":[-1]"), "tensor 'x': did not expect a negative number at 'shape'");
  expect_corrupt(file_bytes("{\"__metadata__\":{\"a\":{}}}", 0), "did not expect an object");
  expect_corrupt(file_bytes(R"({"__metadata__":{},"__metadata__":{}})", 0), "twice");
  expect_corrupt(one(R"("dtype":"F32","shape":[2])"), "needs dtype, shape");
  expect_corrupt(one(R"("dtype":"F32","shape":[2],"data_offsets":[0])"), "two data_offsets");
  expect_corrupt(one(R"("dtype":"F32","shape":[2],"data_offsets":[0,8,8])"), "two data_offsets");
  expect_corrupt(one(R"("dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8])"), "twice");
  expect_corrupt(one(R"("dtype":"F32","shape":[2],"data_offsets":[0,8],"more":1)"),
                 "unknown field");
  expect_corrupt(one(R"("dtype":["F32"],"shape":[2],"data_offsets":[0,8])"), "an array");
  expect_corrupt(one(R"("dtype":"F32","shape":"2","data_offsets":[0,8])"), "a string");
  expect_corrupt(one(R"("dtype":"F32","shape":[[2]],"data_offsets":[0,8])"), "an array");
  expect_corrupt(one(R"("dtype":"F32","shape":[-2],"data_offsets":[0,8])"), "negative");
  expect_corrupt(one(R"("dtype":"F32","shape":[2.0],"data_offsets":[0,8])"), "fraction");
  expect_corrupt(one(R"("dtype":"F32","shape":[1e30],"data_offsets":[0,8])"), "fraction");
  expect_corrupt(one(R"("dtype":"F32","shape":[18446744073709551615],"data_offsets":[0,8])"),
                 "huge");
  expect_corrupt(one(R"("dtype":"F99","shape":[2],"data_offsets":[0,8])"), "unknown dtype");
  expect_corrupt(one(R"("dtype":"F32","shape":[3],"data_offsets":[0,8])"), "take 12");
  expect_corrupt(one(R"("dtype":"F32","shape":[2],"data_offsets":[8,0])"), "outside");
  expect_corrupt(one(R"("dtype":"F32","shape":[4],"data_offsets":[0,16])"), "outside");
  expect_corrupt(
      one(R"("dtype":"F32","shape":[1],"data_offsets":[9223372036854775803,9223372036854775807])"),
      "outside");
  // 2^32 * 2^32 * 4 bytes is 0 in 64 bits.
  expect_corrupt(one(R"("dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0])"),
                 "impossible size");
  expect_corrupt(
      one(R"("dtype":"F32","shape":[4294967296,0,4294967296,4294967296],"data_offsets":[0,0])"),
      "impossible size");
  expect_corrupt(one(R"("dtype":"F4","shape":[3],"data_offsets":[0,1])"), "impossible size");
}

TEST(Safetensors, HolesOverlapsAndTrailingBytes) {
  const auto two = [](int a0, int a1, int b0, int b1, std::size_t data) {
    const auto tensor = [](int begin, int end) {
      return "{\"dtype\":\"U8\",\"shape\":[" + std::to_string(end - begin) +
             "],\"data_offsets\":[" + std::to_string(begin) + "," + std::to_string(end) + "]}";
    };
    return file_bytes("{\"a\":" + tensor(a0, a1) + ",\"b\":" + tensor(b0, b1) + "}", data);
  };
  open_bytes(two(4, 8, 0, 4, 8));
  expect_corrupt(two(0, 4, 5, 8, 8), "hole");
  expect_corrupt(two(1, 4, 4, 8, 8), "hole");
  expect_corrupt(two(0, 5, 4, 8, 8), "overlap");
  expect_corrupt(two(0, 4, 0, 4, 4), "overlap");
  expect_corrupt(two(0, 4, 4, 8, 9), "1 bytes behind");
  expect_corrupt(two(0, 4, 4, 8, 7), "outside");
  expect_corrupt(file_bytes("{}", 1), "behind");
}

TEST(Safetensors, DuplicateNames) {
  expect_corrupt(file_bytes(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
                            R"("a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}})",
                            2),
                 "twice");
}

TEST(Safetensors, DeepNestingAndLongNamesAreCheap) {
  std::string deep = "{\"a\":";
  for (int i = 0; i < 200000; ++i) deep += "[";
  expect_corrupt(file_bytes(deep, 0), "did not expect an array");
  std::string objects;
  for (int i = 0; i < 200000; ++i) objects += "{\"a\":";
  expect_corrupt(file_bytes(objects, 0), "unknown field");
  try {
    open_bytes(file_bytes("{\"" + std::string(1 << 20, 'n') + "\":1}", 0));
    FAIL();
  } catch (const Error& e) {
    EXPECT_LT(std::strlen(e.what()), 400u);
  }
}

TEST(Safetensors, EveryTruncationIsAnError) {
  Directory dir;
  std::vector<float> v(16, 1.0f);
  const NamedTensor tensors[] = {{"a", Tensor::contiguous(v.data(), DType::kF32, {4, 4})},
                                 {"b", Tensor::contiguous(v.data(), DType::kF32, {3})}};
  save_safetensors(dir / "x", tensors);
  std::ifstream in(dir / "x", std::ios::binary);
  const std::string whole((std::istreambuf_iterator<char>(in)), {});
  open_bytes(whole);
  for (std::size_t n = 0; n < whole.size(); ++n) {
    try {
      open_bytes(whole.substr(0, n));
      FAIL() << "accepted " << n << " of " << whole.size() << " bytes";
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), ErrorCode::kCorruptFile);
    }
  }
}

TEST(Safetensors, FilesThatAreNotThere) {
  Directory dir;
  EXPECT_EQ(open_error(dir / "nothing.safetensors"), ErrorCode::kIo);
  EXPECT_EQ(open_error(dir.str()), ErrorCode::kIo);
  EXPECT_EQ(open_error("/dev/null"), ErrorCode::kIo);
  ASSERT_EQ(::mkfifo((dir / "pipe").c_str(), 0600), 0);
  EXPECT_EQ(open_error(dir / "pipe"), ErrorCode::kIo);  // and nobody waits for a writer
  write_text(dir / "empty.safetensors", "");
  EXPECT_EQ(open_error(dir / "empty.safetensors"), ErrorCode::kCorruptFile);
}

TEST(Safetensors, ShardsAndTheirIndex) {
  Directory dir;
  const float v[2] = {1, 2};
  const NamedTensor a[] = {{"a", Tensor::contiguous(&v[0], DType::kF32, {1})}};
  const NamedTensor b[] = {{"b", Tensor::contiguous(&v[1], DType::kF32, {1})}};
  save_safetensors(dir / "m-1.safetensors", a);
  save_safetensors(dir / "m-2.safetensors", b);
  const std::string index = dir / "model.safetensors.index.json";
  const auto with = [&](const std::string& map) {
    write_text(index, "{\"weight_map\":" + map + "}");
  };

  with(R"({"a":"m-1.safetensors","b":"m-2.safetensors"})");
  const TensorFile file = TensorFile::open(dir.str());
  EXPECT_EQ(file.tensor("b").as<const float>()[0], 2);
  EXPECT_EQ(file.tensors().size(), 2u);

  with(R"({"a":"m-1.safetensors","b":"m-3.safetensors"})");
  EXPECT_EQ(open_error(index), ErrorCode::kIo);
  with(R"({"a":"m-1.safetensors","c":"m-2.safetensors"})");
  EXPECT_EQ(open_error(index), ErrorCode::kCorruptFile);
  with(R"({"a":"../m-1.safetensors"})");
  EXPECT_EQ(open_error(index), ErrorCode::kCorruptFile);
  with(R"({"a":7})");
  EXPECT_EQ(open_error(index), ErrorCode::kCorruptFile);
  with("[]");
  EXPECT_EQ(open_error(index), ErrorCode::kCorruptFile);
  write_text(index, std::string(1000, '['));
  EXPECT_EQ(open_error(index), ErrorCode::kCorruptFile);
  write_text(index, "{\"weight_map\":" + std::string(200000, '[') + std::string(200000, ']') + "}");
  EXPECT_EQ(open_error(index), ErrorCode::kCorruptFile);

  save_safetensors(dir / "m-2.safetensors", a);  // the same name in two shards
  with(R"({"a":"m-1.safetensors","b":"m-2.safetensors"})");
  EXPECT_EQ(open_error(index), ErrorCode::kCorruptFile);
}

TEST(Safetensors, ViewsThatCannotBe) {
  const std::string text =
      file_bytes(R"({"five":{"dtype":"U8","shape":[1,1,1,1,1],"data_offsets":[0,1]},)"
                 R"("odd":{"dtype":"F32","shape":[1],"data_offsets":[1,5]},)"
                 R"("f64":{"dtype":"F64","shape":[1],"data_offsets":[5,13]}})",
                 13);
  const TensorFile file = TensorFile::from_bytes(std::as_bytes(std::span(text)));
  for (const char* name : {"five", "odd", "f64"}) {
    try {
      const Tensor t = file.tensor(name);
      // "odd" may happen to be aligned in memory; the others never have a view.
      EXPECT_EQ(reinterpret_cast<std::uintptr_t>(t.data) % 4, 0u);
      EXPECT_STREQ(name, "odd");
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), ErrorCode::kUnsupported);
    }
  }
}

}  // namespace
}  // namespace moesaic
