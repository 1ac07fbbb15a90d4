// SPDX-License-Identifier: Apache-2.0
// A layer with random weights and a batch for it, in two lines: what most tests start from.
#pragma once

#include "harness/data.h"
#include "harness/execute.h"
#include "harness/verify.h"
#include "moesaic/moesaic.h"

namespace moesaic::harness {

// 8 experts of 64 x 48, top 2, swiglu, bf16: the configuration a test changes one thing of.
inline LayerConfig small_config(Scheme scheme = Scheme::kBF16, std::int64_t max_tokens = 64) {
  Case c;
  c.variant = default_variant(scheme);
  c.shape = {"fixture", 8, 64, 48, 2};
  c.tokens = max_tokens;
  return layer_config(c);
}

struct Fixture {
  LayerConfig config;
  WeightData weights;
  Layer layer;

  explicit Fixture(const LayerConfig& configuration,
                   const WeightOptions& options = {.bias = Biases::kAll}, Device device = {})
      : config(configuration),
        weights(make_weights(configuration, options)),
        layer(configuration, device) {
    layer.load(weights.weights);
  }
  Batch batch(std::int64_t tokens, Load load = Load::kUniform, std::uint64_t seed = 3) const {
    return make_batch(config, {.tokens = tokens, .load = load, .seed = seed});
  }
  HostTensor run(const Batch& b, Format format = Format::kStandard) const {
    Execution how;
    how.format = format;
    return execute(layer, b, how).output;
  }
};

inline bool same_bits(const HostTensor& a, const HostTensor& b) {
  return a.shape() == b.shape() && a.bytes() == b.bytes();
}

inline const Variant& variant_named(std::string_view wanted) {
  for (const Variant& v : variants())
    if (v.name == wanted) return v;
  throw Error(ErrorCode::kInvalidArgument, "variant: no " + std::string(wanted));
}

// What is wrong with a case, or "".
inline std::string failure(const Case& c) {
  const VerifyResult r = run_case(c);
  return r.status == Status::kPassed ? "" : r.name + ": " + r.reason;
}

// What an Error says, or "" when nothing is thrown.
template <typename F>
std::string complaint(F&& f) {
  try {
    f();
  } catch (const Error& error) {
    return error.what();
  }
  return {};
}

}  // namespace moesaic::harness
