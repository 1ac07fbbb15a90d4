// SPDX-License-Identifier: Apache-2.0
// The activation functions on the device, fp32 in and out: one place for the fused epilogues of
// both kernel families and for the separate activation kernel, so that all give the same bits.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "moesaic/activation.h"

namespace moesaic::cuda {

// Gated functions are one formula, with terms of an expert: with g = min(gate, gate_limit),
//   min(g * sigmoid(z), silu_limit) * (clamp(up) + beta),   z = alpha * g, or cubic in g
// where what a function has not is an infinity or -0. All kernels have it once: a copy for each
// function was code beside the main loops, of which the fast ways of writing C had two. (SwiGLU,
// which most have, is eight instructions shorter by itself; GEGLU with the error function is not
// of this form.)
constexpr Activation formula_of(Activation kind) {
  const bool has_terms = kind == Activation::kGegluTanh || kind == Activation::kSwigluClamp ||
                         kind == Activation::kSwigluStep;
  return has_terms ? Activation::kSwigluOai : kind;
}
constexpr bool has_terms(Activation kind) { return formula_of(kind) == Activation::kSwigluOai; }
struct ActivationTerms {
  float alpha, beta;  // alpha: times -log2(e)
  float gate_limit, silu_limit;
  bool cubic;
};
inline constexpr float kMinusLog2E = -1.4426950408889634f;
inline constexpr float kNoLimit = __builtin_huge_valf();

// What a kernel takes by value: the scalars, and per-expert arrays where the caller gave them.
struct ActivationView {
  Activation kind = Activation::kIdentity;
  float alpha = 0, beta = 0, limit = 0;
  const float* alphas = nullptr;  // [E], else the scalar
  const float* betas = nullptr;
  const float* limits = nullptr;
  std::int64_t alpha_stride = 1, beta_stride = 1, limit_stride = 1;

  __device__ ActivationTerms terms(std::int64_t expert) const {
    const float given = limits ? limits[expert * limit_stride] : limit;
    const bool step = kind == Activation::kSwigluStep;
    return {.alpha = alphas ? alphas[expert * alpha_stride] * kMinusLog2E : alpha,
            .beta = betas ? betas[expert * beta_stride] : beta,
            .gate_limit = step ? kNoLimit : given,
            .silu_limit = step ? given : kNoLimit,
            .cubic = kind == Activation::kGegluTanh};
  }
};

inline ActivationView activation_view(const ActivationSpec& spec,
                                      const ActivationWeights& weights) {
  const bool oai = spec.kind == Activation::kSwigluOai, tanh = spec.kind == Activation::kGegluTanh;
  // 0.5 * (1 + tanh(z)) = sigmoid(2 z), z = sqrt(2 / pi) * (g + 0.044715 g^3).
  const float alpha = oai ? spec.alpha : tanh ? 2.0f * 0.79788456080286536f : 1.0f;
  ActivationView view{.kind = spec.kind,
                      .alpha = alpha * kMinusLog2E,
                      .beta = oai ? spec.beta : -0.0f,  // +0 would make another sign of a zero
                      .limit = tanh ? kNoLimit : spec.limit};
  const auto attach = [](const Tensor& t, const float*& data, std::int64_t& stride) {
    if (!t.defined()) return;
    data = t.as<const float>();
    stride = t.strides[0];
  };
  if (oai) attach(weights.alpha, view.alphas, view.alpha_stride);
  if (oai) attach(weights.beta, view.betas, view.beta_stride);
  if (!tanh) attach(weights.limit, view.limits, view.limit_stride);
  return view;
}

// --- pieces --------------------------------------------------------------------------------------
// exp and division by the special function unit: 2 ulp each, far below the 16-bit rounding behind.
// The library's expf and a true division cost four times the instructions. Nor __expf and
// __fdividef, which are five instructions longer than these: for results below the smallest normal
// number, of which beside 1 nothing is left. The bits are theirs for each of the 2^32 arguments.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float sigmoid(float x) {
  return reciprocal_fast(1.0f + exp2_fast(x * kMinusLog2E));
}
__device__ __forceinline__ float silu(float x) { return x * sigmoid(x); }
// erfc, not 1 + erf: that would cancel for negative x and lose the tail's relative accuracy.
__device__ __forceinline__ float gelu_erf(float x) {
  return 0.5f * x * erfcf(x * -0.70710678118654752f);
}
// 0.5 * (1 + tanh(z)) = sigmoid(2 z). tanhf would branch; tanh.approx has 11 bits only.
__device__ __forceinline__ float gelu_tanh(float x) {
  // The fused multiply-add is spelled out: the same bits in every kernel this is inlined into.
  const float z = 0.79788456080286536f * __fmaf_rn(0.044715f * x * x, x, x);
  return x * reciprocal_fast(1.0f + exp2_fast(z * (2.0f * kMinusLog2E)));
}
// Not fminf and fmaxf: those would swallow a NaN, which must stay in its row.
__device__ __forceinline__ float at_most(float x, float limit) {
  float y;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(limit));
  return y;
}
__device__ __forceinline__ float clamp_to(float x, float limit) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(at_most(x, limit)), "f"(-limit));
  return y;
}

