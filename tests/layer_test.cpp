// SPDX-License-Identifier: Apache-2.0
// Level 1: what a Layer promises beside its numbers (those: verify_pairs_test) and its complaints
// (layer_errors_test).
#include <gtest/gtest.h>

#include <atomic>
#include <thread>

#include "allocations.h"
#include "harness/fixture.h"
#include "scheme.h"

namespace moesaic::harness {
namespace {

using testing::allocations;
using testing::watching;

TEST(Layer, TokenChunksUnderAWorkspaceCapGiveTheSameBits) {
  for (const Variant& variant :
       variants()) {  // 8-bit inputs with scales, static scales, factors ...
    Case c;
    c.variant = variant;
    c.shape = {"chunks", 8, 64, 48, 2};
    c.tokens = 64;
    LayerConfig config = layer_config(c);
    config.shared_experts = 1;
    if (config.quant.act_scale == ActScale::kTensorDynamic) {
      config.workspace_cap = 1 << 20;
      EXPECT_NE(complaint([&] { Layer layer(config); }).find("workspace_cap"), std::string::npos);
      continue;
    }
    const WeightData weights = make_weights(config, weight_options(c));
    const WeightData shared = make_shared(config, weight_options(c));
    const Batch batch =
        make_batch(config, {.tokens = 64, .load = Load::kZipf, .id_dtype = DType::kI64, .seed = 3});
    HostTensor outputs[2], counts[2];
    std::size_t all = 0, one = 0;
    for (const int capped : {0, 1}) {
      config.workspace_cap = capped == 0 ? 0 : one + (all - one) / 5;
      Layer layer(config);
      layer.load(weights.weights);
      layer.load_shared(shared.weights);
      all = layer.workspace_bytes(64);
      one = layer.workspace_bytes(1);
      if (capped == 1) {
        EXPECT_LE(all, config.workspace_cap);
      }
      HostTensor& y = outputs[capped] = HostTensor(config.output_dtype, {64, 64});
      for (std::int64_t i = 0; i < y.numel(); ++i)  // a residual that is added to
        store_element(y.bytes().data(), y.dtype(), i, 0.01 * static_cast<double>(i % 101));
      HostTensor& count = counts[capped] = HostTensor(DType::kI32, {8});
      const WorkspaceBuffer workspace({}, all);
      layer.forward({.hidden_states = batch.hidden_states.view(),
                     .hidden_scale = batch.hidden_scale.view(),
                     .topk_ids = batch.topk_ids.view(),
                     .topk_weights = batch.topk_weights.view(),
                     .output = y.view(),
                     .accumulate = Accumulate::kAdd,
                     .tokens_per_expert = count.view(),
                     .workspace = workspace.view()});
    }
    EXPECT_TRUE(same_bits(outputs[0], outputs[1])) << variant.name;
    EXPECT_TRUE(same_bits(counts[0], counts[1])) << variant.name;
  }
}

// Whatever the cap: it is kept for every T, logits of many experts included, or refused.
TEST(Layer, NoWorkspaceIsEverAboveTheCap) {
  LayerConfig config = small_config(Scheme::kBF16, 300);
  config.experts = 256;
  config.hidden = 16;
  config.intermediate = 8;
  config.workspace_cap = 16;
  const std::string text = complaint([&] { Layer layer(config); });
  ASSERT_NE(text.find("workspace_cap: expected at least "), std::string::npos) << text;
  const std::size_t least = std::stoull(text.substr(text.find("least ") + 6));
  config.workspace_cap = least - 1;
  EXPECT_NE(complaint([&] { Layer layer(config); }).find("workspace_cap"), std::string::npos);

  config.workspace_cap = 0;
  Fixture whole(config);
  const RouterData router = make_router(config, RouterBias::kBoth, 5);
  whole.layer.set_router(router.weights);
  const Batch batch = whole.batch(300);
  for (const std::size_t cap : {least, least + 5000, least + 100000}) {
    config.workspace_cap = cap;
    Fixture capped(config);
    capped.layer.set_router(router.weights);
    for (const std::int64_t t : {0, 1, 2, 17, 299, 300})
      EXPECT_LE(capped.layer.workspace_bytes(t), cap) << t << " tokens";
    for (const Execution::Source source :
         {Execution::Source::kLogits, Execution::Source::kRouter}) {
      Execution how;
      how.source = source;
      EXPECT_TRUE(same_bits(execute(whole.layer, batch, how).output,
                            execute(capped.layer, batch, how).output))
          << "cap " << cap;
    }
  }
}

TEST(Layer, WorkspaceIsAPureFunctionAndGrowsWithTokens) {
  const Fixture f(small_config());
  std::size_t last = 0;
  for (std::int64_t t = 0; t <= 64; ++t) {
    EXPECT_GE(f.layer.workspace_bytes(t), last);
    EXPECT_EQ(f.layer.workspace_bytes(t), f.layer.workspace_bytes(t));
    last = f.layer.workspace_bytes(t);
  }
  EXPECT_NE(complaint([&] { f.layer.workspace_bytes(65); }).find("tokens"), std::string::npos);
}

TEST(Layer, LogitsAndRouterGiveTheSameBitsAsTheirIds) {
  const Fixture f(small_config());
  const Batch batch = f.batch(20);
  Execution how;
  how.source = Execution::Source::kLogits;
  const HostTensor from_logits = execute(f.layer, batch, how).output;
  Batch routed = batch;
  RouteArgs args;
  args.logits = batch.router_logits.view();
  args.topk_ids = routed.topk_ids.view();
  args.topk_weights = routed.topk_weights.view();
  route(args);
  EXPECT_TRUE(same_bits(from_logits, f.run(routed)));
}

TEST(Layer, ExpertsMayBeLoadedOneByOneInAnyOrderAndTheirTensorsGoAway) {
  for (int s = 0; s < kNumSchemes; ++s) {
    const LayerConfig config = small_config(static_cast<Scheme>(s));
    const Fixture whole(config);
    Layer layer(config);
    for (const std::int64_t e : {7, 0, 3, 1, 6, 2, 5, 4}) {
      EXPECT_FALSE(layer.ready());
      const WeightData one = make_experts(config, {.bias = Biases::kAll}, e, 1);
      layer.load_expert(e, one.weights);
    }
    EXPECT_TRUE(layer.ready());
    const Batch batch = whole.batch(9);
    EXPECT_TRUE(same_bits(whole.run(batch), execute(layer, batch, {}).output))
        << name(static_cast<Scheme>(s));
  }
}

TEST(Layer, TransposedWeightsAreRead) {  // GPT-OSS and Llama-4 store [E, H, 2I] and [E, I, H]
  for (const Scheme scheme : {Scheme::kF32, Scheme::kF16, Scheme::kBF16}) {
    const Fixture f(small_config(scheme));
    LayerWeights turned = f.weights.weights;
    std::deque<HostTensor> kept;
    for (GemmWeights* g : {&turned.fc1, &turned.fc2}) {
      const Tensor w = g->weight;
      HostTensor& t =
          kept.emplace_back(w.dtype, std::vector<std::int64_t>{w.shape[0], w.shape[2], w.shape[1]});
      for (std::int64_t e = 0; e < w.shape[0]; ++e)
        for (std::int64_t n = 0; n < w.shape[1]; ++n)
          for (std::int64_t k = 0; k < w.shape[2]; ++k)
            store_element(t.bytes().data(), w.dtype, (e * w.shape[2] + k) * w.shape[1] + n,
                          element(w, {e, n, k}));
      g->weight = t.view();
      std::swap(g->weight.shape[1], g->weight.shape[2]);
      std::swap(g->weight.strides[1], g->weight.strides[2]);
    }
    Layer layer(f.config);
    layer.load(turned);
    const Batch batch = f.batch(9);
    EXPECT_TRUE(same_bits(f.run(batch), execute(layer, batch, {}).output));
  }
}

// (E,), (E, 1), (E, 1, 1) for a tensor; (E, N), (E, N, 1) for channels: one meaning each.
TEST(Layer, ScalesMayComeInAnyShapeOfTheirContract) {
  const auto reshaped = [](const Tensor& t, std::initializer_list<std::int64_t> shape) {
    return Tensor::contiguous(t.data, t.dtype, shape);
  };
  for (const Scheme scheme :
       {Scheme::kFp8Tensor, Scheme::kFp8Channel, Scheme::kInt8Channel, Scheme::kInt8W8A16}) {
    const Fixture f(small_config(scheme));
    const Batch batch = f.batch(9);
    const HostTensor expected = f.run(batch);
    for (const int form : {0, 1, 2}) {
      LayerWeights w = f.weights.weights;
      for (GemmWeights* g : {&w.fc1, &w.fc2}) {
        const std::int64_t e = 8, n = g->scale.numel() / 8;
        if (n == 1)
          g->scale = form == 0   ? reshaped(g->scale, {e})
                     : form == 1 ? reshaped(g->scale, {e, 1})
                                 : reshaped(g->scale, {e, 1, 1});
        else
          g->scale = form == 0 ? reshaped(g->scale, {e, n}) : reshaped(g->scale, {e, n, 1});
      }
      Layer layer(f.config);
      layer.load(w);
      EXPECT_TRUE(same_bits(execute(layer, batch, {}).output, expected))
          << name(scheme) << ", form " << form;
    }
  }
}

// Activation scales per token, static and dynamic, with and without AWQ's factors and alphas.
TEST(Layer, FourBitWeightsTakeEveryActivationScale) {
  for (const Scheme scheme : {Scheme::kInt4W4A8Fp8, Scheme::kInt4W4A8Int8}) {
    for (const ActScale scale :
         {ActScale::kToken, ActScale::kTensorStatic, ActScale::kTensorDynamic}) {
      for (const Extras extras : {Extras::kNone, Extras::kPrequantAlpha}) {
        for (const Format format : {Format::kStandard, Format::kSorted, Format::kBatched}) {
          Case c;
          c.variant = default_variant(scheme);
          c.variant.quant.act_scale = scale;
          c.variant.extras = extras;
          c.format = format;
          c.shape = {"w4a8", 5, 160, 96, 2};
          c.bias = Biases::kAll;
          c.tokens = 7;
          c.seed = 17;
          EXPECT_EQ(failure(c), "")
              << "act_scale " << static_cast<int>(scale) << ", extras " << static_cast<int>(extras);
        }
      }
    }
  }
}

TEST(Layer, AnExpertRangeSumsUpToTheWhole) {  // expert parallelism from outside
  LayerConfig config = small_config(Scheme::kF32);
  const Fixture whole(config);
  const Batch batch = whole.batch(21, Load::kDuplicates);
  HostTensor sum(DType::kF32, {21, config.hidden});
  for (const ExpertRange range : {ExpertRange{0, 3}, ExpertRange{3, 4}, ExpertRange{7, 1}}) {
    config.local = range;
    const HostTensor part = Fixture(config).run(batch);
    for (std::int64_t i = 0; i < sum.numel(); ++i) sum.as<float>()[i] += part.as<float>()[i];
  }
  EXPECT_LT(distance(sum, whole.run(batch)), 1e-6);
}

TEST(Layer,
     ShardsOfTheIntermediateSumUpToTheWhole) {  // tensor parallelism: gate and up sharded apart
  const LayerConfig config = small_config(Scheme::kF32);
  const Fixture whole(config);
  const Batch batch = whole.batch(13);
  HostTensor sum(DType::kF32, {13, config.hidden});
  const std::int64_t half = config.intermediate / 2;
  for (const std::int64_t rank : {0, 1}) {
    LayerConfig shard = config;
    shard.intermediate = half;
    LayerWeights w = whole.weights.weights;
    HostTensor fc1(DType::kF32, {8, 2 * half, config.hidden}), bias(DType::kF32, {8, 2 * half});
    for (std::int64_t e = 0; e < 8; ++e) {
      for (std::int64_t n = 0; n < 2 * half; ++n) {
        const std::int64_t from = n / half * config.intermediate + rank * half + n % half;
        bias.as<float>()[e * 2 * half + n] = static_cast<float>(element(w.fc1.bias, {e, from}));
        for (std::int64_t k = 0; k < config.hidden; ++k)
          fc1.as<float>()[(e * 2 * half + n) * config.hidden + k] =
              static_cast<float>(element(w.fc1.weight, {e, from, k}));
      }
    }
    w.fc1.weight = fc1.view();
    w.fc1.bias = bias.view();
    w.fc2.weight.shape[2] = half;
    w.fc2.weight.data = w.fc2.weight.as<float>() + rank * half;
    if (rank != 0) w.fc2.bias = {};  // FC2's bias once
    Layer layer(shard);
    layer.load(w);
    const HostTensor part = execute(layer, batch, {}).output;
    for (std::int64_t i = 0; i < sum.numel(); ++i) sum.as<float>()[i] += part.as<float>()[i];
  }
  EXPECT_LT(distance(sum, whole.run(batch)), 1e-6);
}

TEST(Layer, ManyThreadsMayForwardAtOnceWithAWorkspaceEach) {
  const Fixture f(small_config(Scheme::kInt4W4A16));
  const Batch batch = f.batch(40);
  const HostTensor expected = f.run(batch);
  std::vector<HostTensor> got(4);
  std::vector<std::thread> threads;
  for (HostTensor& out : got)
    threads.emplace_back([&] {
      for (int i = 0; i < 5; ++i) out = f.run(batch);
    });
  for (std::thread& t : threads) t.join();
  for (const HostTensor& out : got) EXPECT_TRUE(same_bits(out, expected));
}

TEST(Layer, TwoLayersMayShareAWorkspace) {
  const Fixture a(small_config()), b(small_config(Scheme::kFp8Block));
  const Batch batch = a.batch(30);
  const WorkspaceBuffer shared({},
                               std::max(a.layer.workspace_bytes(30), b.layer.workspace_bytes(30)));
  for (const Fixture* f : {&a, &b, &a}) {
    HostTensor y(DType::kBF16, {30, 64});
    ForwardArgs args;
    args.hidden_states = batch.hidden_states.view();
    args.topk_ids = batch.topk_ids.view();
    args.topk_weights = batch.topk_weights.view();
    args.output = y.view();
    args.workspace = shared.view();
    f->layer.forward(args);
    EXPECT_TRUE(same_bits(y, f->run(batch)));
  }
}

TEST(Layer, OutputMayBeTheHiddenStatesThemselves) {
  const Fixture f(small_config());
  Batch batch = f.batch(17);
  const HostTensor expected = f.run(batch);
  const WorkspaceBuffer workspace({}, f.layer.workspace_bytes(17));
  ForwardArgs args;
  args.hidden_states = args.output = batch.hidden_states.view();
  args.topk_ids = batch.topk_ids.view();
  args.topk_weights = batch.topk_weights.view();
  args.workspace = workspace.view();
  f.layer.forward(args);
  EXPECT_TRUE(same_bits(batch.hidden_states, expected));
}

TEST(Layer, EveryTacticGivesTheSameBitsAndABadIndexFallsToThePolicy) {
  for (int s = 0; s < kNumSchemes; ++s) {
    Fixture f(small_config(static_cast<Scheme>(s)));
    const Batch batch = f.batch(33);
    const HostTensor expected = f.run(batch);
    for (const Tactic& t : f.layer.tactics_gemm1()) {
      f.layer.set_tactics({.gemm1 = t.id, .gemm2 = -1});
      EXPECT_TRUE(same_bits(f.run(batch), expected)) << t.description;
    }
    for (const Tactic& t : f.layer.tactics_gemm2()) {
      f.layer.set_tactics({.gemm1 = -1, .gemm2 = t.id});
      EXPECT_TRUE(same_bits(f.run(batch), expected)) << t.description;
    }
    f.layer.set_tactics({.gemm1 = 9999, .gemm2 = -7});
    EXPECT_TRUE(same_bits(f.run(batch), expected));
  }
}

TEST(Layer, TokensPerExpertCountsLocalSlotsOnly) {
  LayerConfig config = small_config();
  config.local = {2, 5};
  for (const std::size_t cap : {std::size_t{0}, std::size_t{6000}}) {
    config.workspace_cap = cap;
    const Fixture f(config);
    const Batch batch = make_batch(
        config, {.tokens = 40, .load = Load::kRemote, .id_dtype = DType::kI64, .seed = 9});
    std::vector<std::int32_t> expected(5, 0);
    for (std::int64_t i = 0; i < batch.topk_ids.numel(); ++i) {
      const std::int64_t id = batch.topk_ids.as<std::int64_t>()[i];
      if (id >= 2 && id < 7) ++expected[static_cast<std::size_t>(id - 2)];
    }
    HostTensor y(DType::kBF16, {40, 64}), counts(DType::kI32, {5});
    const WorkspaceBuffer workspace({}, f.layer.workspace_bytes(40));
    ForwardArgs args;
    args.hidden_states = batch.hidden_states.view();
    args.topk_ids = batch.topk_ids.view();
    args.topk_weights = batch.topk_weights.view();
    args.output = y.view();
    args.tokens_per_expert = counts.view();
    args.workspace = workspace.view();
    f.layer.forward(args);
    for (std::size_t e = 0; e < 5; ++e) EXPECT_EQ(counts.as<std::int32_t>()[e], expected[e]);
  }
}

// From ids, from logits and from the router, in one piece and in chunks, after one forward that may
// start the pool's threads.
TEST(Layer, ForwardAllocatesNothing) {
  for (int s = 0; s < kNumSchemes; ++s) {
    for (const std::size_t cap : {std::size_t{0}, std::size_t{60000}}) {
      LayerConfig config = small_config(static_cast<Scheme>(s));
      if (config.quant.act_scale != ActScale::kTensorDynamic) config.workspace_cap = cap;
      config.shared_experts = 1;
      Fixture f(small_config(static_cast<Scheme>(s)));
      Layer layer(config);
      layer.load(f.weights.weights);
      layer.load_shared(make_experts(f.config, {.bias = Biases::kAll}, 0, 1).weights);
      const Batch batch = f.batch(40);
      layer.set_router(make_router(config, RouterBias::kBoth, 5).weights);
      HostTensor y(config.output_dtype, {40, config.hidden}), counts(DType::kI32, {8});
      const WorkspaceBuffer workspace({}, layer.workspace_bytes(40));
      ForwardArgs by_router;
      by_router.hidden_states = batch.hidden_states.view();
      by_router.output = y.view();
      by_router.tokens_per_expert = counts.view();
      by_router.workspace = workspace.view();
      ForwardArgs by_logits = by_router, by_ids = by_router;
      by_logits.router_logits = batch.router_logits.view();
      by_ids.topk_ids = batch.topk_ids.view();
      by_ids.topk_weights = batch.topk_weights.view();
      for (const ForwardArgs* args : {&by_router, &by_logits, &by_ids}) {
        layer.forward(*args);
        allocations = 0;
        watching = true;
        layer.forward(*args);
        watching = false;
        EXPECT_EQ(allocations, 0) << name(static_cast<Scheme>(s)) << ", cap " << cap;
      }
    }
  }
  allocations = 0;
  watching = true;
  const auto proof = std::make_unique<int>(1);  // that something would be seen
  watching = false;
  EXPECT_EQ(allocations, 1);
}

TEST(Layer, NoTokensIsNoWork) {
  for (int s = 0; s < kNumSchemes; ++s)
    for (const Format format : {Format::kStandard, Format::kSorted, Format::kBatched}) {
      const Fixture f(small_config(static_cast<Scheme>(s)));
      EXPECT_EQ(f.run(f.batch(0), format).numel(), 0);
    }
}

}  // namespace
}  // namespace moesaic::harness
