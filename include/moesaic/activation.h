// SPDX-License-Identifier: Apache-2.0
// The functions between the two products.
#pragma once

#include <cstdint>
#include <string_view>

#include "moesaic/types.h"

namespace moesaic {

// g: gate, u: up. L, alpha and beta are per expert when tensors are given, else the scalars.
enum class Activation : std::uint8_t {
  // Ungated: fc1 has N = intermediate.
  kSilu, kGelu, kGeluTanh, kRelu, kRelu2, kIdentity,
  // Gated: fc1 has N = 2 * intermediate.
  kSwiglu,       // swiglu        silu(g) * u
  kGeglu,        // geglu         gelu(g) * u, erf form (SGLang's and vLLM's gelu_and_mul)
  kGegluTanh,    // geglu_tanh    gelu(g) * u, tanh form
  kSwigluOai,    // swiglu_oai    g=min(g,L), u=clamp(u,-L,L): g*sigmoid(alpha*g)*(u+beta)  (GPT-OSS)
  kSwigluClamp,  // swiglu_clamp  silu(min(g,L)) * clamp(u,-L,L)
  kSwigluStep,   // swiglu_step   min(silu(g),L) * clamp(u,-L,L)
};
inline constexpr int kNumActivations = 12;
MOESAIC_API std::string_view name(Activation activation);
MOESAIC_API Activation parse_activation(std::string_view text);  // throws kInvalidArgument
constexpr bool is_gated(Activation a) { return a >= Activation::kSwiglu; }

// Where gate and up lie in the N = 2 * intermediate rows of fc1.
enum class GateOrder : std::uint8_t { kGateFirst, kUpFirst };       // kUpFirst: FlashInfer
enum class GateLayout : std::uint8_t { kHalves, kInterleaved };     // kInterleaved: GPT-OSS

struct ActivationSpec {
  Activation kind = Activation::kSwiglu;
  GateOrder order = GateOrder::kGateFirst;
  GateLayout layout = GateLayout::kHalves;
  float alpha = 1.702f;  // swiglu_oai
  float beta = 1.0f;     // swiglu_oai
  float limit = 7.0f;    // swiglu_oai, swiglu_clamp, swiglu_step
};

// Per-expert parameters, f32 [E]; undefined: the scalars of ActivationSpec.
struct ActivationWeights {
  Tensor alpha, beta, limit;
};

struct ActivateArgs {
  ActivationSpec spec{};
  ActivationWeights parameters{};
  Tensor input;       // [R, N] f32, f16 or bf16; computed in fp32
  Tensor row_expert;  // [R] i32, needed when `parameters` are given; rows with -1 become zero
  Tensor output;      // [R, intermediate] f32, f16 or bf16
  Stream stream{};
};
// output[r] = act(input[r]), in fp32, rounded once. The gated forms are Shazeer's GLU variants
// (arXiv:2002.05202), gelu is Hendrycks and Gimpel's (1606.08415), swiglu_oai GPT-OSS's, and
// swiglu_clamp and swiglu_step SGLang's and FlashInfer's. Throws kInvalidArgument for shapes, dtypes
// and strides that do not fit; NaN stays in its element.
MOESAIC_API void activate(const ActivateArgs& args);

}  // namespace moesaic
