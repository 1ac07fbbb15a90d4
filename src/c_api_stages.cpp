// SPDX-License-Identifier: Apache-2.0
// The C interface of levels 2 and 3: the stages, the grouped GEMM and the pieces around it.
#include "c_convert.h"
#include "c_guard.h"
#include "check.h"
#include "moesaic/c_api.h"

namespace moesaic::c {
namespace {

PrepareArgs to_prepare(const moesaic_prepare_args* given) {
  const auto a = read("args", given, moesaic_prepare_args MOESAIC_PREPARE_ARGS);
  return {.hidden_states = to_tensor("hidden_states", a.hidden_states),
          .hidden_scale = to_tensor("hidden_scale", a.hidden_scale),
          .topk_ids = to_tensor("topk_ids", a.topk_ids),
          .topk_weights = to_tensor("topk_weights", a.topk_weights),
          .expert_map = to_tensor("expert_map", a.expert_map),
          .rows = to_tensor("rows", a.rows),
          .row_scale = to_tensor("row_scale", a.row_scale),
          .num_tokens = to_tensor("num_tokens", a.num_tokens),
          .slot_row = to_tensor("slot_row", a.slot_row),
          .status = to_tensor("status", a.status),
          .workspace = workspace_of(a),
          .stream = {a.stream}};
}

StageShape to_stage_shape(const moesaic_stage_shape* given) {
  const auto s = read("shape", given, moesaic_stage_shape MOESAIC_STAGE_SHAPE);
  return {.format = to_format(s.format),
          .tokens = s.tokens,
          .capacity = s.capacity,
          .device = to_device(s.device)};
}

ExpertsArgs to_experts(const moesaic_experts_args* given) {
  const auto a = read("args", given, moesaic_experts_args MOESAIC_EXPERTS_ARGS);
  return {.format = to_format(a.format),
          .rows = to_tensor("rows", a.rows),
          .row_scale = to_tensor("row_scale", a.row_scale),
          .batched = to_batched(a.num_tokens),
          .sorted = to_sorted("sorted", a.sorted),
          .row_weights = to_tensor("row_weights", a.row_weights),
          .output = to_tensor("output", a.output),
          .expected_tokens = a.expected_tokens,
          .workspace = workspace_of(a),
          .stream = {a.stream}};
}

FinalizeArgs to_finalize(const moesaic_finalize_args* given) {
  const auto a = read("args", given, moesaic_finalize_args MOESAIC_FINALIZE_ARGS);
  return {.expert_output = to_tensor("expert_output", a.expert_output),
          .topk_ids = to_tensor("topk_ids", a.topk_ids),
          .topk_weights = to_tensor("topk_weights", a.topk_weights),
          .expert_map = to_tensor("expert_map", a.expert_map),
          .slot_row = to_tensor("slot_row", a.slot_row),
          .output = to_tensor("output", a.output),
          .accumulate = to_accumulate(a.accumulate),
          .workspace = workspace_of(a),
          .stream = {a.stream}};
}

GroupedGemmArgs to_grouped_gemm(const moesaic_grouped_gemm_args* given) {
  const auto a = read("args", given, moesaic_grouped_gemm_args MOESAIC_GROUPED_GEMM_ARGS);
  return {.quant = to_quant(a.quant),
          .a = to_tensor("a", a.a),
          .a_scale = to_tensor("a_scale", a.a_scale),
          .b = to_gemm_weights("b", a.b),
          .sorted = to_sorted("sorted", a.sorted),
          .batched = to_batched(a.num_tokens),
          .top_k = a.top_k,
          .a_order = to_enum<RowOrder>("a_order", a.a_order, 2),
          .c_order = to_enum<RowOrder>("c_order", a.c_order, 2),
          .row_weights = to_tensor("row_weights", a.row_weights),
          .c = to_tensor("c", a.c),
          .workspace = workspace_of(a),
          .stream = {a.stream}};
}

QuantizeArgs to_quantize(const moesaic_quantize_args* given) {
  const auto a = read("args", given, moesaic_quantize_args MOESAIC_QUANTIZE_ARGS);
  return {.input = to_tensor("input", a.input),
          .num_tokens = to_tensor("num_tokens", a.num_tokens),
          .to = to_dtype("to", a.to),
          .granularity = to_enum<ActScale>("granularity", a.granularity, 5),
          .group_size = a.group_size,
          .int8_rounding = to_enum<Int8Rounding>("int8_rounding", a.int8_rounding, 2),
          .static_scale = to_tensor("static_scale", a.static_scale),
          .output = to_tensor("output", a.output),
          .scale = to_tensor("scale", a.scale),
          .workspace = workspace_of(a),
          .stream = {a.stream}};
}

}  // namespace
}  // namespace moesaic::c

using namespace moesaic;     // NOLINT: this file is the seam between the two interfaces
using namespace moesaic::c;  // NOLINT

