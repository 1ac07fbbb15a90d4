// SPDX-License-Identifier: Apache-2.0
// Checkpoints that the transformers library wrote, against that library's own layer: the weights
// that the mapping finds, the router's choice and the block's output.
// scripts/make_test_checkpoints.py writes them with MOESAIC_PYTHON; without that these tests skip
// and say so.
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <string>
#include <vector>

#include "moesaic/moesaic.h"
#include "numeric.h"
#include "reference/layer.h"

namespace moesaic {
namespace {

namespace fs = std::filesystem;
constexpr std::int64_t kLayer = 1;
constexpr double kBf16Tolerance = 6e-3;  // ||y - y*|| / ||y*||, 16-bit arithmetic against float32

// Written once for all tests of this process, removed at its end.
class Checkpoints : public ::testing::Environment {
 public:
  static inline std::string folder, reason;  // why everything skips
  static inline std::string
      broken;  // why everything fails: Python is there, its script is not right

  void SetUp() override {
    const char* python = std::getenv("MOESAIC_PYTHON");
    const auto can_import = [&] {
      const std::string line =
          "'" + std::string(python) + "' -c 'import torch, transformers' >/dev/null 2>&1";
      return std::system(line.c_str()) == 0;
    };
    if (python == nullptr || !fs::exists(python) || !can_import()) {
      reason = std::string("MOESAIC_PYTHON (") + (python ? python : "not set") +
               ") has no Python with torch and transformers; scripts/setup_venv.sh .venv makes one";
      return;
    }
    std::string pattern = (fs::temp_directory_path() / "moesaic-checkpoints-XXXXXX").string();
    folder = ::mkdtemp(pattern.data());
    const std::string command = "'" + std::string(python) +
                                "' '" MOESAIC_SOURCE_DIR "/scripts/make_test_checkpoints.py' '" +
                                folder + "' > '" + folder + "/log' 2>&1";
    if (std::system(command.c_str()) != 0) {
      std::system(("cat '" + folder + "/log' >&2").c_str());
      broken = "scripts/make_test_checkpoints.py failed (its output is above)";
    }
  }
  void TearDown() override {
    if (!folder.empty()) fs::remove_all(folder);
  }
};
const auto* const kEnvironment = ::testing::AddGlobalTestEnvironment(new Checkpoints);

double value(const Tensor& t, std::int64_t i) {
  if (t.dtype == DType::kF32) return t.as<const float>()[i];
  return t.dtype == DType::kBF16 ? bf16_to_float(t.as<const std::uint16_t>()[i])
                                 : f16_to_float(t.as<const std::uint16_t>()[i]);
}
double at(const Tensor& t, std::int64_t e, std::int64_t n, std::int64_t k) {
  return value(t, e * t.strides[0] + n * t.strides[1] + k * t.strides[2]);
}

class Transformers : public ::testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    if (!Checkpoints::reason.empty()) GTEST_SKIP() << Checkpoints::reason;
    ASSERT_EQ(Checkpoints::broken, "");
    path_ = Checkpoints::folder + "/" + GetParam();
    if (!fs::exists(path_)) GTEST_SKIP() << "this version of transformers writes no " << GetParam();
  }
  // The layer's answer to the stored input.
  void expect_output(SharedExperts shared, const std::string& expected) {
    const Checkpoint checkpoint = Checkpoint::open(path_);
    const TensorFile reference = TensorFile::open(path_ + "/reference.safetensors");
    const Tensor x = reference.tensor("hidden_states"), want = reference.tensor(expected);
    const std::int64_t tokens = x.shape[0], hidden = x.shape[1];

    const LayerConfig config =
        checkpoint.layer_config(kLayer, {.shared = shared, .max_tokens = tokens});
    EXPECT_EQ(config.quant.scheme, Scheme::kBF16);
    Layer layer(config);
    std::int64_t calls = 0;
    checkpoint.load(kLayer, layer, [&](std::int64_t done, std::int64_t total) {
      EXPECT_EQ(done, ++calls);
      EXPECT_EQ(total, config.experts);
    });
    ASSERT_TRUE(layer.ready());
    const WorkspaceBuffer workspace(layer.device(), layer.workspace_bytes(tokens));
    std::vector<std::uint16_t> y(static_cast<std::size_t>(tokens * hidden), 0xffff);  // NaN
    layer.forward({.hidden_states = x,
                   .output = Tensor::contiguous(y.data(), DType::kBF16, {tokens, hidden}),
                   .workspace = workspace.view()});

    double error = 0, norm = 0;
    for (std::size_t i = 0; i < y.size(); ++i) {
      const double w = want.as<const float>()[i], d = bf16_to_float(y[i]) - w;
      error += d * d;
      norm += w * w;
    }
    ASSERT_GT(norm, 0);
    EXPECT_LE(std::sqrt(error / norm), kBf16Tolerance);
    RecordProperty("relative_error", std::to_string(std::sqrt(error / norm)));

    expect_bounds(checkpoint, reference, layer, want);
  }

