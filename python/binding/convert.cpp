// SPDX-License-Identifier: Apache-2.0
// DLPack views of Python's tensors, and the reader of named options.
#include "convert.h"

#include <set>

namespace moesaic::python {

void refuse(std::string_view argument, const std::string& what) {
  throw Error(ErrorCode::kInvalidArgument, std::string(argument) + ": " + what);
}

namespace {

DType dtype_of(const DLDataType& t, std::string_view argument) {
  if (t.lanes == 1) {
    if (t.code == kDLFloat && t.bits == 32) return DType::kF32;
    if (t.code == kDLFloat && t.bits == 16) return DType::kF16;
    if (t.code == kDLBfloat && t.bits == 16) return DType::kBF16;
    if (t.code == kDLFloat8_e4m3fn && t.bits == 8) return DType::kF8E4M3;
    if (t.code == kDLFloat8_e8m0fnu && t.bits == 8) return DType::kE8M0;
    if (t.code == kDLInt && t.bits == 8) return DType::kI8;
    if (t.code == kDLUInt && t.bits == 8) return DType::kU8;
    if (t.code == kDLInt && t.bits == 32) return DType::kI32;
    if (t.code == kDLInt && t.bits == 64) return DType::kI64;
    if (t.code == kDLUInt && t.bits == 16)
      refuse(argument, "dtype uint16 is not supported; bits of bf16 go in as moesaic.typed(array, 'bf16')");
  }
  std::string text;
  try {
    text = ffi::DLDataTypeToString(t);
  } catch (const ffi::Error&) {  // it has no name for complex numbers, for one
    text = "of DLPack code " + std::to_string(t.code);
  }
  refuse(argument, "dtype " + text +
                       " is not supported; convert it to one of f32, f16, bf16, fp8_e4m3, e8m0, i8, u8, i32, i64");
}

Tensor view_of(const DLTensor& t, const std::string& dtype, std::string_view argument) {
  Tensor view;
  if (t.device.device_type == kDLCUDA) {
    view.device = {DeviceType::kCuda, t.device.device_id};
  } else if (t.device.device_type != kDLCPU && t.device.device_type != kDLCUDAHost) {
    refuse(argument, "lies on neither the CPU nor a CUDA device; move it to one");
  }
  if (dtype.empty()) {
    view.dtype = dtype_of(t.dtype, argument);
  } else {
    view.dtype = parse_dtype(dtype);
    if (size_of(view.dtype) * 8 != t.dtype.bits)
      refuse(argument, "is to be read as " + dtype + ", but its elements have " + std::to_string(t.dtype.bits) +
                           " bits; pass an array whose elements are as wide");
  }
  view.data = static_cast<char*>(t.data) + t.byte_offset;
  view.rank = std::max(t.ndim, 1);  // a 0-d scalar is [1]
  if (t.ndim > Tensor::kMaxRank)
    refuse(argument, "expected at most 4 dimensions, got " + std::to_string(t.ndim) + "; pass a view with fewer");
  view.shape[0] = view.strides[0] = 1;
  std::int64_t stride = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    view.shape[i] = t.shape[i];
    view.strides[i] = t.strides != nullptr ? t.strides[i] : stride;
    stride *= t.shape[i];
  }
  return view;
}

// What Python calls the type of a value.
std::string type_of(const ffi::AnyView& value) {
  const std::string key = value.GetTypeKey();
  if (key == "ffi.SmallStr" || key == "ffi.String") return "str";
  if (key == "ffi.Map") return "dict";
  if (key == "ffi.Array") return "list";
  if (key == "ffi.BigInt") return "an int beyond 64 bits";
  if (key == "ffi.Tensor" || key == "DLTensor*") return "an array";
  if (key == "ffi.OpaquePyObject") return "another object";
  return key;
}

// A view of a string that lies in a call's arguments; short ones lie in the argument itself.
std::string_view text_of(const ffi::AnyView& argument) {
  const TVMFFIAny* raw = reinterpret_cast<const TVMFFIAny*>(&argument);
  if (raw->type_index == ffi::TypeIndex::kTVMFFISmallStr) {
    const TVMFFIByteArray text = TVMFFISmallBytesGetContentByteArray(raw);
    return {text.data, text.size};
  }
  if (raw->type_index != ffi::TypeIndex::kTVMFFIStr) throw ffi::Error("TypeError", "expected the name of an argument", "");
  const TVMFFIByteArray* text = TVMFFIBytesGetByteArrayPtr(raw->v_obj);
  return {text->data, text->size};
}

[[noreturn]] void mistyped(const std::string& argument, std::string_view expected, const ffi::AnyView& value) {
  throw ffi::Error("TypeError", argument + ": expected " + std::string(expected) + ", got " + type_of(value), "");
}

}  // namespace

