// SPDX-License-Identifier: Apache-2.0
// The three stages apart, with a foreign dispatch and combine in between: here two "ranks" in one
// process, each with half of the experts, and a copy of memory where a network would be.
#include <moesaic/moesaic.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <vector>
using namespace moesaic;

namespace {
constexpr std::int64_t kExperts = 8, kHidden = 64, kIntermediate = 32, kTopK = 2, kTokens = 5;

Tensor f32(std::vector<float>& v, std::initializer_list<std::int64_t> shape) {
  return Tensor::contiguous(v.data(), DType::kF32, shape);
}
Tensor i32(std::vector<std::int32_t>& v, std::initializer_list<std::int64_t> shape) {
  return Tensor::contiguous(v.data(), DType::kI32, shape);
}
LayerConfig config_of(ExpertRange local) {
  return {.experts = kExperts, .hidden = kHidden, .intermediate = kIntermediate, .top_k = kTopK,
          .max_tokens = kTokens, .local = local, .quant = {.scheme = Scheme::kF32},
          .input_dtype = DType::kF32, .output_dtype = DType::kF32};
}
}  // namespace

int main() {
  std::vector<float> fc1(kExperts * 2 * kIntermediate * kHidden), fc2(kExperts * kHidden * kIntermediate);
  std::vector<float> x(kTokens * kHidden), weights(kTokens * kTopK, 0.5f);
  std::vector<std::int32_t> ids(kTokens * kTopK);  // two experts of eight for each token
  for (std::size_t i = 0; i < fc1.size(); ++i) fc1[i] = 0.05f * std::sin(0.7f * static_cast<float>(i));
  for (std::size_t i = 0; i < fc2.size(); ++i) fc2[i] = 0.05f * std::cos(0.3f * static_cast<float>(i));
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = std::sin(static_cast<float>(i));
  for (std::size_t t = 0; t < kTokens; ++t) {
    ids[kTopK * t] = static_cast<std::int32_t>(t % 8);
    ids[kTopK * t + 1] = static_cast<std::int32_t>((3 * t + 1) % 8);
  }

  // What one layer with all experts says.
  Layer whole(config_of({}));
  whole.load({.fc1 = {.weight = f32(fc1, {kExperts, 2 * kIntermediate, kHidden})},
              .fc2 = {.weight = f32(fc2, {kExperts, kHidden, kIntermediate})}});
  std::vector<float> expected(kTokens * kHidden);
  WorkspaceBuffer scratch({}, whole.workspace_bytes(kTokens));
  whole.forward({.hidden_states = f32(x, {kTokens, kHidden}), .topk_ids = i32(ids, {kTokens, kTopK}),
                 .topk_weights = f32(weights, {kTokens, kTopK}),
                 .output = f32(expected, {kTokens, kHidden}), .workspace = scratch.view()});

  // Two ranks: each runs its half and adds its part to the tokens.
  std::vector<float> y(kTokens * kHidden, 0.0f);
  const std::int64_t half = kExperts / 2, capacity = kTokens * kTopK;
  for (std::int64_t rank = 0; rank < 2; ++rank) {
    const LayerConfig config = config_of({.first = rank * half, .count = half});
    std::vector<float> rows(half * capacity * kHidden), out(rows.size());
    std::vector<std::int32_t> counts(half), slot_row(kTokens * kTopK);
    WorkspaceBuffer workspace({}, stage_workspace_bytes(config, {.tokens = kTokens, .capacity = capacity}));
    prepare(config, {.hidden_states = f32(x, {kTokens, kHidden}), .topk_ids = i32(ids, {kTokens, kTopK}),
                     .rows = f32(rows, {half, capacity, kHidden}), .num_tokens = i32(counts, {half}),
                     .slot_row = i32(slot_row, {kTokens, kTopK}), .workspace = workspace.view()});
    // ... `rows` and `counts` are what a dispatch library would carry to the rank that owns them ...
    const Tensor my_fc1 = f32(fc1, {kExperts, 2 * kIntermediate, kHidden}).slice(rank * half, half);
    const Tensor my_fc2 = f32(fc2, {kExperts, kHidden, kIntermediate}).slice(rank * half, half);
    experts(config, {.fc1 = {.weight = my_fc1}, .fc2 = {.weight = my_fc2}, .activation = {}},
            {.format = Format::kBatched, .rows = f32(rows, {half, capacity, kHidden}),
             .batched = {.num_tokens = i32(counts, {half})},
             .output = f32(out, {half, capacity, kHidden}), .workspace = workspace.view()});
    finalize(config, {.expert_output = f32(out, {half, capacity, kHidden}),
                      .topk_ids = i32(ids, {kTokens, kTopK}), .topk_weights = f32(weights, {kTokens, kTopK}),
                      .slot_row = i32(slot_row, {kTokens, kTopK}), .output = f32(y, {kTokens, kHidden}),
                      .accumulate = Accumulate::kAdd, .workspace = workspace.view()});
  }
  float worst = 0;
  for (std::size_t i = 0; i < y.size(); ++i) worst = std::max(worst, std::abs(y[i] - expected[i]));
  std::printf("two ranks against one layer: largest difference %.1e\n", static_cast<double>(worst));
  return worst < 1e-6f ? 0 : 1;
}
