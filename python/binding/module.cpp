// SPDX-License-Identifier: Apache-2.0
// The functions Python calls: thin, one per C++ entry point. No copies, no allocations of tensors;
// outputs and workspaces are the caller's.
#include "convert.h"

namespace moesaic::python {
namespace {

struct LayerObject : public ffi::Object {
  explicit LayerObject(Layer&& made) : layer(std::move(made)) {}
  Layer layer;
  TVM_FFI_DECLARE_OBJECT_INFO_FINAL("moesaic.Layer", LayerObject, ffi::Object);
};
struct LayerRef : public ffi::ObjectRef {
  explicit LayerRef(Layer&& layer) : ffi::ObjectRef(ffi::make_object<LayerObject>(std::move(layer))) {}
  TVM_FFI_DEFINE_OBJECT_REF_METHODS_NULLABLE(LayerRef, ffi::ObjectRef, LayerObject);
};

const Layer& layer_of(const LayerRef& ref) { return ref.as<LayerObject>()->layer; }
Layer& mutable_layer(const LayerRef& ref) {
  return const_cast<LayerObject*>(ref.as<LayerObject>())->layer;
}

// The caller's workspace; on the CPU, without one, a buffer of this thread's that only grows. (On CUDA
// the Python side takes it from the framework's stream-ordered allocator.)
Workspace workspace_of(const Tensor& given, Device device, std::size_t needed) {
  if (given.defined()) return {given.data, static_cast<std::size_t>(given.numel()) * size_of(given.dtype)};
  if (device.type != DeviceType::kCpu || needed == 0) return {};
  static thread_local WorkspaceBuffer buffer;
  if (buffer.view().bytes < needed) buffer = WorkspaceBuffer(device, needed);
  return buffer.view();
}

// --- level 1 ----------------------------------------------------------------------------------------

LayerRef layer_new(Options config, ffi::String device) {
  return guarded([&] {
    return LayerRef(Layer(read_all<LayerConfig>("config", config), parse_device(std::string(device))));
  });
}
void layer_load(LayerRef ref, Options weights) {
  guarded([&] { mutable_layer(ref).load(read_all<LayerWeights>("weights", weights)); });
}
void layer_load_expert(LayerRef ref, std::int64_t expert, Options weights) {
  guarded([&] { mutable_layer(ref).load_expert(expert, read_all<LayerWeights>("weights", weights)); });
}
void layer_unpack_expert(LayerRef ref, std::int64_t expert, ffi::AnyView fc1, ffi::AnyView fc2) {
  guarded([&] { layer_of(ref).unpack_expert(expert, tensor_of(fc1), tensor_of(fc2)); });
}
void layer_load_shared(LayerRef ref, Options weights, ffi::AnyView gate) {
  guarded([&] { mutable_layer(ref).load_shared(read_all<LayerWeights>("weights", weights), tensor_of(gate)); });
}
void layer_set_router(LayerRef ref, ffi::AnyView weight, ffi::AnyView bias, ffi::AnyView selection_bias) {
  guarded([&] {
    mutable_layer(ref).set_router(
        {.weight = tensor_of(weight), .bias = tensor_of(bias), .selection_bias = tensor_of(selection_bias)});
  });
}
std::int64_t layer_workspace_bytes(LayerRef ref, std::int64_t tokens) {
  return guarded([&] { return static_cast<std::int64_t>(layer_of(ref).workspace_bytes(tokens)); });
}
std::int64_t layer_weight_bytes(LayerRef ref) { return static_cast<std::int64_t>(layer_of(ref).weight_bytes()); }
bool layer_ready(LayerRef ref) { return layer_of(ref).ready(); }

void layer_forward(LayerRef ref, ffi::AnyView hidden_states, ffi::AnyView hidden_scale,
                   ffi::AnyView topk_ids, ffi::AnyView topk_weights, ffi::AnyView router_logits,
                   ffi::AnyView output, bool add, ffi::AnyView tokens_per_expert, ffi::AnyView workspace) {
  guarded([&] {
    ForwardArgs args{.hidden_states = tensor_of(hidden_states),
                     .hidden_scale = tensor_of(hidden_scale),
                     .topk_ids = tensor_of(topk_ids),
                     .topk_weights = tensor_of(topk_weights),
                     .router_logits = tensor_of(router_logits),
                     .output = tensor_of(output),
                     .accumulate = add ? Accumulate::kAdd : Accumulate::kOverwrite,
                     .tokens_per_expert = tensor_of(tokens_per_expert)};
    const Layer& layer = layer_of(ref);
    const std::int64_t tokens = args.hidden_states.shape[0];
    const bool sized = tokens >= 0 && tokens <= layer.config().max_tokens;  // else forward complains
    args.workspace = workspace_of(tensor_of(workspace), layer.device(), sized ? layer.workspace_bytes(tokens) : 0);
    args.stream = current_stream(args.hidden_states);
    layer.forward(args);
  });
}

// --- level 2 ----------------------------------------------------------------------------------------
// `layer` is a Layer, or a config dictionary for weights that stay the caller's.

LayerConfig config_of(const ffi::AnyView& layer) {
  if (const auto ref = layer.as<LayerRef>()) return layer_of(*ref).config();
  return read_all<LayerConfig>("config", layer.cast<Options>());
}

void stage_prepare(ffi::AnyView layer, Options o) {
  guarded([&] {
    PrepareArgs a;
    Reader r("prepare", o);
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
    Tensor workspace;
    r.tensor("workspace", workspace);
    r.finish();
    const LayerConfig config = config_of(layer);
    const bool sized = a.topk_ids.rank == 2 && a.rows.rank == 3;
    a.workspace = workspace_of(workspace, a.hidden_states.device,
                               sized ? stage_workspace_bytes(config, Format::kBatched, a.topk_ids.shape[0],
                                                             a.rows.shape[1], a.hidden_states.device)
                                     : 0);
    a.stream = current_stream(a.hidden_states);
    if (const auto ref = layer.as<LayerRef>())
      prepare(layer_of(*ref), a);
    else
      prepare(config, a);
  });
}

void stage_experts(ffi::AnyView layer, ffi::AnyView weights, Options o) {
  guarded([&] {
    ExpertsArgs a;
    Reader r("experts", o);
    r.text("format", [&](std::string_view t) { a.format = parse_format(t); });
    r.tensor("rows", a.rows);
    r.tensor("row_scale", a.row_scale);
    r.tensor("num_tokens", a.batched.num_tokens);
    r.tensor("slots", a.sorted.slots);
    r.tensor("block_experts", a.sorted.block_experts);
    r.tensor("num_padded", a.sorted.num_padded);
    r.integer("block_rows", a.sorted.block_rows);
    r.tensor("row_weights", a.row_weights);
    r.tensor("output", a.output);
    r.integer("expected_tokens", a.expected_tokens);
    Tensor workspace;
    r.tensor("workspace", workspace);
    r.finish();
    const LayerConfig config = config_of(layer);
    const bool batched = a.format == Format::kBatched && a.rows.rank == 3;
    const bool sorted = a.format == Format::kSorted && a.rows.rank == 2 && a.sorted.slots.rank == 1;
    std::size_t needed = 0;
    if (batched)
      needed = stage_workspace_bytes(config, a.format, 0, a.rows.shape[1], a.rows.device);
    else if (sorted)
      needed = stage_workspace_bytes(config, a.format, a.rows.shape[0], a.sorted.slots.shape[0], a.rows.device);
    a.workspace = workspace_of(workspace, a.rows.device, needed);
    a.stream = current_stream(a.rows);
    if (const auto ref = layer.as<LayerRef>())
      experts(layer_of(*ref), a);
    else
      experts(config, read_all<LayerWeights>("weights", weights.cast<Options>()), a);
  });
}

void stage_finalize(ffi::AnyView layer, Options o) {
  guarded([&] {
    FinalizeArgs a;
    Reader r("finalize", o);
    r.tensor("expert_output", a.expert_output);
    r.tensor("topk_ids", a.topk_ids);
    r.tensor("topk_weights", a.topk_weights);
    r.tensor("expert_map", a.expert_map);
    r.tensor("slot_row", a.slot_row);
    r.tensor("output", a.output);
    bool add = false;
    r.flag("add", add);
    a.accumulate = add ? Accumulate::kAdd : Accumulate::kOverwrite;
    Tensor workspace;
    r.tensor("workspace", workspace);
    r.finish();
    const LayerConfig config = config_of(layer);
    const bool sized = a.output.rank == 2 && a.expert_output.rank == 3;
    a.workspace = workspace_of(workspace, a.output.device,
                               sized ? stage_workspace_bytes(config, Format::kBatched, a.output.shape[0],
                                                             a.expert_output.shape[1], a.output.device)
                                     : 0);
    a.stream = current_stream(a.output);
    if (const auto ref = layer.as<LayerRef>())
      finalize(layer_of(*ref), a);
    else
      finalize(config, a);
  });
}

std::int64_t stages_workspace_bytes(Options config, ffi::String format, std::int64_t tokens,
                                    std::int64_t capacity, ffi::String device) {
  return guarded([&] {
    return static_cast<std::int64_t>(stage_workspace_bytes(
        read_all<LayerConfig>("config", config), parse_format(std::string(format)), tokens, capacity,
        parse_device(std::string(device))));
  });
}

// --- level 3 ----------------------------------------------------------------------------------------

GroupedGemmArgs read_gemm(const Options& o) {
  GroupedGemmArgs a;
  Reader r("grouped_gemm", o);
  r.options("quant", [&](Reader& inner) { read(inner, a.quant); });
  r.options("b", [&](Reader& inner) { read(inner, a.b); });
  r.tensor("a", a.a);
  r.tensor("a_scale", a.a_scale);
  r.tensor("slots", a.sorted.slots);
  r.tensor("block_experts", a.sorted.block_experts);
  r.tensor("num_padded", a.sorted.num_padded);
  r.integer("block_rows", a.sorted.block_rows);
  r.tensor("num_tokens", a.batched.num_tokens);
  r.integer("top_k", a.top_k);
  r.text("a_order", [&](std::string_view t) { a.a_order = choose("a_order", kRowOrders, t); });
  r.text("c_order", [&](std::string_view t) { a.c_order = choose("c_order", kRowOrders, t); });
  r.tensor("row_weights", a.row_weights);
  r.tensor("c", a.c);
  Tensor workspace;
  r.tensor("workspace", workspace);
  r.finish();
  a.workspace = workspace_of(workspace, a.a.device, grouped_gemm_workspace_bytes(a));
  a.stream = current_stream(a.a);
  return a;
}
std::int64_t gemm_workspace_bytes(Options o) {
  return guarded([&] { return static_cast<std::int64_t>(grouped_gemm_workspace_bytes(read_gemm(o))); });
}
void gemm(Options o) {
  guarded([&] { grouped_gemm(read_gemm(o)); });
}

void align_slots(ffi::AnyView topk_ids, std::int64_t experts, std::int64_t first, std::int64_t count,
                 ffi::AnyView expert_map, std::int64_t block_rows, ffi::AnyView slots,
                 ffi::AnyView block_experts, ffi::AnyView num_padded, ffi::AnyView slot_row,
                 ffi::AnyView tokens_per_expert, ffi::AnyView workspace) {
  guarded([&] {
    AlignArgs a{.topk_ids = tensor_of(topk_ids),
                .experts = experts,
                .local = {first, count},
                .expert_map = tensor_of(expert_map),
                .rows = {.slots = tensor_of(slots),
                         .block_experts = tensor_of(block_experts),
                         .num_padded = tensor_of(num_padded),
                         .block_rows = block_rows},
                .slot_row = tensor_of(slot_row),
                .tokens_per_expert = tensor_of(tokens_per_expert)};
    a.workspace = workspace_of(tensor_of(workspace), a.topk_ids.device,
                               align_workspace_bytes(a.topk_ids.numel(), experts, a.topk_ids.device));
    a.stream = current_stream(a.topk_ids);
    align(a);
  });
}
std::int64_t align_length(std::int64_t slots, std::int64_t experts, std::int64_t block_rows) {
  return guarded([&] { return align_capacity(slots, experts, block_rows); });
}
std::int64_t align_bytes(std::int64_t slots, std::int64_t experts, ffi::String device) {
  return guarded([&] {
    return static_cast<std::int64_t>(align_workspace_bytes(slots, experts, parse_device(std::string(device))));
  });
}

void route_tokens(Options spec, ffi::AnyView logits, ffi::AnyView hidden_states, ffi::AnyView weight,
                  ffi::AnyView bias, ffi::AnyView selection_bias, ffi::AnyView topk_ids,
                  ffi::AnyView topk_weights, ffi::AnyView workspace) {
  guarded([&] {
    RouteArgs a{.spec = read_all<RoutingSpec>("routing", spec),
                .logits = tensor_of(logits),
                .hidden_states = tensor_of(hidden_states),
                .router = {.weight = tensor_of(weight), .bias = tensor_of(bias),
                           .selection_bias = tensor_of(selection_bias)},
                .topk_ids = tensor_of(topk_ids),
                .topk_weights = tensor_of(topk_weights)};
    const bool computes = !a.logits.defined() && a.router.weight.rank == 2 && a.topk_ids.rank == 2;
    a.workspace = workspace_of(tensor_of(workspace), a.topk_ids.device,
                               computes ? route_workspace_bytes(a.topk_ids.shape[0], a.router.weight.shape[0]) : 0);
    a.stream = current_stream(a.topk_ids);
    route(a);
  });
}

QuantizeArgs read_quantize(ffi::AnyView input, ffi::AnyView num_tokens, ffi::String to, ffi::String granularity,
                           std::int64_t group_size, ffi::String rounding, ffi::AnyView static_scale,
                           ffi::AnyView output, ffi::AnyView scale) {
  return {.input = tensor_of(input),
          .num_tokens = tensor_of(num_tokens),
          .to = parse_dtype(std::string(to)),
          .granularity = choose("granularity", kActScales, std::string(granularity)),
          .group_size = group_size,
          .int8_rounding = choose("int8_rounding", kRoundings, std::string(rounding)),
          .static_scale = tensor_of(static_scale),
          .output = tensor_of(output),
          .scale = tensor_of(scale)};
}
void quantize_rows(ffi::AnyView input, ffi::AnyView num_tokens, ffi::String to, ffi::String granularity,
                   std::int64_t group_size, ffi::String rounding, ffi::AnyView static_scale, ffi::AnyView output,
                   ffi::AnyView scale, ffi::AnyView workspace) {
  guarded([&] {
    QuantizeArgs a = read_quantize(input, num_tokens, to, granularity, group_size, rounding, static_scale, output, scale);
    a.workspace = workspace_of(tensor_of(workspace), a.input.device, quantize_workspace_bytes(a));
    a.stream = current_stream(a.input);
    quantize(a);
  });
}
std::int64_t quantize_bytes(ffi::AnyView input, ffi::AnyView num_tokens, ffi::String to, ffi::String granularity,
                            std::int64_t group_size, ffi::String rounding, ffi::AnyView static_scale,
                            ffi::AnyView output, ffi::AnyView scale) {
  return guarded([&] {
    return static_cast<std::int64_t>(quantize_workspace_bytes(
        read_quantize(input, num_tokens, to, granularity, group_size, rounding, static_scale, output, scale)));
  });
}

void activate_rows(Options spec, ffi::AnyView input, ffi::AnyView row_expert, ffi::AnyView alpha,
                   ffi::AnyView beta, ffi::AnyView limit, ffi::AnyView output) {
  guarded([&] {
    ActivateArgs a{.spec = read_all<ActivationSpec>("activation", spec),
                   .parameters = {tensor_of(alpha), tensor_of(beta), tensor_of(limit)},
                   .input = tensor_of(input),
                   .row_expert = tensor_of(row_expert),
                   .output = tensor_of(output)};
    a.stream = current_stream(a.input);
    activate(a);
  });
}

void sum(ffi::AnyView input, ffi::AnyView slot_row, ffi::AnyView topk_weights, ffi::AnyView topk_ids,
         double scale, bool add, ffi::AnyView output) {
  guarded([&] {
    SumArgs a{.input = tensor_of(input),
              .slot_row = tensor_of(slot_row),
              .topk_weights = tensor_of(topk_weights),
              .topk_ids = tensor_of(topk_ids),
              .scale = static_cast<float>(scale),
              .accumulate = add ? Accumulate::kAdd : Accumulate::kOverwrite,
              .output = tensor_of(output)};
    a.stream = current_stream(a.output);
    sum_slots(a);
  });
}

// --- the process --------------------------------------------------------------------------------------

ffi::Array<ffi::Map<ffi::String, ffi::String>> list_devices() {
  return guarded([&] {
    ffi::Array<ffi::Map<ffi::String, ffi::String>> list;
    for (const DeviceInfo& info : devices())
      list.push_back(ffi::Map<ffi::String, ffi::String>{{"device", to_string(info.device)},
                                                        {"name", info.name},
                                                        {"kernels", info.kernels},
                                                        {"note", info.note}});
    return list;
  });
}
ffi::Array<ffi::String> scheme_names() {
  ffi::Array<ffi::String> list;
  for (int i = 0; i < kNumSchemes; ++i) list.push_back(std::string(name(static_cast<Scheme>(i))));
  return list;
}
ffi::String support_reason(Options config, ffi::String format, ffi::String device) {
  return guarded([&]() -> ffi::String {
    const Support s = supports(read_all<LayerConfig>("config", config), parse_format(std::string(format)),
                               parse_device(std::string(device)));
    return s.supported ? std::string() : s.reason;
  });
}
ffi::String library_version() { return version(); }
void threads(std::int64_t n) {
  guarded([&] { set_num_threads(static_cast<int>(n)); });
}
void kernels(ffi::String type, ffi::String level) {
  guarded([&] {
    set_kernels(std::string(type) == "cuda" ? DeviceType::kCuda : DeviceType::kCpu, std::string(level));
  });
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(layer_new, layer_new);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(layer_load, layer_load);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(layer_load_expert, layer_load_expert);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(layer_unpack_expert, layer_unpack_expert);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(layer_load_shared, layer_load_shared);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(layer_set_router, layer_set_router);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(layer_workspace_bytes, layer_workspace_bytes);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(layer_weight_bytes, layer_weight_bytes);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(layer_ready, layer_ready);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(layer_forward, layer_forward);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(prepare, stage_prepare);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(experts, stage_experts);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(finalize, stage_finalize);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(stage_workspace_bytes, stages_workspace_bytes);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(grouped_gemm, gemm);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(grouped_gemm_workspace_bytes, gemm_workspace_bytes);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(align, align_slots);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(align_capacity, align_length);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(align_workspace_bytes, align_bytes);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(route, route_tokens);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(quantize, quantize_rows);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(quantize_workspace_bytes, quantize_bytes);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(activate, activate_rows);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(sum_slots, sum);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(devices, list_devices);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(schemes, scheme_names);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(support_reason, support_reason);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(version, library_version);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(set_num_threads, threads);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(set_kernels, kernels);

}  // namespace
}  // namespace moesaic::python