  // Element by element, in two steps that share the oracle: in f32 it must be transformers' answer
  // within the bound of float32 arithmetic, and in bf16 the layer must be within the oracle's
  // bound.
  void expect_bounds(const Checkpoint& checkpoint, const TensorFile& reference, const Layer& layer,
                     const Tensor& want) {
    const Tensor x = reference.tensor("hidden_states"), ids = reference.tensor("topk_ids"),
                 weights = reference.tensor("topk_weights");
    const std::int64_t tokens = x.shape[0], hidden = x.shape[1];
    std::vector<float> x32(static_cast<std::size_t>(tokens * hidden));
    for (std::size_t i = 0; i < x32.size(); ++i)
      x32[i] = bf16_to_float(x.as<const std::uint16_t>()[i]);
    const auto oracle = [&](const LayerConfig& config, const Tensor& input) {
      const HostWeights experts = checkpoint.experts(kLayer, config);
      HostShared stored;
      reference::SharedWeights shared;
      const bool has_shared = config.shared_experts > 0;
      if (has_shared) {
        stored = checkpoint.shared(kLayer, config);
        shared = {.weights = stored.weights, .gate = stored.gate};
      }
      return reference::layer(
          config, experts.weights, has_shared ? &shared : nullptr,
          {.hidden_states = input, .topk_ids = ids, .topk_weights = weights},
          {.slots = config.quant.scheme == Scheme::kF32 ? DType::kF32 : DType::kBF16});
    };
    const SharedExperts shared =
        layer.config().shared_experts > 0 ? SharedExperts::kOn : SharedExperts::kOff;
    const LayerConfig exact = checkpoint.layer_config(
        kLayer, {.scheme = Scheme::kF32, .shared = shared, .max_tokens = tokens});
    const reference::LayerOutput in_f32 =
        oracle(exact, Tensor::contiguous(x32.data(), DType::kF32, {tokens, hidden}));
    const reference::LayerOutput in_bf16 = oracle(layer.config(), x);

    const WorkspaceBuffer workspace(layer.device(), layer.workspace_bytes(tokens));
    std::vector<std::uint16_t> y(x32.size(), 0xffff);
    layer.forward({.hidden_states = x,
                   .topk_ids = ids,
                   .topk_weights = weights,
                   .output = Tensor::contiguous(y.data(), DType::kBF16, {tokens, hidden}),
                   .workspace = workspace.view()});
    for (std::int64_t t = 0; t < tokens; ++t) {
      for (std::int64_t h = 0; h < hidden; ++h) {
        const auto i = static_cast<std::size_t>(t * hidden + h);
        const reference::Bounded& e = in_f32.at(t, h);
        // Twice: transformers sums in another order, and stores intermediates in float32, too.
        ASSERT_NEAR(want.as<const float>()[i], e.value, 2 * reference::stored_error(e, DType::kF32))
            << "oracle against transformers, token " << t << ", column " << h;
        const reference::Bounded& b = in_bf16.at(t, h);
        ASSERT_NEAR(bf16_to_float(y[i]), b.value, reference::stored_error(b, DType::kBF16))
            << "layer against oracle, token " << t << ", column " << h;
      }
    }
  }
  std::string path_;
};

