// SPDX-License-Identifier: Apache-2.0
// Level 3: align, the grouped GEMM, and the sum over slots. The same stages as the layer's, on
// lists and tensors that the caller owns.
#include <fmt/format.h>

#include <algorithm>

#include "check.h"
#include "experts.h"
#include "moesaic/gemm.h"
#include "plan.h"
#include "weights.h"

namespace moesaic {

// --- align ---------------------------------------------------------------------------------------

std::int64_t align_capacity(std::int64_t slot_count, std::int64_t experts,
                            std::int64_t block_rows) {
  check_range("slot_count", slot_count, 0, INT64_C(0x7fffffff));
  check_range("experts", experts, 1, kMaxExperts);
  check_range("block_rows", block_rows, 1, INT64_C(1) << 20);
  // Each non-empty expert wastes at most block_rows - 1; one more run holds the filtered slots.
  if (slot_count < experts + 1) return slot_count * block_rows;
  return slot_count + (experts + 1) * (block_rows - 1);
}

std::size_t align_workspace_bytes(std::int64_t slot_count, std::int64_t experts, Device device) {
  check_range("slot_count", slot_count, 0, INT64_C(0x7fffffff));
  check_range("experts", experts, 1, kMaxExperts);
  return backend(device).align_scratch_bytes(slot_count, experts);
}

void align(const AlignArgs& args) {
  const Device device = args.topk_ids.device;
  check("topk_ids", args.topk_ids).rank(2).dtype({DType::kI32, DType::kI64}).contiguous();
  check_range("experts", args.experts, 1, kMaxExperts);
  ExpertRange local = args.local;
  check_range("local.first", local.first, 0, args.experts - 1);
  if (local.count == 0) local.count = args.experts - local.first;
  check_range("local.count", local.count, 1, args.experts - local.first);
  if (args.expert_map.defined())
    check("expert_map", args.expert_map)
        .shape({args.experts})
        .dtype({DType::kI32})
        .contiguous()
        .on(device);
  const std::int64_t slots = args.topk_ids.numel();
  const std::int64_t capacity = check_sorted_rows(args.rows, device);
  const std::int64_t needed = align_capacity(slots, args.experts, args.rows.block_rows);
  if (capacity < needed)
    invalid(fmt::format(
        "rows.slots: expected room for {} ({} slots; align_capacity), got {}; make it that long",
        needed, slots, capacity));
  if (args.slot_row.defined())
    check("slot_row", args.slot_row).dtype({DType::kI32}).contiguous().on(device);
  if (args.slot_row.defined() && args.slot_row.numel() != slots)
    invalid(fmt::format("slot_row: expected {} elements (one per slot), got {}; make it that long",
                        slots, to_string(args.slot_row)));
  if (args.tokens_per_expert.defined())
    check("tokens_per_expert", args.tokens_per_expert)
        .shape({local.count})
        .dtype({DType::kI32})
        .contiguous()
        .on(device);
  const Backend& kernels = backend(device);
  check_workspace(args.workspace, kernels.align_scratch_bytes(slots, args.experts),
                  "align_workspace_bytes");
  kernels.align({.topk_ids = args.topk_ids,
                 .experts = args.experts,
                 .local = local,
                 .expert_map = args.expert_map,
                 .block_rows = args.rows.block_rows,
                 .rows = {.row_slot = args.rows.slots.as<std::int32_t>(),
                          .positions = capacity,
                          .slot_count = slots},
                 .block_experts = args.rows.block_experts.as<std::int32_t>(),
                 .num_padded = args.rows.num_padded.as<std::int32_t>(),
                 .slot_row = args.slot_row.as<std::int32_t>(),
                 .tokens_per_expert = args.tokens_per_expert.as<std::int32_t>(),
                 .scratch = args.workspace.data},
                args.stream);
}

// --- the grouped GEMM ----------------------------------------------------------------------------

namespace {

// What a call resolves to, from shapes and dtypes alone.
struct Resolved {
  LayerPlan plan;  // fc1 is the product; there is no second
  bool batched = false;
  std::int64_t capacity = 0, positions = 0, slot_count = 0;
  Tensor a, c;
};

Resolved resolve(const GroupedGemmArgs& args) {
  Resolved r;
  const Device device = args.a.device;
  r.batched = args.batched.num_tokens.defined();
  if (r.batched == args.sorted.slots.defined())
    invalid(fmt::format(
        "sorted, batched: expected exactly one of the two formats, got {}; fill in sorted or "
        "batched.num_tokens",
        r.batched ? "both" : "neither"));
  check_enum("a_order", args.a_order, 2);
  check_enum("c_order", args.c_order, 2);
  check("a", args.a).inner_contiguous();
  check("b.weight", args.b.weight).rank(3).on(device);
  const std::int64_t experts = args.b.weight.shape[0], n = args.b.weight.shape[1];
  const std::int64_t k = args.a.shape[args.a.rank - 1];
  check_range("b.weight: experts", experts, 1, kMaxExperts);
  check_range("b.weight: N", n, 1, INT64_C(1) << 24);
  check_range("a: K", k, 1, INT64_C(1) << 24);
  check_range("top_k", args.top_k, 1, kMaxTopK);

  // Float activations with a scale: the scale is the static one of a per-tensor scheme.
  QuantSpec quant = args.quant;
  const bool quantizes = is_float(args.a.dtype);
  if (quantizes && args.a_scale.defined() && quant.act_scale == ActScale::kDefault)
    quant.act_scale = ActScale::kTensorStatic;
  LayerPlan& plan = r.plan;
  plan.device = device;
  plan.backend = &backend(device);
  plan.fc1 = weight_spec(quant, experts, n, k, args.a.dtype, args.c.dtype);
  plan.config.quant = quant;
  plan.config.top_k = args.top_k;
  plan.config.input_dtype = args.a.dtype;
  // 8-bit rows bring their scales: whether those were static nobody asks.
  if (!quantizes && plan.fc1.act_scale == ActScale::kTensorStatic)
    plan.fc1.act_scale = ActScale::kTensorDynamic;
  const WeightSpec& spec = plan.fc1;
  if (quantizes && args.a_scale.defined() && spec.act_scale != ActScale::kTensorStatic)
    invalid(
        fmt::format("a_scale: a is {}, and its scales are made from it; leave a_scale undefined, "
                    "or set quant.act_scale to tensor_static",
                    name(args.a.dtype)));
  if (spec.act_scale == ActScale::kDefault) {
    check("a", args.a).dtype({spec.act_dtype});
  } else if (!quantizes) {
    check("a", args.a).dtype({spec.act_dtype});
    check_activation_scale("a_scale", spec, args.a, args.a_scale, device);
  }
  check("c", args.c).dtype({DType::kF32, DType::kF16, DType::kBF16}).distinct().on(device);

  if (r.batched) {
    check("a", args.a).rank(3);
    if (args.a.shape[0] != experts)
      invalid(
          fmt::format("a: expected {} experts in the leading dimension, as b.weight has, got {}; "
                      "pass one buffer per expert",
                      experts, to_string(args.a)));
    r.capacity = args.a.shape[1];
    check("c", args.c).shape({experts, r.capacity, n});
    check("batched.num_tokens", args.batched.num_tokens)
        .shape({experts})
        .dtype({DType::kI32})
        .contiguous()
        .on(device);
    if (args.row_weights.defined())
      unsupported(
          "row_weights: the batched format has no slots to index them by; apply them in finalize");
    r.positions = checked_mul(experts, r.capacity, "a");
    check_range("a: experts x capacity", r.positions, 0, INT64_C(0x7fffffff));
    r.slot_count = r.positions;
  } else {
    check("a", args.a).rank(2);
    r.positions = check_sorted_rows(args.sorted, device);
    const Tensor c = as_rows("c", args.c);
    if (args.c_order == RowOrder::kSlot) {
      r.slot_count = c.shape[0];
      if (args.a_order == RowOrder::kSlot &&
          r.slot_count != checked_mul(args.a.shape[0], args.top_k, "a"))
        invalid(
            fmt::format("c: expected {} x {} rows (one per slot), got {}; set top_k, or pass rows "
                        "for every slot",
                        args.a.shape[0], args.top_k, to_string(args.c)));
    } else {
      check("c (sorted rows)", c).shape({r.positions, n});
      r.slot_count = args.a_order == RowOrder::kSlot ? checked_mul(args.a.shape[0], args.top_k, "a")
                     : args.row_weights.defined()    ? args.row_weights.numel()
                                                     : INT64_C(0x7fffffff);
    }
    if (c.shape[1] != n)
      invalid(fmt::format(
          "c: expected {} columns, as b.weight has rows, got {}; pass a view of that width", n,
          to_string(args.c)));
    if (args.a_order == RowOrder::kSorted) check("a (sorted rows)", args.a).shape({r.positions, k});
    if (args.row_weights.defined()) {
      check("row_weights", args.row_weights).dtype({DType::kF32}).contiguous().on(device);
      if (args.row_weights.numel() < r.slot_count)
        invalid(fmt::format(
            "row_weights: expected {} values (one per slot), got {}; pass a weight for every slot",
            r.slot_count, to_string(args.row_weights)));
    }
  }
  check_range("a: slots", r.slot_count, 0, INT64_C(0x7fffffff));  // ids of slots have 32 bits
  r.a = as_rows("a", args.a);
  r.c = as_rows("c", args.c);
  return r;
}

struct Buffers {
  RowMap rows;
  InputBuffers input;
  void* scratch = nullptr;
};
Buffers take_buffers(Arena& arena, const Resolved& r) {
  const LayerPlan& plan = r.plan;
  Buffers b;
  b.rows =
      take_row_map(arena, r.positions, r.batched ? plan.fc1.experts : r.positions, r.slot_count);
  b.input = take_input_buffers(
      arena, plan, {.tokens = r.batched ? r.positions : r.a.shape[0], .positions = r.positions});
  b.scratch = arena.take(plan.backend->gemm_scratch_bytes(plan.fc1, r.positions));
  return b;
}

// Blocks are tiles already, where small tiles are wanted anyway (one weight row then passes by
// an expert's blocks one by one) and rows are not laid out by them first.
UnlistedRows blocks_as_tiles(const Resolved& r, const WeightOperand& b, const GroupedGemmArgs& args,
                             const RowMap& rows) {
  const LayerPlan& plan = r.plan;
  const bool moved = must_expand(plan, &b.side) || b.side.prequant.defined() ||
                     (args.a_order != RowOrder::kSlot && is_float(args.a.dtype) &&
                      plan.fc1.act_scale != ActScale::kDefault);
  if (r.batched || moved) return {};
  const UnlistedRows blocks = unlisted_blocks(rows, args.sorted);
  const bool makes = plan.backend->makes_tiles(plan.fc1, rows, blocks, /*all_quantized=*/false);
  return makes ? blocks : UnlistedRows{};
}

}  // namespace

std::size_t grouped_gemm_workspace_bytes(const GroupedGemmArgs& args) {
  Arena arena;
  take_buffers(arena, resolve(args));
  return arena.used();
}

void grouped_gemm(const GroupedGemmArgs& args) {
  const Resolved r = resolve(args);
  const LayerPlan& plan = r.plan;
  WeightOperand b{.spec = plan.fc1};
  GemmWeights given = args.b;
  if (plan.fc1.act_scale == ActScale::kTensorStatic && !given.input_scale.defined())
    given.input_scale = args.a_scale;
  if (!is_float(args.a.dtype) && given.prequant.defined())
    unsupported(
        fmt::format("b.prequant: multiplies rows before they are quantized, and a is {}; pass {} "
                    "rows",
                    name(args.a.dtype), name(plan.fc1.dtype16)));
  check_in_place(plan.device, given, {}, "b");
  b.plain = normalize(plan.fc1, plan.fc1.experts, given, "b");
  b.side = side_views(plan.fc1, plan.fc1.experts, b.plain, {}, "b");

  Arena counting;
  take_buffers(counting, r);
  check_workspace(args.workspace, counting.used(), "grouped_gemm_workspace_bytes");
  if (r.positions == 0) return;
  Arena arena(args.workspace.data);
  Buffers buffers = take_buffers(arena, r);
  RowMap& rows = buffers.rows;
  if (r.batched) {
    set_tile_rows(rows, plan.fc1.experts, plan.backend->tile_rows(plan.fc1, r.positions));
  } else {
    rows.row_slot = args.sorted.slots.as<std::int32_t>();
    set_tile_rows_of_blocks(rows, args.sorted, plan.backend->tile_rows(plan.fc1, r.slot_count));
  }
  const UnlistedRows unlisted = blocks_as_tiles(r, b, args, rows);
  if (unlisted.any()) {
    rows = tiles_of_blocks(rows, args.sorted);
  } else {
    plan.backend->tiles({.sorted = args.sorted,
                         .batched = args.batched,
                         .capacity = r.capacity,
                         .experts = plan.fc1.experts,
                         .rows = rows},
                        args.stream);
  }
  const bool by_slot = !r.batched && args.a_order == RowOrder::kSlot;
  const bool is_quantized = !is_float(args.a.dtype);
  const Rows input = prepare_input(
      {.plan = &plan,
       .fc1 = &b,
       .rows = &rows,
       .input = {.values = r.a,
                 .scale = is_quantized ? caller_scale_view(plan.fc1, args.a_scale) : ActScaleView{},
                 .row = by_slot ? RowOf::kToken : RowOf::kPosition},
       .per_expert_absmax = r.batched},
      buffers.input, args.stream);
  plan.backend->gemm(
      {.rows = rows,
       .unlisted = unlisted,
       .a = input.values,
       .a_scale = input.scale,
       .a_row = input.row,
       .top_k = args.top_k,
       .b = &b,
       .row_weights = args.row_weights.as<float>(),
       .c = r.c,
       .c_row = r.batched || args.c_order == RowOrder::kSorted ? RowOf::kPosition : RowOf::kSlot,
       .scratch = buffers.scratch},
      args.stream);
}

// --- sum -----------------------------------------------------------------------------------------

void sum_slots(const SumArgs& args) {
  const Device device = args.output.device;
  check_enum("accumulate", args.accumulate, 2);
  check("output", args.output)
      .rank(2)
      .dtype({DType::kF32, DType::kF16, DType::kBF16})
      .inner_contiguous()
      .distinct();
  const std::int64_t tokens = args.output.shape[0], hidden = args.output.shape[1];
  check("input", args.input)
      .dtype({DType::kF32, DType::kF16, DType::kBF16})
      .inner_contiguous()
      .on(device);
  const Tensor rows = as_rows("input", args.input);
  if (rows.shape[1] != hidden)
    invalid(
        fmt::format("input: expected {} columns, as output has, got {}; pass a view of that width",
                    hidden, to_string(args.input)));
  std::int64_t top_k = 1;
  if (args.slot_row.defined()) {
    check("slot_row", args.slot_row)
        .shape({tokens, kAny})
        .dtype({DType::kI32})
        .contiguous()
        .on(device);
    top_k = args.slot_row.shape[1];
  } else {
    check("input", args.input).rank(3).shape({tokens, kAny, hidden});
    top_k = args.input.shape[1];
  }
  check_range("top_k", top_k, 1, kMaxTopK);
  if (args.topk_weights.defined())
    check("topk_weights", args.topk_weights)
        .shape({tokens, top_k})
        .dtype({DType::kF32})
        .contiguous()
        .on(device);
  if (args.topk_ids.defined())
    check("topk_ids", args.topk_ids)
        .shape({tokens, top_k})
        .dtype({DType::kI32})
        .contiguous()
        .on(device);
  if (tokens == 0) return;
  backend(device).combine({.rows = rows,
                           .slot_row = args.slot_row.as<std::int32_t>(),
                           .topk_ids = args.topk_ids.as<std::int32_t>(),
                           .weights = args.topk_weights.as<float>(),
                           .top_k = top_k,
                           .scale = args.scale,
                           .accumulate = args.accumulate,
                           .output = args.output},
                          args.stream);
}

}  // namespace moesaic
