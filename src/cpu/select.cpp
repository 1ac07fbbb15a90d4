// SPDX-License-Identifier: Apache-2.0
#include "cpu/select.h"

#include <bit>
#include <cmath>
#include <limits>

namespace moesaic {
namespace {

constexpr float kLowest = -std::numeric_limits<float>::infinity();

// A score and an id as one number, larger = better: higher score, then lower id. NaN is below
// -infinity, and -0 equals 0. An ineligible expert has no key (0).
std::uint64_t key_of(float score, std::int64_t id) {
  std::uint32_t rank = 1;  // NaN
  if (score == score) {
    const auto bits = std::bit_cast<std::uint32_t>(score + 0.0f);
    rank = bits & 0x80000000u ? ~bits : bits | 0x80000000u;  // -inf becomes 0x007fffff
  }
  return std::uint64_t{rank} << 32 | (0xffffffffu - static_cast<std::uint32_t>(id));
}

// The `k` largest keys seen, best first.
class Best {
 public:
  explicit Best(std::int64_t k) : k_(k) { keys_.fill(0); }
  void offer(std::uint64_t key) {
    if (key <= keys_[static_cast<std::size_t>(k_ - 1)]) return;
    std::int64_t i = k_ - 1;
    for (; i > 0 && keys_[static_cast<std::size_t>(i - 1)] < key; --i)
      keys_[static_cast<std::size_t>(i)] = keys_[static_cast<std::size_t>(i - 1)];
    keys_[static_cast<std::size_t>(i)] = key;
  }
  std::int32_t id(std::int64_t i) const {
    const std::uint64_t key = keys_[static_cast<std::size_t>(i)];
    return key == 0 ? -1 : static_cast<std::int32_t>(0xffffffffu - static_cast<std::uint32_t>(key));
  }

