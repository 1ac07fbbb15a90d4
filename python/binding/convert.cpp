// SPDX-License-Identifier: Apache-2.0
#include "convert.h"

#include <set>

namespace moesaic::python {
namespace {

// How enumerations are spelled in option dictionaries.
constexpr Choice<WeightScale> kWeightScales[] = {{"default", WeightScale::kDefault},
    {"tensor", WeightScale::kTensor},
    {"channel", WeightScale::kChannel},
    {"block", WeightScale::kBlock},
    {"group", WeightScale::kGroup}};
constexpr Choice<GateOrder> kOrders[] = {{"gate_first", GateOrder::kGateFirst}, {"up_first", GateOrder::kUpFirst}};
constexpr Choice<GateLayout> kLayouts[] = {{"halves", GateLayout::kHalves}, {"interleaved", GateLayout::kInterleaved}};
constexpr Choice<Renormalize> kRenormalize[] = {
    {"default", Renormalize::kDefault}, {"never", Renormalize::kNever}, {"always", Renormalize::kAlways}};
constexpr Choice<WeightOn> kWeightOn[] = {{"output", WeightOn::kOutput}, {"input", WeightOn::kInput}};

[[noreturn]] void refuse(std::string_view argument, const std::string& what) {
  throw Error(ErrorCode::kInvalidArgument, std::string(argument) + ": " + what);
}

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

// --- what a layer is: read from a dictionary and written into one ---------------------------------------
// One list of fields per struct serves both ways; `V` is a Reader or a Writer.

namespace {

class Writer {
 public:
  void integer(const char* key, const std::int64_t& from) { options_.Set(key, from); }
  void integer(const char* key, const int& from) { options_.Set(key, static_cast<std::int64_t>(from)); }
  void number(const char* key, const float& from) { options_.Set(key, static_cast<double>(from)); }
  void flag(const char* key, const bool& from) { options_.Set(key, from); }
  template <typename E>
  void name(const char* key, E (*)(std::string_view), const E& from) {
    options_.Set(key, ffi::String(std::string(moesaic::name(from))));
  }
  template <typename E, std::size_t N>
  void choice(const char* key, const Choice<E> (&choices)[N], const E& from) {
    for (const Choice<E>& c : choices)
      if (c.value == from) options_.Set(key, ffi::String(std::string(c.name)));
  }
  template <typename Struct>
  void inner(const char* key, Struct& from) {
    Writer writer;
    fields(writer, from);
    options_.Set(key, writer.options_);
  }
  Options options() const { return options_; }