// --- the functions -------------------------------------------------------------------------------
// Ungated: act(x). Gated: act(gate, up). kKind is a formula_of, and a constant, so that only one
// branch is compiled.
template <Activation kKind>
__device__ __forceinline__ float activate(float gate, float up, const ActivationTerms& terms) {
  if constexpr (kKind == Activation::kSilu) return silu(gate);
  if constexpr (kKind == Activation::kGelu) return gelu_erf(gate);
  if constexpr (kKind == Activation::kGeluTanh) return gelu_tanh(gate);
  if constexpr (kKind == Activation::kRelu) return gate < 0.0f ? 0.0f : gate;
  if constexpr (kKind == Activation::kRelu2) return gate < 0.0f ? 0.0f : gate * gate;
  if constexpr (kKind == Activation::kIdentity) return gate;
  if constexpr (kKind == Activation::kSwiglu) return silu(gate) * up;
  if constexpr (kKind == Activation::kGeglu) return gelu_erf(gate) * up;
  if constexpr (kKind == Activation::kSwigluOai) {
    const float g = at_most(gate, terms.gate_limit);
    // (Not a factor that may be 0: an infinity would become NaN.)
    const float z = terms.cubic ? __fmaf_rn(0.044715f * g * g, g, g) : g;
    const float silu = g * reciprocal_fast(1.0f + exp2_fast(z * terms.alpha));
    const float up_limit = fminf(terms.gate_limit, terms.silu_limit);  // one is none
    return at_most(silu, terms.silu_limit) * (clamp_to(up, up_limit) + terms.beta);
  }
}

// The one closed switch: calls body(tag) with formula_of(kind) as a constant, tag::value.
template <typename Body>
__device__ __forceinline__ void with_activation(Activation kind, Body&& body) {
  using A = Activation;
  switch (kind) {
    case A::kSilu:
      return body(std::integral_constant<A, A::kSilu>{});
    case A::kGelu:
      return body(std::integral_constant<A, A::kGelu>{});
    case A::kGeluTanh:
      return body(std::integral_constant<A, A::kGeluTanh>{});
    case A::kRelu:
      return body(std::integral_constant<A, A::kRelu>{});
    case A::kRelu2:
      return body(std::integral_constant<A, A::kRelu2>{});
    case A::kIdentity:
      return body(std::integral_constant<A, A::kIdentity>{});
    case A::kSwiglu:
      return body(std::integral_constant<A, A::kSwiglu>{});
    case A::kGeglu:
      return body(std::integral_constant<A, A::kGeglu>{});
    case A::kGegluTanh:
    case A::kSwigluOai:
    case A::kSwigluClamp:
    case A::kSwigluStep:
      return body(std::integral_constant<A, A::kSwigluOai>{});
  }
}

}  // namespace moesaic::cuda
