// SPDX-License-Identifier: Apache-2.0
// Which options make which struct: a layer's configuration, its weights, the arguments of each call.
#include "convert.h"

namespace moesaic::python {

// --- what a layer is: read from a dictionary and written into one ---------------------------------------
// One list of fields per struct serves both ways; `V` is a Reader or a Writer.

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
constexpr Choice<WeightStorage> kWeightStorage[] = {{"copied", WeightStorage::kCopied}, {"in_place", WeightStorage::kInPlace}};
constexpr Choice<WeightOn> kWeightOn[] = {{"output", WeightOn::kOutput}, {"input", WeightOn::kInput}};

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
  v.choice("weight_storage", kWeightStorage, c.weight_storage);
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
