// SPDX-License-Identifier: Apache-2.0
// The one case list: what the tests, `verify` and `bench` run. A case is a complete description;
// its name is stable and says all of it.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "harness/data.h"
#include "moesaic/moesaic.h"

namespace moesaic::harness {

// --- shapes -------------------------------------------------------------------------------------
struct Shape {
  std::string name;
  std::int64_t experts = 0, hidden = 0, intermediate = 0, top_k = 0;
};
// Models that users serve: `bench --shape NAME`.
std::span<const Shape> model_shapes();
// Small ones, one per class of trouble: `verify --shape NAME`.
std::span<const Shape> test_shapes();
// A name of either list, or "E,H,I,k". Throws kInvalidArgument and lists the names.
Shape parse_shape(std::string_view text);

// --- schemes with their options -----------------------------------------------------------------
// One way of using a scheme: granularity, group, zero points, static or dynamic, dtypes.
struct Variant {
  std::string name;  // the scheme's, and behind '+' what is special: "int4_w4a16+g64+zp"
  QuantSpec quant;
  DType input = DType::kBF16;
  DType output = DType::kBF16;
  TensorScales tensor_scales = TensorScales::kOne;
  StaticScales static_scales = StaticScales::kShared;
  Extras extras = Extras::kNone;
};
std::span<const Variant> variants();  // the first of each scheme is its plain form
const Variant& default_variant(Scheme scheme);
// A variant's name, which may be a scheme's: that is its plain form. Throws kInvalidArgument and
// lists the names.
const Variant& parse_variant(std::string_view text);

// --- cases --------------------------------------------------------------------------------------
// Where a forward gets its routing from.
enum class RoutingSource : std::uint8_t { kIds, kLogits, kRouter };

struct Case {
  Variant variant;
  Shape shape;
  Format format = Format::kStandard;
  ActivationSpec activation{};
  Biases bias = Biases::kNone;
  ExpertParameters parameters = ExpertParameters::kScalar;
  std::int64_t tokens = 17;
  Load load = Load::kUniform;
  Values values = Values::kFinite;
  Placement placement = Placement::kDense;
  DType id_dtype = DType::kI32;
  ExpertRange local{};
  WeightOn weight_on = WeightOn::kOutput;
  RoutingSource source = RoutingSource::kIds;
  RoutingSpec routing{};
  std::int64_t shared_experts = 0;
  Accumulate accumulate = Accumulate::kOverwrite;
  std::uint64_t seed = 1;
};
std::string name(const Case& c);          // "int4_w4a16+g64/batched/swiglu/bias/odd/t17/zipf"
LayerConfig layer_config(const Case& c);  // complete and consistent
WeightOptions weight_options(const Case& c);
BatchOptions batch_options(const Case& c);
Support supported(const Case& c, Device device);

// Undefined fields match everything.
struct CaseFilter {
  std::optional<Scheme> scheme;
  std::optional<std::string> variant;  // its name
  std::optional<Format> format;
  std::optional<Activation> activation;
  std::optional<Shape> shape;  // a test shape, or any: then only that shape is made
  std::optional<std::int64_t> tokens;
};
// Every pair of (variant, format, activation, bias, shape, tokens, load), greedily covered: what
// the tests run.
std::vector<Case> pair_cases();
// What the issue list names one by one: 2048 experts, non-finite values, strided views, remote
// experts, shared experts, local ranges, routing inside the layer, residual ...
std::vector<Case> special_cases();
// The full product of variants, formats, activations, biases and shapes (tokens, load and gate
// order rotate through it), then the special cases: what `moesaic verify` runs.
std::vector<Case> product_cases(const CaseFilter& filter);

}  // namespace moesaic::harness
