// SPDX-License-Identifier: Apache-2.0
#include "reference/activation.h"

#include <numbers>

namespace moesaic::reference {
namespace {

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
double silu(double x) { return x * sigmoid(x); }
double gelu(double x) { return 0.5 * x * (1 + std::erf(x / std::numbers::sqrt2)); }
double gelu_tanh(double x) {
  const double inner = std::sqrt(2 / std::numbers::pi) * (x + 0.044715 * x * x * x);
  return 0.5 * x * (1 + std::tanh(inner));
}
double clamp(double x, double limit) { return std::min(std::max(x, -limit), limit); }

// What evaluating f(g, u) in fp32 may cost: a few roundings of the result, the argument of exp
// rounded once (|x| units), and for 1 + erf and 1 + tanh, which cancel for negative x, some units
// of |x| itself. The second factor multiplies along.
double evaluation_error(Activation kind, const ActivationParameters& p, double g, double u,
                        double result) {
  constexpr double kRoundings = 8;
  const double size = std::abs(result) * (kRoundings + 2 * std::min(std::abs(g), 100.0)) * kUnit;
  switch (kind) {
    case Activation::kGelu:
    case Activation::kGeluTanh:
      return size + kRoundings * kUnit * std::abs(g);
    case Activation::kGeglu:
    case Activation::kGegluTanh:
      return size + kRoundings * kUnit * std::abs(g * u);
    case Activation::kSwigluOai:
      return size * std::max(1.0, std::abs(p.alpha)) +
             2 * kUnit * std::abs(g) * (std::abs(u) + std::abs(p.beta));
    default:
      return size;
  }
}

}  // namespace

ActivationParameters parameters_of(const ActivationSpec& spec, const ActivationWeights& weights,
                                   std::int64_t expert) {
  const auto pick = [&](const Tensor& t, float scalar) {
    return t.defined() ? load(t, expert) : static_cast<double>(scalar);
  };
  return {pick(weights.alpha, spec.alpha), pick(weights.beta, spec.beta),
          pick(weights.limit, spec.limit)};
}

double activate(Activation kind, const ActivationParameters& p, double g, double u) {
  const double limit = p.limit;
  switch (kind) {
    case Activation::kSilu:
      return silu(g);
    case Activation::kGelu:
      return gelu(g);
    case Activation::kGeluTanh:
      return gelu_tanh(g);
    case Activation::kRelu:
      return std::max(g, 0.0);
    case Activation::kRelu2:
      return std::max(g, 0.0) * std::max(g, 0.0);
    case Activation::kIdentity:
      return g;
    case Activation::kSwiglu:
      return silu(g) * u;
    case Activation::kGeglu:
      return gelu(g) * u;
    case Activation::kGegluTanh:
      return gelu_tanh(g) * u;
    case Activation::kSwigluOai: {
      const double gate = std::min(g, limit);
      return gate * sigmoid(p.alpha * gate) * (clamp(u, limit) + p.beta);
    }
    case Activation::kSwigluClamp:
      return silu(std::min(g, limit)) * clamp(u, limit);
    case Activation::kSwigluStep:
      return std::min(silu(g), limit) * clamp(u, limit);
  }
  return 0;
}

// The furthest of the interval's corners. Inside, a minimum of f (silu and gelu have one) lies at
// most half the second derivative times the error squared further out: |f''| < 2 for all of them
// (relu2 exactly 2), times the other factor.
Bounded activate(Activation kind, const ActivationParameters& p, Bounded g, Bounded u) {
  const double value = activate(kind, p, g.value, u.value);
  if (std::isnan(value)) return {value, 0};
  double error = evaluation_error(kind, p, g.value, u.value, value);
  double furthest = 0;
  for (const double gg : {g.value - g.error, g.value, g.value + g.error})
    for (const double uu : {u.value - u.error, u.value, u.value + u.error})
      furthest = std::max(furthest, std::abs(activate(kind, p, gg, uu) - value));
  error += furthest;
  error += g.error * g.error * (1 + (is_gated(kind) ? std::abs(u.value) + std::abs(p.beta) : 0));
  return {value, error};
}

std::vector<Bounded> activate(const ActivationSpec& spec, const ActivationParameters& parameters,
                              std::span<const Bounded> fc1) {
  if (!is_gated(spec.kind)) {
    std::vector<Bounded> out;
    for (const Bounded& g : fc1) out.push_back(activate(spec.kind, parameters, g, {}));
    return out;
  }
  const std::size_t width = fc1.size() / 2;
  std::vector<Bounded> out(width);
  for (std::size_t i = 0; i < width; ++i) {
    const bool halves = spec.layout == GateLayout::kHalves;
    Bounded first = halves ? fc1[i] : fc1[2 * i], second = halves ? fc1[i + width] : fc1[2 * i + 1];
    if (spec.order == GateOrder::kUpFirst) std::swap(first, second);
    out[i] = activate(spec.kind, parameters, first, second);
  }
  return out;
}

}  // namespace moesaic::reference
