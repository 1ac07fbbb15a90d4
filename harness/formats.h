// SPDX-License-Identifier: Apache-2.0
// One layer, one batch, run through any of the three formats with buffers made beforehand, so that
// the run itself is what a caller of that format would pay.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "harness/data.h"
#include "moesaic/moesaic.h"

namespace moesaic::harness {

struct FormatInputs {
  Tensor hidden_states;  // [T, H] on the layer's device
  Tensor hidden_scale;   // standard format with 8-bit activations
  Tensor topk_ids;       // [T, k] i32
  Tensor topk_weights;   // [T, k] f32
  Tensor router_logits;  // [T, E]; standard format: instead of the two before
  Tensor output;         // [T, H]
};

class FormatRunner {
 public:
  // `capacity`: rows per expert of the batched format; 0: whatever any routing can need, T * k.
  FormatRunner(const Layer& layer, Format format, std::int64_t tokens, std::int64_t capacity = 0);
  void run(const FormatInputs& in, Stream stream) const {
    before(in, stream);
    products(in, stream);
    after(in, stream);
  }
  // The three stages of `run`. Standard: everything is in `products`.
  void before(const FormatInputs& in, Stream stream) const;
  void products(const FormatInputs& in, Stream stream) const;
  void after(const FormatInputs& in, Stream stream) const;

 private:
  SortedRows sorted() const;

  const Layer* layer_;
  // Batched, static activation scales: the layer whose rows prepare makes; experts quantizes them.
  std::optional<LayerConfig> float_rows_;
  Format format_;
  std::int64_t tokens_, capacity_, block_rows_;
  WorkspaceBuffer workspace_, align_workspace_;
  DeviceTensor slots_, block_experts_, num_padded_, slot_outputs_;          // sorted
  DeviceTensor rows_, row_scale_, num_tokens_, slot_row_, expert_outputs_;  // batched
};

}  // namespace moesaic::harness
