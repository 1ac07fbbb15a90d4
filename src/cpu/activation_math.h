// SPDX-License-Identifier: Apache-2.0
// The activations in scalar fp32: the activate stage and the scalar kernels. What each name means is
// said once, here. NaN goes through every one of them (the comparisons are written so that it does).
#pragma once

#include <cmath>

#include "moesaic/activation.h"

namespace moesaic {

struct ActivationParams {
  float alpha = 1.702f, beta = 1.0f, limit = 7.0f;
};

inline float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }
inline float silu(float x) { return x / (1.0f + std::exp(-x)); }
inline float gelu(float x) { return 0.5f * x * (1.0f + std::erf(x * 0.70710678118654752f)); }
inline float gelu_tanh(float x) {
  const float inner = 0.79788456080286536f * (x + 0.044715f * x * x * x);
  return 0.5f * x * (1.0f + std::tanh(inner));
}
inline float at_most(float x, float limit) { return x > limit ? limit : x; }
inline float clamp_to(float x, float limit) {
  return x > limit ? limit : x < -limit ? -limit : x;
}

inline float activate_plain(Activation kind, float x) {
  switch (kind) {
    case Activation::kSilu: return silu(x);
    case Activation::kGelu: return gelu(x);
    case Activation::kGeluTanh: return gelu_tanh(x);
    case Activation::kRelu: return x < 0.0f ? 0.0f : x;
    case Activation::kRelu2: return x < 0.0f ? 0.0f : x * x;
    default: return x;  // kIdentity
  }
}

inline float activate_gated(Activation kind, float gate, float up, const ActivationParams& p) {
  switch (kind) {
    case Activation::kGeglu: return gelu(gate) * up;
    case Activation::kGegluTanh: return gelu_tanh(gate) * up;
    case Activation::kSwigluOai: {
      const float g = at_most(gate, p.limit);
      return g * sigmoid(p.alpha * g) * (clamp_to(up, p.limit) + p.beta);
    }
    case Activation::kSwigluClamp:
      return silu(at_most(gate, p.limit)) * clamp_to(up, p.limit);
    case Activation::kSwigluStep:
      return at_most(silu(gate), p.limit) * clamp_to(up, p.limit);
    default: return silu(gate) * up;  // kSwiglu
  }
}

}  // namespace moesaic
