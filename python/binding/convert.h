// SPDX-License-Identifier: Apache-2.0
// Between Python's values and the library's structs: DLPack views, option dictionaries, errors.
#pragma once

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/function.h>

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "moesaic/moesaic.h"

namespace moesaic::python {

namespace ffi = tvm::ffi;
using Options = ffi::Map<ffi::String, ffi::Any>;

// Runs `body`; an Error becomes the Python exception its code calls for, with the same text.
template <typename F>
auto guarded(F&& body) -> decltype(body()) {
  try {
    return body();
  } catch (const Error& error) {
    const bool value = error.code() == ErrorCode::kInvalidArgument ||
                       error.code() == ErrorCode::kUnsupported;
    const bool os = error.code() == ErrorCode::kIo;
    throw ffi::Error(value ? "ValueError" : os ? "OSError" : "RuntimeError", error.what(), "");
  }
}

[[noreturn]] void refuse(std::string_view argument, const std::string& what);

// None, a tensor, or [tensor, "bf16"]: an array library without the dtype hands over raw bits. `argument` is what
// an error calls it.
Tensor tensor_of(const ffi::AnyView& value, std::string_view argument);
// The calling framework's current stream on the tensor's device.
Stream current_stream(const Tensor& tensor);

// How an enumeration is spelled in option dictionaries.
template <typename E>
struct Choice {
  std::string_view name;
  E value;
};
template <typename E, std::size_t N>
E choose(std::string_view what, const Choice<E> (&choices)[N], std::string_view text) {
  std::string known;
  for (const Choice<E>& c : choices) {
    if (c.name == text) return c.value;
    known += (known.empty() ? "" : ", ") + std::string(c.name);
  }
  refuse(what, "unknown value '" + std::string(text) + "'; known: " + known);
}

// Named options. Every name must be asked for: `finish` refuses what is left by name.
class Reader {
 public:
  Reader(std::string what, Options options);
  // The same from a value that ought to be a dictionary.
  Reader(std::string what, const ffi::AnyView& options);
  // A call's arguments: names and values in turn, "b.weight" being `weight` of the dictionary `b`. A dictionary made for the
  // call lost: it took longer to make than the call to run, and hides the framework's stream.
  Reader(std::string what, ffi::PackedArgs pairs);
  Reader(Reader&&) = default;  // not copied: entries_ views names_
  Reader& operator=(Reader&&) = default;
  void integer(const char* key, std::int64_t& into);
  void integer(const char* key, int& into);
  void number(const char* key, float& into);
  void flag(const char* key, bool& into);
  std::optional<std::string> text(const char* key);
  // A name that `parse` knows; one of `choices`; a dictionary of its own.
  template <typename E>
  void name(const char* key, E (*parse)(std::string_view), E& into) {
    if (const auto t = text(key)) into = parse(*t);
  }
  template <typename E, std::size_t N>
  void choice(const char* key, const Choice<E> (&choices)[N], E& into) {
    if (const auto t = text(key)) into = choose(key, choices, *t);
  }
  template <typename Struct>
  void inner(const char* key, Struct& into) {
    if (auto reader = nested(key)) {
      read(*reader, into);
      reader->finish();
    }
  }
  void tensor(const char* key, Tensor& into);
  void finish() const;

 private:
  struct Entry {
    std::string_view name;
    ffi::AnyView value;
    bool used = false;
  };
  std::optional<ffi::AnyView> find(const char* key);
  // The value of `key` as a T, or a TypeError that names it and says what was `expected`.
  template <typename T>
  std::optional<T> value(const char* key, std::string_view expected);
  std::optional<Reader> nested(const char* key);
  // What an error calls the argument: "fc1.weight" of "weights.fc1", "experts" of "config".
  std::string path(const char* key) const;
  std::string what_;
  Options options_{};  // what `entries_` views, where a dictionary was given,
  std::vector<ffi::String> names_{};  // and its names; those of a call's arguments last as long as the call
  std::vector<Entry> entries_{};
  std::vector<const char*> asked_{};
};

void read(Reader& reader, QuantSpec& spec);
void read(Reader& reader, ActivationSpec& spec);
void read(Reader& reader, RoutingSpec& spec);
void read(Reader& reader, LayerConfig& config);
void read(Reader& reader, GemmWeights& weights);
void read(Reader& reader, LayerWeights& weights);
void read(Reader& reader, PrepareArgs& args);
void read(Reader& reader, ExpertsArgs& args);
void read(Reader& reader, FinalizeArgs& args);
void read(Reader& reader, GroupedGemmArgs& args);
void read(Reader& reader, AlignArgs& args);
void read(Reader& reader, RouteArgs& args);
void read(Reader& reader, QuantizeArgs& args);
void read(Reader& reader, ActivateArgs& args);
void read(Reader& reader, SumArgs& args);

// The dictionary that `read` makes the same configuration of.
Options options_of(const LayerConfig& config);

template <typename Struct, typename From>
Struct read_all(const char* what, const From& from) {
  Reader reader(what, from);
  Struct value{};
  read(reader, value);
  reader.finish();
  return value;
}

inline constexpr Choice<ActScale> kActScales[] = {{"default", ActScale::kDefault},
                                                  {"tensor_static", ActScale::kTensorStatic},
                                                  {"tensor_dynamic", ActScale::kTensorDynamic},
                                                  {"token", ActScale::kToken},
                                                  {"group", ActScale::kGroup}};
inline constexpr Choice<Int8Rounding> kRoundings[] = {{"nearest", Int8Rounding::kNearest},
                                                      {"truncate", Int8Rounding::kTruncate}};
inline constexpr Choice<RowOrder> kRowOrders[] = {{"slot", RowOrder::kSlot},
                                                  {"sorted", RowOrder::kSorted}};

}  // namespace moesaic::python
