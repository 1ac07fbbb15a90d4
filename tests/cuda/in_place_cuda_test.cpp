// SPDX-License-Identifier: Apache-2.0
// WeightStorage::kInPlace: the bits of a layer with copies, in the caller's memory and no other.
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <deque>

#include "backend.h"
#include "harness/fixture.h"

namespace moesaic::harness {
namespace {

constexpr Device kGpu{DeviceType::kCuda, 0};

// Weights on the device, each tensor as little aligned as may be, between guards.
struct Given {
  explicit Given(const LayerWeights& host, std::size_t offset = kInPlaceAlignment)
      : weights(host), offset(offset) {
    for (GemmWeights* w : {&weights.fc1, &weights.fc2})
      for (Tensor* t : {&w->weight, &w->scale, &w->zero_point})
        if (t->defined()) *t = place(*t);
  }
  Tensor place(const Tensor& host) {
    const DeviceTensor dense = DeviceTensor::from(host, kGpu);
    const std::size_t bytes = static_cast<std::size_t>(host.numel()) * size_of(host.dtype);
    storage.emplace_back(kGpu, DType::kU8,
                         std::vector<std::int64_t>{static_cast<std::int64_t>(bytes + offset)});
    Tensor t = dense.view();
    t.data = storage.back().view().as<char>() + offset;
    backend(kGpu).copy(t.data, dense.view().data, bytes, {});
    return t;
  }
  bool guards_intact() const {
    return std::all_of(storage.begin(), storage.end(),
                       [](const DeviceTensor& t) { return t.guards_intact(); });
  }
  LayerWeights weights;
  std::size_t offset;
  std::deque<DeviceTensor> storage;
};

std::vector<std::byte> bytes_of(const Tensor& device) {
  std::vector<std::byte> bytes(static_cast<std::size_t>(device.numel()) * size_of(device.dtype));
  backend(kGpu).copy(bytes.data(), device.data, bytes.size(), {});
  return bytes;
}

class InPlace : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    const std::vector<std::string> levels = available_kernels(DeviceType::kCuda);
    if (std::find(levels.begin(), levels.end(), GetParam()) == levels.end())
      GTEST_SKIP() << "no CUDA device, or one that does not run " << GetParam() << " kernels";
    set_kernels(DeviceType::kCuda, GetParam());
  }
  void TearDown() override { set_kernels(DeviceType::kCuda, ""); }
};

TEST_P(InPlace, GivesTheBitsOfACopyAndTheWayBack) {
  int rearranged = 0;
  for (const Variant& variant : variants()) {
    Case c;
    c.variant = variant;
    c.shape = {"in_place", 16, 256, 192, 4};
    c.local = {3, 7};
    c.tokens = 300;
    if (!supported(c, kGpu).supported) continue;
    SCOPED_TRACE(name(c));
    LayerConfig config = layer_config(c);
    config.shared_experts = 1;
    config.shared_intermediate = 128;
    if (!supports(config, Format::kStandard, kGpu).supported) continue;
    const WeightOptions options{.bias = Biases::kAll};
    const WeightData weights = make_weights(config, options), shared = make_shared(config, options);
    Layer copied(config, kGpu);
    copied.load(weights.weights);
    copied.load_shared(shared.weights);
    config.weight_storage = WeightStorage::kInPlace;
    Layer layer(config, kGpu);
    const Given given(weights.weights), given_shared(shared.weights);
    const std::vector<std::byte> before = bytes_of(given.weights.fc1.weight);
    layer.load(given.weights);
    layer.load_shared(given_shared.weights);
    rearranged += bytes_of(given.weights.fc1.weight) != before;
    EXPECT_LE(layer.weight_bytes() + before.size(), copied.weight_bytes());
    for (const std::int64_t tokens : {1, 20, 300}) {
      const Batch batch = make_batch(config, {.tokens = tokens, .seed = 5});
      EXPECT_EQ(execute(layer, batch, {}).output.bytes(), execute(copied, batch, {}).output.bytes())
          << tokens;
    }
    EXPECT_TRUE(given.guards_intact() && given_shared.guards_intact());
    const Tensor one = given.weights.fc1.weight.slice(2, 1),
                 two = given.weights.fc2.weight.slice(2, 1);
    const DeviceTensor fc1 = DeviceTensor::from(weights.weights.fc1.weight.slice(0, 1), kGpu),
                       fc2 = DeviceTensor::from(weights.weights.fc2.weight.slice(0, 1), kGpu);
    layer.unpack_expert(2, fc1.view(), fc2.view());
    copied.unpack_expert(2, one, two);  // which restores this expert in the caller's tensor, too
    EXPECT_EQ(bytes_of(fc1.view()), bytes_of(one));
    EXPECT_EQ(bytes_of(fc2.view()), bytes_of(two));
  }
  EXPECT_EQ(rearranged > 0, GetParam() == "sm90a");
}

