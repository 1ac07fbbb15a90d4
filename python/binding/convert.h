// SPDX-License-Identifier: Apache-2.0
// Between Python's values and the library's structs: DLPack views, option dictionaries, errors.
#pragma once

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/function.h>

#include <functional>
#include <optional>
#include <set>
#include <string>
#include <string_view>

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

// None, a tensor, or [tensor, "bf16"]: an array library without the dtype hands over raw bits.
Tensor tensor_of(const ffi::AnyView& value);
// The calling framework's current stream on the tensor's device.
Stream current_stream(const Tensor& tensor);

// A dictionary of named options. Every key must be asked for: `finish` refuses what is left by name.
class Reader {
 public:
  Reader(std::string what, Options options) : what_(std::move(what)), options_(std::move(options)) {}
  void integer(const char* key, std::int64_t& into);
  void integer(const char* key, int& into);
  void number(const char* key, float& into);
  void flag(const char* key, bool& into);
  void text(const char* key, const std::function<void(std::string_view)>& into);
  void options(const char* key, const std::function<void(Reader&)>& into);
  void tensor(const char* key, Tensor& into);
  void finish() const;

 private:
  std::optional<ffi::Any> find(const char* key);
  std::string what_;
  Options options_;
  std::set<std::string> used_{};
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

template <typename Struct>
Struct read_all(const char* what, const Options& options) {
  Reader reader(what, options);
  Struct value{};
  read(reader, value);
  reader.finish();
  return value;
}

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
  throw Error(ErrorCode::kInvalidArgument,
              std::string(what) + ": unknown value '" + std::string(text) + "'; known: " + known);
}
template <typename E, std::size_t N>
ffi::String name_of(const Choice<E> (&choices)[N], E value) {
  for (const Choice<E>& c : choices)
    if (c.value == value) return std::string(c.name);
  return "";
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
