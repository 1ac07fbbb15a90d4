// SPDX-License-Identifier: Apache-2.0
// Weights, routers and gates that replace others: nothing of what was there before is left, neither
// in a result nor in memory.
#include <gtest/gtest.h>
#include <malloc.h>

#include "harness/fixture.h"

namespace moesaic::harness {
namespace {

LayerConfig config_with_terms() {
  LayerConfig config = small_config();
  config.activation.kind = Activation::kSwigluOai;
  return config;
}

// With every small tensor that a layer in bf16 may have.
struct Terms {
  HostTensor alpha{DType::kF32, {8}}, beta{DType::kF32, {8}}, limit{DType::kF32, {8}},
      factor{DType::kF32, {8}};
  explicit Terms(LayerWeights* weights) {
    for (int e = 0; e < 8; ++e) {
      alpha.as<float>()[e] = 0.5f;
      beta.as<float>()[e] = 2.0f;
      limit.as<float>()[e] = 0.3f;
      factor.as<float>()[e] = 3.0f;
    }
    weights->activation = {.alpha = alpha.view(), .beta = beta.view(), .limit = limit.view()};
    weights->fc2.alpha = factor.view();
  }
};

LayerWeights without_terms(LayerWeights weights) {
  weights.fc1.bias = weights.fc2.bias = weights.fc1.alpha = weights.fc2.alpha = {};
  weights.activation = {};
  return weights;
}

LayerWeights expert_of(LayerWeights weights, std::int64_t e) {
  for (Tensor* t : {&weights.fc1.weight, &weights.fc2.weight, &weights.fc1.bias, &weights.fc2.bias,
                    &weights.fc2.alpha, &weights.activation.alpha, &weights.activation.beta,
                    &weights.activation.limit})
    if (t->defined()) *t = t->slice(e, 1);
  return weights;
}

TEST(Reload, WhatTheNewWeightsLeaveOutIsGone) {
  Fixture fresh(config_with_terms(), {.bias = Biases::kNone});
  Fixture reloaded(config_with_terms(), {.bias = Biases::kAll});
  const Batch batch = fresh.batch(16);
  LayerWeights rich = reloaded.weights.weights;
  const Terms terms(&rich);
  reloaded.layer.load(rich);
  const HostTensor before = reloaded.run(batch);
  const LayerWeights plain = without_terms(rich);
  fresh.layer.load(plain);
  EXPECT_FALSE(same_bits(before, fresh.run(batch)));  // the terms do count
  reloaded.layer.load(plain);
  EXPECT_TRUE(reloaded.layer.ready());
  EXPECT_TRUE(same_bits(reloaded.run(batch), fresh.run(batch)));
  reloaded.layer.load(rich);  // and come back
  EXPECT_TRUE(same_bits(reloaded.run(batch), before));
}

// Expert by expert: not ready before all of them agree on what they have.
TEST(Reload, ExpertByExpert) {
  Fixture fresh(config_with_terms(), {.bias = Biases::kAll});
  const LayerWeights rich = fresh.weights.weights, plain = without_terms(rich);
  const Batch batch = fresh.batch(16);
  Layer layer(fresh.config);
  layer.load(rich);
  for (std::int64_t e = 0; e < 8; ++e) {
    layer.load_expert(e, expert_of(plain, e));
    EXPECT_EQ(layer.ready(), e == 7) << e;
  }
  fresh.layer.load(plain);
  Execution how;
  EXPECT_TRUE(same_bits(execute(layer, batch, how).output, fresh.run(batch)));
}

// What is refused changes nothing.
TEST(Reload, RefusedWeightsLeaveTheLayerAsItWas) {
  Fixture f(small_config());
  const Batch batch = f.batch(16);
  const HostTensor before = f.run(batch);
  LayerWeights wrong = expert_of(f.weights.weights, 3);
  wrong.fc2.weight.shape[2] -= 1;
  EXPECT_NE(complaint([&] { f.layer.load_expert(3, wrong); }), "");
  EXPECT_TRUE(f.layer.ready());
  EXPECT_TRUE(same_bits(f.run(batch), before));
}

TEST(Reload, ForwardSaysWhichWeightsAreMissing) {
  Fixture f(small_config());
  Layer layer(f.config);
  LayerWeights first = expert_of(f.weights.weights, 0);
  const LayerWeights plain = without_terms(f.weights.weights);
  EXPECT_EQ(complaint([&] { layer.load_expert(0, first); }), "");
  for (std::int64_t e = 1; e < 8; ++e) layer.load_expert(e, expert_of(plain, e));
  EXPECT_FALSE(layer.ready());
  const std::string text = complaint([&] { layer.forward({}); });
  EXPECT_EQ(text,
            "forward: fc1.bias was given for some experts and not for local expert 1; give it for "
            "all or for none");
}

TEST(Reload, ASharedGateThatIsNotGivenIsGone) {
  LayerConfig config = small_config();
  config.shared_experts = 1;
  Fixture f(config, {.bias = Biases::kNone});
  const Batch batch = f.batch(8);
  LayerWeights shared;
  shared.fc1.weight = f.weights.weights.fc1.weight.slice(0, 1);
  shared.fc2.weight = f.weights.weights.fc2.weight.slice(0, 1);
  HostTensor gate(DType::kF32, {64});
  for (int i = 0; i < 64; ++i) gate.as<float>()[i] = 0.1f * static_cast<float>(i % 7 - 3);
  f.layer.load_shared(shared);
  const HostTensor ungated = f.run(batch);
  f.layer.load_shared(shared, gate.view());
  EXPECT_FALSE(same_bits(f.run(batch), ungated));
  f.layer.load_shared(shared);
  EXPECT_TRUE(same_bits(f.run(batch), ungated));
}

// A router of 1 MiB, a hundred times.
TEST(Reload, ARouterTakesThePlaceOfTheOneBefore) {
  LayerConfig config = small_config();
  config.hidden = 32768;
  config.intermediate = 8;
  Layer layer(config);
  HostTensor weight(DType::kF32, {8, 32768});
  layer.set_router({.weight = weight.view()});
  const struct mallinfo2 before = mallinfo2();
  for (int i = 0; i < 100; ++i) layer.set_router({.weight = weight.view()});
  const struct mallinfo2 after = mallinfo2();
  EXPECT_LT(after.uordblks + after.hblkhd,
            before.uordblks + before.hblkhd + (std::size_t{4} << 20));
}

}  // namespace
}  // namespace moesaic::harness
