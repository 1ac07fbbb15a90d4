// SPDX-License-Identifier: Apache-2.0
// The activation functions on the device, fp32 in and out: one place for the fused epilogues of
// both kernel families and for the separate activation kernel, so that all give the same bits.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "moesaic/activation.h"

namespace moesaic::cuda {

// alpha, beta and limit of one expert.
struct ActivationTerms {
  float alpha, beta, limit;
};
constexpr bool has_terms(Activation kind) {
  return kind == Activation::kSwigluOai || kind == Activation::kSwigluClamp ||
         kind == Activation::kSwigluStep;
}

// What a kernel takes by value: the scalars, and per-expert arrays where the caller gave them.
struct ActivationView {
  Activation kind = Activation::kIdentity;
  float alpha = 0, beta = 0, limit = 0;
  const float* alphas = nullptr;  // [E], else the scalar
  const float* betas = nullptr;
  const float* limits = nullptr;
  std::int64_t alpha_stride = 1, beta_stride = 1, limit_stride = 1;

  __device__ ActivationTerms terms(std::int64_t expert) const {
    return {alphas ? alphas[expert * alpha_stride] : alpha,
            betas ? betas[expert * beta_stride] : beta,
            limits ? limits[expert * limit_stride] : limit};
  }
};

inline ActivationView activation_view(const ActivationSpec& spec,
                                      const ActivationWeights& weights) {
  ActivationView view{
      .kind = spec.kind, .alpha = spec.alpha, .beta = spec.beta, .limit = spec.limit};
  const auto attach = [](const Tensor& t, const float*& data, std::int64_t& stride) {
    if (!t.defined()) return;
    data = t.as<const float>();
    stride = t.strides[0];
  };
  attach(weights.alpha, view.alphas, view.alpha_stride);
  attach(weights.beta, view.betas, view.beta_stride);
  attach(weights.limit, view.limits, view.limit_stride);
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
inline constexpr float kMinusLog2E = -1.4426950408889634f;
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
// Comparisons, not fminf / fmaxf: those would swallow a NaN, which must stay in its row.
__device__ __forceinline__ float at_most(float x, float limit) { return x > limit ? limit : x; }
__device__ __forceinline__ float clamp_to(float x, float limit) {
  return x > limit ? limit : (x < -limit ? -limit : x);
}

// --- the functions -------------------------------------------------------------------------------
// Ungated: act(x). Gated: act(gate, up). kKind is a constant, so only one branch is compiled.
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
  if constexpr (kKind == Activation::kGegluTanh) return gelu_tanh(gate) * up;
  if constexpr (kKind == Activation::kSwigluOai) {
    const float g = at_most(gate, terms.limit);
    return g * sigmoid(terms.alpha * g) * (clamp_to(up, terms.limit) + terms.beta);
  }
  if constexpr (kKind == Activation::kSwigluClamp) {
    return silu(at_most(gate, terms.limit)) * clamp_to(up, terms.limit);
  }
  if constexpr (kKind == Activation::kSwigluStep) {
    return at_most(silu(gate), terms.limit) * clamp_to(up, terms.limit);
  }
}

// The one closed switch: calls body(tag) with the kind as a constant, tag::value.
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
      return body(std::integral_constant<A, A::kGegluTanh>{});
    case A::kSwigluOai:
      return body(std::integral_constant<A, A::kSwigluOai>{});
    case A::kSwigluClamp:
      return body(std::integral_constant<A, A::kSwigluClamp>{});
    case A::kSwigluStep:
      return body(std::integral_constant<A, A::kSwigluStep>{});
  }
}

}  // namespace moesaic::cuda
