// SPDX-License-Identifier: Apache-2.0
// Level 2: prepare, experts, finalize, usable apart so that a foreign dispatch / combine can sit
// between them. vLLM's modular kernel defines the contract; `sorted` is SGLang's format, where rows
// stay where they are: its prepare is `align` (and `quantize`), its finalize `sum_slots`.
// All throw kInvalidArgument for shapes, dtypes, strides and devices that do not fit, kUnsupported
// for what the scheme has not, by name; values never raise.
#pragma once

#include <cstdint>

#include "moesaic/gemm.h"
#include "moesaic/layer.h"
#include "moesaic/types.h"

namespace moesaic {

enum class Format : std::uint8_t { kStandard, kSorted, kBatched };
MOESAIC_API std::string_view name(Format format);
MOESAIC_API Format parse_format(std::string_view text);  // throws kInvalidArgument

// --- prepare: tokens -> the batched format, quantized when the scheme has 8-bit activations ------
struct PrepareArgs {
  Tensor hidden_states;  // [T, H]
  Tensor hidden_scale;   // with 8-bit hidden_states: as ForwardArgs::hidden_scale, but [1] alone for
                         // schemes per tensor (row_scale has one value per expert)
  Tensor topk_ids;       // [T, k] i32 or i64, global
  Tensor topk_weights;   // [T, k] f32; read only with WeightOn::kInput
  Tensor expert_map;     // optional i32 [experts]: global -> local, -1 remote; else config.local
  Tensor rows;           // out [E_local, capacity, H] in the activation dtype
  Tensor row_scale;      // out f32, 8-bit activations: [E_local, 1 | capacity, 1 | ceil(H / block_k)]
  Tensor num_tokens;     // out i32 [E_local]: live rows, at most capacity
  Tensor slot_row;       // optional out i32 [T, k]: row (e * capacity + i) of each slot, -1: none
  Tensor status;         // optional out i32 [1]: slots dropped because an expert's capacity was full
  Workspace workspace{};
  Stream stream{};
};

// --- experts: both products and the activation, on rows that are already where they belong --------
struct ExpertsArgs {
  Format format = Format::kBatched;
  Tensor rows;        // batched [E_local, capacity, H]; sorted [T, H], gathered through `sorted`
  Tensor row_scale;   // of 8-bit rows, as prepare writes it (sorted: as ForwardArgs::hidden_scale)
  BatchedRows batched;
  SortedRows sorted;
  Tensor row_weights; // optional f32 [T * k] by slot (sorted only): multiplies the output, with
                      // WeightOn::kInput the input (which then must be 16-bit rows)
  Tensor output;      // batched [E_local, capacity, H]; sorted [T * k, H] by slot. f32, f16 or bf16.
                      // Rows behind an expert's last token are not written.
  std::int64_t expected_tokens = 0;  // batched: a hint, tokens (not rows) that are live over all
                                     // experts. It picks tiles and never changes bits. 0: unknown
  Workspace workspace{};
  Stream stream{};
};

// --- finalize: expert outputs -> tokens ----------------------------------------------------------
struct FinalizeArgs {
  Tensor expert_output;  // [E_local, capacity, H]; never modified
  Tensor topk_ids;       // [T, k], as given to prepare
  Tensor topk_weights;   // [T, k] f32; not applied with WeightOn::kInput
  Tensor expert_map;     // as given to prepare
  Tensor slot_row;       // optional: what prepare wrote; otherwise derived from topk_ids again
  Tensor output;         // [T, H]
  Accumulate accumulate = Accumulate::kOverwrite;
  Workspace workspace{};
  Stream stream{};
};

// With the packed weights of a layer. `experts` throws kNotReady before every expert is loaded.
MOESAIC_API void prepare(const Layer& layer, const PrepareArgs& args);
MOESAIC_API void experts(const Layer& layer, const ExpertsArgs& args);
MOESAIC_API void finalize(const Layer& layer, const FinalizeArgs& args);

// With the caller's own weights, read in place. `config` describes them; max_tokens is not used.
MOESAIC_API void experts(const LayerConfig& config, const LayerWeights& weights,
                         const ExpertsArgs& args);
MOESAIC_API void prepare(const LayerConfig& config, const PrepareArgs& args);
MOESAIC_API void finalize(const LayerConfig& config, const FinalizeArgs& args);

struct StageShape {
  Format format = Format::kBatched;
  std::int64_t tokens = 0;
  std::int64_t capacity = 0;  // batched: rows per expert; sorted: the length of `slots`
  Device device{};
};
// The workspace that any of the three stages needs at most. A pure function; throws kInvalidArgument
// for extents that 32-bit slot ids cannot number.
MOESAIC_API std::size_t stage_workspace_bytes(const LayerConfig& config, const StageShape& shape);

}  // namespace moesaic
