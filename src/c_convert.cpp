// SPDX-License-Identifier: Apache-2.0
#include "c_convert.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <initializer_list>

#include "check.h"

namespace moesaic::c {
namespace {

// The C enumerations are the C++ ones, number by number.
template <typename E>
constexpr bool counts_up(std::initializer_list<E> cpp, std::initializer_list<int> c) {
  int i = 0;
  for (const E e : cpp)
    if (static_cast<int>(e) != i++) return false;
  i = 0;
  for (const int v : c)
    if (v != i++) return false;
  return cpp.size() == c.size();
}
using enum DType;
static_assert(counts_up({kF32, kF16, kBF16, kF8E4M3, kE8M0, kI8, kU8, kI32, kI64},
                        {MOESAIC_F32, MOESAIC_F16, MOESAIC_BF16, MOESAIC_FP8_E4M3, MOESAIC_E8M0,
                         MOESAIC_I8, MOESAIC_U8, MOESAIC_I32, MOESAIC_I64}));
static_assert(
    counts_up({Scheme::kF32, Scheme::kF16, Scheme::kBF16, Scheme::kFp8Tensor, Scheme::kFp8Channel,
               Scheme::kFp8Block, Scheme::kFp8W8A16, Scheme::kInt8Channel, Scheme::kInt8Block,
               Scheme::kInt8W8A16, Scheme::kInt4W4A16, Scheme::kInt4W4A8Fp8, Scheme::kInt4W4A8Int8,
               Scheme::kMxfp4W4A16},
              {MOESAIC_SCHEME_F32, MOESAIC_SCHEME_F16, MOESAIC_SCHEME_BF16,
               MOESAIC_SCHEME_FP8_TENSOR, MOESAIC_SCHEME_FP8_CHANNEL, MOESAIC_SCHEME_FP8_BLOCK,
               MOESAIC_SCHEME_FP8_W8A16, MOESAIC_SCHEME_INT8_CHANNEL, MOESAIC_SCHEME_INT8_BLOCK,
               MOESAIC_SCHEME_INT8_W8A16, MOESAIC_SCHEME_INT4_W4A16, MOESAIC_SCHEME_INT4_W4A8_FP8,
               MOESAIC_SCHEME_INT4_W4A8_INT8, MOESAIC_SCHEME_MXFP4_W4A16}));
static_assert(counts_up({WeightScale::kDefault, WeightScale::kTensor, WeightScale::kChannel,
                         WeightScale::kBlock, WeightScale::kGroup},
                        {MOESAIC_WEIGHT_SCALE_DEFAULT, MOESAIC_WEIGHT_SCALE_TENSOR,
                         MOESAIC_WEIGHT_SCALE_CHANNEL, MOESAIC_WEIGHT_SCALE_BLOCK,
                         MOESAIC_WEIGHT_SCALE_GROUP}));
static_assert(counts_up({ActScale::kDefault, ActScale::kTensorStatic, ActScale::kTensorDynamic,
                         ActScale::kToken, ActScale::kGroup},
                        {MOESAIC_ACT_SCALE_DEFAULT, MOESAIC_ACT_SCALE_TENSOR_STATIC,
                         MOESAIC_ACT_SCALE_TENSOR_DYNAMIC, MOESAIC_ACT_SCALE_TOKEN,
                         MOESAIC_ACT_SCALE_GROUP}));
static_assert(counts_up({Activation::kSilu, Activation::kGelu, Activation::kGeluTanh,
                         Activation::kRelu, Activation::kRelu2, Activation::kIdentity,
                         Activation::kSwiglu, Activation::kGeglu, Activation::kGegluTanh,
                         Activation::kSwigluOai, Activation::kSwigluClamp, Activation::kSwigluStep},
                        {MOESAIC_SILU, MOESAIC_GELU, MOESAIC_GELU_TANH, MOESAIC_RELU, MOESAIC_RELU2,
                         MOESAIC_IDENTITY, MOESAIC_SWIGLU, MOESAIC_GEGLU, MOESAIC_GEGLU_TANH,
                         MOESAIC_SWIGLU_OAI, MOESAIC_SWIGLU_CLAMP, MOESAIC_SWIGLU_STEP}));
static_assert(counts_up(
    {RoutingMethod::kSoftmaxTopK, RoutingMethod::kRenormalize, RoutingMethod::kDeepSeekV3,
     RoutingMethod::kDeepSeekV2, RoutingMethod::kLlama4, RoutingMethod::kTopK,
     RoutingMethod::kSigmoidRenorm, RoutingMethod::kMiniMax2, RoutingMethod::kSigmoid,
     RoutingMethod::kSqrtSoftplus, RoutingMethod::kSparseMixer, RoutingMethod::kSoftmaxBias},
    {MOESAIC_ROUTING_SOFTMAX_TOPK, MOESAIC_ROUTING_RENORMALIZE, MOESAIC_ROUTING_DEEPSEEK_V3,
     MOESAIC_ROUTING_DEEPSEEK_V2, MOESAIC_ROUTING_LLAMA4, MOESAIC_ROUTING_TOPK,
     MOESAIC_ROUTING_SIGMOID_RENORM, MOESAIC_ROUTING_MINIMAX2, MOESAIC_ROUTING_SIGMOID,
     MOESAIC_ROUTING_SQRTSOFTPLUS, MOESAIC_ROUTING_SPARSEMIXER, MOESAIC_ROUTING_SOFTMAX_BIAS}));
static_assert(static_cast<int>(ErrorCode::kInvalidArgument) == MOESAIC_INVALID_ARGUMENT &&
              static_cast<int>(ErrorCode::kInternal) == MOESAIC_INTERNAL);
static_assert(static_cast<int>(Format::kBatched) == MOESAIC_BATCHED &&
              static_cast<int>(Accumulate::kAdd) == MOESAIC_ADD &&
              static_cast<int>(RowOrder::kSorted) == MOESAIC_BY_POSITION &&
              static_cast<int>(WeightOn::kInput) == MOESAIC_WEIGHT_ON_INPUT &&
              static_cast<int>(WeightStorage::kInPlace) == MOESAIC_WEIGHTS_IN_PLACE &&
              static_cast<int>(GateOrder::kUpFirst) == MOESAIC_UP_FIRST &&
              static_cast<int>(GateLayout::kInterleaved) == MOESAIC_INTERLEAVED &&
              static_cast<int>(Int8Rounding::kTruncate) == MOESAIC_INT8_TRUNCATE &&
              static_cast<int>(Renormalize::kAlways) == MOESAIC_NORMALIZE_ALWAYS &&
              static_cast<int>(DeviceType::kCuda) == MOESAIC_CUDA);

}  // namespace

void read_struct(const char* argument, const void* given, std::size_t known, void* out) {
  if (given == nullptr)
    invalid(fmt::format("{}: expected a struct, got NULL; pass a pointer to one", argument));
  std::size_t size = 0;
  std::memcpy(&size, given, sizeof size);
  // The limit is far above any struct of this header: it catches a struct that nobody initialized.
  if (size < sizeof size || size > 65536)
    invalid(fmt::format("{}.struct_size: got {}; initialize the struct with the macro of its name",
                        argument, size));
  std::memcpy(out, given, std::min(size, known));
  const auto* bytes = static_cast<const unsigned char*>(given);
  for (std::size_t i = known; i < size; ++i)
    if (bytes[i] != 0)
      unsupported(
          fmt::format("{}: comes from a newer header and sets a field that this library ({}) "
                      "does not know; update the library or leave the field at zero",
                      argument, MOESAIC_VERSION_STRING));
}

Device to_device(const moesaic_device& device) {
  return {.type = to_enum<DeviceType>("device.type", device.type, 2), .index = device.index};
}

DType to_dtype(const char* argument, std::int32_t dtype) {
  return to_enum<DType>(argument, dtype, MOESAIC_I64 + 1);
}

Tensor to_tensor(const char* argument, const moesaic_tensor* tensor) {
  if (tensor == nullptr) return {};
  if (tensor->rank < 1 || tensor->rank > Tensor::kMaxRank)
    invalid(
        fmt::format("{}.rank: expected 1 to {}, got {}; pass NULL for a tensor that is not given",
                    argument, Tensor::kMaxRank, tensor->rank));
  Tensor t{.data = tensor->data,
           .dtype = to_dtype(argument, tensor->dtype),
           .device = to_device(tensor->device),
           .rank = tensor->rank};
  for (int i = 0; i < t.rank; ++i) {
    if (tensor->shape[i] < 0)
      invalid(fmt::format("{}.shape[{}]: expected 0 or more, got {}; fix the view", argument, i,
                          tensor->shape[i]));
    t.shape[static_cast<std::size_t>(i)] = tensor->shape[i];
    t.strides[static_cast<std::size_t>(i)] = tensor->strides[i];
  }
  if (t.data == nullptr && t.numel() > 0)
    invalid(fmt::format(
        "{}.data: expected memory for {} elements, got NULL; pass NULL for the whole tensor "
        "if it is not given",
        argument, t.numel()));
  return t;
}

Format to_format(std::int32_t format) { return to_enum<Format>("format", format, 3); }
Accumulate to_accumulate(std::int32_t a) { return to_enum<Accumulate>("accumulate", a, 2); }

QuantSpec to_quant(const moesaic_quant_spec* given) {
  const auto s = read_optional("quant", given, moesaic_quant_spec MOESAIC_QUANT_SPEC);
  return {.scheme = to_enum<Scheme>("quant.scheme", s.scheme, kNumSchemes),
          .weight_scale = to_enum<WeightScale>("quant.weight_scale", s.weight_scale, 5),
          .act_scale = to_enum<ActScale>("quant.act_scale", s.act_scale, 5),
          .block_n = s.block_n,
          .block_k = s.block_k,
          .group_size = s.group_size,
          .zero_points = s.zero_points != 0,
          .int8_rounding = to_enum<Int8Rounding>("quant.int8_rounding", s.int8_rounding, 2)};
}

ActivationSpec to_activation(const moesaic_activation_spec* given) {
  const auto s =
      read_optional("activation", given, moesaic_activation_spec MOESAIC_ACTIVATION_SPEC);
  return {.kind = to_enum<Activation>("activation.kind", s.kind, kNumActivations),
          .order = to_enum<GateOrder>("activation.order", s.order, 2),
          .layout = to_enum<GateLayout>("activation.layout", s.layout, 2),
          .alpha = s.alpha,
          .beta = s.beta,
          .limit = s.limit};
}

RoutingSpec to_routing(const moesaic_routing_spec* given) {
  const auto s = read_optional("routing", given, moesaic_routing_spec MOESAIC_ROUTING_SPEC);
  return {.method = to_enum<RoutingMethod>("routing.method", s.method, kNumRoutingMethods),
          .renormalize = to_enum<Renormalize>("routing.renormalize", s.renormalize, 3),
          .scale = s.scale,
          .groups = s.groups,
          .topk_groups = s.topk_groups,
          .jitter = s.jitter,
          .sum_floor = s.sum_floor};
}

GemmWeights to_gemm_weights(const char* argument, const moesaic_gemm_weights* given) {
  const auto w = read(argument, given, moesaic_gemm_weights MOESAIC_GEMM_WEIGHTS);
  const auto tensor = [&](const char* field, const moesaic_tensor* t) {
    return to_tensor(fmt::format("{}.{}", argument, field).c_str(), t);
  };
  return {.weight = tensor("weight", w.weight),
          .scale = tensor("scale", w.scale),
          .zero_point = tensor("zero_point", w.zero_point),
          .bias = tensor("bias", w.bias),
          .input_scale = tensor("input_scale", w.input_scale),
          .prequant = tensor("prequant", w.prequant),
          .alpha = tensor("alpha", w.alpha)};
}

LayerWeights to_layer_weights(const moesaic_layer_weights* given) {
  const auto w = read("weights", given, moesaic_layer_weights MOESAIC_LAYER_WEIGHTS);
  return {.fc1 = to_gemm_weights("weights.fc1", w.fc1),
          .fc2 = to_gemm_weights("weights.fc2", w.fc2),
          .activation = {.alpha = to_tensor("weights.activation_alpha", w.activation_alpha),
                         .beta = to_tensor("weights.activation_beta", w.activation_beta),
                         .limit = to_tensor("weights.activation_limit", w.activation_limit)}};
}

RouterWeights to_router(const moesaic_router_weights* given) {
  const auto r = read_optional("router", given, moesaic_router_weights MOESAIC_ROUTER_WEIGHTS);
  return {.weight = to_tensor("router.weight", r.weight),
          .bias = to_tensor("router.bias", r.bias),
          .selection_bias = to_tensor("router.selection_bias", r.selection_bias)};
}

LayerConfig to_config(const moesaic_layer_config* given) {
  const auto c = read("config", given, moesaic_layer_config MOESAIC_LAYER_CONFIG);
  return {.experts = c.experts,
          .hidden = c.hidden,
          .intermediate = c.intermediate,
          .top_k = c.top_k,
          .max_tokens = c.max_tokens,
          .local = {.first = c.local_first, .count = c.local_count},
          .quant = to_quant(c.quant),
          .activation = to_activation(c.activation),
          .routing = to_routing(c.routing),
          .weight_on = to_enum<WeightOn>("config.weight_on", c.weight_on, 2),
          .input_dtype = to_dtype("config.input_dtype", c.input_dtype),
          .output_dtype = to_dtype("config.output_dtype", c.output_dtype),
          .shared_experts = c.shared_experts,
          .shared_intermediate = c.shared_intermediate,
          .workspace_cap = c.workspace_cap,
          .weight_storage = to_enum<WeightStorage>("config.weight_storage", c.weight_storage, 2)};
}

SortedRows to_sorted(const char* argument, const moesaic_sorted_rows* given) {
  const auto r = read_optional(argument, given, moesaic_sorted_rows MOESAIC_SORTED_ROWS);
  return {.slots = to_tensor("sorted.slots", r.slots),
          .block_experts = to_tensor("sorted.block_experts", r.block_experts),
          .num_padded = to_tensor("sorted.num_padded", r.num_padded),
          .block_rows = r.block_rows};
}

BatchedRows to_batched(const moesaic_tensor* num_tokens) {
  return {.num_tokens = to_tensor("num_tokens", num_tokens)};
}

}  // namespace moesaic::c
