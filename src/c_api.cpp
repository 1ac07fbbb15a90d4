// SPDX-License-Identifier: Apache-2.0
// The C interface: each function converts its arguments, calls the C++ one, and turns an exception
// into a status and a message. No decisions are made here. This file: names, tensors, the layer and
// the process; c_api_stages.cpp: the stages and the pieces.
#include "moesaic/c_api.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <functional>
#include <mutex>
#include <new>
#include <string>

#include "c_convert.h"
#include "c_guard.h"
#include "check.h"

struct moesaic_workspace {
  moesaic::WorkspaceBuffer buffer;
};

namespace moesaic::c {
namespace {

// A fixed buffer: saying that there is no memory must not need any.
thread_local char last_error[2048] = "";

}  // namespace

moesaic_status fail(ErrorCode code, std::string_view message) {
  const std::size_t n = std::min(message.size(), sizeof last_error - 1);
  std::memcpy(last_error, message.data(), n);
  last_error[n] = '\0';
  return static_cast<moesaic_status>(code);
}

namespace {

// A caller may pass any number: one outside the list has the name "?".
template <typename E>
const char* name_of(int value, int count) {
  return value >= 0 && value < count ? name(static_cast<E>(value)).data() : "?";
}

template <typename E, typename Parse>
moesaic_status parse(const char* text, E* out, const Parse& parser) {
  return guarded([&] {
    needed("out", out) = static_cast<E>(parser(std::string_view(&needed("text", text))));
  });
}

void copy_text(std::string_view from, char* to, std::size_t size) {
  const std::size_t n = std::min(from.size(), size - 1);
  std::memcpy(to, from.data(), n);
  std::memset(to + n, 0, size - n);
}

// A host's hook is C code: what a body throws waits here until the hook has returned.
struct HookBody {
  const std::function<void(int)>* body = nullptr;
  std::exception_ptr* first = nullptr;
  std::mutex* mutex = nullptr;
};
void call_hook_body(void* context, std::int32_t i) {
  const auto& hook = *static_cast<const HookBody*>(context);
  try {
    (*hook.body)(i);
  } catch (...) {
    const std::lock_guard lock(*hook.mutex);
    if (!*hook.first) *hook.first = std::current_exception();
  }
}

}  // namespace
}  // namespace moesaic::c

using namespace moesaic;     // NOLINT: this file is the seam between the two interfaces
using namespace moesaic::c;  // NOLINT

