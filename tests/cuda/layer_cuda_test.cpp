// SPDX-License-Identifier: Apache-2.0
// What a layer promises on a CUDA device beside right numbers (verify_cuda_test), with both kernel
// families: the same bits in large batches and with every tactic, graphs, streams and threads.
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <string_view>
#include <thread>
#include <tuple>

#include "backend.h"
#include "experts.h"
#include "forward.h"
#include "harness/execute.h"
#include "harness/fixture.h"
#include "harness/formats.h"
#include "harness/verify.h"
#include "layer_impl.h"

namespace moesaic::harness {
namespace {

constexpr Device kGpu{DeviceType::kCuda, 0};

class OnCuda : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    const std::vector<std::string> levels = available_kernels(DeviceType::kCuda);
    if (levels.empty()) GTEST_SKIP() << "no CUDA device of compute capability 8.0 or above";
    if (std::find(levels.begin(), levels.end(), GetParam()) == levels.end())
      GTEST_SKIP() << GetParam() << " kernels do not run on this device";
    set_kernels(DeviceType::kCuda, GetParam());
  }
  void TearDown() override { set_kernels(DeviceType::kCuda, ""); }
};

// verify_cuda_test does this at few tokens; here the tiles of prefill are in it.
TEST_P(OnCuda, BitsDependOnTheTokenAloneInLargeBatches) {
  for (const Variant& variant : variants()) {
    Case c;
    c.variant = variant;
    c.shape = {"tp192", 8, 256, 192, 2};
    c.tokens = 1500;
    c.load = Load::kZipf;
    c.activation.kind = Activation::kGeluTanh;
    c.seed = 5;
    if (!supported(c, kGpu).supported) continue;
    const VerifyResult r = check_bits(c, kGpu);
    EXPECT_EQ(r.status, Status::kPassed) << r.name << ": " << r.reason;
  }
}

// --- a layer and its tensors on the device -------------------------------------------------------
struct Loaded {
  explicit Loaded(const Case& c)
      : config(layer_config(c)), layer(config, kGpu), batch(make_batch(config, batch_options(c))) {
    const WeightData weights = make_weights(config, weight_options(c));
    layer.load(weights.weights);
    if (config.shared_experts > 0)
      layer.load_shared(make_shared(config, weight_options(c)).weights);
  }
  LayerConfig config;
  Layer layer;
  Batch batch;
};

struct Call {
  Call(const Loaded& loaded, const Batch& batch)
      : x(DeviceTensor::from(batch.hidden_states, kGpu)),
        scale(DeviceTensor::from(batch.hidden_scale, kGpu)),
        ids(DeviceTensor::from(batch.topk_ids, kGpu)),
        weights(DeviceTensor::from(batch.topk_weights, kGpu)),
        y(kGpu, loaded.config.output_dtype, {x.view().shape[0], loaded.config.hidden}),
        workspace(kGpu, loaded.layer.workspace_bytes(x.view().shape[0])) {}
  ForwardArgs args(Stream stream = {}) const {
    return {.hidden_states = x.view(),
            .hidden_scale = scale.view(),
            .topk_ids = ids.view(),
            .topk_weights = weights.view(),
            .output = y.view(),
            .workspace = workspace.view(),
            .stream = stream};
  }
  DeviceTensor x, scale, ids, weights, y;
  WorkspaceBuffer workspace;
};

Case small_case(const Variant& variant, std::int64_t tokens) {
  Case c;
  c.variant = variant;
  c.shape = {"graph", 16, 256, 192, 4};
  c.tokens = tokens;
  c.seed = 77;
  return c;
}

// Chunks that the router's kernels run through as well: their logits share one scratch.
TEST_P(OnCuda, TokenChunksUnderACapGiveTheSameBits) {
  for (const Variant& variant : variants()) {
    const Case c = small_case(variant, 200);
    LayerConfig config = layer_config(c);
    if (!supported(c, kGpu).supported || variant.quant.act_scale == ActScale::kTensorDynamic)
      continue;
    SCOPED_TRACE(name(c));
    const WeightData weights = make_weights(config, weight_options(c));
    const RouterData router = make_router(config, RouterBias::kBoth, 5);
    const Batch batch = make_batch(config, batch_options(c));
    const bool routes = is_float(config.input_dtype);
    HostTensor outputs[2];
    std::size_t all = 0, one = 0;
    for (const int capped : {0, 1}) {
      config.workspace_cap = capped == 0 ? 0 : one + (all - one) / 7;
      Layer layer(config, kGpu);
      layer.load(weights.weights);
      layer.set_router(router.weights);
      all = layer.workspace_bytes(200);
      one = layer.workspace_bytes(1);
      if (capped == 1) {
        EXPECT_LE(all, config.workspace_cap);
      }
      Execution how;
      how.source = routes ? Execution::Source::kRouter : Execution::Source::kIds;
      outputs[capped] = execute(layer, batch, how).output;
    }
    EXPECT_EQ(outputs[0].bytes(), outputs[1].bytes());
  }
}