Tensor tensor_of(const ffi::AnyView& value, std::string_view argument) {
  if (value == nullptr) return {};
  if (const auto pair = value.as<ffi::Array<ffi::Any>>(); pair && pair->size() == 2) {
    const auto array = (*pair)[0].try_cast<ffi::Tensor>();
    const auto dtype = (*pair)[1].try_cast<ffi::String>();
    if (array && dtype) return view_of(*array->GetDLTensorPtr(), *dtype, argument);
  }
  const auto array = value.try_cast<DLTensor*>();
  if (!array) mistyped(std::string(argument), "an array", value);
  return view_of(**array, {}, argument);
}

Stream current_stream(const Tensor& tensor) {
  if (tensor.device.type != DeviceType::kCuda) return {};
  return {TVMFFIEnvGetStream(kDLCUDA, tensor.device.index)};
}

Reader::Reader(std::string what, Options options) : what_(std::move(what)), options_(std::move(options)) {
  names_.reserve(options_.size());  // stays where it is: short names lie inside
  entries_.reserve(options_.size());
  for (const auto& [name, value] : options_) {
    names_.push_back(name);
    entries_.push_back({.name = {names_.back().data(), names_.back().size()}, .value = value});
  }
}
Reader::Reader(std::string what, const ffi::AnyView& options) : what_(std::move(what)) {
  const auto given = options.try_cast<Options>();
  if (!given) mistyped(what_, "a dict", options);
  *this = Reader(std::move(what_), *given);
}
Reader::Reader(std::string what, ffi::PackedArgs pairs) : what_(std::move(what)) {
  entries_.reserve(static_cast<std::size_t>(pairs.size() / 2));
  for (int i = 0; i + 1 < pairs.size(); i += 2)
    entries_.push_back({.name = text_of(pairs.data()[i]), .value = pairs[i + 1]});
}
std::string Reader::path(const char* key) const {
  const auto dot = what_.find('.');
  return dot == std::string::npos ? key : what_.substr(dot + 1) + "." + key;
}
std::optional<ffi::AnyView> Reader::find(const char* key) {
  asked_.push_back(key);
  for (Entry& entry : entries_) {
    if (entry.name != key) continue;
    entry.used = true;
    if (entry.value == nullptr) return std::nullopt;
    return entry.value;
  }
  return std::nullopt;
}
template <typename T>
std::optional<T> Reader::value(const char* key, std::string_view expected) {
  const auto v = find(key);
  if (!v) return std::nullopt;
  const auto cast = v->try_cast<T>();
  if (!cast) mistyped(path(key), expected, *v);
  return *cast;
}
void Reader::integer(const char* key, std::int64_t& into) {
  if (const auto v = value<std::int64_t>(key, "an integer")) into = *v;
}
void Reader::integer(const char* key, int& into) {
  if (const auto v = value<std::int64_t>(key, "an integer")) {
    into = static_cast<int>(*v);
    if (into != *v) refuse(path(key), "expected an integer of 32 bits, got " + std::to_string(*v));
  }
}
void Reader::number(const char* key, float& into) {
  if (const auto v = value<double>(key, "a number")) into = static_cast<float>(*v);
}
void Reader::flag(const char* key, bool& into) {
  if (const auto v = value<bool>(key, "True or False")) into = *v;
}
std::optional<std::string> Reader::text(const char* key) {
  if (const auto v = value<ffi::String>(key, "a name")) return std::string(*v);
  return std::nullopt;
}
std::optional<Reader> Reader::nested(const char* key) {
  if (const auto v = value<Options>(key, "a dict")) return Reader(what_ + "." + key, *v);
  const std::string prefix = std::string(key) + ".";
  Reader inner(what_ + "." + key, Options());
  for (Entry& entry : entries_) {
    if (!entry.name.starts_with(prefix)) continue;
    entry.used = true;
    inner.entries_.push_back({.name = entry.name.substr(prefix.size()), .value = entry.value});
  }
  if (inner.entries_.empty()) return std::nullopt;
  return inner;
}
void Reader::tensor(const char* key, Tensor& into) {
  if (const auto v = find(key)) into = tensor_of(*v, path(key));
}
void Reader::finish() const {
  for (const Entry& entry : entries_) {
    if (entry.used) continue;
    const std::set<std::string> names(asked_.begin(), asked_.end());
    std::string known;
    for (const std::string& name : names) known += (known.empty() ? "" : ", ") + name;
    refuse(what_, "unknown option '" + std::string(entry.name) + "'; known: " + known);
  }
}

}  // namespace moesaic::python
