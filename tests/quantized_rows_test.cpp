// SPDX-License-Identifier: Apache-2.0
// Rows that come quantized: what must be multiplied into them before is refused by name, their
// scales are theirs whatever the configuration calls them, and float rows are quantized by what
// they are.
#include <gtest/gtest.h>

#include <numeric>

#include "harness/fixture.h"

namespace moesaic::harness {
namespace {

constexpr std::int64_t kExperts = 2, kWidth = 32, kTokens = 2;

// Two experts of 32 x 32, a token for each.
struct Small {
  LayerConfig config{.experts = kExperts,
                     .hidden = kWidth,
                     .intermediate = kWidth,
                     .top_k = 1,
                     .max_tokens = kTokens,
                     .output_dtype = DType::kF32};
  HostTensor fc1, fc2, scale1, scale2, prequant{DType::kF32, {kWidth}};
  HostTensor ids{DType::kI32, {kTokens, 1}}, weights{DType::kF32, {kTokens, 1}};
  HostTensor slots{DType::kI32, {kTokens}}, blocks{DType::kI32, {kTokens}}, used{DType::kI32, {1}};
  HostTensor row_weights{DType::kF32, {kTokens}};
  LayerWeights layer;

  explicit Small(Scheme scheme, Rng random = Rng(7)) {
    config.quant = {.scheme = scheme, .group_size = 0};
    const bool four = scheme == Scheme::kInt4W4A8Int8 || scheme == Scheme::kInt4W4A8Fp8;
    const DType dtype = four ? DType::kU8 : DType::kF8E4M3;
    const std::int64_t k = four ? kWidth / 2 : kWidth;
    fc1 = HostTensor(dtype, {kExperts, 2 * kWidth, k});
    fc2 = HostTensor(dtype, {kExperts, kWidth, k});
    for (HostTensor* t : {&fc1, &fc2})
      for (std::byte& b : t->bytes())
        b = four ? static_cast<std::byte>(random.below(256))
                 : static_cast<std::byte>(random.below(2) ? 0x30 : 0xb4);
    scale1 = HostTensor(DType::kF32, four ? std::vector<std::int64_t>{kExperts, 2 * kWidth, 1}
                                          : std::vector<std::int64_t>{kExperts});
    scale2 = HostTensor(DType::kF32, four ? std::vector<std::int64_t>{kExperts, kWidth, 1}
                                          : std::vector<std::int64_t>{kExperts});
    for (HostTensor* t : {&scale1, &scale2}) std::fill_n(t->as<float>(), t->numel(), 0.01f);
    std::fill_n(prequant.as<float>(), kWidth, 4.0f);
    std::fill_n(weights.as<float>(), kTokens, 1.0f);
    std::fill_n(row_weights.as<float>(), kTokens, 0.5f);
    for (std::int32_t i = 0; i < kTokens; ++i)
      ids.as<std::int32_t>()[i] = slots.as<std::int32_t>()[i] = blocks.as<std::int32_t>()[i] = i;
    *used.as<std::int32_t>() = kTokens;
    layer.fc1 = {.weight = fc1.view(), .scale = scale1.view()};
    layer.fc2 = {.weight = fc2.view(), .scale = scale2.view()};
  }