extern "C" {

// --- status, names, tensors ----------------------------------------------------------------------

const char* moesaic_last_error(void) { return last_error; }
const char* moesaic_status_name(moesaic_status status) {
  return status == MOESAIC_OK ? "ok" : name_of<ErrorCode>(status, MOESAIC_INTERNAL + 1);
}

const char* moesaic_scheme_name(moesaic_scheme s) { return name_of<Scheme>(s, kNumSchemes); }
const char* moesaic_dtype_name(moesaic_dtype d) { return name_of<DType>(d, MOESAIC_I64 + 1); }
const char* moesaic_activation_name(moesaic_activation a) {
  return name_of<Activation>(a, kNumActivations);
}
const char* moesaic_routing_name(moesaic_routing r) {
  return name_of<RoutingMethod>(r, kNumRoutingMethods);
}
const char* moesaic_format_name(moesaic_format f) {
  return name_of<Format>(f, MOESAIC_BATCHED + 1);
}

moesaic_status moesaic_parse_scheme(const char* text, moesaic_scheme* out) {
  return parse(text, out, parse_scheme);
}
moesaic_status moesaic_parse_dtype(const char* text, moesaic_dtype* out) {
  return parse(text, out, parse_dtype);
}
moesaic_status moesaic_parse_activation(const char* text, moesaic_activation* out) {
  return parse(text, out, parse_activation);
}
moesaic_status moesaic_parse_routing(const char* text, moesaic_routing* out) {
  return parse(text, out, parse_routing);
}
moesaic_status moesaic_parse_format(const char* text, moesaic_format* out) {
  return parse(text, out, parse_format);
}

moesaic_tensor moesaic_tensor_dense(const void* data, moesaic_dtype dtype, const int64_t* shape,
                                    int32_t rank, moesaic_device device) {
  moesaic_tensor t{.data = const_cast<void*>(data), .dtype = dtype, .rank = rank, .device = device};
  if (shape == nullptr) t.rank = -1;  // refused by name wherever it is passed
  std::int64_t stride = 1;
  for (std::int32_t i = std::min<std::int32_t>(t.rank, Tensor::kMaxRank) - 1; i >= 0; --i) {
    t.shape[i] = shape[i];
    t.strides[i] = stride;
    stride *= std::max<std::int64_t>(shape[i], 1);
  }
  return t;
}

moesaic_status moesaic_workspace_create(moesaic_device device, size_t bytes,
                                        moesaic_workspace** out) {
  return guarded([&] {
    moesaic_workspace*& result = needed("out", out);
    result = nullptr;
    result = new moesaic_workspace{WorkspaceBuffer(to_device(device), bytes)};
  });
}
void moesaic_workspace_destroy(moesaic_workspace* workspace) { delete workspace; }
void* moesaic_workspace_data(const moesaic_workspace* workspace) {
  return workspace == nullptr ? nullptr : workspace->buffer.view().data;
}
size_t moesaic_workspace_bytes(const moesaic_workspace* workspace) {
  return workspace == nullptr ? 0 : workspace->buffer.view().bytes;
}

// --- level 1 -------------------------------------------------------------------------------------

moesaic_status moesaic_layer_create(const moesaic_layer_config* config, moesaic_device device,
                                    moesaic_layer** out) {
  return guarded([&] {
    moesaic_layer*& result = needed("out", out);
    result = nullptr;
    result = new moesaic_layer{Layer(to_config(config), to_device(device))};
  });
}
void moesaic_layer_destroy(moesaic_layer* layer) { delete layer; }

moesaic_status moesaic_layer_load(moesaic_layer* layer, const moesaic_layer_weights* weights) {
  return guarded([&] { needed("layer", layer).layer.load(to_layer_weights(weights)); });
}
moesaic_status moesaic_layer_load_expert(moesaic_layer* layer, int64_t local_expert,
                                         const moesaic_layer_weights* weights) {
  return guarded(
      [&] { needed("layer", layer).layer.load_expert(local_expert, to_layer_weights(weights)); });
}
moesaic_status moesaic_layer_unpack_expert(const moesaic_layer* layer, int64_t local_expert,
                                           const moesaic_tensor* fc1, const moesaic_tensor* fc2) {
  return guarded([&] {
    needed("layer", layer)
        .layer.unpack_expert(local_expert, to_tensor("fc1", fc1), to_tensor("fc2", fc2));
  });
}
moesaic_status moesaic_layer_load_shared(moesaic_layer* layer, const moesaic_layer_weights* weights,
                                         const moesaic_tensor* gate) {
  return guarded([&] {
    needed("layer", layer).layer.load_shared(to_layer_weights(weights), to_tensor("gate", gate));
  });
}
moesaic_status moesaic_layer_set_router(moesaic_layer* layer,
                                        const moesaic_router_weights* router) {
  return guarded(
      [&] { needed("layer", layer).layer.set_router(to_router(&needed("router", router))); });
}
moesaic_status moesaic_layer_ready(const moesaic_layer* layer, int32_t* ready) {
  return guarded([&] { needed("ready", ready) = needed("layer", layer).layer.ready() ? 1 : 0; });
}
moesaic_status moesaic_layer_weight_bytes(const moesaic_layer* layer, size_t* bytes) {
  return guarded([&] { needed("bytes", bytes) = needed("layer", layer).layer.weight_bytes(); });
}
moesaic_status moesaic_layer_workspace_bytes(const moesaic_layer* layer, int64_t tokens,
                                             size_t* bytes) {
  return guarded(
      [&] { needed("bytes", bytes) = needed("layer", layer).layer.workspace_bytes(tokens); });
}

moesaic_status moesaic_layer_forward(const moesaic_layer* layer, const moesaic_forward_args* args) {
  return guarded([&] {
    const auto a = read("args", args, moesaic_forward_args MOESAIC_FORWARD_ARGS);
    needed("layer", layer)
        .layer.forward({.hidden_states = to_tensor("hidden_states", a.hidden_states),
                        .hidden_scale = to_tensor("hidden_scale", a.hidden_scale),
                        .topk_ids = to_tensor("topk_ids", a.topk_ids),
                        .topk_weights = to_tensor("topk_weights", a.topk_weights),
                        .router_logits = to_tensor("router_logits", a.router_logits),
                        .output = to_tensor("output", a.output),
                        .accumulate = to_accumulate(a.accumulate),
                        .tokens_per_expert = to_tensor("tokens_per_expert", a.tokens_per_expert),
                        .workspace = workspace_of(a),
                        .stream = {a.stream}});
  });
}

moesaic_status moesaic_layer_tactic_counts(const moesaic_layer* layer, int32_t* gemm1,
                                           int32_t* gemm2) {
  return guarded([&] {
    const Layer& l = needed("layer", layer).layer;
    needed("gemm1", gemm1) = static_cast<std::int32_t>(l.tactics_gemm1().size());
    needed("gemm2", gemm2) = static_cast<std::int32_t>(l.tactics_gemm2().size());
  });
}
moesaic_status moesaic_layer_set_tactics(moesaic_layer* layer, int32_t gemm1, int32_t gemm2) {
  return guarded(
      [&] { needed("layer", layer).layer.set_tactics({.gemm1 = gemm1, .gemm2 = gemm2}); });
}

// --- the process ---------------------------------------------------------------------------------

const char* moesaic_version(void) { return MOESAIC_VERSION_STRING; }

moesaic_status moesaic_device_count(int32_t* count) {
  return guarded([&] { needed("count", count) = static_cast<std::int32_t>(devices().size()); });
}
moesaic_status moesaic_get_device_info(int32_t index, moesaic_device_info* out) {
  return guarded([&] {
    moesaic_device_info info = read("out", out, moesaic_device_info MOESAIC_DEVICE_INFO);
    const std::vector<DeviceInfo> all = devices();
    check_range("index", index, 0, static_cast<std::int64_t>(all.size()) - 1);
    const DeviceInfo& from = all[static_cast<std::size_t>(index)];
    info.device = {.type = static_cast<std::int32_t>(from.device.type), .index = from.device.index};
    copy_text(from.name, info.name, sizeof info.name);
    copy_text(from.kernels, info.kernels, sizeof info.kernels);
    copy_text(from.note, info.note, sizeof info.note);
    const std::size_t size = out->struct_size;
    std::memcpy(out, &info, std::min(size, sizeof info));
    out->struct_size = size;
  });
}

moesaic_status moesaic_supports(const moesaic_layer_config* config, moesaic_format format,
                                moesaic_device device, int32_t* supported) {
  return guarded([&] {
    std::int32_t& result = needed("supported", supported);
    const Support support = supports(to_config(config), to_format(format), to_device(device));
    result = support.supported ? 1 : 0;
    if (!support.supported) fail(ErrorCode::kUnsupported, support.reason);
  });
}

moesaic_status moesaic_set_num_threads(int32_t threads) {
  return guarded([&] { set_num_threads(threads); });
}
int32_t moesaic_num_threads(void) {
  std::int32_t threads = 0;  // stays when MOESAIC_THREADS is not a number
  guarded([&] { threads = num_threads(); });
  return threads;
}

moesaic_status moesaic_set_parallel_hook(moesaic_parallel_hook hook, void* user) {
  return guarded([&] {
    if (hook == nullptr) return set_parallel_hook({});
    set_parallel_hook([hook, user](int n, const std::function<void(int)>& body) {
      std::exception_ptr first;
      std::mutex mutex;
      HookBody context{.body = &body, .first = &first, .mutex = &mutex};
      hook(user, n, call_hook_body, &context);
      if (first) std::rethrow_exception(first);
    });
  });
}

moesaic_status moesaic_set_kernels(moesaic_device_type type, const char* level) {
  return guarded(
      [&] { set_kernels(to_enum<DeviceType>("type", type, 2), &needed("level", level)); });
}

moesaic_status moesaic_available_kernels(moesaic_device_type type, char* out, size_t size) {
  return guarded([&] {
    std::string text;
    for (const std::string& level : available_kernels(to_enum<DeviceType>("type", type, 2)))
      text += (text.empty() ? "" : ",") + level;
    needed("out", out);
    if (text.size() >= size)
      invalid("size: expected " + std::to_string(text.size() + 1) + " bytes or more, got " +
              std::to_string(size) + "; pass a larger buffer");
    copy_text(text, out, size);
  });
}

moesaic_status moesaic_set_log_sink(moesaic_log_sink sink, void* user) {
  return guarded([&] {
    if (sink == nullptr) return set_log_sink({});
    set_log_sink(
        [sink, user](std::string_view message) { sink(user, std::string(message).c_str()); });
  });
}

}  // extern "C"
