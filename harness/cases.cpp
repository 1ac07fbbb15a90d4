// SPDX-License-Identifier: Apache-2.0
// The lists cases are made of (shapes, variants), their names, and what a case means to a layer.
#include "harness/cases.h"

#include <charconv>

#include "check.h"
#include "scheme.h"
#include "words.h"

namespace moesaic::harness {
namespace {

const std::vector<Shape>& models() {
  static const std::vector<Shape> list = {
      {"mixtral-8x7b", 8, 4096, 14336, 2},       {"qwen3-30b-a3b", 128, 2048, 768, 8},
      {"deepseek-v3-tp8", 256, 7168, 256, 8},    {"deepseek-v3-ep8", 32, 7168, 2048, 8},
      {"gpt-oss-120b-like", 128, 2880, 2880, 4}, {"qwen3-next-512", 512, 2048, 512, 10},
  };
  return list;
}

const std::vector<Shape>& tests() {
  static const std::vector<Shape> list = {
      {"small", 8, 64, 64, 2},
      {"tp192", 8, 128, 192, 2},   // 192 = 768 / 4: a shard that no 128
                                   // divides
      {"2880/8", 4, 360, 360, 4},  // GPT-OSS's width, an eighth of it
      {"ragged", 6, 100, 52, 3},   // multiples of 4 and of nothing else
      {"odd", 3, 75, 37, 2},       // not even that: 4-bit weights refuse it
      {"top22", 32, 64, 48, 22},
      {"single", 1, 64, 96, 1},
      {"many", 512, 32, 32, 8},
      {"blocks", 4, 256, 128, 2},  // whole 128 x 128 blocks
      {"deep", 4, 1160, 64, 2},    // a long K with a short last group
  };
  return list;
}

Variant variant(std::string suffix, Scheme scheme) {
  Variant v;
  v.name = std::string(name(scheme)) + suffix;
  v.quant.scheme = scheme;
  if (scheme == Scheme::kF32) v.input = v.output = DType::kF32;
  if (scheme == Scheme::kF16) v.input = v.output = DType::kF16;
  return v;
}
Variant with_f16(Variant v) {
  v.input = v.output = DType::kF16;
  return v;
}
Variant grouped(std::string suffix, Scheme scheme, std::int64_t group, bool zero_points) {
  Variant v = variant(std::move(suffix), scheme);
  v.quant.weight_scale = WeightScale::kGroup;
  v.quant.group_size = group;
  v.quant.zero_points = zero_points;
  return v;
}
Variant blocked(std::string suffix, Scheme scheme, std::int64_t n, std::int64_t k) {
  Variant v = variant(std::move(suffix), scheme);
  v.quant.block_n = n;
  v.quant.block_k = k;
  return v;
}
Variant scaled(std::string suffix, Scheme scheme, WeightScale scale) {
  Variant v = variant(std::move(suffix), scheme);
  v.quant.weight_scale = scale;
  return v;
}
Variant activations(Variant v, ActScale scale, StaticScales which = StaticScales::kShared) {
  v.quant.act_scale = scale;
  v.static_scales = which;
  return v;
}
Variant input8(Variant v) {
  v.input = traits(v.quant.scheme).act == ActFormat::kE4M3 ? DType::kF8E4M3 : DType::kI8;
  return v;
}

std::vector<Variant> make_variants() {
  using enum Scheme;
  constexpr bool kZero = true, kNoZero = false;
  std::vector<Variant> v;
  v.push_back(variant("", kF32));
  v.push_back(variant("", kF16));
  v.push_back(variant("", kBF16));
  v.push_back(variant("+out_f32", kBF16));
  v.back().output = DType::kF32;
  v.push_back(activations(variant("", kFp8Tensor), ActScale::kTensorDynamic));
  v.push_back(activations(variant("+static", kFp8Tensor), ActScale::kTensorStatic));
  v.push_back(activations(variant("+static_each+two", kFp8Tensor), ActScale::kTensorStatic,
                          StaticScales::kPerExpert));
  v.back().tensor_scales = TensorScales::kTwo;
  v.push_back(input8(activations(variant("+in8", kFp8Tensor), ActScale::kTensorStatic)));
  v.push_back(variant("", kFp8Channel));
  v.push_back(with_f16(variant("+f16", kFp8Channel)));
  v.push_back(input8(variant("+in8", kFp8Channel)));
  v.push_back(variant("", kFp8Block));
  v.push_back(blocked("+64x32", kFp8Block, 64, 32));
  v.push_back(input8(variant("+in8", kFp8Block)));
  v.push_back(variant("", kFp8W8A16));
  v.push_back(scaled("+tensor", kFp8W8A16, WeightScale::kTensor));
  v.back().tensor_scales = TensorScales::kTwo;
  v.push_back(scaled("+block", kFp8W8A16, WeightScale::kBlock));
  v.push_back(with_f16(variant("+f16", kFp8W8A16)));
  v.push_back(variant("", kInt8Channel));
  v.push_back(input8(variant("+in8", kInt8Channel)));
  v.push_back(variant("", kInt8Block));
  v.push_back(blocked("+32x64+truncate", kInt8Block, 32, 64));
  v.back().quant.int8_rounding = Int8Rounding::kTruncate;
  v.push_back(variant("", kInt8W8A16));
  v.push_back(grouped("+g32", kInt8W8A16, 32, kNoZero));
  v.push_back(grouped("+g64+zp", kInt8W8A16, 64, kZero));
  v.push_back(with_f16(grouped("+g128+zp+f16", kInt8W8A16, 128, kZero)));
  v.push_back(grouped("+whole", kInt8W8A16, 0, kNoZero));
  v.push_back(variant("", kInt4W4A16));
  v.push_back(grouped("+g32", kInt4W4A16, 32, kNoZero));
  v.push_back(grouped("+g32+zp", kInt4W4A16, 32, kZero));
  v.push_back(with_f16(grouped("+g64+f16", kInt4W4A16, 64, kNoZero)));
  v.push_back(grouped("+g64+zp", kInt4W4A16, 64, kZero));
  v.push_back(grouped("+g128+zp", kInt4W4A16, 128, kZero));
  v.push_back(grouped("+whole", kInt4W4A16, 0, kNoZero));
  v.push_back(grouped("+whole+zp", kInt4W4A16, 0, kZero));
  v.push_back(variant("", kInt4W4A8Fp8));
  v.push_back(grouped("+g32+zp", kInt4W4A8Fp8, 32, kZero));
  v.push_back(activations(variant("+static+awq", kInt4W4A8Fp8), ActScale::kTensorStatic));
  v.back().extras = Extras::kPrequantAlpha;
  v.push_back(variant("", kInt4W4A8Int8));
  v.push_back(grouped("+g64+zp", kInt4W4A8Int8, 64, kZero));
  v.push_back(activations(variant("+static_each", kInt4W4A8Int8), ActScale::kTensorStatic,
                          StaticScales::kPerExpert));
  v.push_back(variant("", kMxfp4W4A16));
  v.push_back(with_f16(variant("+f16", kMxfp4W4A16)));
  return v;
}

}  // namespace

std::span<const Shape> model_shapes() { return models(); }
std::span<const Shape> test_shapes() { return tests(); }

Shape parse_shape(std::string_view text) {
  for (const auto* list : {&models(), &tests()})
    for (const Shape& s : *list)
      if (s.name == text) return s;
  Shape s{.name = std::string(text)};
  std::int64_t* const fields[] = {&s.experts, &s.hidden, &s.intermediate, &s.top_k};
  const char* at = text.data();
  const char* const end = at + text.size();
  for (int i = 0; i < 4; ++i) {
    const auto [next, error] = std::from_chars(at, end, *fields[i]);
    const bool separated = i < 3 ? next < end && *next == ',' : next == end;
    if (error != std::errc{} || *fields[i] < 1 || !separated) {
      std::string known;
      for (const auto* list : {&models(), &tests()})
        for (const Shape& k : *list) append_word(known, k.name);
      invalid("shape: '" + std::string(text) +
              "' is neither experts,hidden,intermediate,top_k nor one of " + known);
    }
    at = next + 1;
  }
  return s;
}

std::span<const Variant> variants() {
  static const std::vector<Variant> list = make_variants();
  return list;
}
const Variant& default_variant(Scheme scheme) {
  for (const Variant& v : variants())
    if (v.quant.scheme == scheme) return v;
  invalid("scheme: has no variant");
}

const Variant& parse_variant(std::string_view text) {
  const std::string_view scheme_name = text.substr(0, text.find('+'));
  const Scheme scheme = parse_scheme(scheme_name);
  std::string known;
  for (const Variant& v : variants()) {
    if (v.quant.scheme != scheme) continue;
    if (v.name == text) return v;
    append_word(known, v.name);
  }
  invalid("scheme: '" + std::string(text) + "' is no variant of " + std::string(scheme_name) +
          "; known: " + known);
}

std::string name(const Case& c) {
  std::string n = c.variant.name + "/" + std::string(name(c.format)) + "/" +
                  std::string(name(c.activation.kind));
  if (is_gated(c.activation.kind)) {
    if (c.activation.order == GateOrder::kUpFirst) n += "+up_first";
    if (c.activation.layout == GateLayout::kInterleaved) n += "+interleaved";
  }
  if (c.parameters == ExpertParameters::kTensors) n += "+per_expert";
  n += c.bias == Biases::kAll ? "/bias" : "/nobias";
  n += "/" + c.shape.name + "/t" + std::to_string(c.tokens) + "/" + std::string(name(c.load));
  const auto also = [&](bool yes, std::string_view what) {
    if (!yes) return;
    n += '+';
    n += what;
  };
  also(c.values == Values::kNonFinite, "nonfinite");
  also(c.placement == Placement::kStrided, "strided");
  also(c.id_dtype == DType::kI64, "i64");
  also(c.local.count > 0,
       "local" + std::to_string(c.local.first) + ":" + std::to_string(c.local.count));
  also(c.weight_on == WeightOn::kInput, "weight_on_input");
  also(c.source == RoutingSource::kLogits, "logits:" + std::string(name(c.routing.method)));
  also(c.source == RoutingSource::kRouter, "router:" + std::string(name(c.routing.method)));
  also(c.shared_experts > 0, "shared" + std::to_string(c.shared_experts));
  also(c.accumulate == Accumulate::kAdd, "add");
  return n;
}

LayerConfig layer_config(const Case& c) {
  LayerConfig config;
  config.experts = c.shape.experts;
  config.hidden = c.shape.hidden;
  config.intermediate = c.shape.intermediate;
  config.top_k = c.shape.top_k;
  config.max_tokens = c.tokens;
  config.local = c.local;
  config.quant = c.variant.quant;
  config.activation = c.activation;
  config.routing = c.routing;
  config.weight_on = c.weight_on;
  config.input_dtype = c.variant.input;
  config.output_dtype = c.variant.output;
  config.shared_experts = c.shared_experts;
  return config;
}

WeightOptions weight_options(const Case& c) {
  return {.seed = mix(c.seed, 0x77),
          .bias = c.bias,
          .parameters = c.parameters,
          .tensor_scales =
              c.activation.layout == GateLayout::kInterleaved || !is_gated(c.activation.kind)
                  ? TensorScales::kOne  // two scales belong to two halves
                  : c.variant.tensor_scales,
          .static_scales = c.variant.static_scales,
          .extras = c.variant.extras};
}

BatchOptions batch_options(const Case& c) {
  return {.tokens = c.tokens,
          .load = c.load,
          .values = c.values,
          .id_dtype = c.id_dtype,
          .seed = mix(c.seed, 0x78)};
}

Support supported(const Case& c, Device device) {
  return supports(layer_config(c), c.format, device);
}

}  // namespace moesaic::harness
