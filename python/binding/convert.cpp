// SPDX-License-Identifier: Apache-2.0
#include "convert.h"

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

DType dtype_of(const DLDataType& t) {
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
  }
  throw Error(ErrorCode::kInvalidArgument,
              "tensor: dtype " + std::string(ffi::DLDataTypeToString(t)) +
                  " is not one of f32, f16, bf16, fp8_e4m3, e8m0, i8, u8, i32, i64");
}

Tensor view_of(const DLTensor& t, const std::string& dtype) {
  Tensor view;
  if (t.device.device_type == kDLCUDA) {
    view.device = {DeviceType::kCuda, t.device.device_id};
  } else if (t.device.device_type != kDLCPU && t.device.device_type != kDLCUDAHost) {
    throw Error(ErrorCode::kInvalidArgument, "tensor: lies on neither the CPU nor a CUDA device");
  }
  if (dtype.empty()) {
    view.dtype = dtype_of(t.dtype);
  } else {
    view.dtype = parse_dtype(dtype);
    if (size_of(view.dtype) * 8 != t.dtype.bits)
      throw Error(ErrorCode::kInvalidArgument, "dtype: " + dtype + " has another width than the array's elements");
  }
  view.data = static_cast<char*>(t.data) + t.byte_offset;
  view.rank = std::max(t.ndim, 1);  // a 0-d scalar is [1]
  if (t.ndim > Tensor::kMaxRank)
    throw Error(ErrorCode::kInvalidArgument, "tensor: rank above 4");
  view.shape[0] = view.strides[0] = 1;
  std::int64_t stride = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    view.shape[i] = t.shape[i];
    view.strides[i] = t.strides != nullptr ? t.strides[i] : stride;
    stride *= t.shape[i];
  }
  return view;
}

}  // namespace

Tensor tensor_of(const ffi::AnyView& value) {
  if (value == nullptr) return {};
  if (const auto pair = value.as<ffi::Array<ffi::Any>>()) {
    const auto view = (*pair)[0].cast<ffi::Tensor>();
    return view_of(*view.GetDLTensorPtr(), (*pair)[1].cast<ffi::String>());
  }
  return view_of(*value.cast<DLTensor*>(), {});
}

Stream current_stream(const Tensor& tensor) {
  if (tensor.device.type != DeviceType::kCuda) return {};
  return {TVMFFIEnvGetStream(kDLCUDA, tensor.device.index)};
}

std::optional<ffi::Any> Reader::find(const char* key) {
  used_.insert(key);
  const auto it = options_.find(key);
  if (it == options_.end() || (*it).second == nullptr) return std::nullopt;
  return (*it).second;
}
void Reader::integer(const char* key, std::int64_t& into) {
  if (const auto v = find(key)) into = v->cast<std::int64_t>();
}
void Reader::integer(const char* key, int& into) {
  if (const auto v = find(key)) into = static_cast<int>(v->cast<std::int64_t>());
}
void Reader::number(const char* key, float& into) {
  if (const auto v = find(key)) into = static_cast<float>(v->cast<double>());
}
void Reader::flag(const char* key, bool& into) {
  if (const auto v = find(key)) into = v->cast<bool>();
}
void Reader::text(const char* key, const std::function<void(std::string_view)>& into) {
  if (const auto v = find(key)) into(std::string(v->cast<ffi::String>()));
}
void Reader::options(const char* key, const std::function<void(Reader&)>& into) {
  if (const auto v = find(key)) {
    Reader inner(what_ + "." + key, v->cast<Options>());
    into(inner);
    inner.finish();
  }
}
void Reader::tensor(const char* key, Tensor& into) {
  if (const auto v = find(key)) into = tensor_of(ffi::AnyView(*v));
}
void Reader::finish() const {
  for (const auto& [key, value] : options_) {
    if (used_.count(std::string(key)) == 0)
      throw Error(ErrorCode::kInvalidArgument, what_ + ": unknown option '" + std::string(key) + "'");
  }
}

void read(Reader& r, QuantSpec& spec) {
  r.text("scheme", [&](std::string_view t) { spec.scheme = parse_scheme(t); });
  r.text("weight_scale", [&](std::string_view t) { spec.weight_scale = choose("weight_scale", kWeightScales, t); });
  r.text("act_scale", [&](std::string_view t) { spec.act_scale = choose("act_scale", kActScales, t); });
  r.integer("block_n", spec.block_n);
  r.integer("block_k", spec.block_k);
  r.integer("group_size", spec.group_size);
  r.flag("zero_points", spec.zero_points);
  r.text("int8_rounding", [&](std::string_view t) { spec.int8_rounding = choose("int8_rounding", kRoundings, t); });
}

void read(Reader& r, ActivationSpec& spec) {
  r.text("kind", [&](std::string_view t) { spec.kind = parse_activation(t); });
  r.text("order", [&](std::string_view t) { spec.order = choose("order", kOrders, t); });
  r.text("layout", [&](std::string_view t) { spec.layout = choose("layout", kLayouts, t); });
  r.number("alpha", spec.alpha);
  r.number("beta", spec.beta);
  r.number("limit", spec.limit);
}