// What a captured call is made of: kernels, and memsets at most. No allocation, no copy, nothing on
// the host.
void expect_kernels_alone(cudaGraph_t graph) {
  std::size_t count = 0;
  ASSERT_EQ(cudaGraphGetNodes(graph, nullptr, &count), cudaSuccess);
  ASSERT_GT(count, 0u);
  std::vector<cudaGraphNode_t> nodes(count);
  ASSERT_EQ(cudaGraphGetNodes(graph, nodes.data(), &count), cudaSuccess);
  for (const cudaGraphNode_t node : nodes) {
    cudaGraphNodeType type{};
    ASSERT_EQ(cudaGraphNodeGetType(node, &type), cudaSuccess);
    EXPECT_TRUE(type == cudaGraphNodeTypeKernel || type == cudaGraphNodeTypeMemset)
        << "a node of type " << static_cast<int>(type);
  }
}

// The stages of the other formats are captured as a forward is; the routers' kernels, too.
TEST_P(OnCuda, EveryFormatIsKernelsAlone) {
  cudaStream_t stream = nullptr;
  ASSERT_EQ(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
  for (const Variant& variant : variants())
    for (const std::int64_t tokens : {1, 700}) {
      const Case c = small_case(variant, tokens);
      if (!supported(c, kGpu).supported || !is_float(variant.input) ||
          variant.extras != Extras::kNone)
        continue;
      const Loaded loaded(c);
      const Call call(loaded, loaded.batch);
      const DeviceTensor logits = DeviceTensor::from(loaded.batch.router_logits, kGpu);
      FormatInputs in{.hidden_states = call.x.view(),
                      .topk_ids = call.ids.view(),
                      .topk_weights = call.weights.view(),
                      .output = call.y.view()};
      for (const Format format : {Format::kStandard, Format::kSorted, Format::kBatched})
        for (const bool routes : {false, true}) {
          if (routes && format != Format::kStandard) continue;
          SCOPED_TRACE(name(c) + " " + std::string(name(format)));
          const FormatRunner runner(loaded.layer, format, tokens);
          in.router_logits = routes ? logits.view() : Tensor{};
          cudaGraph_t graph = nullptr;
          ASSERT_EQ(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), cudaSuccess);
          runner.run(in, {stream});
          ASSERT_EQ(cudaStreamEndCapture(stream, &graph), cudaSuccess);
          expect_kernels_alone(graph);
          cudaGraphDestroy(graph);
        }
    }
  cudaStreamDestroy(stream);
}

// Captured once, replayed with other routings and inputs of the same T: the bits of a plain
// forward.
TEST_P(OnCuda, GraphsReplayWithOtherRoutings) {
  for (const Variant& variant : variants()) {
    for (const std::int64_t tokens : {1, 40}) {
      Case c = small_case(variant, tokens);
      if (!supported(c, kGpu).supported) continue;
      SCOPED_TRACE(name(c));
      const Loaded loaded(c);
      Call call(loaded, loaded.batch);
      cudaStream_t stream = nullptr;
      ASSERT_EQ(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
      cudaGraph_t graph = nullptr;
      cudaGraphExec_t exec = nullptr;
      ASSERT_EQ(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), cudaSuccess);
      loaded.layer.forward(call.args({stream}));
      ASSERT_EQ(cudaStreamEndCapture(stream, &graph), cudaSuccess);
      expect_kernels_alone(graph);
      ASSERT_EQ(cudaGraphInstantiate(&exec, graph, 0), cudaSuccess);
      for (const std::uint64_t seed : {1, 2, 3}) {
        c.seed = seed;
        c.load = static_cast<Load>(seed);
        const Batch other = make_batch(loaded.config, batch_options(c));
        call.x.assign(other.hidden_states.view());
        call.ids.assign(other.topk_ids.view());
        call.weights.assign(other.topk_weights.view());
        if (other.hidden_scale.defined()) call.scale.assign(other.hidden_scale.view());
        call.y.poison();
        ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
        ASSERT_EQ(cudaGraphLaunch(exec, stream), cudaSuccess);
        ASSERT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
        Call fresh(loaded, other);
        loaded.layer.forward(fresh.args());
        EXPECT_EQ(call.y.to_host().bytes(), fresh.y.to_host().bytes()) << "seed " << seed;
        EXPECT_TRUE(call.y.guards_intact());
      }
      cudaGraphExecDestroy(exec);
      cudaGraphDestroy(graph);
      cudaStreamDestroy(stream);
    }
  }
}

