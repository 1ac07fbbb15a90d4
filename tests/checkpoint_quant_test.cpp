// SPDX-License-Identifier: Apache-2.0
// Quantized layouts against their own formats' dequantizers (golden files of
// scripts/make_quantized_golden.py), conversion between schemes, and this library's own layout.
#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <random>

#include "checkpoint/convert.h"
#include "moesaic/moesaic.h"
#include "numeric.h"
#include "reference/layer.h"

namespace moesaic {
namespace {

namespace fs = std::filesystem;
const std::string kGolden = MOESAIC_SOURCE_DIR "/tests/golden/quantized/";

struct Golden {
  std::string name;
  QuantSpec quant;  // what layer_config should say
};
const Golden kCases[] = {
    // 40 rows in blocks of 16: stacked gate and up need a grid of 8.
    {"fp8_block",
     {.scheme = Scheme::kFp8Block,
      .weight_scale = WeightScale::kBlock,
      .block_n = 8,
      .block_k = 16}},
    {"fp8_tensor_static",
     {.scheme = Scheme::kFp8Tensor,
      .weight_scale = WeightScale::kTensor,
      .act_scale = ActScale::kTensorStatic}},
    {"ct_fp8_channel", {.scheme = Scheme::kFp8Channel, .weight_scale = WeightScale::kChannel}},
    {"ct_fp8_tensor_token", {.scheme = Scheme::kFp8Channel, .weight_scale = WeightScale::kChannel}},
    {"ct_fp8_tensor_static",
     {.scheme = Scheme::kFp8Tensor,
      .weight_scale = WeightScale::kTensor,
      .act_scale = ActScale::kTensorStatic}},
    {"ct_fp8_w8a16", {.scheme = Scheme::kFp8W8A16, .weight_scale = WeightScale::kChannel}},
    {"ct_int8_channel", {.scheme = Scheme::kInt8Channel, .weight_scale = WeightScale::kChannel}},
    {"ct_int4_group",
     {.scheme = Scheme::kInt4W4A16, .weight_scale = WeightScale::kGroup, .group_size = 16}},
    {"ct_int4_group_asym",
     {.scheme = Scheme::kInt4W4A16,
      .weight_scale = WeightScale::kGroup,
      .group_size = 16,
      .zero_points = true}},
    {"ct_int4_channel",
     {.scheme = Scheme::kInt4W4A16, .weight_scale = WeightScale::kGroup, .group_size = 0}},
    {"ct_int4_w4a8",
     {.scheme = Scheme::kInt4W4A8Int8,
      .weight_scale = WeightScale::kGroup,
      .act_scale = ActScale::kToken,
      .group_size = 32}},
    {"ct_int8_packed_channel",
     {.scheme = Scheme::kInt8W8A16, .weight_scale = WeightScale::kChannel, .group_size = 0}},
    {"ct_int8_packed_group_asym",
     {.scheme = Scheme::kInt8W8A16,
      .weight_scale = WeightScale::kGroup,
      .group_size = 16,
      .zero_points = true}},
    {"awq",
     {.scheme = Scheme::kInt4W4A16,
      .weight_scale = WeightScale::kGroup,
      .group_size = 16,
      .zero_points = true}},
    {"gptq_v1_sym",
     {.scheme = Scheme::kInt4W4A16, .weight_scale = WeightScale::kGroup, .group_size = 16}},
    {"gptq_v1_asym",
     {.scheme = Scheme::kInt4W4A16,
      .weight_scale = WeightScale::kGroup,
      .group_size = 16,
      .zero_points = true}},
    {"gptq_v2_asym",
     {.scheme = Scheme::kInt4W4A16,
      .weight_scale = WeightScale::kGroup,
      .group_size = 16,
      .zero_points = true}},
    {"gptq_whole_k",
     {.scheme = Scheme::kInt4W4A16,
      .weight_scale = WeightScale::kGroup,
      .group_size = 0,
      .zero_points = true}},
    {"gptq_8bit",
     {.scheme = Scheme::kInt8W8A16,
      .weight_scale = WeightScale::kGroup,
      .group_size = 16,
      .zero_points = true}},
    {"mxfp4", {.scheme = Scheme::kMxfp4W4A16, .group_size = 32}},
};

float rounded(DType dtype, float v) {
  if (dtype == DType::kBF16) return bf16_to_float(float_to_bf16(v));
  return dtype == DType::kF16 ? f16_to_float(float_to_f16(v)) : v;
}
float load(const Tensor& t, std::int64_t i) {
  if (t.dtype == DType::kF32) return t.as<const float>()[i];
  const std::uint16_t h = t.as<const std::uint16_t>()[i];
  return t.dtype == DType::kBF16 ? bf16_to_float(h) : f16_to_float(h);
}

class Quantized : public ::testing::TestWithParam<Golden> {
 protected:
  const Checkpoint checkpoint_ = Checkpoint::open(kGolden + GetParam().name);
};

TEST_P(Quantized, SaysWhatItIs) {
  const QuantSpec got = checkpoint_.layer_config(0).quant, want = GetParam().quant;
  EXPECT_EQ(got.scheme, want.scheme) << name(got.scheme);
  EXPECT_EQ(got.weight_scale, want.weight_scale);
  EXPECT_EQ(got.act_scale, want.act_scale);
  EXPECT_EQ(got.zero_points, want.zero_points);
  if (want.weight_scale == WeightScale::kGroup) {
    EXPECT_EQ(got.group_size, want.group_size);
  }
  if (want.weight_scale == WeightScale::kBlock) {
    EXPECT_EQ(got.block_n, want.block_n);
    EXPECT_EQ(got.block_k, want.block_k);
  }
}

TEST_P(Quantized, HoldsTheFloatsOfTheFormatsOwnDequantizer) {
  const TensorFile expected = TensorFile::open(kGolden + GetParam().name + "/expected.safetensors");
  const LayerConfig config = checkpoint_.layer_config(0);
  for (std::int64_t e = 0; e < config.experts; ++e) {
    const HostWeights one = checkpoint_.expert(0, config, e);
    for (const Product product : {Product::kFc1, Product::kFc2}) {
      const bool fc1 = product == Product::kFc1;
      const Tensor want = expected.tensor(std::to_string(e) + (fc1 ? ".fc1" : ".fc2"));
      const std::vector<float> got =
          dequantize(weight_spec(config, product), fc1 ? one.weights.fc1 : one.weights.fc2);
      ASSERT_EQ(static_cast<std::int64_t>(got.size()), want.numel());
      for (std::size_t i = 0; i < got.size(); ++i)
        ASSERT_EQ(rounded(want.dtype, got[i]), load(want, static_cast<std::int64_t>(i)))
            << "expert " << e << (fc1 ? " fc1" : " fc2") << " element " << i;
    }
  }
}

TEST_P(Quantized, RunsInsideTheOraclesBound) {
  LayerConfig config = checkpoint_.layer_config(0, {.max_tokens = 5});
  Layer layer(config);
  checkpoint_.load(0, layer);
  ASSERT_TRUE(layer.ready());
  const std::int64_t tokens = 5, hidden = config.hidden;
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  std::vector<std::uint16_t> x(static_cast<std::size_t>(tokens * hidden)), y(x.size(), 0xffff);
  const bool f16 = config.input_dtype == DType::kF16;
  for (auto& v : x) v = f16 ? float_to_f16(normal(random)) : float_to_bf16(normal(random));
  std::vector<std::int32_t> ids(static_cast<std::size_t>(tokens * config.top_k));
  std::vector<float> weights(ids.size());
  for (std::size_t i = 0; i < ids.size(); ++i) {
    ids[i] = static_cast<std::int32_t>(i % 2);
    weights[i] = 0.5f + 0.1f * static_cast<float>(i);
  }
  const Tensor hidden_states = Tensor::contiguous(x.data(), config.input_dtype, {tokens, hidden});
  const Tensor topk_ids = Tensor::contiguous(ids.data(), DType::kI32, {tokens, config.top_k});
  const Tensor topk_weights =
      Tensor::contiguous(weights.data(), DType::kF32, {tokens, config.top_k});
  const WorkspaceBuffer workspace(layer.device(), layer.workspace_bytes(tokens));
  layer.forward({.hidden_states = hidden_states,
                 .topk_ids = topk_ids,
                 .topk_weights = topk_weights,
                 .output = Tensor::contiguous(y.data(), config.output_dtype, {tokens, hidden}),
                 .workspace = workspace.view()});
  const HostWeights host = checkpoint_.experts(0, config);
  const reference::LayerOutput oracle = reference::layer(
      config, host.weights, nullptr,
      {.hidden_states = hidden_states, .topk_ids = topk_ids, .topk_weights = topk_weights},
      {.slots = config.output_dtype});
  // A product that rounds dequantized weights to 16 bit is as allowed as one that does not.
  const reference::LayerOutput rounded_weights = reference::layer(
      config, host.weights, nullptr,
      {.hidden_states = hidden_states, .topk_ids = topk_ids, .topk_weights = topk_weights},
      {.weights = reference::WeightRounding::k16Bit, .slots = config.output_dtype});
  for (std::int64_t t = 0; t < tokens; ++t)
    for (std::int64_t h = 0; h < hidden; ++h) {
      const float got = f16 ? f16_to_float(y[static_cast<std::size_t>(t * hidden + h)])
                            : bf16_to_float(y[static_cast<std::size_t>(t * hidden + h)]);
      const reference::Bounded &a = oracle.at(t, h), &b = rounded_weights.at(t, h);
      const bool inside =
          std::abs(got - a.value) <= reference::stored_error(a, config.output_dtype) ||
          std::abs(got - b.value) <= reference::stored_error(b, config.output_dtype);
      EXPECT_TRUE(inside) << "token " << t << " column " << h << ": " << got << ", oracle "
                          << a.value << " +- " << reference::stored_error(a, config.output_dtype);
    }
}

INSTANTIATE_TEST_SUITE_P(Layouts, Quantized, ::testing::ValuesIn(kCases),
                         [](const auto& info) { return info.param.name; });

TEST(QuantizedLayouts, InputScalesComeAlong) {
  const Checkpoint c = Checkpoint::open(kGolden + "fp8_tensor_static");
  const LayerConfig config = c.layer_config(0);
  const HostWeights one = c.expert(0, config, 1);
  const std::string prefix = "model.layers.0.mlp.experts.1.";
  const auto scale = [&](const char* p) {
    return load(c.files().tensor(prefix + p + ".input_scale"), 0);
  };
  EXPECT_EQ(load(one.weights.fc1.input_scale, 0), std::max(scale("gate_proj"), scale("up_proj")));
  EXPECT_EQ(load(one.weights.fc2.input_scale, 0), scale("down_proj"));
  // Gate's and up's own weight scales, never made one.
  const auto weight = [&](const char* p) {
    return load(c.files().tensor(prefix + p + ".weight_scale"), 0);
  };
  EXPECT_EQ(load(one.weights.fc1.scale, 0), weight("gate_proj"));
  EXPECT_EQ(load(one.weights.fc1.scale, 1), weight("up_proj"));
}

TEST(QuantizedLayouts, ActOrderIsRefusedByName) {
  const Checkpoint c = Checkpoint::open(kGolden + "gptq_act_order");
  try {
    c.layer_config(0);
    FAIL();
  } catch (const Error& e) {
    EXPECT_EQ(e.code(), ErrorCode::kUnsupported);
    EXPECT_NE(std::string(e.what()).find("act-order"), std::string::npos) << e.what();
  }
  // Nor does an override get around it: the columns would be wrong.
  const LayerConfig config = c.layer_config(0, {.scheme = Scheme::kF16});
  EXPECT_THROW(c.expert(0, config, 0), Error);
}

TEST(QuantizedLayouts, SameBytesUnderAnotherScheme) {
  const Checkpoint c = Checkpoint::open(kGolden + "awq");
  const HostWeights a = c.expert(0, c.layer_config(0), 0);
  const LayerConfig as_w4a8 = c.layer_config(0, {.scheme = Scheme::kInt4W4A8Int8});
  EXPECT_EQ(as_w4a8.quant.group_size, 16);
  EXPECT_TRUE(as_w4a8.quant.zero_points);
  const HostWeights b = c.expert(0, as_w4a8, 0);
  ASSERT_EQ(to_string(a.weights.fc1.weight), to_string(b.weights.fc1.weight));
  EXPECT_EQ(std::memcmp(a.weights.fc1.weight.data, b.weights.fc1.weight.data,
                        static_cast<std::size_t>(a.weights.fc1.weight.numel())),
            0);

  const Checkpoint f = Checkpoint::open(kGolden + "fp8_tensor_static");
  for (const Scheme s : {Scheme::kFp8Channel, Scheme::kFp8W8A16}) {
    const HostWeights w = f.expert(0, f.layer_config(0, {.scheme = s}), 0);
    EXPECT_EQ(std::memcmp(w.weights.fc2.weight.data,
                          f.files().tensor("model.layers.0.mlp.experts.0.down_proj.weight").data,
                          64 * 32),
              0);
  }
}

// --- conversion ----------------------------------------------------------------------------------
struct Target {
  std::string name;
  QuantSpec quant;
};
const Target kTargets[] = {
    {"f32", {.scheme = Scheme::kF32}},
    {"f16", {.scheme = Scheme::kF16}},
    {"bf16", {.scheme = Scheme::kBF16}},
    {"fp8_tensor", {.scheme = Scheme::kFp8Tensor}},
    {"fp8_channel", {.scheme = Scheme::kFp8Channel}},
    {"fp8_block", {.scheme = Scheme::kFp8Block, .block_n = 32, .block_k = 48}},
    {"fp8_w8a16", {.scheme = Scheme::kFp8W8A16}},
    {"int8_channel", {.scheme = Scheme::kInt8Channel}},
    {"int8_block", {.scheme = Scheme::kInt8Block, .block_n = 48, .block_k = 32}},
    {"int8_w8a16", {.scheme = Scheme::kInt8W8A16}},
    {"int8_w8a16_group",
     {.scheme = Scheme::kInt8W8A16, .weight_scale = WeightScale::kGroup, .group_size = 24}},
    {"int8_w8a16_group_zp",
     {.scheme = Scheme::kInt8W8A16,
      .weight_scale = WeightScale::kGroup,
      .group_size = 24,
      .zero_points = true}},
    {"int4_w4a16", {.scheme = Scheme::kInt4W4A16, .group_size = 24}},
    {"int4_w4a16_zp", {.scheme = Scheme::kInt4W4A16, .group_size = 24, .zero_points = true}},
    {"int4_w4a8_fp8", {.scheme = Scheme::kInt4W4A8Fp8, .group_size = 0}},
    {"int4_w4a8_int8", {.scheme = Scheme::kInt4W4A8Int8, .group_size = 32}},
    {"mxfp4_w4a16", {.scheme = Scheme::kMxfp4W4A16}},
};

class Convert : public ::testing::TestWithParam<Target> {};

// Every element comes back within what one code step allows, whatever the grid's ragged edges.
TEST_P(Convert, RoundTripIsWithinHalfAStep) {
  LayerConfig c;
  c.experts = 1;
  c.hidden = 52;
  c.intermediate = 36;
  c.quant = GetParam().quant;
  std::mt19937 random(std::random_device{}());
  std::normal_distribution<float> normal;
  for (const Product product : {Product::kFc1, Product::kFc2}) {
    const WeightSpec spec = weight_spec(c, product);
    std::vector<float> values(static_cast<std::size_t>(spec.n * spec.k));
    for (float& v : values) v = normal(random);
    Arena arena;
    const GemmWeights w = quantize_weights(spec, values, arena);
    const std::vector<float> back = dequantize(spec, w);
    for (std::int64_t n = 0; n < spec.n; ++n) {
      for (std::int64_t k = 0; k < spec.k; ++k) {
        const auto i = static_cast<std::size_t>(n * spec.k + k);
        const float v = values[i];
        float cell = 0;  // absmax of the cell
        if (spec.scale.has_scale)
          for (std::int64_t a = n / spec.scale.group_n * spec.scale.group_n;
               a < std::min(spec.n, (n / spec.scale.group_n + 1) * spec.scale.group_n); ++a)
            for (std::int64_t b = k / spec.scale.group_k * spec.scale.group_k;
                 b < std::min(spec.k, (k / spec.scale.group_k + 1) * spec.scale.group_k); ++b)
              cell = std::max(cell, std::fabs(values[static_cast<std::size_t>(a * spec.k + b)]));
        double step = 0;
        switch (spec.format) {
          case WeightFormat::kF32:
            step = 0;
            break;
          case WeightFormat::kF16:
            step = std::fabs(v) * 0x1p-11 + 0x1p-25;
            break;
          case WeightFormat::kBF16:
            step = std::fabs(v) * 0x1p-8;
            break;
          case WeightFormat::kE4M3:
            step = std::max<double>(std::fabs(v) * 0x1p-4, cell / 448 * 0x1p-10);
            break;
          case WeightFormat::kI8:
            step = cell / 127 / 2;
            break;
          case WeightFormat::kU8:
            step = 2 * cell / 255;
            break;  // at most; the zero point rounds, too
          case WeightFormat::kU4:
            step = 2 * cell / 14;
            break;
          case WeightFormat::kE2M1:
            step = cell / 4;
            break;  // 8 * 2^e saturates at 6 * 2^e
        }
        ASSERT_LE(std::fabs(back[i] - v), step * (1 + 1e-5))
            << GetParam().name << " [" << n << ", " << k << "] of " << v;
      }
    }
  }
}

TEST_P(Convert, WrittenLayerLoadsAgainBitForBit) {
  std::string folder = (fs::temp_directory_path() / "moesaic-quant-XXXXXX").string();
  ASSERT_NE(::mkdtemp(folder.data()), nullptr);
  const std::string out = folder + "/layer.safetensors";
  const Checkpoint demo = Checkpoint::open(MOESAIC_SOURCE_DIR "/examples/data/qwen3-moe-tiny");
  QuantSpec quant = GetParam().quant;
  std::int64_t calls = 0;
  quantize_layer(demo, {.layer = 1,
                        .quant = quant,
                        .out_path = out,
                        .progress = [&](std::int64_t, std::int64_t) { ++calls; }});
  EXPECT_EQ(calls, 16);
  const Checkpoint native = Checkpoint::open(out);
  ASSERT_EQ(native.layers().size(), 1u);
  const LayerConfig a = demo.layer_config(1, {.quant = quant}), b = native.layer_config(1);
  EXPECT_EQ(b.quant.scheme, quant.scheme);
  EXPECT_EQ(b.quant.group_size, quant.group_size);
  EXPECT_EQ(a.input_dtype, b.input_dtype);
  for (const std::int64_t e : {0, 15}) {
    const HostWeights one = demo.expert(1, a, e), two = native.expert(1, b, e);
    for (const auto product : {&LayerWeights::fc1, &LayerWeights::fc2})
      for (const auto member :
           {&GemmWeights::weight, &GemmWeights::scale, &GemmWeights::zero_point}) {
        const Tensor &p = one.weights.*product.*member, &q = two.weights.*product.*member;
        ASSERT_EQ(p.defined(), q.defined());
        if (!p.defined()) continue;
        ASSERT_EQ(to_string(p), to_string(q));
        EXPECT_EQ(
            std::memcmp(p.data, q.data, static_cast<std::size_t>(p.numel()) * size_of(p.dtype)), 0);
      }
  }
  Layer layer(b);
  native.load(1, layer);
  EXPECT_TRUE(layer.ready());
  fs::remove_all(folder);
}

INSTANTIATE_TEST_SUITE_P(Schemes, Convert, ::testing::ValuesIn(kTargets),
                         [](const auto& info) { return info.param.name; });

TEST(ConvertEdges, ZerosInfinitiesAndNaN) {
  for (const Target& target : kTargets) {
    LayerConfig c;
    c.experts = 1;
    c.hidden = 52;
    c.intermediate = 36;
    c.quant = target.quant;
    const WeightSpec spec = weight_spec(c, Product::kFc2);
    std::vector<float> values(static_cast<std::size_t>(spec.n * spec.k), 0.0f);
    Arena arena;
    for (const float v : dequantize(spec, quantize_weights(spec, values, arena)))
      ASSERT_EQ(v, 0.0f) << target.name;
    values[0] = std::numeric_limits<float>::infinity();
    values[1] = std::numeric_limits<float>::quiet_NaN();
    values[2] = 1.0f;  // its neighbours survive
    const std::vector<float> back = dequantize(spec, quantize_weights(spec, values, arena));
    EXPECT_NEAR(back[2], 1.0f, 0.26f) << target.name;
  }
}

}  // namespace
}  // namespace moesaic