 private:
  std::int64_t k_;
  std::array<std::uint64_t, kMaxPicks> keys_;
};

bool divides(const RoutingSpec& spec) {
  if (spec.renormalize != Renormalize::kDefault) return spec.renormalize == Renormalize::kAlways;
  switch (spec.method) {
    case RoutingMethod::kRenormalize:
    case RoutingMethod::kDeepSeekV3:
    case RoutingMethod::kSigmoidRenorm:
    case RoutingMethod::kMiniMax2:
    case RoutingMethod::kSqrtSoftplus:
    case RoutingMethod::kSoftmaxBias:
      return true;
    default:
      return false;
  }
}

// Added to the sum that divides, as the models that define the method do it.
float added_to_sum(RoutingMethod method) {
  switch (method) {
    case RoutingMethod::kDeepSeekV3:
    case RoutingMethod::kSigmoidRenorm:
    case RoutingMethod::kMiniMax2:
      return 1e-20f;
    default:
      return 0.0f;
  }
}

bool is_grouped(const RoutingSpec& spec) {
  return (spec.method == RoutingMethod::kDeepSeekV2 || spec.method == RoutingMethod::kDeepSeekV3) &&
         spec.groups > 1 && spec.topk_groups < spec.groups;
}

}  // namespace

Selector::Selector(const StageKernels& kernels, const RoutingSpec& spec, std::int64_t experts,
                   std::int64_t top_k, const RowView& selection_bias)
    : kernels_(kernels),
      spec_(spec),
      experts_(experts),
      top_k_(top_k),
      biased_(selection_bias.rows() > 0) {
  if (biased_) selection_bias.read(kernels, 0, 0, experts, bias_.data());
}

void Selector::add_router_bias(const RowView& bias) {
  bias.read(kernels_, 0, 0, experts_, c_.data());
  for (std::int64_t e = 0; e < experts_; ++e) z_[e] += c_[e];
}

float Selector::score() {
  switch (spec_.method) {
    case RoutingMethod::kSoftmaxTopK:
    case RoutingMethod::kRenormalize:
    case RoutingMethod::kDeepSeekV2:
    case RoutingMethod::kSoftmaxBias: {
      float top = kLowest;  // NaN does not count: it is this token's, and shows in its sum
      for (std::int64_t e = 0; e < experts_; ++e) top = z_[e] > top ? z_[e] : top;
      if (top == kLowest) top = 0.0f;  // all -inf: -inf - -inf is NaN, and 0 is what is meant
      return 1.0f / kernels_.exponentials(z_.data(), top, experts_, p_.data());
    }
    case RoutingMethod::kTopK:
    case RoutingMethod::kSparseMixer:
      std::copy_n(z_.data(), experts_, p_.data());
      return 1.0f;
    case RoutingMethod::kSqrtSoftplus:
      kernels_.sqrt_softplus(z_.data(), experts_, p_.data());
      return 1.0f;
    default:
      kernels_.sigmoids(z_.data(), experts_, p_.data());
      return 1.0f;
  }
}

void Selector::keep_groups(const float* c) {
  const std::int64_t groups = spec_.groups, width = experts_ / groups;
  const bool two = spec_.method == RoutingMethod::kDeepSeekV3 && width > 1;
  // Groups are ranked like experts; there may be more of them than picks, so each counts those that
  // are better.
  std::array<std::uint64_t, kMaxRoutedExperts> keys;
  for (std::int64_t g = 0; g < groups; ++g) {
    Best best(two ? 2 : 1);
    for (std::int64_t i = 0; i < width; ++i) best.offer(key_of(c[g * width + i], i));
    const float* group = c + g * width;
    keys[g] = key_of(two ? group[best.id(0)] + group[best.id(1)] : group[best.id(0)], g);
  }
  for (std::int64_t g = 0; g < groups; ++g) {
    std::int64_t better = 0;
    for (std::int64_t other = 0; other < groups; ++other) better += keys[other] > keys[g];
    std::fill_n(eligible_.data() + g * width, width, better < spec_.topk_groups);
  }
}

Selection Selector::select() {
  if (spec_.method == RoutingMethod::kSparseMixer) return sparse_mixer();
  const bool grouped = is_grouped(spec_);
  // Softmax and sigmoid are monotone: where neither a bias nor a sum of two comes in, z itself is
  // compared, which does not saturate.
  const bool by_score = biased_ || (grouped && spec_.method == RoutingMethod::kDeepSeekV3);
  const float factor = score();
  const float* c = z_.data();
  if (by_score) {
    for (std::int64_t e = 0; e < experts_; ++e)
      c_[e] = p_[e] * factor + (biased_ ? bias_[e] : 0.0f);
    c = c_.data();
  }
  if (grouped) keep_groups(c);
  Best best(top_k_);
  for (std::int64_t e = 0; e < experts_; ++e)
    if (!grouped || eligible_[e]) best.offer(key_of(c[e], e));
  Selection out;
  for (std::int64_t j = 0; j < top_k_; ++j) out.ids[j] = best.id(j);
  weigh(factor, &out);
  return out;
}

// w = p * factor, divided by the sum over S where the method or the caller says so, times the
// scale: the one place where the routed scaling factor is applied.
void Selector::weigh(float factor, Selection* out) const {
  const bool divide = divides(spec_);
  // Softmax over S is exp(z) over its own sum: dividing the quotients of a far larger sum over all
  // E would lose what the best logit outside S takes.
  const bool direct = divide && spec_.method != RoutingMethod::kSoftmaxBias;
  float sum = added_to_sum(spec_.method);
  for (std::int64_t j = 0; j < top_k_; ++j) {
    const std::int32_t id = out->ids[j];
    out->weights[j] = id < 0 ? 0.0f : direct ? p_[id] : p_[id] * factor;
    sum += out->weights[j];
  }
  if (divide && spec_.method == RoutingMethod::kSoftmaxBias)
    sum = sum < spec_.sum_floor ? spec_.sum_floor : sum;
  for (std::int64_t j = 0; j < top_k_; ++j) {
    float w = out->weights[j];
    if (divide) w = sum == 0.0f ? 0.0f : w / sum;
    out->weights[j] = w * spec_.scale;
  }
}

// Phi-3.5-MoE at inference. Each pick is the best that is left; its weight is the softmax over
// those left within 2 * jitter of it, relative to max(|z|, best). The threshold looks at z itself.
Selection Selector::sparse_mixer() {
  std::copy_n(z_.data(), experts_, c_.data());  // what is left; picked: -inf
  std::fill_n(eligible_.data(), experts_, true);
  Selection out;
  for (std::int64_t j = 0; j < top_k_; ++j) {
    Best best(1);
    for (std::int64_t e = 0; e < experts_; ++e)
      if (eligible_[e]) best.offer(key_of(c_[e], e));
    const std::int32_t id = best.id(0);
    out.ids[j] = id;
    out.weights[j] = 0.0f;
    if (id < 0) continue;
    const float top = c_[id];
    for (std::int64_t e = 0; e < experts_; ++e) {
      const float magnitude = std::fabs(z_[e]), reach = magnitude > top ? magnitude : top;
      const bool masked = (top - z_[e]) / reach > 2.0f * spec_.jitter;
      p_[e] = masked ? kLowest : c_[e];
    }
    out.weights[j] = spec_.scale / kernels_.exponentials(p_.data(), top, experts_, p_.data());
    eligible_[id] = false;
    c_[id] = kLowest;
  }
  return out;
}

}  // namespace moesaic