// One layer, many threads, a stream and a workspace each.
TEST_P(OnCuda, ManyThreadsAndStreams) {
  const Case c = small_case(default_variant(Scheme::kBF16), 64);
  const Loaded loaded(c);
  const Call alone(loaded, loaded.batch);
  loaded.layer.forward(alone.args());
  const std::vector<std::byte> expected = alone.y.to_host().bytes();
  std::vector<std::thread> threads;
  std::vector<int> right(6, 0);
  for (int i = 0; i < 6; ++i)
    threads.emplace_back([&, i] {
      const Call call(loaded, loaded.batch);
      cudaStream_t stream = nullptr;
      if (cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) != cudaSuccess) return;
      for (int turn = 0; turn < 30; ++turn) loaded.layer.forward(call.args({stream}));
      if (cudaStreamSynchronize(stream) != cudaSuccess) return;
      cudaStreamDestroy(stream);
      right[static_cast<std::size_t>(i)] = call.y.to_host().bytes() == expected;
    });
  for (std::thread& t : threads) t.join();
  EXPECT_EQ(right, std::vector<int>(6, 1));
}

// Every tactic of every product gives the bits of the policy's choice.
TEST_P(OnCuda, TacticsGiveTheSameBits) {
  for (const Variant& variant : variants())
    for (const std::int64_t tokens : {1, 16, 300}) {
      const Case c = small_case(variant, tokens);
      if (!supported(c, kGpu).supported) continue;
      SCOPED_TRACE(name(c));
      Loaded loaded(c);
      const Call call(loaded, loaded.batch);
      loaded.layer.forward(call.args());
      const std::vector<std::byte> expected = call.y.to_host().bytes();
      for (const Tactic& first : loaded.layer.tactics_gemm1()) {
        loaded.layer.set_tactics({first.id, -1});
        loaded.layer.forward(call.args());
        EXPECT_EQ(call.y.to_host().bytes(), expected) << "gemm1 " << first.description;
      }
      for (const Tactic& second : loaded.layer.tactics_gemm2()) {
        loaded.layer.set_tactics({-1, second.id});
        loaded.layer.forward(call.args());
        EXPECT_EQ(call.y.to_host().bytes(), expected) << "gemm2 " << second.description;
      }
    }
}

// Whether a forward of the layer lists nothing, as forward itself asks.
bool lists_nothing(const Layer& layer, std::int64_t tokens) {
  const LoadedLayer loaded = layer.impl().loaded_layer();
  const LayerPlan& plan = *loaded.plan;
  const std::int64_t slots = tokens * plan.config.top_k;
  RowMap rows{.positions = slots, .slot_count = slots};
  set_tile_rows(rows, plan.fc1.experts, plan.backend->tile_rows(plan.fc1, slots));
  const std::int32_t id = 0;  // nobody reads it
  return products_make_tiles({.plan = &plan,
                              .fc1 = loaded.fc1,
                              .fc2 = loaded.fc2,
                              .rows = rows,
                              .unlisted = {.ids = &id},
                              .tactics = loaded.tactics});
}

// Few slots have no lists: the products find their rows from the ids (UnlistedRows::ids), unless a
// tactic is forced. Whatever the ids are, the bits are those of rows that align has listed.
TEST_P(OnCuda, FewSlotsGiveTheBitsOfListedOnes) {
  std::map<std::string_view, int> unlisted;  // forwards by variant
  for (const Variant& variant : variants())
    for (const ExpertRange local : {ExpertRange{}, ExpertRange{5, 6}}) {
      Case c = small_case(variant, 8);
      c.local = local;
      if (!supported(c, kGpu).supported) continue;
      Loaded loaded(c);
      Rng rng(31);
      for (const std::int64_t tokens : {1, 3, 8})  // up to 32 slots
        for (const int kind : {0, 1, 2, 3}) {
          c.tokens = tokens;
          c.seed = static_cast<std::uint64_t>(100 * tokens + kind);
          SCOPED_TRACE(name(c) + ", ids " + std::to_string(kind));
          Batch batch = make_batch(loaded.config, batch_options(c));
          auto* const ids = batch.topk_ids.as<std::int32_t>();
          for (std::int64_t i = 0; i < batch.topk_ids.numel(); ++i) {
            if (kind == 1) ids[i] = 7;  // tiles of one expert
            if (kind == 2) ids[i] = static_cast<std::int32_t>(rng.below(22)) - 3;
            if (kind == 3) ids[i] = i % 2 ? INT32_MIN : INT32_MAX;
          }
          const Call call(loaded, batch);
          loaded.layer.set_tactics({});
          unlisted[variant.name] += lists_nothing(loaded.layer, tokens);
          loaded.layer.forward(call.args());
          const std::vector<std::byte> found = call.y.to_host().bytes();
          EXPECT_TRUE(call.y.guards_intact());
          const Call listed(loaded, batch);
          loaded.layer.set_tactics({loaded.layer.tactics_gemm1()[0].id, -1});
          EXPECT_FALSE(lists_nothing(loaded.layer, tokens));
          loaded.layer.forward(listed.args());
          EXPECT_EQ(found, listed.y.to_host().bytes());
        }
    }
  for (const std::string_view name : {"bf16", "f16", "fp8_channel", "fp8_w8a16", "fp8_w8a16+f16",
                                      "int8_w8a16", "int4_w4a16", "int4_w4a16+g128+zp"})
    EXPECT_GT(unlisted[name], 0) << name;
}

