// SPDX-License-Identifier: Apache-2.0
// The functions Python calls: thin, one per C++ entry point. No copies, no allocations of tensors;
// outputs and workspaces are the caller's.
#include "convert.h"
#include "openmp.h"

#include <algorithm>

namespace moesaic::python {
namespace {

struct LayerObject : public ffi::Object {
  explicit LayerObject(Layer&& made) : layer(std::move(made)) {}
  Layer layer;
  TVM_FFI_DECLARE_OBJECT_INFO_FINAL("moesaic.Layer", LayerObject, ffi::Object);
};
struct LayerRef : public ffi::ObjectRef {
  explicit LayerRef(Layer&& layer) : ffi::ObjectRef(ffi::make_object<LayerObject>(std::move(layer))) {}
  TVM_FFI_DEFINE_OBJECT_REF_METHODS_NOTNULLABLE(LayerRef, ffi::ObjectRef, LayerObject);
};

const Layer& layer_of(const LayerRef& ref) { return ref.as<LayerObject>()->layer; }
Layer& mutable_layer(const LayerRef& ref) {
  return const_cast<LayerObject*>(ref.as<LayerObject>())->layer;
}

// Scratch of one call. What the framework's allocator lent goes back when the call returns, in the order of the stream that
// the work is on.
struct Scratch {
  Workspace view;
  ffi::Optional<ffi::Tensor> lent{};
};

// From the allocator that a torch tensor among the arguments brings with it: a third of what torch.empty takes. Empty where there
// is none, or no memory: the Python side then asks, and shows the framework's own error.
Scratch borrow(Device device, std::size_t bytes) {
  if (TVMFFIEnvGetDLPackManagedTensorAllocator() == nullptr) return {};
  try {
    ffi::Tensor lent = ffi::Tensor::FromEnvAlloc(TVMFFIEnvTensorAlloc, {static_cast<std::int64_t>(bytes)},
                                                 DLDataType{kDLUInt, 8, 1}, DLDevice{kDLCUDA, device.index});
    return {.view = {lent.data_ptr(), bytes}, .lent = std::move(lent)};
  } catch (const ffi::Error&) {
    return {};
  }
}

// `given`: the caller's workspace; True: what the framework lends; None. On the CPU, without a workspace, a buffer of this
// thread's that only grows.
Scratch scratch_for(const ffi::AnyView& given, Device device, std::size_t needed) {
  const bool lendable = given.type_index() == ffi::TypeIndex::kTVMFFIBool;
  if (given == nullptr || lendable) {
    if (needed == 0) return {};
    if (device.type != DeviceType::kCpu) return lendable ? borrow(device, needed) : Scratch{};
    static thread_local WorkspaceBuffer buffer;
    if (buffer.view().bytes < needed) buffer = WorkspaceBuffer(device, needed);
    return {.view = buffer.view()};
  }
  const Tensor tensor = tensor_of(given, "workspace");
  const auto refuse = [&](const std::string& what) { throw Error(ErrorCode::kInvalidArgument, "workspace: " + what); };
  if (!(tensor.device == device))
    refuse("expected on " + to_string(device) + ", got " + to_string(tensor) + "; pass scratch of that device");
  if (!tensor.is_contiguous())
    refuse("must be contiguous, got " + to_string(tensor) + " with other strides; pass a flat array of bytes");
  return {.view = {tensor.data, static_cast<std::size_t>(tensor.numel()) * size_of(tensor.dtype)}};
}

// Every call that needs scratch returns 0 or, on a device, the bytes that it was not given and could not borrow; then nothing
// has run, and the Python side makes them.

// --- level 1 ----------------------------------------------------------------------------------------

LayerRef layer_new(Options config, ffi::String device) {
  return guarded([&] {
    return LayerRef(Layer(read_all<LayerConfig>("config", config), parse_device(std::string(device))));
  });
}
// A checkpoint's layer, loaded: what the overrides leave out is the checkpoint's own.
LayerRef layer_from_checkpoint(ffi::String path, std::int64_t index, Options options, ffi::String device) {
  return guarded([&] {
    LayerOverrides overrides;
    Reader r("load_checkpoint", options);
    r.integer("max_tokens", overrides.max_tokens);
    r.integer("local_first", overrides.local.first);
    r.integer("local_count", overrides.local.count);
    if (const auto t = r.text("scheme")) overrides.scheme = parse_scheme(*t);
    if (const auto t = r.text("dtype")) overrides.dtype = parse_dtype(*t);
    bool shared = false;
    r.flag("shared_experts", shared);
    overrides.shared = shared ? SharedExperts::kOn : SharedExperts::kOff;
    r.finish();
    const Checkpoint checkpoint = Checkpoint::open(std::string(path));
    Layer layer(checkpoint.layer_config(index, overrides), parse_device(std::string(device)));
    checkpoint.load(index, layer);
    return LayerRef(std::move(layer));
  });
}
Options layer_config(LayerRef ref) {
  return guarded([&] { return options_of(layer_of(ref).config()); });
}
ffi::Array<ffi::Map<ffi::String, ffi::Any>> checkpoint_layers(ffi::String path) {
  return guarded([&] {
    ffi::Array<ffi::Map<ffi::String, ffi::Any>> list;
    const Checkpoint checkpoint = Checkpoint::open(std::string(path));  // owns what `layers` shows
    for (const CheckpointLayer& l : checkpoint.layers())
      list.push_back(ffi::Map<ffi::String, ffi::Any>{{"index", l.index},
                                                     {"name", l.name},
                                                     {"storage", l.storage},
                                                     {"experts", l.experts},
                                                     {"hidden", l.hidden},
                                                     {"intermediate", l.intermediate},
                                                     {"top_k", l.top_k},
                                                     {"shared_experts", l.shared_experts},
                                                     {"scheme", std::string(name(l.quant.scheme))},
                                                     {"bytes", static_cast<std::int64_t>(l.bytes)}});
    return list;
  });
}
void layer_load(LayerRef ref, Options weights) {
  guarded([&] { mutable_layer(ref).load(read_all<LayerWeights>("weights", weights)); });
}
void layer_load_expert(LayerRef ref, std::int64_t expert, Options weights) {
  guarded([&] { mutable_layer(ref).load_expert(expert, read_all<LayerWeights>("weights", weights)); });
}
void layer_unpack_expert(LayerRef ref, std::int64_t expert, ffi::AnyView fc1, ffi::AnyView fc2) {
  guarded([&] { layer_of(ref).unpack_expert(expert, tensor_of(fc1, "fc1"), tensor_of(fc2, "fc2")); });
}
void layer_load_shared(LayerRef ref, Options weights, ffi::AnyView gate) {
  guarded([&] { mutable_layer(ref).load_shared(read_all<LayerWeights>("weights", weights), tensor_of(gate, "gate")); });
}
void layer_set_router(LayerRef ref, ffi::AnyView weight, ffi::AnyView bias, ffi::AnyView selection_bias) {
  guarded([&] {
    mutable_layer(ref).set_router(
        {.weight = tensor_of(weight, "weight"),
         .bias = tensor_of(bias, "bias"),
         .selection_bias = tensor_of(selection_bias, "selection_bias")});
  });
}
std::int64_t layer_workspace_bytes(LayerRef ref, std::int64_t tokens) {
  return guarded([&] { return static_cast<std::int64_t>(layer_of(ref).workspace_bytes(tokens)); });
}
std::int64_t layer_weight_bytes(LayerRef ref) { return static_cast<std::int64_t>(layer_of(ref).weight_bytes()); }
bool layer_ready(LayerRef ref) { return layer_of(ref).ready(); }

std::int64_t layer_forward(LayerRef ref, ffi::AnyView workspace, ffi::AnyView hidden_states, ffi::AnyView hidden_scale,
                           ffi::AnyView topk_ids, ffi::AnyView topk_weights, ffi::AnyView router_logits,
                           ffi::AnyView output, bool add, ffi::AnyView tokens_per_expert) {
  return guarded([&]() -> std::int64_t {
    ForwardArgs args{.hidden_states = tensor_of(hidden_states, "hidden_states"),
                     .hidden_scale = tensor_of(hidden_scale, "hidden_scale"),
                     .topk_ids = tensor_of(topk_ids, "topk_ids"),
                     .topk_weights = tensor_of(topk_weights, "topk_weights"),
                     .router_logits = tensor_of(router_logits, "router_logits"),
                     .output = tensor_of(output, "output"),
                     .accumulate = add ? Accumulate::kAdd : Accumulate::kOverwrite,
                     .tokens_per_expert = tensor_of(tokens_per_expert, "tokens_per_expert")};
    const Layer& layer = layer_of(ref);
    const std::int64_t tokens = args.hidden_states.shape[0];
    // Rows of another device, or too many of them: forward complains. Scratch that was made beside such rows lies
    // where they do, and is not what is wrong.
    const bool sized = tokens >= 0 && tokens <= layer.config().max_tokens;
    Scratch scratch;
    if (args.hidden_states.device == layer.device()) {
      const std::size_t bytes = sized ? layer.workspace_bytes(tokens) : 0;
      scratch = scratch_for(workspace, layer.device(), bytes);
      if (scratch.view.data == nullptr && bytes > 0) return static_cast<std::int64_t>(bytes);
    }
    args.workspace = scratch.view;
    args.stream = current_stream(args.hidden_states);
    layer.forward(args);
    return 0;
  });
}

// --- levels 2 and 3 -----------------------------------------------------------------------------------
// Every call has one form: scratch, and the arguments, names and values in turn. (Stages begin with their layer, or None.)

// Scratch is for a call that is shaped as it must be; of any other the call itself complains.
std::size_t needed(const LayerConfig& config, const PrepareArgs& a) {
  if (a.topk_ids.rank != 2 || a.rows.rank != 3) return 0;
  return stage_workspace_bytes(config, {Format::kBatched, a.topk_ids.shape[0], a.rows.shape[1], a.hidden_states.device});
}
std::size_t needed(const LayerConfig& config, const ExpertsArgs& a) {
  if (a.format == Format::kBatched && a.rows.rank == 3)
    return stage_workspace_bytes(config, {a.format, 0, a.rows.shape[1], a.rows.device});
  if (a.format == Format::kSorted && a.rows.rank == 2 && a.sorted.slots.rank == 1)
    return stage_workspace_bytes(config, {a.format, a.rows.shape[0], a.sorted.slots.shape[0], a.rows.device});
  return 0;
}
std::size_t needed(const LayerConfig& config, const FinalizeArgs& a) {
  if (a.output.rank != 2 || a.expert_output.rank != 3) return 0;
  return stage_workspace_bytes(config, {Format::kBatched, a.output.shape[0], a.expert_output.shape[1], a.output.device});
}
std::size_t needed(const GroupedGemmArgs& a) { return grouped_gemm_workspace_bytes(a); }
std::size_t needed(const AlignArgs& a) {
  return align_workspace_bytes(a.topk_ids.numel(), a.experts, a.topk_ids.device);
}
std::size_t needed(const RouteArgs& a) {
  if (a.logits.defined() || a.router.weight.rank != 2 || a.topk_ids.rank != 2) return 0;
  return route_workspace_bytes(a.topk_ids.shape[0], a.router.weight.shape[0]);
}
std::size_t needed(const QuantizeArgs& a) { return quantize_workspace_bytes(a); }
std::size_t needed(const ActivateArgs&) { return 0; }
std::size_t needed(const SumArgs&) { return 0; }

// The tensor whose device and stream a call has.
const Tensor& main_of(const PrepareArgs& a) { return a.hidden_states; }
const Tensor& main_of(const ExpertsArgs& a) { return a.rows; }
const Tensor& main_of(const FinalizeArgs& a) { return a.output; }
const Tensor& main_of(const GroupedGemmArgs& a) { return a.a; }
const Tensor& main_of(const AlignArgs& a) { return a.topk_ids; }
const Tensor& main_of(const RouteArgs& a) { return a.topk_ids; }
const Tensor& main_of(const QuantizeArgs& a) { return a.input; }
const Tensor& main_of(const ActivateArgs& a) { return a.input; }
const Tensor& main_of(const SumArgs& a) { return a.output; }

template <typename Args, typename Run>
std::int64_t with_scratch(Args& a, const ffi::AnyView& given, std::size_t bytes, const Run& run) {
  Scratch scratch;
  if constexpr (requires { a.workspace; }) {
    scratch = scratch_for(given, main_of(a).device, bytes);
    if (scratch.view.data == nullptr && bytes > 0) return static_cast<std::int64_t>(bytes);
    a.workspace = scratch.view;
  }
  a.stream = current_stream(main_of(a));
  run();
  return 0;
}

// run(layer, args), or without a layer run(config, args): then the configuration is among the arguments, as "config.experts" and so on.
template <typename Args, typename Run>
std::int64_t stage(Reader& reader, const ffi::AnyView& layer, const ffi::AnyView& scratch, const Run& run) {
  Args a{};
  read(reader, a);
  if (const auto ref = layer.as<LayerRef>()) {
    reader.finish();
    const Layer& own = layer_of(*ref);
    return with_scratch(a, scratch, needed(own.config(), a), [&] { run(own, a); });
  }
  LayerConfig config{};
  reader.inner("config", config);
  reader.finish();
  return with_scratch(a, scratch, needed(config, a), [&] { run(config, a); });
}
std::int64_t stage_prepare(ffi::PackedArgs given) {
  return guarded([&] {
    Reader reader("prepare", given.Slice(2));
    return stage<PrepareArgs>(reader, given[0], given[1], [](const auto& on, const auto& a) { prepare(on, a); });
  });
}
std::int64_t stage_finalize(ffi::PackedArgs given) {
  return guarded([&] {
    Reader reader("finalize", given.Slice(2));
    return stage<FinalizeArgs>(reader, given[0], given[1], [](const auto& on, const auto& a) { finalize(on, a); });
  });
}
std::int64_t stage_experts(ffi::PackedArgs given) {
  return guarded([&] {
    Reader reader("experts", given.Slice(2));
    LayerWeights weights;
    reader.inner("weights", weights);
    return stage<ExpertsArgs>(reader, given[0], given[1], [&](const auto& on, const auto& a) {
      if constexpr (std::is_same_v<std::decay_t<decltype(on)>, Layer>)
        experts(on, a);
      else
        experts(on, weights, a);
    });
  });
}

template <typename Args, void (*kRun)(const Args&)>
std::int64_t call(const char* what, ffi::PackedArgs given) {
  return guarded([&] {
    Args a = read_all<Args>(what, given.Slice(1));
    return with_scratch(a, given[0], needed(a), [&] { kRun(a); });
  });
}
std::int64_t gemm(ffi::PackedArgs given) { return call<GroupedGemmArgs, grouped_gemm>("grouped_gemm", given); }
std::int64_t align_slots(ffi::PackedArgs given) { return call<AlignArgs, align>("align", given); }
std::int64_t route_tokens(ffi::PackedArgs given) { return call<RouteArgs, route>("route", given); }
std::int64_t quantize_rows(ffi::PackedArgs given) { return call<QuantizeArgs, quantize>("quantize", given); }
std::int64_t activate_rows(ffi::PackedArgs given) { return call<ActivateArgs, activate>("activate", given); }
std::int64_t sum(ffi::PackedArgs given) { return call<SumArgs, sum_slots>("sum_slots", given); }
std::int64_t align_length(std::int64_t slots, std::int64_t experts, std::int64_t block_rows) {
  return guarded([&] { return align_capacity(slots, experts, block_rows); });
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
  constexpr std::int64_t kMany = 1 << 20;  // far above what is allowed: a narrowed number could be allowed again
  guarded([&] { set_num_threads(static_cast<int>(std::clamp(n, -kMany, kMany))); });
}
void openmp(ffi::String path) {
  guarded([&] { use_openmp(std::string(path)); });
}
void kernels(ffi::String type, ffi::String level) {
  guarded([&] { set_kernels(parse_device(std::string(type)).type, std::string(level)); });
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(layer_new, layer_new);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(layer_from_checkpoint, layer_from_checkpoint);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(layer_config, layer_config);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(checkpoint_layers, checkpoint_layers);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(layer_load, layer_load);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(layer_load_expert, layer_load_expert);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(layer_unpack_expert, layer_unpack_expert);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(layer_load_shared, layer_load_shared);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(layer_set_router, layer_set_router);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(layer_workspace_bytes, layer_workspace_bytes);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(layer_weight_bytes, layer_weight_bytes);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(layer_ready, layer_ready);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(layer_forward, layer_forward);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(align_capacity, align_length);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(devices, list_devices);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(schemes, scheme_names);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(support_reason, support_reason);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(version, library_version);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(set_num_threads, threads);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(set_kernels, kernels);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(use_openmp, openmp);

}  // namespace
}  // namespace moesaic::python

// The same for functions of any number of arguments, for which apache-tvm-ffi has no macro.
#define MOESAIC_EXPORT_PACKED(name, function)                                                                   \
  extern "C" TVM_FFI_DLL_EXPORT int __tvm_ffi_##name(void*, const TVMFFIAny* args, std::int32_t count,          \
                                                     TVMFFIAny* result) {                                       \
    using namespace moesaic::python;                                                                            \
    TVM_FFI_SAFE_CALL_BEGIN();                                                                                  \
    *reinterpret_cast<ffi::Any*>(result) =                                                                      \
        function(ffi::PackedArgs(reinterpret_cast<const ffi::AnyView*>(args), count));                          \
    TVM_FFI_SAFE_CALL_END();                                                                                    \
  }

MOESAIC_EXPORT_PACKED(prepare, stage_prepare)
MOESAIC_EXPORT_PACKED(experts, stage_experts)
MOESAIC_EXPORT_PACKED(finalize, stage_finalize)
MOESAIC_EXPORT_PACKED(grouped_gemm, gemm)
MOESAIC_EXPORT_PACKED(align, align_slots)
MOESAIC_EXPORT_PACKED(route, route_tokens)
MOESAIC_EXPORT_PACKED(quantize, quantize_rows)
MOESAIC_EXPORT_PACKED(activate, activate_rows)
MOESAIC_EXPORT_PACKED(sum_slots, sum)