  // experts, sorted, one row a block.
  HostTensor run_experts(const Tensor& rows, const Tensor& row_scale = {},
                         const Tensor& row_weight = {}) {
    HostTensor y(DType::kF32, {kTokens, kWidth});
    const WorkspaceBuffer workspace(
        {}, stage_workspace_bytes(
                config, {.format = Format::kSorted, .tokens = kTokens, .capacity = kTokens}));
    experts(config, layer,
            {.format = Format::kSorted,
             .rows = rows,
             .row_scale = row_scale,
             .sorted = {.slots = slots.view(),
                        .block_experts = blocks.view(),
                        .num_padded = used.view(),
                        .block_rows = 1},
             .row_weights = row_weight,
             .output = y.view(),
             .workspace = workspace.view()});
    return y;
  }
};

HostTensor rows_of(DType dtype, double step) {
  HostTensor rows(dtype, {kTokens, kWidth});
  Rng random(5);
  for (std::int64_t i = 0; i < rows.numel(); ++i)
    store_element(rows.bytes().data(), dtype, i, step * static_cast<double>(random.below(41) - 20));
  return rows;
}

void expect_refusal(const std::string& text, std::string_view argument) {
  EXPECT_TRUE(text.starts_with(argument)) << "'" << text << "' does not begin with " << argument;
  EXPECT_NE(text.find("pass"), std::string::npos) << text;
}

TEST(QuantizedRows, AreNotMultipliedByAFactorPerChannel) {
  Small s(Scheme::kInt4W4A8Int8);
  s.layer.fc1.prequant = s.prequant.view();
  const HostTensor rows = rows_of(DType::kI8, 1);
  HostTensor scale(DType::kF32, {kTokens, 1});
  expect_refusal(complaint([&] { s.run_experts(rows.view(), scale.view()); }),
                 "rows: fc1.prequant");

  LayerConfig eight = s.config;
  eight.input_dtype = DType::kI8;
  EXPECT_NE(complaint([&] { Layer(eight).load(s.layer); }).find("fc1.prequant"), std::string::npos);

  Layer layer(s.config);
  layer.load(s.layer);
  HostTensor prepared(DType::kI8, {kExperts, 4, kWidth}), row_scale(DType::kF32, {kExperts, 4, 1});
  HostTensor counts(DType::kI32, {kExperts});
  const HostTensor x = rows_of(DType::kBF16, 0.25);
  const WorkspaceBuffer workspace(
      {}, stage_workspace_bytes(s.config, {.tokens = kTokens, .capacity = 4}));
  const std::string text = complaint([&] {
    prepare(layer, {.hidden_states = x.view(),
                    .topk_ids = s.ids.view(),
                    .rows = prepared.view(),
                    .row_scale = row_scale.view(),
                    .num_tokens = counts.view(),
                    .workspace = workspace.view()});
  });
  EXPECT_TRUE(text.starts_with("prepare: fc1.prequant")) << text;

  HostTensor c(DType::kF32, {kTokens, 2 * kWidth});
  GroupedGemmArgs product{.quant = s.config.quant,
                          .a = rows.view(),
                          .a_scale = scale.view(),
                          .b = s.layer.fc1,
                          .sorted = {.slots = s.slots.view(),
                                     .block_experts = s.blocks.view(),
                                     .num_padded = s.used.view(),
                                     .block_rows = 1},
                          .c = c.view()};
  expect_refusal(complaint([&] { grouped_gemm(product); }), "b.prequant");
}

TEST(QuantizedRows, AreNotMultipliedByRoutingWeights) {
  Small s(Scheme::kInt4W4A8Int8);
  s.config.weight_on = WeightOn::kInput;
  HostTensor scale(DType::kF32, {kTokens, 1});
  std::fill_n(scale.as<float>(), kTokens, 0.05f);
  const HostTensor rows = rows_of(DType::kI8, 1);
  expect_refusal(complaint([&] { s.run_experts(rows.view(), scale.view(), s.row_weights.view()); }),
                 "row_weights: weight_on is input");
  EXPECT_NO_THROW(s.run_experts(rows.view(), scale.view()));  // all weights 1
}

// Float rows are quantized by the expert's own static scale, whether or not the layer's input would
// have come quantized.
TEST(QuantizedRows, TheConfigurationsInputDoesNotSayWhatRowsAre) {
  Small s(Scheme::kInt4W4A8Int8);
  s.config.quant.act_scale = ActScale::kTensorStatic;
  HostTensor input1(DType::kF32, {kExperts}), input2(DType::kF32, {kExperts});
  input1.as<float>()[0] = 0.01f;
  input1.as<float>()[1] = 1.0f;
  std::fill_n(input2.as<float>(), kExperts, 0.5f);
  s.layer.fc1.input_scale = input1.view();
  s.layer.fc2.input_scale = input2.view();
  const HostTensor rows = rows_of(DType::kBF16, 1);
  const HostTensor expected = s.run_experts(rows.view());
  s.config.input_dtype = DType::kI8;
  EXPECT_TRUE(same_bits(s.run_experts(rows.view()), expected));
}

// A dynamic scale is that of the rows in the lists alone.
TEST(QuantizedRows, ATokenInNoListDoesNotEnterTheScale) {
  for (const DType input : {DType::kBF16, DType::kF8E4M3}) {
    Small s(Scheme::kFp8Tensor);
    s.config.input_dtype = input;
    s.slots.as<std::int32_t>()[1] = kTokens;  // padding
    *s.used.as<std::int32_t>() = 1;
    HostTensor rows = rows_of(DType::kBF16, 0.1);
    const HostTensor quiet = s.run_experts(rows.view());
    for (std::int64_t i = kWidth; i < 2 * kWidth; ++i)
      store_element(rows.bytes().data(), DType::kBF16, i, 1e6);
    EXPECT_TRUE(same_bits(s.run_experts(rows.view()), quiet)) << name(input);
  }
}

// prepare has one scale for an expert's rows, so tokens cannot each bring theirs.
TEST(QuantizedRows, PrepareTakesOneScalePerTensor) {
  Small s(Scheme::kFp8Tensor);
  s.config.input_dtype = DType::kF8E4M3;
  HostTensor x(DType::kF8E4M3, {kTokens, kWidth}), scale(DType::kF32, {kTokens, 1});
  HostTensor rows(DType::kF8E4M3, {kExperts, 4, kWidth}), row_scale(DType::kF32, {kExperts, 1, 1});
  HostTensor counts(DType::kI32, {kExperts});
  const WorkspaceBuffer workspace(
      {}, stage_workspace_bytes(s.config, {.tokens = kTokens, .capacity = 4}));
  const auto run = [&](const Tensor& given) {
    prepare(s.config, {.hidden_states = x.view(),
                       .hidden_scale = given,
                       .topk_ids = s.ids.view(),
                       .rows = rows.view(),
                       .row_scale = row_scale.view(),
                       .num_tokens = counts.view(),
                       .workspace = workspace.view()});
  };
  const std::string text = complaint([&] { run(scale.view()); });
  EXPECT_TRUE(text.starts_with("hidden_scale: expected f32[1]")) << text;
  HostTensor one(DType::kF32, {1});
  *one.as<float>() = 3.0f;
  run(one.view());
  EXPECT_EQ(row_scale.as<float>()[0], 3.0f);
  EXPECT_EQ(row_scale.as<float>()[1], 3.0f);

  // No tokens have no scales.
  std::fill_n(counts.as<std::int32_t>(), kExperts, 7);
  HostTensor none(DType::kF8E4M3, {0, kWidth}), no_ids(DType::kI32, {0, s.config.top_k}),
      no_scale(DType::kF32, {0, 1});
  prepare(s.config, {.hidden_states = none.view(),
                     .hidden_scale = no_scale.view(),
                     .topk_ids = no_ids.view(),
                     .rows = rows.view(),
                     .row_scale = row_scale.view(),
                     .num_tokens = counts.view(),
                     .workspace = workspace.view()});
  for (std::int64_t e = 0; e < kExperts; ++e) EXPECT_EQ(counts.as<std::int32_t>()[e], 0);
}

// Scales of 8-bit rows are read alike whether the scheme calls them static or not.
TEST(QuantizedRows, GroupedGemmReadsTheirScalesWhateverTheyAreCalled) {
  Small s(Scheme::kFp8Tensor);
  HostTensor a(DType::kF8E4M3, {kExperts, 2, kWidth}), scale(DType::kF32, {kExperts, 1, 1});
  for (std::byte& b : a.bytes()) b = std::byte{0x38};
  scale.as<float>()[0] = 1.0f;
  scale.as<float>()[1] = 2.0f;
  HostTensor counts(DType::kI32, {kExperts});
  std::fill_n(counts.as<std::int32_t>(), kExperts, 2);
  std::vector<HostTensor> results;
  for (const ActScale act : {ActScale::kTensorDynamic, ActScale::kTensorStatic}) {
    HostTensor c(DType::kF32, {kExperts, 2, 2 * kWidth});
    GroupedGemmArgs product{.quant = {.scheme = Scheme::kFp8Tensor, .act_scale = act},
                            .a = a.view(),
                            .a_scale = scale.view(),
                            .b = s.layer.fc1,
                            .batched = {.num_tokens = counts.view()},
                            .c = c.view()};
    const WorkspaceBuffer workspace({}, grouped_gemm_workspace_bytes(product));
    product.workspace = workspace.view();
    grouped_gemm(product);
    results.push_back(c);
  }
  EXPECT_TRUE(same_bits(results[0], results[1]));
  EXPECT_NE(results[0].as<float>()[0], 0.0f);
}

TEST(QuantizedRows, AScaleOfFloatRowsIsTheStaticOneOrRefused) {
  Small s(Scheme::kFp8Tensor);
  const HostTensor a = rows_of(DType::kBF16, 100);
  HostTensor scale(DType::kF32, {1}), c(DType::kF32, {kTokens, 2 * kWidth});
  *scale.as<float>() = 1.0f;
  GroupedGemmArgs product{
      .quant = {.scheme = Scheme::kFp8Tensor, .act_scale = ActScale::kTensorDynamic},
      .a = a.view(),
      .a_scale = scale.view(),
      .b = s.layer.fc1,
      .sorted = {.slots = s.slots.view(),
                 .block_experts = s.blocks.view(),
                 .num_padded = s.used.view(),
                 .block_rows = 1},
      .c = c.view()};
  const std::string text = complaint([&] { grouped_gemm_workspace_bytes(product); });
  EXPECT_TRUE(text.starts_with("a_scale: a is bf16")) << text;
}

}  // namespace
}  // namespace moesaic::harness