// What cannot be read as it is, is copied: scales in another dtype, or one for a whole expert's
// rows.
TEST_P(InPlace, ScalesInAnotherDtypeAreCopied) {
  LayerConfig config = small_config(Scheme::kInt4W4A16);
  config.hidden = 256;
  config.intermediate = 128;
  const WeightData weights = make_weights(config, {});
  LayerWeights bf16 = weights.weights;
  std::deque<HostTensor> storage;
  for (GemmWeights* w : {&bf16.fc1, &bf16.fc2}) {
    const Tensor& f32 = w->scale;
    HostTensor scale(DType::kBF16, {f32.shape.begin(), f32.shape.begin() + f32.rank});
    for (std::int64_t i = 0; i < f32.numel(); ++i)
      store_element(scale.view().data, DType::kBF16, i, load_element(f32.data, f32.dtype, i));
    storage.push_back(std::move(scale));
    w->scale = storage.back().view();
  }
  Layer copied(config, kGpu);
  copied.load(bf16);
  config.weight_storage = WeightStorage::kInPlace;
  Layer layer(config, kGpu);
  const Given given(bf16);
  layer.load(given.weights);
  const Batch batch = make_batch(config, {.tokens = 30, .seed = 5});
  EXPECT_EQ(execute(layer, batch, {}).output.bytes(), execute(copied, batch, {}).output.bytes());
}

TEST_P(InPlace, WhatDoesNotFitIsRefusedByNameAndLeftAlone) {
  LayerConfig config = small_config(Scheme::kInt4W4A16);
  config.hidden = 256;
  config.intermediate = 128;
  config.weight_storage = WeightStorage::kInPlace;
  const WeightData weights = make_weights(config, {});
  Layer layer(config, kGpu);
  const Given given(weights.weights), shifted(weights.weights, 8);
  const std::vector<std::byte> before = bytes_of(given.weights.fc1.weight);
  const auto refused = [&](const char* what, auto change) {
    LayerWeights wrong = given.weights;
    change(&wrong);
    const std::string text = complaint([&] { layer.load(wrong); });
    EXPECT_NE(text.find(what), std::string::npos) << text;
    EXPECT_EQ(bytes_of(given.weights.fc1.weight), before);
    EXPECT_FALSE(layer.ready());
  };
  const DeviceTensor strided =
      DeviceTensor::from(weights.weights.fc2.weight, kGpu, Placement::kStrided);
  refused("fc2.weight: expected on cuda:0",
          [&](LayerWeights* w) { w->fc2.weight = weights.weights.fc2.weight; });
  refused("fc2.weight: must be contiguous",
          [&](LayerWeights* w) { w->fc2.weight = strided.view(); });
  refused("fc2.weight: weight_storage is in_place, which needs data aligned to 16 bytes, got 8",
          [&](LayerWeights* w) { w->fc2.weight = shifted.weights.fc2.weight; });
  EXPECT_NE(
      complaint([&] { layer.load_expert(0, given.weights); }).find("load_expert: weight_storage"),
      std::string::npos);
  layer.load(given.weights);
  EXPECT_TRUE(layer.ready());
  EXPECT_NE(
      complaint([&] { layer.load(given.weights); }).find("fc1: weight_storage is in_place, and"),
      std::string::npos);
}

// Of 192 MiB (int4: 48) nothing is held a second time. What other processes take meanwhile counts
// here, too: the least of a few attempts.
TEST_P(InPlace, HoldsNoSecondCopy) {
  for (const Scheme scheme : {Scheme::kBF16, Scheme::kInt4W4A16}) {
    LayerConfig config = small_config(scheme);
    config.experts = 4;
    config.hidden = 2048;
    config.intermediate = 4096;
    config.weight_storage = WeightStorage::kInPlace;
    const WeightData weights = make_weights(config, {.fill = Fill::kFast});
    const Given given(weights.weights);
    const auto free_bytes = [] {
      std::size_t free = 0, all = 0;
      EXPECT_EQ(cudaMemGetInfo(&free, &all), cudaSuccess);
      return static_cast<std::int64_t>(free);
    };
    const std::int64_t most = INT64_C(8) << 20;
    std::int64_t taken = most + 1;
    for (int attempt = 0; attempt < 5 && taken > most; ++attempt) {
      const std::int64_t before = free_bytes();
      Layer layer(config, kGpu);
      layer.load(given.weights);
      taken = before - free_bytes();
      EXPECT_EQ(layer.weight_bytes(), 0u);
    }
    EXPECT_LE(taken, most);
  }
}

INSTANTIATE_TEST_SUITE_P(Kernels, InPlace, testing::Values("sm80", "sm90a"),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace moesaic::harness
