// SPDX-License-Identifier: Apache-2.0
// A CUDA layer where tests of chosen cases do not go: random shapes for as long as
// MOESAIC_STRESS_SECONDS says (2), more rows than 32 bits can address, more than one device, and a
// stream that refuses work.
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>

#include "backend.h"
#include "harness/execute.h"
#include "harness/verify.h"

namespace moesaic::harness {
namespace {

constexpr Device kGpu{DeviceType::kCuda, 0};

class Stress : public testing::Test {
 protected:
  void SetUp() override {
    if (available_kernels(DeviceType::kCuda).empty())
      GTEST_SKIP() << "no CUDA device of compute capability 8.0 or above";
  }
  void TearDown() override {
    if (!available_kernels(DeviceType::kCuda).empty()) set_kernels(DeviceType::kCuda, "");
  }
};

Case random_case(std::uint64_t seed) {
  Rng rng(seed);
  Case c;
  c.variant =
      variants()[static_cast<std::size_t>(rng.below(static_cast<std::int64_t>(variants().size())))];
  const std::int64_t step = rng.below(3) == 0 ? 8 : 128;
  c.shape = {"stress", 1 + rng.below(rng.below(4) == 0 ? 200 : 24),
             step * (1 + rng.below(512 / step)), step * (1 + rng.below(512 / step)), 0};
  c.shape.top_k = 1 + rng.below(std::min<std::int64_t>(c.shape.experts, 12));
  c.format = static_cast<Format>(rng.below(3));
  c.activation.kind = static_cast<Activation>(rng.below(kNumActivations));
  c.bias = rng.below(2) == 0 ? Biases::kAll : Biases::kNone;
  c.tokens = rng.below(4) == 0 ? rng.below(4) : 1 + rng.below(rng.below(3) == 0 ? 700 : 60);
  c.load = static_cast<Load>(rng.below(kNumLoads));
  if (c.load == Load::kRemote && rng.below(2) == 0) c.id_dtype = DType::kI64;
  c.seed = seed;
  return c;
}

TEST_F(Stress, RandomShapes) {
  const char* text = std::getenv("MOESAIC_STRESS_SECONDS");
  const double seconds = text != nullptr ? std::atof(text) : 2.0;
  const char* first = std::getenv("MOESAIC_STRESS_SEED");
  std::uint64_t seed = first != nullptr ? std::strtoull(first, nullptr, 10) : 1;
  const std::vector<std::string> levels = available_kernels(DeviceType::kCuda);
  int ran = 0, refused = 0;
  const auto start = std::chrono::steady_clock::now();
  while (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() <
             seconds ||
         ran < 20) {
    const Case c = random_case(seed);
    set_kernels(DeviceType::kCuda, levels[seed % levels.size()]);
    const VerifyResult r = seed % 8 == 0 ? check_bits(c, kGpu) : run_case(c, kGpu);
    ASSERT_NE(r.status, Status::kFailed)
        << "MOESAIC_STRESS_SEED=" << seed << " " << r.name << ", shape " << c.shape.experts << ","
        << c.shape.hidden << "," << c.shape.intermediate << "," << c.shape.top_k << ": "
        << r.reason;
    ran += r.status == Status::kPassed;
    refused += r.status == Status::kSkipped;
    ++seed;
  }
  std::printf("    %d passed, %d refused by name, last seed %llu\n", ran, refused,
              static_cast<unsigned long long>(seed - 1));
}

// --- one forward, as a caller makes it
struct Call {
  Call(const Layer& layer, const Batch& batch, Device device)
      : x(DeviceTensor::from(batch.hidden_states, device)),
        ids(DeviceTensor::from(batch.topk_ids, device)),
        weights(DeviceTensor::from(batch.topk_weights, device)),
        y(device, layer.config().output_dtype, {x.view().shape[0], layer.config().hidden}),
        workspace(device, layer.workspace_bytes(x.view().shape[0])) {}
  ForwardArgs args(Stream stream = {}) const {
    return {.hidden_states = x.view(),
            .topk_ids = ids.view(),
            .topk_weights = weights.view(),
            .output = y.view(),
            .workspace = workspace.view(),
            .stream = stream};
  }
  DeviceTensor x, ids, weights, y;
  WorkspaceBuffer workspace;
};

// 400,000 tokens with 8 slots each: the slots' outputs are 6.6 GB, the hidden rows 3.3 GB. The last
// tokens come out as they do alone.
TEST_F(Stress, RowsBeyond32Bits) {
  std::size_t free_bytes = 0, all = 0;
  ASSERT_EQ(cudaMemGetInfo(&free_bytes, &all), cudaSuccess);
  if (free_bytes < (std::size_t{24} << 30)) GTEST_SKIP() << "needs 24 GiB of free device memory";
  for (const Scheme scheme : {Scheme::kBF16, Scheme::kFp8Block}) {
    Case c;
    c.variant = default_variant(scheme);
    c.shape = {"large", 16, 1024, 512, 8};
    c.tokens = 400'000;
    const LayerConfig config = layer_config(c);
    Layer layer(config, kGpu);
    layer.load(make_weights(config, weight_options(c)).weights);
    const Batch batch = make_batch(config, {.tokens = c.tokens, .fill = Fill::kFast, .seed = 3});
    const Call whole(layer, batch, kGpu);
    layer.forward(whole.args());
    constexpr std::int64_t kLast = 16;
    const Call last(layer, take_tokens(batch, c.tokens - kLast, kLast), kGpu);
    layer.forward(last.args());
    const HostTensor all_rows = whole.y.to_host(), few = last.y.to_host();
    const std::vector<std::byte> expected = few.bytes();
    EXPECT_TRUE(std::equal(expected.begin(), expected.end(),
                           all_rows.bytes().end() - static_cast<std::ptrdiff_t>(expected.size())))
        << name(scheme);
  }
}

TEST_F(Stress, EveryDeviceGivesTheSameBits) {
  std::vector<Device> gpus;
  for (const DeviceInfo& info : devices())
    if (info.device.type == DeviceType::kCuda) gpus.push_back(info.device);
  if (gpus.size() < 2) GTEST_SKIP() << "needs two CUDA devices, there are " << gpus.size();
  Case c;
  c.shape = {"devices", 8, 256, 192, 2};
  c.tokens = 50;
  const LayerConfig config = layer_config(c);
  const WeightData weights = make_weights(config, weight_options(c));
  const Batch batch = make_batch(config, batch_options(c));
  std::vector<std::byte> expected;
  for (const Device gpu : gpus) {  // the calling thread's current device stays device 0 throughout
    Layer layer(config, gpu);
    layer.load(weights.weights);
    const Call call(layer, batch, gpu);
    layer.forward(call.args());
    const std::vector<std::byte> got = call.y.to_host().bytes();
    if (expected.empty()) expected = got;
    EXPECT_EQ(got, expected) << to_string(gpu);
  }
}

// A launch that fails is an error of the call, not of a later one.
TEST_F(Stress, LaunchErrorsAreReturned) {
  Case c;
  c.shape = {"errors", 8, 256, 192, 2};
  c.tokens = 5;
  const LayerConfig config = layer_config(c);
  Layer layer(config, kGpu);
  layer.load(make_weights(config, weight_options(c)).weights);
  const Call call(layer, make_batch(config, batch_options(c)), kGpu);
  layer.forward(call.args());
  const std::vector<std::byte> expected = call.y.to_host().bytes();
  cudaStream_t stream = nullptr;
  ASSERT_EQ(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), cudaSuccess);
  ASSERT_EQ(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), cudaSuccess);
  EXPECT_NE(cudaStreamSynchronize(stream),
            cudaSuccess);  // not allowed: from here on the capture is void
  try {
    layer.forward(call.args({stream}));
    ADD_FAILURE() << "a forward on a stream whose capture is void succeeded";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kDevice) << error.what();
  }
  cudaGraph_t graph = nullptr;
  EXPECT_NE(cudaStreamEndCapture(stream, &graph), cudaSuccess);
  (void)cudaGetLastError();
  layer.forward(call.args({stream}));  // the stream works again, and so does the layer
  ASSERT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
  EXPECT_EQ(call.y.to_host().bytes(), expected);
  cudaStreamDestroy(stream);
}

}  // namespace
}  // namespace moesaic::harness