void read(Reader& r, RoutingSpec& spec) {
  r.text("method", [&](std::string_view t) { spec.method = parse_routing(t); });
  r.text("renormalize", [&](std::string_view t) { spec.renormalize = choose("renormalize", kRenormalize, t); });
  r.number("scale", spec.scale);
  r.integer("groups", spec.groups);
  r.integer("topk_groups", spec.topk_groups);
  r.number("jitter", spec.jitter);
  r.number("sum_floor", spec.sum_floor);
}

void read(Reader& r, LayerConfig& c) {
  r.integer("experts", c.experts);
  r.integer("hidden", c.hidden);
  r.integer("intermediate", c.intermediate);
  r.integer("top_k", c.top_k);
  r.integer("max_tokens", c.max_tokens);
  r.integer("local_first", c.local.first);
  r.integer("local_count", c.local.count);
  r.options("quant", [&](Reader& inner) { read(inner, c.quant); });
  r.options("activation", [&](Reader& inner) { read(inner, c.activation); });
  r.options("routing", [&](Reader& inner) { read(inner, c.routing); });
  r.text("weight_on", [&](std::string_view t) { c.weight_on = choose("weight_on", kWeightOn, t); });
  r.text("input_dtype", [&](std::string_view t) { c.input_dtype = parse_dtype(t); });
  r.text("output_dtype", [&](std::string_view t) { c.output_dtype = parse_dtype(t); });
  r.integer("shared_experts", c.shared_experts);
  r.integer("shared_intermediate", c.shared_intermediate);
  std::int64_t cap = 0;
  r.integer("workspace_cap", cap);
  c.workspace_cap = static_cast<std::size_t>(cap);
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
  r.options("fc1", [&](Reader& inner) { read(inner, w.fc1); });
  r.options("fc2", [&](Reader& inner) { read(inner, w.fc2); });
  r.tensor("alpha", w.activation.alpha);
  r.tensor("beta", w.activation.beta);
  r.tensor("limit", w.activation.limit);
}

Options options_of(const LayerConfig& c) {
  const auto text = [](std::string_view t) { return ffi::String(std::string(t)); };
  const QuantSpec& q = c.quant;
  const ActivationSpec& a = c.activation;
  const RoutingSpec& r = c.routing;
  const Options quant{{"scheme", text(name(q.scheme))},
                      {"weight_scale", name_of(kWeightScales, q.weight_scale)},
                      {"act_scale", name_of(kActScales, q.act_scale)},
                      {"block_n", q.block_n},
                      {"block_k", q.block_k},
                      {"group_size", q.group_size},
                      {"zero_points", q.zero_points},
                      {"int8_rounding", name_of(kRoundings, q.int8_rounding)}};
  const Options activation{{"kind", text(name(a.kind))},
                           {"order", name_of(kOrders, a.order)},
                           {"layout", name_of(kLayouts, a.layout)},
                           {"alpha", static_cast<double>(a.alpha)},
                           {"beta", static_cast<double>(a.beta)},
                           {"limit", static_cast<double>(a.limit)}};
  const Options routing{{"method", text(name(r.method))},
                        {"renormalize", name_of(kRenormalize, r.renormalize)},
                        {"scale", static_cast<double>(r.scale)},
                        {"groups", static_cast<std::int64_t>(r.groups)},
                        {"topk_groups", static_cast<std::int64_t>(r.topk_groups)},
                        {"jitter", static_cast<double>(r.jitter)},
                        {"sum_floor", static_cast<double>(r.sum_floor)}};
  return {{"experts", c.experts},
          {"hidden", c.hidden},
          {"intermediate", c.intermediate},
          {"top_k", c.top_k},
          {"max_tokens", c.max_tokens},
          {"local_first", c.local.first},
          {"local_count", c.local.count},
          {"quant", quant},
          {"activation", activation},
          {"routing", routing},
          {"weight_on", name_of(kWeightOn, c.weight_on)},
          {"input_dtype", text(name(c.input_dtype))},
          {"output_dtype", text(name(c.output_dtype))},
          {"shared_experts", c.shared_experts},
          {"shared_intermediate", c.shared_intermediate},
          {"workspace_cap", static_cast<std::int64_t>(c.workspace_cap)}};
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
  r.text("format", [&](std::string_view t) { a.format = parse_format(t); });
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
  r.options("quant", [&](Reader& inner) { read(inner, a.quant); });
  r.options("b", [&](Reader& inner) { read(inner, a.b); });
  r.tensor("a", a.a);
  r.tensor("a_scale", a.a_scale);
  read_sorted(r, a.sorted);
  r.tensor("num_tokens", a.batched.num_tokens);
  r.integer("top_k", a.top_k);
  r.text("a_order", [&](std::string_view t) { a.a_order = choose("a_order", kRowOrders, t); });
  r.text("c_order", [&](std::string_view t) { a.c_order = choose("c_order", kRowOrders, t); });
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
  r.options("spec", [&](Reader& inner) { read(inner, a.spec); });
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
  r.text("to", [&](std::string_view t) { a.to = parse_dtype(t); });
  r.text("granularity", [&](std::string_view t) { a.granularity = choose("granularity", kActScales, t); });
  r.integer("group_size", a.group_size);
  r.text("int8_rounding", [&](std::string_view t) { a.int8_rounding = choose("int8_rounding", kRoundings, t); });
  r.tensor("static_scale", a.static_scale);
  r.tensor("output", a.output);
  r.tensor("scale", a.scale);
}

void read(Reader& r, ActivateArgs& a) {
  r.options("spec", [&](Reader& inner) { read(inner, a.spec); });
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
