// SPDX-License-Identifier: Apache-2.0
// The oracle itself, against golden files that transformers, PyTorch and NumPy computed
// (tests/golden/make_reference.py).
#include <gtest/gtest.h>

#include <cmath>
#include <string>

#include "harness/data.h"
#include "moesaic/checkpoint.h"
#include "reference/activation.h"
#include "reference/layer.h"
#include "reference/matrix.h"
#include "reference/quantize.h"
#include "reference/routing.h"
#include "scheme.h"

namespace moesaic {
namespace {

using harness::HostTensor;

class Golden {
 public:
  explicit Golden(const std::string& name)
      : file_(TensorFile::open(std::string(MOESAIC_SOURCE_DIR) + "/tests/golden/" + name +
                               ".safetensors")) {}
  Tensor operator[](const std::string& name) const {
    return file_.find(name) != nullptr ? file_.tensor(name) : Tensor{};
  }
  std::string entry(const std::string& key, const std::string& otherwise = "0") const {
    const auto at = file_.metadata().find(key);
    return at == file_.metadata().end() ? otherwise : at->second;
  }
  double number(const std::string& key, double otherwise = 0) const {
    return std::stod(entry(key, std::to_string(otherwise)));
  }

 private:
  TensorFile file_;
};

double at(const Tensor& t, std::int64_t i) { return reference::load(t.data, t.dtype, i); }

// A dense f32 copy, which the scheme f32 takes.
HostTensor to_f32(const Tensor& t) {
  HostTensor out(DType::kF32, {t.shape.begin(), t.shape.begin() + t.rank});
  for (std::int64_t i = 0; i < out.numel(); ++i) out.as<float>()[i] = static_cast<float>(at(t, i));
  return out;
}
// [E, A, B] seen as [E, B, A]: how GPT-OSS and Llama-4 store their experts.
Tensor transposed(Tensor t) {
  std::swap(t.shape[1], t.shape[2]);
  std::swap(t.strides[1], t.strides[2]);
  return t;
}

// --- whole layers of transformers ----------------------------------------------------------------

class LayerGolden : public testing::TestWithParam<const char*> {};

TEST_P(LayerGolden, TransformersOwnModuleGivesTheSame) {
  const Golden golden("layer_" + std::string(GetParam()));
  std::deque<HostTensor> kept;
  const auto f32 = [&](const std::string& name) {
    const Tensor t = golden[name];
    return t.defined() ? kept.emplace_back(to_f32(t)).view() : Tensor{};
  };
  LayerWeights weights;
  weights.fc1 = {.weight = f32("fc1"), .bias = f32("fc1_bias")};
  weights.fc2 = {.weight = f32("fc2"), .bias = f32("fc2_bias")};
  if (golden.number("transposed") != 0) {
    weights.fc1.weight = transposed(weights.fc1.weight);
    weights.fc2.weight = transposed(weights.fc2.weight);
  }
  const Tensor x = f32("x");
  LayerConfig config;
  config.experts = weights.fc1.weight.shape[0];
  config.hidden = weights.fc1.weight.shape[2];
  config.intermediate = weights.fc2.weight.shape[2];
  config.top_k = static_cast<std::int64_t>(golden.number("top_k"));
  config.max_tokens = x.shape[0];
  config.quant.scheme = Scheme::kF32;
  config.input_dtype = config.output_dtype = DType::kF32;
  config.activation.kind = parse_activation(golden.entry("activation", "swiglu"));
  config.activation.limit = static_cast<float>(golden.number("limit", 7));
  if (golden.entry("layout") == "interleaved") config.activation.layout = GateLayout::kInterleaved;
  if (golden.entry("weight_on") == "input") config.weight_on = WeightOn::kInput;
  config.routing.method = parse_routing(golden.entry("routing"));
  config.routing.scale = static_cast<float>(golden.number("scale", 1));
  config.routing.groups = static_cast<int>(golden.number("groups", 1));
  config.routing.topk_groups = static_cast<int>(golden.number("topk_groups", 1));
  config.routing.jitter = static_cast<float>(golden.number("jitter", 0.01));
  config.shared_intermediate = static_cast<std::int64_t>(golden.number("shared_intermediate"));
  config.shared_experts = config.shared_intermediate > 0 ? 1 : 0;

  const RouterWeights router{f32("router"), f32("router_bias"), {}};
  std::vector<double> bias;
  if (const Tensor b = golden["selection_bias"]; b.defined())
    for (std::int64_t e = 0; e < config.experts; ++e) bias.push_back(at(b, e));
  HostTensor ids(DType::kI32, {x.shape[0], config.top_k}),
      w(DType::kF32, {x.shape[0], config.top_k});
  for (std::int64_t t = 0; t < x.shape[0]; ++t) {
    const reference::Routed r = reference::route(config.routing, config.top_k,
                                                 reference::logits(x.select(t), router), bias);
    for (std::int64_t j = 0; j < config.top_k; ++j) {
      ids.as<std::int32_t>()[t * config.top_k + j] =
          static_cast<std::int32_t>(r.ids[static_cast<std::size_t>(j)]);
      w.as<float>()[t * config.top_k + j] =
          static_cast<float>(r.weights[static_cast<std::size_t>(j)]);
    }
  }
  reference::SharedWeights shared;
  shared.weights.fc1.weight = f32("shared_fc1");
  shared.weights.fc2.weight = f32("shared_fc2");
  shared.gate = f32("shared_gate");
  reference::LayerInput input;
  input.hidden_states = x;
  input.topk_ids = ids.view();
  input.topk_weights = w.view();
  const auto y =
      reference::layer(config, weights, config.shared_experts > 0 ? &shared : nullptr, input, {});
  const Tensor expected = golden["output"];
  double norm = 0, size = 0;
  for (std::int64_t i = 0; i < expected.numel(); ++i) {
    const double difference = y.output[static_cast<std::size_t>(i)].value - at(expected, i);
    norm += difference * difference;
    size += at(expected, i) * at(expected, i);
    EXPECT_NEAR(difference, 0, 4e-6) << "element " << i;  // routing in f32 there, stored as f32
  }
  ASSERT_GT(size, 0);
  EXPECT_LT(std::sqrt(norm / size), 1e-6);

  // The same numbers as bf16: what the rounding points cost against the unrounded answer.
  LayerConfig rounded = config;
  rounded.quant.scheme = Scheme::kBF16;
  rounded.input_dtype = rounded.output_dtype = DType::kBF16;
  const auto y16 =
      reference::layer(rounded, weights, config.shared_experts > 0 ? &shared : nullptr, input, {});
  double norm16 = 0;
  for (std::int64_t i = 0; i < expected.numel(); ++i) {
    const double stored =
        reference::round_to(DType::kBF16, y16.output[static_cast<std::size_t>(i)].value);
    norm16 += (stored - at(expected, i)) * (stored - at(expected, i));
  }
  EXPECT_LT(std::sqrt(norm16 / size), 6e-3);
}

INSTANTIATE_TEST_SUITE_P(Families, LayerGolden,
                         testing::Values("mixtral", "qwen3_moe", "qwen2_moe", "gpt_oss",
                                         "deepseek_v3", "ernie4_5", "phimoe", "llama4"),
                         [](const auto& info) { return std::string(info.param); });

// --- pieces --------------------------------------------------------------------------------------

TEST(Activations, AsPyTorchComputesThem) {
  const Golden golden("pieces");
  const Tensor g = golden["act.g"], u = golden["act.u"];
  for (int i = 0; i < kNumActivations; ++i) {
    const auto kind = static_cast<Activation>(i);
    const Tensor expected = golden["act." + std::string(name(kind))];
    ASSERT_TRUE(expected.defined());
    for (std::int64_t j = 0; j < g.shape[0]; ++j) {
      const double got = reference::activate(kind, {.alpha = 1.702, .beta = 0.75, .limit = 2.5},
                                             at(g, j), at(u, j));
      EXPECT_NEAR(got, at(expected, j), 1e-7 * std::max(1.0, std::abs(got)))
          << name(kind) << " of " << at(g, j);
    }
  }
}

TEST(Activations, TheBoundHoldsForAnyNumbersInTheIntervals) {
  harness::Rng rng(3);
  for (int i = 0; i < kNumActivations; ++i) {
    const auto kind = static_cast<Activation>(i);
    const reference::ActivationParameters p{.alpha = 1.702, .beta = 1, .limit = 1.25};
    for (int n = 0; n < 2000; ++n) {
      const reference::Bounded g{3.0 * rng.normal(), 0.02 * rng.uniform()},
          u{3.0 * rng.normal(), 0.02 * rng.uniform()};
      const reference::Bounded h = reference::activate(kind, p, g, u);
      const double moved = reference::activate(kind, p, g.value + g.error * (2 * rng.uniform() - 1),
                                               u.value + u.error * (2 * rng.uniform() - 1));
      EXPECT_LE(std::abs(moved - h.value), h.error)
          << name(kind) << " at " << g.value << ", " << u.value;
    }
  }
}

TEST(Quantizers, AsNumPyComputesThem) {
  const Golden golden("pieces");
  const Tensor x = golden["quant.x"];
  for (const DType to : {DType::kF8E4M3, DType::kI8}) {
    for (const std::int64_t group : {0, 8}) {
      const std::string key = std::string("quant.") + (to == DType::kI8 ? "i8" : "fp8") +
                              (group ? ".group8" : ".token");
      const Tensor q = golden[key], scale = golden[key + ".scale"];
      for (std::int64_t r = 0; r < x.shape[0]; ++r) {
        std::vector<reference::Bounded> row;
        for (std::int64_t k = 0; k < x.shape[1]; ++k) row.push_back({reference::load(x, r, k), 0});
        const reference::Row got = reference::quantize({.to = to, .group = group}, row);
        for (std::int64_t k = 0; k < x.shape[1]; ++k) {
          const double s = reference::load(scale, r, group ? k / group : 0);
          const double number = to == DType::kI8
                                    ? reference::load(q, r, k)
                                    : e4m3_to_float(q.as<std::uint8_t>()[r * x.shape[1] + k]);
          EXPECT_EQ(got.value[static_cast<std::size_t>(k)], number * s)
              << key << " row " << r << " column " << k;
          EXPECT_EQ(got.error[static_cast<std::size_t>(k)], 0);
        }
      }
    }
  }
}

TEST(Quantizers, AnUncertainInputMovesTheResultWithinItsBound) {
  harness::Rng rng(5);
  for (int n = 0; n < 400; ++n) {
    std::vector<reference::Bounded> row, moved;
    for (int k = 0; k < 24; ++k) {
      const reference::Bounded b{rng.normal(), rng.below(4) == 0 ? 0.004 : 0};
      row.push_back(b);
      moved.push_back({b.value + b.error * (2 * rng.uniform() - 1), 0});
    }
    for (const DType to : {DType::kF8E4M3, DType::kI8}) {
      const reference::QuantizeRule rule{.to = to, .group = 8};
      const reference::Row a = reference::quantize(rule, row), b = reference::quantize(rule, moved);
      for (std::size_t k = 0; k < row.size(); ++k) {
        const double allowed = a.error[k] + a.scale_error[k / 8] * std::abs(a.value[k]);
        EXPECT_LE(std::abs(a.value[k] - b.value[k]), allowed * 1.0001 + 1e-7);
      }
    }
  }
}

TEST(Dequantization, AsNumPyComputesIt) {
  const Golden golden("pieces");
  struct One {
    Scheme scheme;
    const char *weight, *scale, *zero, *expected;
    WeightScale granularity;
    std::int64_t k;
  };
  const One cases[] = {
      {Scheme::kInt4W4A16, "u4", "group_scale", "u4.zero", "u4.zp", WeightScale::kGroup, 40},
      {Scheme::kInt4W4A16, "u4", "group_scale", nullptr, "u4.nozp", WeightScale::kGroup, 40},
      {Scheme::kInt8W8A16, "u8", "group_scale", "u8.zero", "u8.zp", WeightScale::kGroup, 40},
      {Scheme::kFp8W8A16, "fp8", "fp8.block_scale", nullptr, "fp8.block", WeightScale::kBlock, 40},
      {Scheme::kMxfp4W4A16, "mxfp4", "mxfp4.scale", nullptr, "mxfp4.values", WeightScale::kGroup,
       64},
  };
  for (const One& c : cases) {
    QuantSpec quant{.scheme = c.scheme,
                    .weight_scale = c.granularity,
                    .block_n = 4,
                    .block_k = 16,
                    .group_size = 16};
    quant.zero_points = c.zero != nullptr;
    const WeightSpec spec = weight_spec(quant, 2, 6, c.k, DType::kBF16, DType::kBF16);
    GemmWeights w;
    w.weight = golden[std::string("dequant.") + c.weight];
    w.scale = golden[std::string("dequant.") + c.scale];
    if (c.zero != nullptr) w.zero_point = golden[std::string("dequant.") + c.zero];
    const Tensor expected = golden[std::string("dequant.") + c.expected];
    for (std::int64_t e = 0; e < 2; ++e) {
      const reference::Matrix m =
          reference::dequantize(spec, w, e, reference::WeightRounding::kExact);
      for (std::int64_t n = 0; n < 6; ++n) {
        for (std::int64_t k = 0; k < c.k; ++k) {
          const double want = reference::load(expected, e, n, k);
          EXPECT_NEAR(m.at[static_cast<std::size_t>(k * 6 + n)], want, std::abs(want) * 1e-7)
              << c.expected << " at " << e << ", " << n << ", " << k;
        }
      }
    }
  }
}

TEST(Dequantization, EveryE4M3Number) {
  const Golden golden("pieces");
  const Tensor table = golden["dequant.e4m3_table"];
  for (int b = 0; b < 256; ++b) {
    const float want = table.as<float>()[b], got = e4m3_to_float(static_cast<std::uint8_t>(b));
    if (std::isnan(want))
      EXPECT_TRUE(std::isnan(got)) << b;
    else
      EXPECT_EQ(got, want) << b;
  }
}

TEST(Routing, MethodsByTheirDefinitions) {
  const Golden golden("pieces");
  const Tensor z = golden["route.logits"], b = golden["route.bias"];
  std::vector<double> bias;
  for (std::int64_t e = 0; e < 16; ++e) bias.push_back(at(b, e));
  for (const RoutingMethod method :
       {RoutingMethod::kSoftmaxTopK, RoutingMethod::kRenormalize, RoutingMethod::kTopK,
        RoutingMethod::kSigmoid, RoutingMethod::kSigmoidRenorm, RoutingMethod::kMiniMax2,
        RoutingMethod::kSqrtSoftplus, RoutingMethod::kSoftmaxBias, RoutingMethod::kDeepSeekV2}) {
    RoutingSpec spec{.method = method};
    const bool scaled = method == RoutingMethod::kMiniMax2 ||
                        method == RoutingMethod::kSqrtSoftplus ||
                        method == RoutingMethod::kDeepSeekV2;
    if (scaled) spec.scale = 1.5f;
    if (method == RoutingMethod::kDeepSeekV2) {
      spec.groups = 4;
      spec.topk_groups = 2;
    }
    const bool biased = method == RoutingMethod::kMiniMax2 ||
                        method == RoutingMethod::kSqrtSoftplus ||
                        method == RoutingMethod::kSoftmaxBias;
    const std::string key = "route." + std::string(name(method));
    const Tensor ids = golden[key + ".ids"], weights = golden[key + ".weights"];
    for (std::int64_t t = 0; t < z.shape[0]; ++t) {
      std::vector<double> row;
      for (std::int64_t e = 0; e < 16; ++e) row.push_back(reference::load(z, t, e));
      const reference::Routed r =
          reference::route(spec, 4, row, biased ? bias : std::vector<double>{});
      for (std::int64_t j = 0; j < 4; ++j) {
        EXPECT_EQ(r.ids[static_cast<std::size_t>(j)], ids.as<std::int32_t>()[t * 4 + j])
            << key << " token " << t;
        EXPECT_NEAR(r.weights[static_cast<std::size_t>(j)], weights.as<float>()[t * 4 + j],
                    2e-7 * 4)
            << key;
      }
    }
  }
}

TEST(Bounded, RoundingNearATieReachesOneStep) {
  const double tie = 1.0 + 0x1p-8;  // between 1 and 1 + 2^-7
  EXPECT_EQ(reference::round_to(DType::kBF16, reference::Bounded{tie, 0}).error, 0);
  EXPECT_EQ(reference::round_to(DType::kBF16, reference::Bounded{tie, 1e-6}).error, 0x1p-7);
  EXPECT_EQ(reference::round_to(DType::kBF16, reference::Bounded{1.001, 1e-5}).error, 0);
}

}  // namespace
}  // namespace moesaic