TEST_P(Transformers, FindsTheWeightsTheModelHolds) {
  const Checkpoint checkpoint = Checkpoint::open(path_);
  const TensorFile reference = TensorFile::open(path_ + "/reference.safetensors");
  const Tensor fc1 = reference.tensor("fc1"), fc2 = reference.tensor("fc2");
  const CheckpointLayer& layer = checkpoint.layer(kLayer);
  EXPECT_EQ(layer.experts, fc1.shape[0]);
  EXPECT_EQ(layer.hidden, fc1.shape[2]);
  EXPECT_EQ(2 * layer.intermediate, fc1.shape[1]);
  EXPECT_TRUE(layer.has_router);
  EXPECT_EQ(layer.dtype, DType::kBF16);
  EXPECT_GT(layer.bytes, static_cast<std::uint64_t>(2 * fc1.numel() + 2 * fc2.numel()));

  const LayerConfig config = checkpoint.layer_config(kLayer);
  const HostWeights all = checkpoint.experts(kLayer, config);
  for (std::int64_t e = 0; e < layer.experts; ++e) {
    const HostWeights one = checkpoint.expert(kLayer, config, e);
    for (std::int64_t n = 0; n < fc1.shape[1]; ++n)
      for (std::int64_t k = 0; k < fc1.shape[2]; ++k) {
        ASSERT_EQ(at(one.weights.fc1.weight, 0, n, k), at(fc1, e, n, k))
            << "fc1 " << e << " " << n << " " << k;
        ASSERT_EQ(at(all.weights.fc1.weight, e, n, k), at(fc1, e, n, k));
      }
    for (std::int64_t n = 0; n < fc2.shape[1]; ++n)
      for (std::int64_t k = 0; k < fc2.shape[2]; ++k)
        ASSERT_EQ(at(one.weights.fc2.weight, 0, n, k), at(fc2, e, n, k))
            << "fc2 " << e << " " << n << " " << k;
  }
}

TEST_P(Transformers, RoutesAsTheModelDoes) {
  const Checkpoint checkpoint = Checkpoint::open(path_);
  const TensorFile reference = TensorFile::open(path_ + "/reference.safetensors");
  const LayerConfig config = checkpoint.layer_config(kLayer);
  const HostRouter router = checkpoint.router(kLayer);
  const Tensor x = reference.tensor("hidden_states"), ids = reference.tensor("topk_ids"),
               w = reference.tensor("topk_weights");
  const std::int64_t tokens = x.shape[0], k = ids.shape[1];
  ASSERT_EQ(config.top_k, k);
  std::vector<std::int32_t> got_ids(static_cast<std::size_t>(tokens * k));
  std::vector<float> got_weights(got_ids.size());
  const WorkspaceBuffer workspace({}, route_workspace_bytes(tokens, config.experts));
  route({.spec = config.routing,
         .hidden_states = x,
         .router = router.weights,
         .topk_ids = Tensor::contiguous(got_ids.data(), DType::kI32, {tokens, k}),
         .topk_weights = Tensor::contiguous(got_weights.data(), DType::kF32, {tokens, k}),
         .workspace = workspace.view()});
  for (std::int64_t t = 0; t < tokens; ++t) {
    for (std::int64_t j = 0; j < k; ++j) {  // the library's order is not always best first
      const std::int32_t id = ids.as<const std::int32_t>()[t * k + j];
      const auto* begin = &got_ids[static_cast<std::size_t>(t * k)];
      const auto* found = std::find(begin, begin + k, id);
      ASSERT_NE(found, begin + k) << "token " << t << " should go to expert " << id;
      EXPECT_NEAR(got_weights[static_cast<std::size_t>(t * k + (found - begin))],
                  w.as<const float>()[t * k + j], 2e-5)
          << "token " << t << ", expert " << id;
    }
  }
}

TEST_P(Transformers, SameAnswerWithoutSharedExperts) {
  expect_output(SharedExperts::kOff, "routed");
}

TEST_P(Transformers, SameAnswerWithSharedExperts) {
  if (Checkpoint::open(path_).layer(kLayer).shared_experts == 0)
    GTEST_SKIP() << "this family has no shared experts";
  expect_output(SharedExperts::kOn, "output");
}

