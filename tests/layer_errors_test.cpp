// SPDX-License-Identifier: Apache-2.0
// What level 1 says when it is called wrongly: the argument, what was expected, what came, a way
// out.
#include <gtest/gtest.h>

#include "harness/fixture.h"
#include "weights.h"

namespace moesaic::harness {
namespace {

// A call of eight tokens that is right, of which a test makes one thing wrong.
struct GoodCall {
  Fixture f{small_config()};
  Batch batch = f.batch(8);
  HostTensor y{DType::kBF16, {8, 64}};
  WorkspaceBuffer workspace{{}, f.layer.workspace_bytes(8)};
  ForwardArgs args{.hidden_states = batch.hidden_states.view(),
                   .topk_ids = batch.topk_ids.view(),
                   .topk_weights = batch.topk_weights.view(),
                   .output = y.view(),
                   .workspace = workspace.view()};

  // What the layer says of the call with `change` made, "" when nothing.
  template <typename Change>
  std::string complaint_of(const Change& change) const {
    ForwardArgs changed = args;
    change(&changed);
    return complaint([&] { f.layer.forward(changed); });
  }
};

TEST(LayerErrors, NameTheArgumentAndSayWhatCame) {
  const GoodCall call;
  EXPECT_EQ(call.complaint_of([](ForwardArgs*) {}), "");
  const auto expect = [&](const char* what, const char* came, auto change) {
    const std::string text = call.complaint_of(change);
    EXPECT_NE(text.find(what), std::string::npos) << "'" << text << "'";
    EXPECT_NE(text.find(came), std::string::npos) << "'" << text << "'";
  };
  HostTensor wrong(DType::kF32, {8, 64}), narrow(DType::kBF16, {8, 63}),
      many(DType::kBF16, {65, 64});
  expect("hidden_states", "f32", [&](ForwardArgs* a) { a->hidden_states = wrong.view(); });
  expect("hidden_states", "63", [&](ForwardArgs* a) { a->hidden_states = narrow.view(); });
  expect("hidden_states", "65", [&](ForwardArgs* a) { a->hidden_states = many.view(); });
  expect("topk_ids", "bf16", [&](ForwardArgs* a) { a->topk_ids = call.y.view(); });
  expect("topk_weights", "", [&](ForwardArgs* a) { a->topk_weights = {}; });
  expect("output", "f32", [&](ForwardArgs* a) { a->output = wrong.view(); });
  expect("workspace", "", [&](ForwardArgs* a) { a->workspace.bytes = 1; });
  expect("hidden_states", "cuda",
         [&](ForwardArgs* a) { a->hidden_states.device = {DeviceType::kCuda, 0}; });
  expect("router", "", [&](ForwardArgs* a) { a->topk_ids = a->topk_weights = {}; });
}

// What a message consists of: the argument, what was expected, what came, a way out.
TEST(LayerErrors, OfferAWayOut) {
  const GoodCall call;
  HostTensor narrow(DType::kBF16, {8, 63});
  const auto says = [&](const char* text, auto change) {
    EXPECT_EQ(call.complaint_of(change), text);
  };
  says("hidden_states: expected shape [*, 64], got bf16[8, 63] on cpu; pass a view of that shape",
       [&](ForwardArgs* a) { a->hidden_states = narrow.view(); });
  says("topk_ids: expected dtype i32 or i64, got f32[8, 2] on cpu; convert it",
       [&](ForwardArgs* a) { a->topk_ids = call.batch.topk_weights.view(); });
  says("output: is required and was not given; pass it", [&](ForwardArgs* a) { a->output = {}; });
}

// What of a caller's memory a layer could keep (tests/cuda/in_place_cuda_test.cpp has such layers).
TEST(LayerErrors, WhatCannotStayInPlaceIsRefused) {
  LayerConfig config = small_config();
  config.weight_storage = WeightStorage::kInPlace;
  EXPECT_FALSE(supports(config, Format::kStandard).supported);
  EXPECT_EQ(complaint([&] { Layer layer(config); }).find("weight_storage: in_place is for CUDA"),
            0u);
  alignas(64) std::byte memory[1024];
  const auto says = [&](std::string_view text, std::size_t at, Device device, auto change) {
    Tensor w = Tensor::contiguous(memory + at, DType::kBF16, {2, 8, 16});
    change(&w);
    const std::string said = complaint([&] { check_keepable(device, w, "fc1.weight"); });
    EXPECT_EQ(said.substr(0, text.size()), text) << said;
    EXPECT_EQ(said.empty(), text.empty()) << said;
  };
  const auto as_it_is = [](Tensor*) {};
  says("", 16, {}, as_it_is);
  says("fc1.weight: expected on cuda:0", 0, {DeviceType::kCuda, 0}, as_it_is);
  says("fc1.weight: weight_storage is in_place, which needs data aligned to 16 bytes, got 8", 8, {},
       as_it_is);
  says("fc1.weight: must be contiguous", 0, {}, [](Tensor* w) { w->strides = {128, 1, 8}; });
  says("fc1.weight: must be contiguous", 0, {}, [](Tensor* w) { w->shape[2] = 8; });
}

// The gate reads the layer's input as a router does: both must be floats.
TEST(LayerErrors, ASharedGateThatCannotBeReadIsRefused) {
  const std::vector<std::int8_t> bytes(64, 1);
  const std::vector<float> floats(64, 1.0f);
  LayerConfig config = small_config(Scheme::kInt8Channel);
  config.shared_experts = 1;
  const WeightData one = make_experts(config, {}, 0, 1);
  Layer layer(config);
  EXPECT_NE(complaint([&] {
              layer.load_shared(one.weights, Tensor::contiguous(bytes.data(), DType::kI8, {64}));
            }).find("shared.gate: expected dtype"),
            std::string::npos);
  layer.load_shared(one.weights, Tensor::contiguous(floats.data(), DType::kF32, {64}));
  config.input_dtype = DType::kI8;
  Layer eight(config);
  EXPECT_NE(complaint([&] {
              eight.load_shared(one.weights, Tensor::contiguous(floats.data(), DType::kF32, {64}));
            }).find("shared.gate: reads f32, f16 or bf16"),
            std::string::npos);
  eight.load_shared(one.weights);
}

TEST(LayerErrors, AnIncompleteLayerSaysWhichExpertIsMissing) {
  const LayerConfig config = small_config();
  Layer layer(config);
  const WeightData one = make_experts(config, {}, 0, 1);
  layer.load_expert(0, one.weights);
  EXPECT_NE(complaint([&] { layer.forward({}); }).find("expert 1"), std::string::npos);
}

// Memory that cannot be what it is said to be: between two elements, or written in two places.
TEST(LayerErrors, MisplacedAndOverlappingTensorsAreRefused) {
  const GoodCall call;
  const auto says = [&](const char* text, auto change) {
    const std::string got = call.complaint_of(change);
    EXPECT_TRUE(got.starts_with(text)) << got;
  };
  says("hidden_states: bf16[8, 64] on cpu must be aligned to its elements of 2 bytes",
       [](ForwardArgs* a) { a->hidden_states.data = a->hidden_states.as<char>() + 1; });
  says("topk_weights: f32[8, 2] on cpu must be aligned",
       [](ForwardArgs* a) { a->topk_weights.data = a->topk_weights.as<char>() + 2; });
  for (const std::int64_t stride : {0, 1, 63, -63})
    says("output: is written, and its elements overlap", [&](ForwardArgs* a) {
      a->output.strides[0] = stride;
      a->output.data = a->output.as<std::uint16_t>() + (stride < 0 ? 7 * 63 : 0);
    });
  // One token, eight times; and the rows of the output in descending order.
  EXPECT_EQ(call.complaint_of([](ForwardArgs* a) { a->hidden_states.strides[0] = 0; }), "");
  EXPECT_EQ(call.complaint_of([](ForwardArgs* a) {
    a->output.data = a->output.as<std::uint16_t>() + 7 * 64;
    a->output.strides[0] = -64;
  }),
            "");
}

TEST(LayerErrors, ConfigurationsThatCannotBeAreRefusedByName) {
  const auto refused = [](auto change) {
    LayerConfig config = small_config();
    change(&config);
    return complaint([&] { Layer layer(config); });
  };
  EXPECT_NE(refused([](LayerConfig* c) { c->experts = 0; }).find("experts"), std::string::npos);
  EXPECT_NE(refused([](LayerConfig* c) { c->top_k = 9; }).find("top_k"), std::string::npos);
  EXPECT_NE(refused([](LayerConfig* c) { c->local = {6, 3}; }).find("local"), std::string::npos);
  EXPECT_NE(refused([](LayerConfig* c) { c->input_dtype = DType::kF32; }).find("input_dtype"),
            std::string::npos);
  EXPECT_NE(refused([](LayerConfig* c) { c->output_dtype = DType::kI8; }).find("output_dtype"),
            std::string::npos);
  EXPECT_NE(refused([](LayerConfig* c) {
              c->quant = {.scheme = Scheme::kInt4W4A16};
              c->hidden = 63;
            }).find("even"),
            std::string::npos);
  EXPECT_NE(refused([](LayerConfig* c) {
              c->quant = {.scheme = Scheme::kFp8Block, .weight_scale = WeightScale::kGroup};
            }).find("weight_scale"),
            std::string::npos);
  EXPECT_NE(refused([](LayerConfig* c) {
              c->quant = {.scheme = Scheme::kFp8Channel, .zero_points = true};
            }).find("zero_points"),
            std::string::npos);
  EXPECT_NE(refused([](LayerConfig* c) {
              c->routing = {.method = RoutingMethod::kDeepSeekV3, .groups = 3};
            }).find("groups"),
            std::string::npos);
}

// A caller may have cast any number to an enumeration.
TEST(LayerErrors, EnumeratorsThatAreNoneAreRefusedByName) {
  const auto refused = [](const char* argument, auto change) {
    LayerConfig config = small_config();
    change(&config);
    const std::string text = complaint([&] { Layer layer(config); });
    EXPECT_TRUE(text.starts_with(argument)) << "'" << text << "'";
    EXPECT_FALSE(supports(config, Format::kBatched).supported);
  };
  refused("scheme", [](LayerConfig* c) { c->quant.scheme = Scheme{99}; });
  refused("weight_scale", [](LayerConfig* c) { c->quant.weight_scale = WeightScale{9}; });
  refused("act_scale", [](LayerConfig* c) { c->quant.act_scale = ActScale{9}; });
  refused("int8_rounding", [](LayerConfig* c) { c->quant.int8_rounding = Int8Rounding{9}; });
  refused("activation.kind", [](LayerConfig* c) { c->activation.kind = Activation{99}; });
  refused("activation.order", [](LayerConfig* c) { c->activation.order = GateOrder{9}; });
  refused("activation.layout", [](LayerConfig* c) { c->activation.layout = GateLayout{9}; });
  refused("routing.method", [](LayerConfig* c) { c->routing.method = RoutingMethod{99}; });
  refused("routing.renormalize", [](LayerConfig* c) { c->routing.renormalize = Renormalize{9}; });
  refused("weight_on", [](LayerConfig* c) { c->weight_on = WeightOn{9}; });
  refused("weight_storage", [](LayerConfig* c) { c->weight_storage = WeightStorage{9}; });
  EXPECT_FALSE(supports(small_config(), Format{9}).supported);
  EXPECT_NE(complaint([] { Layer layer(small_config(), {DeviceType{9}, 0}); }).find("device.type"),
            std::string::npos);
  const GoodCall call;
  const std::string text = call.complaint_of([](ForwardArgs* a) { a->accumulate = Accumulate{9}; });
  EXPECT_TRUE(text.starts_with("accumulate")) << text;
}

// What `supports` says is what the constructor does, to the word.
TEST(LayerErrors, SupportsKnowsWhatTheConstructorRefuses) {
  const auto same = [](auto change) {
    LayerConfig config = small_config(Scheme::kInt4W4A16);
    change(&config);
    const Support support = supports(config, Format::kStandard);
    const std::string text = complaint([&] { Layer layer(config); });
    EXPECT_EQ(support.supported, text.empty()) << text;
    EXPECT_NE(text.find(support.reason), std::string::npos) << text << " / " << support.reason;
    return text;
  };
  EXPECT_EQ(same([](LayerConfig*) {}), "");
  EXPECT_NE(same([](LayerConfig* c) { c->shared_experts = 1, c->shared_intermediate = 33; }), "");
  EXPECT_NE(same([](LayerConfig* c) { c->workspace_cap = 100; }), "");
  LayerConfig capped = small_config();
  capped.workspace_cap = 100;  // a cap is forward's: stages have none
  EXPECT_TRUE(supports(capped, Format::kBatched).supported);
}

TEST(LayerErrors, WeightsThatDoNotFitAreRefusedByName) {
  const LayerConfig config = small_config(Scheme::kInt4W4A16);
  const WeightData good = make_weights(config, {});
  Layer layer(config);
  const auto refused = [&](auto change) {
    LayerWeights w = good.weights;
    change(&w);
    return complaint([&] { layer.load(w); });
  };
  EXPECT_NE(refused([](LayerWeights* w) { w->fc1.scale = {}; }).find("fc1.scale"),
            std::string::npos);
  const auto expect = [&](const char* argument, auto change) {
    const std::string text = refused(change);
    EXPECT_NE(text.find(argument), std::string::npos) << "'" << text << "'";
  };
  expect("fc2.weight", [](LayerWeights* w) { w->fc2.weight.shape[1] = 63; });
  EXPECT_NE(
      refused([](LayerWeights* w) { w->fc1.zero_point = w->fc1.weight; }).find("fc1.zero_point"),
      std::string::npos);
  expect("fc1.weight", [](LayerWeights* w) { w->fc1.weight.dtype = DType::kI8; });
  EXPECT_NE(refused([](LayerWeights* w) { w->fc1.prequant = w->fc1.scale; }).find("fc1.prequant"),
            std::string::npos);
  EXPECT_EQ(refused([](LayerWeights*) {}), "");
}

}  // namespace
}  // namespace moesaic::harness