extern "C" {

// --- level 2 -------------------------------------------------------------------------------------

moesaic_status moesaic_layer_prepare(const moesaic_layer* layer, const moesaic_prepare_args* args) {
  return guarded([&] { prepare(needed("layer", layer).layer, to_prepare(args)); });
}
moesaic_status moesaic_layer_experts(const moesaic_layer* layer, const moesaic_experts_args* args) {
  return guarded([&] { experts(needed("layer", layer).layer, to_experts(args)); });
}
moesaic_status moesaic_layer_finalize(const moesaic_layer* layer,
                                      const moesaic_finalize_args* args) {
  return guarded([&] { finalize(needed("layer", layer).layer, to_finalize(args)); });
}
moesaic_status moesaic_prepare(const moesaic_layer_config* config,
                               const moesaic_prepare_args* args) {
  return guarded([&] { prepare(to_config(config), to_prepare(args)); });
}
moesaic_status moesaic_experts(const moesaic_layer_config* config,
                               const moesaic_layer_weights* weights,
                               const moesaic_experts_args* args) {
  return guarded([&] { experts(to_config(config), to_layer_weights(weights), to_experts(args)); });
}
moesaic_status moesaic_finalize(const moesaic_layer_config* config,
                                const moesaic_finalize_args* args) {
  return guarded([&] { finalize(to_config(config), to_finalize(args)); });
}
moesaic_status moesaic_stage_workspace_bytes(const moesaic_layer_config* config,
                                             const moesaic_stage_shape* shape, size_t* bytes) {
  return guarded([&] {
    needed("bytes", bytes) = stage_workspace_bytes(to_config(config), to_stage_shape(shape));
  });
}

// --- level 3 -------------------------------------------------------------------------------------

moesaic_status moesaic_align_capacity(int64_t slot_count, int64_t experts, int64_t block_rows,
                                      int64_t* capacity) {
  return guarded(
      [&] { needed("capacity", capacity) = align_capacity(slot_count, experts, block_rows); });
}
moesaic_status moesaic_align_workspace_bytes(int64_t slot_count, int64_t experts,
                                             moesaic_device device, size_t* bytes) {
  return guarded([&] {
    needed("bytes", bytes) = align_workspace_bytes(slot_count, experts, to_device(device));
  });
}
moesaic_status moesaic_align(const moesaic_align_args* args) {
  return guarded([&] {
    const auto a = read("args", args, moesaic_align_args MOESAIC_ALIGN_ARGS);
    align({.topk_ids = to_tensor("topk_ids", a.topk_ids),
           .experts = a.experts,
           .local = {.first = a.local_first, .count = a.local_count},
           .expert_map = to_tensor("expert_map", a.expert_map),
           .rows = to_sorted("rows", a.rows),
           .slot_row = to_tensor("slot_row", a.slot_row),
           .tokens_per_expert = to_tensor("tokens_per_expert", a.tokens_per_expert),
           .workspace = workspace_of(a),
           .stream = {a.stream}});
  });
}

moesaic_status moesaic_grouped_gemm_workspace_bytes(const moesaic_grouped_gemm_args* args,
                                                    size_t* bytes) {
  return guarded(
      [&] { needed("bytes", bytes) = grouped_gemm_workspace_bytes(to_grouped_gemm(args)); });
}
moesaic_status moesaic_grouped_gemm(const moesaic_grouped_gemm_args* args) {
  return guarded([&] { grouped_gemm(to_grouped_gemm(args)); });
}

moesaic_status moesaic_sum(const moesaic_sum_args* args) {
  return guarded([&] {
    const auto a = read("args", args, moesaic_sum_args MOESAIC_SUM_ARGS);
    sum_slots({.input = to_tensor("input", a.input),
               .slot_row = to_tensor("slot_row", a.slot_row),
               .topk_weights = to_tensor("topk_weights", a.topk_weights),
               .topk_ids = to_tensor("topk_ids", a.topk_ids),
               .scale = a.scale,
               .accumulate = to_accumulate(a.accumulate),
               .output = to_tensor("output", a.output),
               .stream = {a.stream}});
  });
}

moesaic_status moesaic_route_workspace_bytes(int64_t tokens, int64_t experts, size_t* bytes) {
  return guarded([&] { needed("bytes", bytes) = route_workspace_bytes(tokens, experts); });
}
moesaic_status moesaic_route(const moesaic_route_args* args) {
  return guarded([&] {
    const auto a = read("args", args, moesaic_route_args MOESAIC_ROUTE_ARGS);
    route({.spec = to_routing(a.spec),
           .logits = to_tensor("logits", a.logits),
           .hidden_states = to_tensor("hidden_states", a.hidden_states),
           .router = to_router(a.router),
           .topk_ids = to_tensor("topk_ids", a.topk_ids),
           .topk_weights = to_tensor("topk_weights", a.topk_weights),
           .workspace = workspace_of(a),
           .stream = {a.stream}});
  });
}

moesaic_status moesaic_quantize_workspace_bytes(int64_t rows, moesaic_device device,
                                                size_t* bytes) {
  return guarded(
      [&] { needed("bytes", bytes) = quantize_workspace_bytes(rows, to_device(device)); });
}
moesaic_status moesaic_quantize_call_workspace_bytes(const moesaic_quantize_args* args,
                                                     size_t* bytes) {
  return guarded([&] { needed("bytes", bytes) = quantize_workspace_bytes(to_quantize(args)); });
}
moesaic_status moesaic_quantize(const moesaic_quantize_args* args) {
  return guarded([&] { quantize(to_quantize(args)); });
}

moesaic_status moesaic_activate(const moesaic_activate_args* args) {
  return guarded([&] {
    const auto a = read("args", args, moesaic_activate_args MOESAIC_ACTIVATE_ARGS);
    activate({.spec = to_activation(a.spec),
              .parameters = {.alpha = to_tensor("alpha", a.alpha),
                             .beta = to_tensor("beta", a.beta),
                             .limit = to_tensor("limit", a.limit)},
              .input = to_tensor("input", a.input),
              .row_expert = to_tensor("row_expert", a.row_expert),
              .output = to_tensor("output", a.output),
              .stream = {a.stream}});
  });
}

}  // extern "C"