 private:
  Options options_;
};

template <typename V>
void fields(V& v, QuantSpec& spec) {
  v.name("scheme", parse_scheme, spec.scheme);
  v.choice("weight_scale", kWeightScales, spec.weight_scale);
  v.choice("act_scale", kActScales, spec.act_scale);
  v.integer("block_n", spec.block_n);
  v.integer("block_k", spec.block_k);
  v.integer("group_size", spec.group_size);
  v.flag("zero_points", spec.zero_points);
  v.choice("int8_rounding", kRoundings, spec.int8_rounding);
}

template <typename V>
void fields(V& v, ActivationSpec& spec) {
  v.name("kind", parse_activation, spec.kind);
  v.choice("order", kOrders, spec.order);
  v.choice("layout", kLayouts, spec.layout);
  v.number("alpha", spec.alpha);
  v.number("beta", spec.beta);
  v.number("limit", spec.limit);
}

template <typename V>
void fields(V& v, RoutingSpec& spec) {
  v.name("method", parse_routing, spec.method);
  v.choice("renormalize", kRenormalize, spec.renormalize);
  v.number("scale", spec.scale);
  v.integer("groups", spec.groups);
  v.integer("topk_groups", spec.topk_groups);
  v.number("jitter", spec.jitter);
  v.number("sum_floor", spec.sum_floor);
}

template <typename V>
void fields(V& v, LayerConfig& c) {
  v.integer("experts", c.experts);
  v.integer("hidden", c.hidden);
  v.integer("intermediate", c.intermediate);
  v.integer("top_k", c.top_k);
  v.integer("max_tokens", c.max_tokens);
  v.integer("local_first", c.local.first);
  v.integer("local_count", c.local.count);
  v.inner("quant", c.quant);
  v.inner("activation", c.activation);
  v.inner("routing", c.routing);
  v.choice("weight_on", kWeightOn, c.weight_on);
  v.name("input_dtype", parse_dtype, c.input_dtype);
  v.name("output_dtype", parse_dtype, c.output_dtype);
  v.integer("shared_experts", c.shared_experts);
  v.integer("shared_intermediate", c.shared_intermediate);
  auto cap = static_cast<std::int64_t>(c.workspace_cap);
  v.integer("workspace_cap", cap);
  if (cap < 0) refuse("workspace_cap", "expected 0 (no cap) or more bytes, got " + std::to_string(cap));
  c.workspace_cap = static_cast<std::size_t>(cap);
}

}  // namespace

void read(Reader& r, QuantSpec& spec) { fields(r, spec); }
void read(Reader& r, ActivationSpec& spec) { fields(r, spec); }
void read(Reader& r, RoutingSpec& spec) { fields(r, spec); }
void read(Reader& r, LayerConfig& config) { fields(r, config); }
Options options_of(const LayerConfig& config) {
  Writer writer;
  LayerConfig copy = config;
  fields(writer, copy);
  return writer.options();
}

void read(Reader& r, GemmWeights& w) {
  r.tensor("weight", w.weight);
  r.tensor("scale", w.scale);
  r.tensor("zero_point", w.zero_point);
  r.tensor("bias", w.bias);
  r.tensor("input_scale", w.input_scale);
  r.tensor("prequant", w.prequant);
  r.tensor("alpha", w.alpha);
}

void read(Reader& r, LayerWeights& w) {
  r.inner("fc1", w.fc1);
  r.inner("fc2", w.fc2);
  r.tensor("alpha", w.activation.alpha);
  r.tensor("beta", w.activation.beta);
  r.tensor("limit", w.activation.limit);
}

// --- arguments of the calls, named as the structs name them -------------------------------------------

namespace {

void read_add(Reader& r, Accumulate& into) {
  bool add = false;
  r.flag("add", add);
  into = add ? Accumulate::kAdd : Accumulate::kOverwrite;
}
void read_sorted(Reader& r, SortedRows& rows) {
  r.tensor("slots", rows.slots);
  r.tensor("block_experts", rows.block_experts);
  r.tensor("num_padded", rows.num_padded);
  r.integer("block_rows", rows.block_rows);
}

}  // namespace

void read(Reader& r, PrepareArgs& a) {
  r.tensor("hidden_states", a.hidden_states);
  r.tensor("hidden_scale", a.hidden_scale);
  r.tensor("topk_ids", a.topk_ids);
  r.tensor("topk_weights", a.topk_weights);
  r.tensor("expert_map", a.expert_map);
  r.tensor("rows", a.rows);
  r.tensor("row_scale", a.row_scale);
  r.tensor("num_tokens", a.num_tokens);
  r.tensor("slot_row", a.slot_row);
  r.tensor("status", a.status);
}

void read(Reader& r, ExpertsArgs& a) {
  r.name("format", parse_format, a.format);
  r.tensor("rows", a.rows);
  r.tensor("row_scale", a.row_scale);
  r.tensor("num_tokens", a.batched.num_tokens);
  read_sorted(r, a.sorted);
  r.tensor("row_weights", a.row_weights);
  r.tensor("output", a.output);
  r.integer("expected_tokens", a.expected_tokens);
}

void read(Reader& r, FinalizeArgs& a) {
  r.tensor("expert_output", a.expert_output);
  r.tensor("topk_ids", a.topk_ids);
  r.tensor("topk_weights", a.topk_weights);
  r.tensor("expert_map", a.expert_map);
  r.tensor("slot_row", a.slot_row);
  r.tensor("output", a.output);
  read_add(r, a.accumulate);
}

void read(Reader& r, GroupedGemmArgs& a) {
  r.inner("quant", a.quant);
  r.inner("b", a.b);
  r.tensor("a", a.a);
  r.tensor("a_scale", a.a_scale);
  read_sorted(r, a.sorted);
  r.tensor("num_tokens", a.batched.num_tokens);
  r.integer("top_k", a.top_k);
  r.choice("a_order", kRowOrders, a.a_order);
  r.choice("c_order", kRowOrders, a.c_order);
  r.tensor("row_weights", a.row_weights);
  r.tensor("c", a.c);
}

void read(Reader& r, AlignArgs& a) {
  r.tensor("topk_ids", a.topk_ids);
  r.integer("experts", a.experts);
  r.integer("local_first", a.local.first);
  r.integer("local_count", a.local.count);
  r.tensor("expert_map", a.expert_map);
  read_sorted(r, a.rows);
  r.tensor("slot_row", a.slot_row);
  r.tensor("tokens_per_expert", a.tokens_per_expert);
}

void read(Reader& r, RouteArgs& a) {
  r.inner("spec", a.spec);
  r.tensor("logits", a.logits);
  r.tensor("hidden_states", a.hidden_states);
  r.tensor("weight", a.router.weight);
  r.tensor("bias", a.router.bias);
  r.tensor("selection_bias", a.router.selection_bias);
  r.tensor("topk_ids", a.topk_ids);
  r.tensor("topk_weights", a.topk_weights);
}

void read(Reader& r, QuantizeArgs& a) {
  r.tensor("input", a.input);
  r.tensor("num_tokens", a.num_tokens);
  r.name("to", parse_dtype, a.to);
  r.choice("granularity", kActScales, a.granularity);
  r.integer("group_size", a.group_size);
  r.choice("int8_rounding", kRoundings, a.int8_rounding);
  r.tensor("static_scale", a.static_scale);
  r.tensor("output", a.output);
  r.tensor("scale", a.scale);
}

void read(Reader& r, ActivateArgs& a) {
  r.inner("spec", a.spec);
  r.tensor("input", a.input);
  r.tensor("row_expert", a.row_expert);
  r.tensor("alpha", a.parameters.alpha);
  r.tensor("beta", a.parameters.beta);
  r.tensor("limit", a.parameters.limit);
  r.tensor("output", a.output);
}

void read(Reader& r, SumArgs& a) {
  r.tensor("input", a.input);
  r.tensor("slot_row", a.slot_row);
  r.tensor("topk_weights", a.topk_weights);
  r.tensor("topk_ids", a.topk_ids);
  r.number("scale", a.scale);
  read_add(r, a.accumulate);
  r.tensor("output", a.output);
}

}  // namespace moesaic::python
