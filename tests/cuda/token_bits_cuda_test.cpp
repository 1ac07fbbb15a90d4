// SPDX-License-Identifier: Apache-2.0
// A token's bits at the shapes of the tables: token 0 alone, and in batches of up to 8192, through
// every format, with every tactic of both products. Layers of up to 6.4 GB: --gtest_filter splits
// the list over processes.
#include <gtest/gtest.h>

#include <algorithm>
#include <cctype>
#include <cstring>
#include <deque>
#include <tuple>

#include "backend.h"
#include "harness/cases.h"
#include "harness/execute.h"
#include "harness/formats.h"

namespace moesaic::harness {
namespace {

constexpr Device kDevice{DeviceType::kCuda, 0};
constexpr std::int64_t kTokens[] = {1, 3, 16, 100, 1024, 8192};
constexpr Format kFormats[] = {Format::kStandard, Format::kSorted, Format::kBatched};

using Param = std::tuple<std::string, std::string, std::string>;  // kernels, variant, shape

class TokenBits : public testing::TestWithParam<Param> {
 protected:
  void SetUp() override {
    const std::vector<std::string> levels = available_kernels(kDevice.type);
    const std::string& level = std::get<0>(GetParam());
    if (std::find(levels.begin(), levels.end(), level) == levels.end())
      GTEST_SKIP() << "no device that runs " << level << ": " << cuda_absence();
    set_kernels(kDevice.type, level);
  }
  void TearDown() override {
    if (!available_kernels(kDevice.type).empty()) set_kernels(kDevice.type, "");
  }
};

// Two experts' numbers in turn, drawn on the host and copied on the device: all of them would take
// longer than everything else together.
void load(const Variant& variant, Layer* layer) {
  const LayerConfig& config = layer->config();
  const WeightOptions options{.seed = 7,
                              .tensor_scales = variant.tensor_scales,
                              .static_scales = variant.static_scales,
                              .fill = Fill::kFast};
  std::deque<DeviceWeights> there;
  for (std::int64_t e = 0; e < 2; ++e)
    there.push_back(to_device(make_experts(config, options, e, 1).weights, kDevice));
  for (std::int64_t e = 0; e < config.experts; ++e)
    layer->load_expert(e, there[static_cast<std::size_t>(e % 2)].weights);
}

// A batch on the device, and what one of its forwards says of token 0.
class FirstToken {
 public:
  FirstToken(const LayerConfig& config, std::int64_t tokens)
      : batch_(make_batch(config, {.tokens = tokens, .fill = Fill::kFast, .seed = 3})),
        x_(DeviceTensor::from(batch_.hidden_states, kDevice)),
        ids_(DeviceTensor::from(batch_.topk_ids, kDevice)),
        weights_(DeviceTensor::from(batch_.topk_weights, kDevice)),
        y_(kDevice, config.output_dtype, {tokens, config.hidden}),
        bytes_(static_cast<std::size_t>(config.hidden) * size_of(config.output_dtype)),
        capacity_(needed_capacity(config, batch_.topk_ids)) {}

  std::int64_t capacity() const { return capacity_; }
  std::vector<std::byte> poison() const { return std::vector(bytes_, DeviceTensor::kPoison); }
  std::vector<std::byte> bits(const FormatRunner& runner) const {
    std::vector<std::byte> row = poison();
    backend(kDevice).copy(y_.view().data, row.data(), row.size(), {});
    runner.run({.hidden_states = x_.view(),
                .topk_ids = ids_.view(),
                .topk_weights = weights_.view(),
                .output = y_.view()},
               {});
    backend(kDevice).copy(row.data(), y_.view().data, row.size(), {});
    return row;
  }

 private:
  Batch batch_;
  DeviceTensor x_, ids_, weights_, y_;
  std::size_t bytes_;
  std::int64_t capacity_;
};

TEST_P(TokenBits, FollowFromTheTokenAlone) {
  const auto& [level, variant_name, shape_name] = GetParam();
  Case c;
  c.variant = parse_variant(variant_name);
  c.shape = parse_shape(shape_name);
  c.tokens = std::end(kTokens)[-1];
  const LayerConfig config = layer_config(c);
  const Support support = supports(config, Format::kStandard, kDevice);
  if (!support.supported) GTEST_SKIP() << support.reason;
  Layer layer(config, kDevice);
  load(c.variant, &layer);
  std::vector<TacticPair> pairs{{}};
  for (const Tactic& t : layer.tactics_gemm1()) pairs.push_back({t.id, -1});
  for (const Tactic& t : layer.tactics_gemm2()) pairs.push_back({-1, t.id});

  std::vector<std::byte> expected;
  int runs = 0;
  for (const std::int64_t tokens : kTokens) {
    const FirstToken first(config, tokens);
    for (const Format format : kFormats) {
      const FormatRunner runner(layer, format, tokens, first.capacity());
      for (const TacticPair& pair : pairs) {
        layer.set_tactics(pair);
        const std::vector<std::byte> got = first.bits(runner);
        if (runs++ == 0) {
          expected = got;
          ASSERT_NE(got, first.poison());
          ASSERT_NE(got, std::vector<std::byte>(got.size()));
        }
        ASSERT_TRUE(got == expected) << tokens << " tokens, " << name(format) << ", tactics "
                                     << pair.gemm1 << " and " << pair.gemm2;
      }
    }
  }
  std::printf("    %d forwards with the same bits\n", runs);
}

std::vector<std::string> shapes() {
  std::vector<std::string> names;
  for (const Shape& s : model_shapes()) names.push_back(s.name);
  return names;
}
INSTANTIATE_TEST_SUITE_P(Shapes, TokenBits,
                         testing::Combine(testing::Values("sm90a", "sm80"),
                                          testing::Values("bf16", "fp8_block", "fp8_tensor+static",
                                                          "int4_w4a16", "f16", "fp8_channel",
                                                          "fp8_w8a16", "int8_w8a16",
                                                          "int4_w4a16+g128+zp"),
                                          testing::ValuesIn(shapes())),
                         [](const auto& info) {
                           std::string n = std::get<0>(info.param) + "_" + std::get<1>(info.param) +
                                           "_" + std::get<2>(info.param);
                           std::replace_if(
                               n.begin(), n.end(),
                               [](unsigned char c) { return std::isalnum(c) == 0; }, '_');
                           return n;
                         });

}  // namespace
}  // namespace moesaic::harness