#ifdef MOESAIC_COMMAND
// The same through the command, which reads the input and writes the answer.
TEST_P(Transformers, TheCommandGivesTheSameAnswer) {
  const TensorFile reference = TensorFile::open(path_ + "/reference.safetensors");
  const NamedTensor input{"hidden_states", reference.tensor("hidden_states")};
  const std::string in = path_ + "/in.safetensors", out = path_ + "/out.safetensors";
  save_safetensors(in, {&input, 1});
  const bool shared = Checkpoint::open(path_).layer(kLayer).shared_experts > 0;
  const std::string line = std::string(MOESAIC_COMMAND " run --checkpoint '") + path_ +
                           "' --layer " + std::to_string(kLayer) + " --input '" + in +
                           "' --output '" + out + "'" + (shared ? " --shared" : "") + " >/dev/null";
  ASSERT_EQ(std::system(line.c_str()), 0) << line;
  const TensorFile answer = TensorFile::open(out);
  const Tensor y = answer.tensor("output"), want = reference.tensor(shared ? "output" : "routed");
  ASSERT_EQ(y.numel(), want.numel());
  double error = 0, norm = 0;
  for (std::int64_t i = 0; i < y.numel(); ++i) {
    error += (value(y, i) - value(want, i)) * (value(y, i) - value(want, i));
    norm += value(want, i) * value(want, i);
  }
  EXPECT_LE(std::sqrt(error / norm), kBf16Tolerance);
}
#endif

TEST_P(Transformers, QuantizedLayerLoadsAgain) {
  const Checkpoint checkpoint = Checkpoint::open(path_);
  const std::string out = path_ + "/native.safetensors";
  quantize_layer(checkpoint,
                 {.layer = kLayer, .quant = {.scheme = Scheme::kFp8W8A16}, .out_path = out});
  const Checkpoint native = Checkpoint::open(out);
  EXPECT_EQ(native.family(), "moesaic");
  const LayerOverrides as_fp8{.scheme = Scheme::kFp8W8A16};
  const LayerConfig a = checkpoint.layer_config(kLayer, as_fp8), b = native.layer_config(kLayer);
  EXPECT_EQ(b.quant.scheme, Scheme::kFp8W8A16);
  EXPECT_EQ(a.routing.method, b.routing.method);
  EXPECT_EQ(a.routing.scale, b.routing.scale);
  EXPECT_EQ(a.routing.renormalize, b.routing.renormalize);
  EXPECT_EQ(a.activation.kind, b.activation.kind);
  EXPECT_EQ(a.activation.layout, b.activation.layout);
  EXPECT_EQ(a.weight_on, b.weight_on);
  EXPECT_EQ(a.top_k, b.top_k);
  for (std::int64_t e = 0; e < a.experts; ++e) {  // the same codes as converting at load
    const HostWeights one = checkpoint.expert(kLayer, a, e), two = native.expert(kLayer, b, e);
    const Tensor& p = one.weights.fc1.weight;
    ASSERT_EQ(to_string(p), to_string(two.weights.fc1.weight));
    EXPECT_EQ(std::memcmp(p.data, two.weights.fc1.weight.data, static_cast<std::size_t>(p.numel())),
              0);
  }
  const Tensor r1 = checkpoint.router(kLayer).weights.weight,
               r2 = native.router(kLayer).weights.weight;
  EXPECT_EQ(to_string(r1), to_string(r2));
}

INSTANTIATE_TEST_SUITE_P(Families, Transformers,
                         ::testing::Values("mixtral", "mixtral-fused", "qwen2_moe",
                                           "qwen2_moe-fused", "qwen3_moe", "qwen3_moe-fused",
                                           "deepseek_v2", "deepseek_v2-fused", "deepseek_v3",
                                           "deepseek_v3-fused", "olmoe", "olmoe-fused", "phimoe",
                                           "phimoe-fused", "ernie4_5_moe", "ernie4_5_moe-fused",
                                           "glm4_moe", "glm4_moe-fused", "gpt_oss", "llama4_text"),
                         [](const auto& info) {
                           std::string name = info.param;
                           std::replace(name.begin(), name.end(), '-', '_');
                           return name;
                         });

}  // namespace
}  // namespace moesaic