// A GEMM1 that quantizes hidden itself gives the bits of the stage that it replaces.
TEST_P(OnCuda, FusedAndSeparateQuantizersGiveTheSameBits) {
  int fused = 0;
  for (const Variant& variant : variants())
    for (const Activation activation : {Activation::kSwiglu, Activation::kGeglu})
      for (const std::int64_t tokens : {1, 16, 150, 300, 600, 1500}) {  // tiles of every size
        Case c = small_case(variant, tokens);
        c.activation.kind = activation;
        if (!supported(c, kGpu).supported) continue;
        const Loaded loaded(c);
        const Layer::Impl& layer = loaded.layer.impl();
        if (layer.plan.intermediate_quantized_by == QuantizedBy::kStage) continue;
        SCOPED_TRACE(name(c));
        ++fused;
        Call call(loaded, loaded.batch);
        loaded.layer.forward(call.args());
        const std::vector<std::byte> expected = call.y.to_host().bytes();
        LayerPlan plan = layer.plan;
        plan.intermediate_quantized_by = QuantizedBy::kStage;
        LoadedLayer separate = layer.loaded_layer();
        separate.plan = &plan;
        const WorkspaceBuffer workspace(kGpu, forward_workspace_bytes(plan, nullptr, tokens));
        ForwardArgs args = call.args();
        args.workspace = workspace.view();
        call.y.poison();
        forward(separate, args);
        EXPECT_EQ(call.y.to_host().bytes(), expected);
      }
  EXPECT_EQ(fused > 0, GetParam() == "sm90a");
}

// Rows that no product reads where they lie: refused before any output is written, the counts of
// align included, which runs in front of the products.
TEST_P(OnCuda, MisalignedRowsAreRefusedBeforeAnythingIsWritten) {
  for (const auto& [tokens, weight_on, shared_experts] :
       {std::tuple{3, WeightOn::kOutput, 0},
        {700, WeightOn::kOutput, 0},
        {3, WeightOn::kInput, 1}}) {  // the shared expert alone reads x as it lies
    Case c = small_case(default_variant(Scheme::kBF16), tokens);
    c.weight_on = weight_on;
    c.shared_experts = shared_experts;
    const Loaded loaded(c);
    const Call call(loaded, loaded.batch);
    const LayerConfig& config = loaded.layer.config();
    DeviceTensor counts(kGpu, DType::kI32, {config.experts});
    const std::vector<std::byte> before = counts.to_host().bytes();
    const std::vector<std::byte> output = call.y.to_host().bytes();
    DeviceTensor rows(kGpu, DType::kBF16, {tokens, config.hidden + 1});
    ForwardArgs args = call.args();
    args.tokens_per_expert = counts.view();
    args.hidden_states = rows.view();
    args.hidden_states.shape[1] = config.hidden;  // every second row begins 2 bytes beside a word
    EXPECT_NE(complaint([&] { loaded.layer.forward(args); }).find("multiples of"),
              std::string::npos);
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    EXPECT_EQ(counts.to_host().bytes(), before);
    EXPECT_EQ(call.y.to_host().bytes(), output);
  }
}

TEST_P(OnCuda, NoTokens) {
  Case c = small_case(default_variant(Scheme::kBF16), 0);
  const Loaded loaded(c);
  const Call call(loaded, loaded.batch);
  loaded.layer.forward(call.args());
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
}

INSTANTIATE_TEST_SUITE_P(Kernels, OnCuda, testing::Values("sm80", "sm90a"),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace moesaic::harness
