// SPDX-License-Identifier: Apache-2.0
// The activation functions on the device, fp32 in and out: one place for the fused epilogues of
// both kernel families and for the separate activation kernel, so that all give the same bits.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "moesaic/activation.h"

namespace moesaic::cuda {

// z(g) of g * sigmoid(z), as an odd polynomial: z = g * (of[0] + of[1] g^2 + of[2] g^4 + ...), and
// all times -log2(e).
struct SigmoidArgument {
  static constexpr int kTerms = 7;
  float of[kTerms] = {};
};
inline constexpr float kMinusLog2E = -1.4426950408889634f;
constexpr SigmoidArgument argument_of(Activation kind, float alpha = 1.0f) {
  // 0.5 * (1 + tanh(z)) = sigmoid(2 z), z = sqrt(2 / pi) * (g + 0.044715 g^3).
  constexpr float kTanh = 2.0f * 0.79788456080286536f * kMinusLog2E;
  switch (kind) {
    case Activation::kGelu:
    case Activation::kGeglu:
      // 0.5 * (1 + erf(g / sqrt(2))) = sigmoid(z), z = log(Phi(g) / Phi(-g)): no branch, and
      // nothing that cancels. A minimax fit in units of the bound of docs/numerics.md, of which it
      // takes 0.11 (0.20 with the roundings of fp32, 0.33 where exp2 and the reciprocal are 2 and 1
      // ulp off); from g = -4.75 on it is also within 0.0011 of the result.
      return {{-2.30220723f, -0.104841538f, 9.93287904e-05f, 1.57860050e-04f, -1.11948921e-05f,
               3.67012831e-07f, -4.79155737e-09f}};
    case Activation::kGeluTanh:
    case Activation::kGegluTanh:
      return {{kTanh, kTanh * 0.044715f}};
    default:
      return {{alpha * kMinusLog2E}};
  }
}

// Gated functions are one formula, with terms of an expert: with g = min(gate, gate_limit),
//   min(g * sigmoid(z(g)), silu_limit) * (clamp(up) + beta)
// where what a function has not is an infinity, -0 or, in z, 0. All kernels have it once: a copy
// for each function was code beside the main loops, of which the fast ways of writing C had two.
// (SwiGLU, which most have, is thirteen instructions shorter by itself.)
constexpr bool has_terms(Activation kind) { return is_gated(kind) && kind != Activation::kSwiglu; }
struct ActivationTerms {
  SigmoidArgument z;
  float beta, gate_limit, silu_limit;
};
inline constexpr float kNoLimit = __builtin_huge_valf();

// What a kernel takes by value: the scalars, and per-expert arrays where the caller gave them.
struct ActivationView {
  Activation kind = Activation::kIdentity;
  SigmoidArgument z;  // z.of[0] times alpha
  float beta = 0, limit = 0;
  const float* alphas = nullptr;  // [E], else the scalar
  const float* betas = nullptr;
  const float* limits = nullptr;
  std::int64_t alpha_stride = 1, beta_stride = 1, limit_stride = 1;

  __device__ ActivationTerms terms(std::int64_t expert) const {
    const float given = limits ? limits[expert * limit_stride] : limit;
    const bool step = kind == Activation::kSwigluStep;
    ActivationTerms terms{.z = z,
                          .beta = betas ? betas[expert * beta_stride] : beta,
                          .gate_limit = step ? kNoLimit : given,
                          .silu_limit = step ? given : kNoLimit};
    if (alphas) terms.z.of[0] = alphas[expert * alpha_stride] * kMinusLog2E;
    return terms;
  }
};

inline ActivationView activation_view(const ActivationSpec& spec,
                                      const ActivationWeights& weights) {
  const bool oai = spec.kind == Activation::kSwigluOai;
  const bool limited =
      oai || spec.kind == Activation::kSwigluClamp || spec.kind == Activation::kSwigluStep;
  ActivationView view{.kind = spec.kind,
                      .z = argument_of(spec.kind, oai ? spec.alpha : 1.0f),
                      .beta = oai ? spec.beta : -0.0f,  // +0 would make another sign of a zero
                      .limit = limited ? spec.limit : kNoLimit};
  const auto attach = [](const Tensor& t, const float*& data, std::int64_t& stride) {
    if (!t.defined()) return;
    data = t.as<const float>();
    stride = t.strides[0];
  };
  if (oai) attach(weights.alpha, view.alphas, view.alpha_stride);
  if (oai) attach(weights.beta, view.betas, view.beta_stride);
  if (limited) attach(weights.limit, view.limits, view.limit_stride);
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
// g * sigmoid(z) with as many terms of z as are given. (An infinite square, times a term that is 0,
// would be NaN; beyond 100 every sigmoid is 0 or 1.)
template <int kCount>
__device__ __forceinline__ float times_sigmoid(float g, const float* of) {
  const float square = fminf(g * g, 100.0f);
  float z = of[kCount - 1];
  // The fused multiply-add is spelled out: the same bits in every kernel this is inlined into.
#pragma unroll
  for (int i = kCount - 2; i >= 0; --i) z = __fmaf_rn(z, square, of[i]);
  return g * reciprocal_fast(1.0f + exp2_fast(g * z));
}
template <Activation kKind, int kCount>
__device__ __forceinline__ float times_sigmoid(float g) {
  constexpr SigmoidArgument z = argument_of(kKind);
  return times_sigmoid<kCount>(g, z.of);
}
__device__ __forceinline__ float silu(float x) { return times_sigmoid<Activation::kSilu, 1>(x); }
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
// Ungated: act(x). Gated: act(gate, up). kKind is a constant, so that only one branch is compiled:
// kSwigluOai stands for all that has_terms.
template <Activation kKind>
__device__ __forceinline__ float activate(float gate, float up, const ActivationTerms& terms) {
  if constexpr (kKind == Activation::kSilu) return silu(gate);
  if constexpr (kKind == Activation::kGelu)
    return times_sigmoid<kKind, SigmoidArgument::kTerms>(gate);
  if constexpr (kKind == Activation::kGeluTanh) return times_sigmoid<kKind, 2>(gate);
  if constexpr (kKind == Activation::kRelu) return gate < 0.0f ? 0.0f : gate;
  if constexpr (kKind == Activation::kRelu2) return gate < 0.0f ? 0.0f : gate * gate;
  if constexpr (kKind == Activation::kIdentity) return gate;
  if constexpr (kKind == Activation::kSwiglu) return silu(gate) * up;
  if constexpr (kKind == Activation::kSwigluOai) {
    const float g = at_most(gate, terms.gate_limit);
    const float silu = times_sigmoid<SigmoidArgument::kTerms>(g, terms.z.of);
    const float up_limit = fminf(terms.gate_limit, terms.silu_limit);  // one is none
    return at_most(silu, terms.silu_limit) * (clamp_to(up, up_limit) + terms.beta);
  }
}

// The one closed switch: calls body(tag) with the kind as a constant, tag::value, or kSwigluOai in
// place of all that has_terms.
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
    case A::kGegluTanh:
    case A::kSwigluOai:
    case A::kSwigluClamp:
    case A::kSwigluStep:
      return body(std::integral_constant<A, A::kSwigluOai>{});
  }
}

}  // namespace moesaic::cuda
