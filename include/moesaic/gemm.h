// SPDX-License-Identifier: Apache-2.0
// Level 3: one grouped GEMM over experts whose rows are gathered through a routing, and the pieces
// around it. Defined by SGLang's invoke_fused_moe_kernel and, for the batched format, vLLM's
// invoke_moe_batched_triton_kernel. Nothing here keeps state between calls.
#pragma once

#include <cstdint>

#include "moesaic/activation.h"
#include "moesaic/quant.h"
#include "moesaic/types.h"

namespace moesaic {

// Which global expert ids live here. Ids outside contribute nothing.
struct ExpertRange {
  std::int64_t first = 0;
  std::int64_t count = 0;  // 0: from first to the last
};

// The sorted format: slot ids (token * top_k + j) grouped by expert, each expert's run padded to a
// multiple of block_rows with the value T * top_k.
struct SortedRows {
  Tensor slots;          // [capacity] i32
  Tensor block_experts;  // [capacity / block_rows] i32; -1: not on this rank, rows are zero
  Tensor num_padded;     // [1] i32: how many of `slots` are in use, whole blocks (one that the end of
                         // `slots` cuts off may be left out)
  std::int64_t block_rows = 0;
};

// The batched format: expert e's rows are the first num_tokens[e] of A's [E, capacity, K].
struct BatchedRows {
  Tensor num_tokens;  // [E_local] i32
};

// --- align: moe_align_block_size, stable and checked ------------------------------------------
struct AlignArgs {
  Tensor topk_ids;             // [T, k] i32 or i64
  std::int64_t experts = 0;    // ids in [0, experts) are valid, others contribute nothing
  ExpertRange local{};         // ids outside become blocks of expert -1 (filtered)
  Tensor expert_map;           // optional i32 [experts]: global -> local id, in place of local.first;
                               // what lies outside [0, local.count) is not here
  SortedRows rows;             // out; block_experts holds *local* ids
  Tensor slot_row;             // optional out i32 [T * k]: position of each slot in `slots`, or -1
  Tensor tokens_per_expert;    // optional out i32 [E_local]
  Workspace workspace{};       // align_workspace_bytes
  Stream stream{};
};
// Length of `slots` that suffices for any routing of `slot_count` slots.
MOESAIC_API std::int64_t align_capacity(std::int64_t slot_count, std::int64_t experts,
                                        std::int64_t block_rows);
// Bytes of workspace for any routing of `slot_count` slots.
MOESAIC_API std::size_t align_workspace_bytes(std::int64_t slot_count, std::int64_t experts,
                                              Device device = {});
// Slots of one expert keep their order: the same ids give the same lists, always. Ids may be anything
// (SGLang's are not checked, and its order varies). Throws kInvalidArgument for shapes, dtypes,
// lists shorter than align_capacity, a workspace that is too small.
MOESAIC_API void align(const AlignArgs& args);

// --- the grouped GEMM -------------------------------------------------------------------------
enum class RowOrder : std::uint8_t {
  kSlot,    // row = slot id (for A: slot / top_k, which is the token)
  kSorted,  // row = position in `slots` (SGLang's a_use_tma / c_sorted)
};

struct GroupedGemmArgs {
  QuantSpec quant{};
  Tensor a;            // sorted: [T, K] (or [T * k, K] with top_k = 1); batched: [E, capacity, K].
                       // f32/f16/bf16, quantized inside when the scheme has 8-bit activations; or
                       // already e4m3 / i8 with a_scale
  Tensor a_scale;      // f32: [1] | [T, 1] | [T, ceil(K/g)], or [E, 1 | capacity, ...] batched. With
                       // float a: the static scale where b.input_scale is not given (an act_scale
                       // of kDefault then means kTensorStatic)
  GemmWeights b;       // unpacked views, used in place
  SortedRows sorted;   // exactly one of
  BatchedRows batched; // the two formats
  std::int64_t top_k = 1;
  RowOrder a_order = RowOrder::kSlot;
  RowOrder c_order = RowOrder::kSlot;
  Tensor row_weights;  // optional f32 [T * k] by slot: multiplies after the bias (mul_routed_weight)
  Tensor c;            // out: [T, k, N], [T * k, N], [positions, N] when kSorted, [E, capacity, N]
                       // batched; f32, f16 or bf16; any strides of rows and columns (rows evenly
                       // apart: a rank-3 view, of `a` too, has strides[0] = shape[1] * strides[1]).
                       // Rows of filtered blocks become zero; rows behind an expert's last token
                       // are not written.
  Workspace workspace{};
  Stream stream{};
};
// Bytes of workspace from the call's shapes, dtypes and strides; tensors' contents are not read.
MOESAIC_API std::size_t grouped_gemm_workspace_bytes(const GroupedGemmArgs& args);
// Epilogue order: scale, bias, row weight, cast. fp32 accumulation in one fixed order of K. Throws
// kInvalidArgument (shapes, dtypes, strides, tensors on another device, small tensors of `b` that are
// not dense, workspace), kUnsupported (a scheme's option outside the matrix, by name).
MOESAIC_API void grouped_gemm(const GroupedGemmArgs& args);

// --- sum: moe_sum_reduce / finalize -----------------------------------------------------------
enum class Accumulate : std::uint8_t { kOverwrite, kAdd };  // kAdd: y += (residual)

struct SumArgs {
  Tensor input;         // [T, k, H] by slot; or rows addressed through slot_row
  Tensor slot_row;      // optional i32 [T, k]: row of `input` [R, H] holding the slot; -1: none
  Tensor topk_weights;  // optional f32 [T, k]
  Tensor topk_ids;      // optional i32 [T, k]: slots with a negative id are skipped
  float scale = 1.0f;   // combine's own factor; 1 unless a drop-in caller sets it
  Accumulate accumulate = Accumulate::kOverwrite;
  Tensor output;        // [T, H] f32, f16 or bf16
  Stream stream{};
};
// fp32 sum in slot order, one rounding at the end. Throws kInvalidArgument for what does not fit.
MOESAIC_API void sum_slots(const SumArgs& args);

}  // namespace moesaic
