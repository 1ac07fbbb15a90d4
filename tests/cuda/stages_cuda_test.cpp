// SPDX-License-Identifier: Apache-2.0
// The batched stages of two ranks with an expert map, on a CUDA device, with both kernel families.
#include <gtest/gtest.h>

#include <algorithm>

#include "backend.h"
#include "harness/execute.h"
#include "harness/fixture.h"

namespace moesaic::harness {
namespace {

constexpr Device kGpu{DeviceType::kCuda, 0};
constexpr std::int64_t kExperts = 8, kHere = 4, kTokens = 45, kCapacity = 2 * kTokens;

class StagesOnCuda : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    const std::vector<std::string> levels = available_kernels(kGpu.type);
    if (std::find(levels.begin(), levels.end(), GetParam()) == levels.end())
      GTEST_SKIP() << "no device that runs " << GetParam();
    set_kernels(kGpu.type, GetParam());
  }
  void TearDown() override {
    if (!available_kernels(kGpu.type).empty()) set_kernels(kGpu.type, "");
  }
};

// What rank r adds: its experts are those of parity r, in descending order, which no range says.
HostTensor part(const LayerConfig& whole, const WeightOptions& options, const Batch& batch,
                std::int64_t rank) {
  LayerConfig c = whole;
  c.local = {0, kHere};
  c.output_dtype = DType::kF32;
  Layer layer(c, kGpu);
  HostTensor map(DType::kI32, {kExperts});
  std::fill_n(map.as<std::int32_t>(), kExperts, -1);
  for (std::int64_t local = 0; local < kHere; ++local) {
    const std::int64_t global = 6 - 2 * local + rank;
    map.as<std::int32_t>()[global] = static_cast<std::int32_t>(local);
    layer.load_expert(local, make_experts(whole, options, global, 1).weights);
  }
  // prepare does not see static scales, which belong to the weights.
  const WeightSpec fc1 = weight_spec(c, Product::kFc1);
  const bool later = fc1.act_scale == ActScale::kTensorStatic;
  const LayerConfig prepared = later ? float_rows(c) : c;
  const std::int64_t groups =
      fc1.act_scale == ActScale::kGroup ? (c.hidden + fc1.act_group - 1) / fc1.act_group : 1;
  const DeviceTensor x = DeviceTensor::from(batch.hidden_states, kGpu),
                     ids = DeviceTensor::from(batch.topk_ids, kGpu),
                     weights = DeviceTensor::from(batch.topk_weights, kGpu),
                     expert_map = DeviceTensor::from(map, kGpu),
                     rows(kGpu, later ? fc1.dtype16 : fc1.act_dtype, {kHere, kCapacity, c.hidden}),
                     scale(kGpu, DType::kF32, {kHere, kCapacity, groups}),
                     counts(kGpu, DType::kI32, {kHere}),
                     outputs(kGpu, DType::kF32, {kHere, kCapacity, c.hidden}),
                     y(kGpu, DType::kF32, {kTokens, c.hidden});
  const Tensor row_scale = later || fc1.act_scale == ActScale::kDefault ? Tensor{} : scale.view();
  const StageShape shape{.tokens = kTokens, .capacity = kCapacity, .device = kGpu};
  const WorkspaceBuffer workspace(
      kGpu, std::max(stage_workspace_bytes(c, shape), stage_workspace_bytes(prepared, shape)));
  prepare(prepared, {.hidden_states = x.view(),
                     .topk_ids = ids.view(),
                     .topk_weights = weights.view(),
                     .expert_map = expert_map.view(),
                     .rows = rows.view(),
                     .row_scale = row_scale,
                     .num_tokens = counts.view(),
                     .workspace = workspace.view()});
  experts(layer, {.rows = rows.view(),
                  .row_scale = row_scale,
                  .batched = {.num_tokens = counts.view()},
                  .output = outputs.view(),
                  .workspace = workspace.view()});
  finalize(c, {.expert_output = outputs.view(),
               .topk_ids = ids.view(),
               .topk_weights = weights.view(),
               .expert_map = expert_map.view(),
               .output = y.view(),
               .workspace = workspace.view()});
  return y.to_host();
}

TEST_P(StagesOnCuda, TwoRanksWithAnExpertMapGiveTheWhole) {
  int ran = 0;
  for (const Variant& variant : variants()) {
    Case c;
    c.variant = variant;
    c.shape = {"map", kExperts, 136, 80, 2};
    c.tokens = kTokens;
    c.bias = Biases::kAll;
    c.load = Load::kDuplicates;
    LayerConfig config = layer_config(c);
    if (!supported(c, kGpu).supported || !is_float(variant.input) ||
        variant.extras != Extras::kNone ||
        config.quant.act_scale == ActScale::kTensorDynamic)  // one scale per call
      continue;
    SCOPED_TRACE(variant.name);
    config.output_dtype = DType::kF32;
    const Batch batch = make_batch(config, batch_options(c));
    Layer layer(config, kGpu);
    layer.load(make_weights(config, weight_options(c)).weights);
    const HostTensor whole = execute(layer, batch, {}).output;
    HostTensor sum = part(config, weight_options(c), batch, 0);
    const HostTensor other = part(config, weight_options(c), batch, 1);
    for (std::int64_t i = 0; i < sum.numel(); ++i) sum.as<float>()[i] += other.as<float>()[i];
    // The layer keeps a slot's output in 16 bits where its backend says so.
    EXPECT_LT(distance(sum, whole), 5e-3);
    ++ran;
  }
  EXPECT_GT(ran, 10);
}

INSTANTIATE_TEST_SUITE_P(Kernels, StagesOnCuda, testing::Values("sm80", "sm90a"),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace moesaic::harness
