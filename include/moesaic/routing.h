// SPDX-License-Identifier: Apache-2.0
// Routing: from router logits (or hidden states and router weights) to expert ids and weights.
#pragma once

#include <cstdint>
#include <string_view>

#include "moesaic/types.h"

namespace moesaic {

// How experts are chosen; their weight. z: logits [T, E] plus router bias; s: the score they are chosen
// by, without the selection bias ("+ bias"); p: softmax(z), for deepseek_v3 sigmoid(z); S: the set
// chosen. A selection bias affects which experts
// are chosen and never their weights. Ties: the lowest expert id first. NaN logits rank last.
// Who defines them: DeepSeek-V2 (arXiv:2405.04434) and -V3 (2412.19437), sparsemixer (GRIN,
// 2409.12136), the others the models' own code in the transformers library, which golden tests hold
// the oracle to.
enum class RoutingMethod : std::uint8_t {
  kSoftmaxTopK,    // softmax_topk    top-k softmax(z);                 weight: softmax over all E
  kRenormalize,    // renormalize     top-k z;                          weight: softmax over S
  kDeepSeekV3,     // deepseek_v3     grouped top-k of sigmoid(z)+bias;  p / (sum_S p + 1e-20)
  kDeepSeekV2,     // deepseek_v2     grouped (max) top-k softmax(z);    softmax over all E
  kLlama4,         // llama4          argmax z (top_k 1);               sigmoid(z); with WeightOn::kInput
  kTopK,           // topk            top-k z;                          raw z
  kSigmoidRenorm,  // sigmoid_renorm  top-k sigmoid(z);                 s / (sum_S s + 1e-20)
  kMiniMax2,       // minimax2        top-k (sigmoid(z) + bias);        s / (sum_S s + 1e-20)
  kSigmoid,        // sigmoid         top-k sigmoid(z);                 s
  kSqrtSoftplus,   // sqrtsoftplus    top-k (sqrt(softplus(z)) + bias);  s / sum_S s
  kSparseMixer,    // sparsemixer     Phi-3.5-MoE at inference, top_k 2
  kSoftmaxBias,    // softmax_bias    top-k (softmax(z) + bias);        p / max(sum_S p, floor)
};
inline constexpr int kNumRoutingMethods = 12;
MOESAIC_API std::string_view name(RoutingMethod method);
MOESAIC_API RoutingMethod parse_routing(std::string_view text);  // throws kInvalidArgument

// Whether the weights of S are divided by their sum. kDefault is what the table above says.
enum class Renormalize : std::uint8_t { kDefault, kNever, kAlways };

struct RoutingSpec {
  RoutingMethod method = RoutingMethod::kRenormalize;
  Renormalize renormalize = Renormalize::kDefault;
  float scale = 1.0f;         // routed scaling factor, applied exactly once, here
  int groups = 1;             // deepseek_*: experts are split into this many groups ...
  int topk_groups = 1;        // ... of which this many stay
  float jitter = 0.01f;       // sparsemixer's threshold is 2 * jitter
  float sum_floor = 1e-12f;   // softmax_bias
};

struct RouterWeights {
  Tensor weight;          // [E, H] f32, f16 or bf16, whatever dtype x has; z = x W^T accumulated in fp32.
                          // (Checkpoint makes f32 of routers that a file holds in fp8 or f64)
  Tensor bias;            // [E] f32/f16/bf16, added to z (GPT-OSS)
  Tensor selection_bias;  // [E] f32/f16/bf16, e_score_correction_bias; not with sparsemixer
};

struct RouteArgs {
  RoutingSpec spec{};
  Tensor logits;          // [T, E] f32, f16 or bf16; or
  Tensor hidden_states;   // [T, H] with router.weight
  RouterWeights router{};
  Tensor topk_ids;        // out [T, k] i32 (k = top_k), best first
  Tensor topk_weights;    // out [T, k] f32
  Workspace workspace{};  // route_workspace_bytes(...); only read when logits are computed here
  Stream stream{};
};
// Bytes that `route` needs for T tokens: the f32 logits [T, E], when it computes them.
MOESAIC_API std::size_t route_workspace_bytes(std::int64_t tokens, std::int64_t experts);
// Chooses top_k experts for every token, and their weights. A token's ids and bits depend on its own
// logits alone. Throws kInvalidArgument for shapes, dtypes, strides or a workspace that do not fit
// and for options that contradict the number of experts (groups, top_k), kUnsupported for a
// selection bias with sparsemixer; values never raise.
MOESAIC_API void route(const RouteArgs& args);

}  // namespace moesaic
