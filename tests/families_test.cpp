// SPDX-License-Identifier: Apache-2.0
// Finding layers and reading config.json, on checkpoints written here: every layout says the same
// layer, overrides, the generic family, and refusals by name. Needs no Python; what real models
// look like is checkpoint_transformers_test's business.
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>
#include <random>

#include "moesaic/moesaic.h"
#include "numeric.h"
#include "scheme.h"

namespace moesaic {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

constexpr std::int64_t kExperts = 4, kHidden = 12, kWidth = 10;

// A checkpoint under construction: tensors, config.json and a folder that goes away.
class Model {
 public:
  Model() {
    std::string pattern = (fs::temp_directory_path() / "moesaic-families-XXXXXX").string();
    path_ = ::mkdtemp(pattern.data());
    config = {{"model_type", "qwen3_moe"}, {"num_experts", kExperts}, {"num_experts_per_tok", 2},
              {"norm_topk_prob", true},    {"hidden_act", "silu"},    {"torch_dtype", "bfloat16"}};
    for (auto* m : {&gate, &up}) fill(*m, kExperts * kWidth * kHidden);
    fill(down, kExperts * kHidden * kWidth);
  }
  ~Model() { fs::remove_all(path_); }

  // One tensor of bf16 in the given order of dimensions.
  void put(const std::string& name, std::vector<std::int64_t> shape,
           std::vector<std::uint16_t> data) {
    storage_.push_back(std::make_unique<std::vector<std::uint16_t>>(std::move(data)));
    tensors_.push_back({name, Tensor::contiguous(storage_.back()->data(), DType::kBF16,
                                                 shape.data(), static_cast<int>(shape.size()))});
  }
  void put_zeros(const std::string& name, std::vector<std::int64_t> shape) {
    std::int64_t n = 1;
    for (const std::int64_t s : shape) n *= s;
    put(name, shape, std::vector<std::uint16_t>(static_cast<std::size_t>(n)));
  }
  void per_expert(const std::string& block, const std::string& g, const std::string& u,
                  const std::string& d) {
    for (std::int64_t e = 0; e < kExperts; ++e) {
      const std::string prefix = block + ".experts." + std::to_string(e) + ".";
      if (!g.empty())
        put(prefix + g + ".weight", {kWidth, kHidden}, part(gate, e, kWidth * kHidden));
      put(prefix + u + ".weight", {kWidth, kHidden}, part(up, e, kWidth * kHidden));
      put(prefix + d + ".weight", {kHidden, kWidth}, part(down, e, kHidden * kWidth));
    }
  }
  // gate_up_proj and down_proj from what row r of fc1 (expert e) should be.
  void fused(const std::string& block, const std::function<bool(std::int64_t r)>& is_gate,
             const std::function<std::int64_t(std::int64_t r)>& row,
             CheckpointOptions::FusedLayout layout) {
    const bool nk = layout == CheckpointOptions::FusedLayout::kNK;
    std::vector<std::uint16_t> one(static_cast<std::size_t>(kExperts * 2 * kWidth * kHidden)),
        two(down.size());
    for (std::int64_t e = 0; e < kExperts; ++e)
      for (std::int64_t r = 0; r < 2 * kWidth; ++r)
        for (std::int64_t h = 0; h < kHidden; ++h) {
          const auto to =
              nk ? (e * 2 * kWidth + r) * kHidden + h : (e * kHidden + h) * 2 * kWidth + r;
          one[static_cast<std::size_t>(to)] =
              (is_gate(r) ? gate
                          : up)[static_cast<std::size_t>((e * kWidth + row(r)) * kHidden + h)];
        }
    for (std::int64_t e = 0; e < kExperts; ++e)
      for (std::int64_t h = 0; h < kHidden; ++h)
        for (std::int64_t i = 0; i < kWidth; ++i)
          two[static_cast<std::size_t>(nk ? (e * kHidden + h) * kWidth + i
                                          : (e * kWidth + i) * kHidden + h)] =
              down[static_cast<std::size_t>((e * kHidden + h) * kWidth + i)];
    using Shape = std::vector<std::int64_t>;
    put(block + ".experts.gate_up_proj",
        nk ? Shape{kExperts, 2 * kWidth, kHidden} : Shape{kExperts, kHidden, 2 * kWidth}, one);
    put(block + ".experts.down_proj",
        nk ? Shape{kExperts, kHidden, kWidth} : Shape{kExperts, kWidth, kHidden}, two);
  }
  void router(const std::string& name) { put_zeros(name, {kExperts, kHidden}); }
  void remove(const std::string& name) {
    std::erase_if(tensors_, [&](const NamedTensor& t) { return t.name == name; });
  }

  Checkpoint open(const CheckpointOptions& options = {}) {
    save_safetensors((path_ / "model.safetensors").string(), tensors_);
    if (!config.is_null()) std::ofstream(path_ / "config.json") << config.dump();
    return Checkpoint::open(path_.string(), options);
  }
  // The complaint of open, or "".
  std::string complaint(ErrorCode code, const CheckpointOptions& options = {}) {
    try {
      open(options);
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), code) << e.what();
      return e.what();
    }
    return "";
  }
  std::string path() const { return path_.string(); }

  Json config;
  std::vector<std::uint16_t> gate, up, down;  // [E, I, H], [E, I, H], [E, H, I]

 private:
  static void fill(std::vector<std::uint16_t>& v, std::int64_t n) {
    static std::mt19937 random(std::random_device{}());
    v.resize(static_cast<std::size_t>(n));
    for (auto& x : v) x = float_to_bf16(std::normal_distribution<float>()(random));
  }
  static std::vector<std::uint16_t> part(const std::vector<std::uint16_t>& v, std::int64_t e,
                                         std::int64_t n) {
    return {v.begin() + e * n, v.begin() + (e + 1) * n};
  }

  fs::path path_;
  std::vector<NamedTensor> tensors_;
  std::vector<std::unique_ptr<std::vector<std::uint16_t>>> storage_;
};

std::uint16_t at(const Tensor& t, std::int64_t n, std::int64_t k) {
  return t.as<const std::uint16_t>()[n * t.strides[1] + k * t.strides[2]];
}

// Whatever the layout, column i of the activation reads gate row i and up row i.
void expect_same_layer(const Model& model, const Checkpoint& c, std::int64_t index,
                       const LayerOverrides& o = {}) {
  const LayerConfig config = c.layer_config(index, o);
  ASSERT_EQ(config.experts, kExperts);
  ASSERT_EQ(config.hidden, kHidden);
  ASSERT_EQ(config.intermediate, kWidth);
  const WeightSpec spec = weight_spec(config, Product::kFc1);
  for (std::int64_t e = 0; e < kExperts; ++e) {
    const HostWeights w = c.expert(index, config, e);
    for (std::int64_t i = 0; i < kWidth; ++i)
      for (std::int64_t h = 0; h < kHidden; ++h) {
        const auto from = static_cast<std::size_t>((e * kWidth + i) * kHidden + h);
        ASSERT_EQ(at(w.weights.fc1.weight, spec.gate_row(i), h), model.gate[from]);
        ASSERT_EQ(at(w.weights.fc1.weight, spec.up_row(i), h), model.up[from]);
        ASSERT_EQ(at(w.weights.fc2.weight, h, i),
                  model.down[static_cast<std::size_t>((e * kHidden + h) * kWidth + i)]);
      }
  }
}

const auto kGateHalf = [](std::int64_t r) { return r < kWidth; };
const auto kHalfRow = [](std::int64_t r) { return r % kWidth; };
const auto kEven = [](std::int64_t r) { return r % 2 == 0; };
const auto kPairRow = [](std::int64_t r) { return r / 2; };
using FusedLayout = CheckpointOptions::FusedLayout;

TEST(Families, EveryLayoutIsTheSameLayer) {
  {
    Model m;
    m.per_expert("model.layers.3.mlp", "gate_proj", "up_proj", "down_proj");
    const Checkpoint c = m.open();
    EXPECT_EQ(c.family(), "qwen3_moe");
    EXPECT_FALSE(c.layer(3).has_router);
    EXPECT_EQ(c.layer(3).name, "model.layers.3.mlp");
    expect_same_layer(m, c, 3);
  }
  {
    Model m;
    m.config["model_type"] = "mixtral";
    m.per_expert("model.layers.0.block_sparse_moe", "w1", "w3", "w2");
    m.router("model.layers.0.block_sparse_moe.gate.weight");
    const Checkpoint c = m.open();
    EXPECT_TRUE(c.layer(0).has_router);
    expect_same_layer(m, c, 0);
  }
  {
    Model m;
    m.fused("model.layers.0.mlp", kGateHalf, kHalfRow, FusedLayout::kNK);
    expect_same_layer(m, m.open(), 0);
  }
  {
    Model m;
    m.config["model_type"] = "llama4";
    m.config = {{"model_type", "llama4"},
                {"text_config", m.config}};  // the text model's values lie inside
    m.config["text_config"]["num_experts_per_tok"] = 1;
    m.fused("language_model.model.layers.7.feed_forward", kGateHalf, kHalfRow, FusedLayout::kKN);
    const Checkpoint c = m.open();
    expect_same_layer(m, c, 7);
    EXPECT_EQ(c.layer_config(7).weight_on, WeightOn::kInput);
    EXPECT_EQ(c.layer_config(7).routing.method, RoutingMethod::kLlama4);
  }
  {
    Model m;
    m.config["model_type"] = "gpt_oss";
    m.fused("model.layers.0.mlp", kEven, kPairRow, FusedLayout::kKN);
    const Checkpoint c = m.open();
    EXPECT_EQ(c.layer_config(0).activation.layout, GateLayout::kInterleaved);
    EXPECT_EQ(c.layer_config(0).activation.kind, Activation::kSwigluOai);
    expect_same_layer(m, c, 0);
  }
}

TEST(Families, GenericReadsAnythingRecognizableAsTold) {
  const LayerOverrides told{
      .top_k = 2, .routing = RoutingMethod::kRenormalize, .activation = Activation::kSwiglu};
  for (const FusedLayout layout : {FusedLayout::kNK, FusedLayout::kKN}) {
    Model m;
    m.config = nullptr;  // no config.json at all
    m.fused(
        "decoder.stack.5.ffn", [](auto r) { return r % 2 == 1; }, kPairRow, layout);
    EXPECT_NE(m.complaint(ErrorCode::kUnsupported).find("--family"), std::string::npos);
    const Checkpoint c = m.open({.family = "generic",
                                 .gate_order = GateOrder::kUpFirst,
                                 .gate_layout = GateLayout::kInterleaved});
    EXPECT_THROW(c.layer_config(5), Error);
    EXPECT_THROW(c.layer_config(5, {.top_k = 2}), Error);
    EXPECT_THROW(c.layer_config(5, {.top_k = 2, .routing = RoutingMethod::kRenormalize}), Error);
    expect_same_layer(m, c, 5, told);
  }
  Model plain;  // no gate: up and down only
  plain.config["model_type"] = "something_else";
  plain.per_expert("model.layers.0.mixer", "", "up_proj", "down_proj");
  EXPECT_NE(plain.complaint(ErrorCode::kUnsupported).find("something_else"), std::string::npos);
  const Checkpoint c = plain.open({.family = "generic"});
  EXPECT_THROW(c.layer_config(0, told), Error) << "a gated activation without a gate";
  LayerOverrides relu = told;
  relu.activation = Activation::kRelu2;
  const LayerConfig config = c.layer_config(0, relu);
  const HostWeights w = c.expert(0, config, 2);
  EXPECT_EQ(w.weights.fc1.weight.shape[1], kWidth);
  EXPECT_EQ(at(w.weights.fc1.weight, 3, 4),
            plain.up[static_cast<std::size_t>((2 * kWidth + 3) * kHidden + 4)]);
}

TEST(Families, ConfigJsonSuppliesAndOverridesReplace) {
  Model m;
  m.config.update({{"model_type", "deepseek_v3"},
                   {"n_group", 2},
                   {"topk_group", 1},
                   {"routed_scaling_factor", 2.5},
                   {"norm_topk_prob", false},
                   {"hidden_act", "gelu_pytorch_tanh"}});
  m.per_expert("model.layers.1.mlp", "gate_proj", "up_proj", "down_proj");
  const Checkpoint c = m.open();
  const LayerConfig config = c.layer_config(1);
  EXPECT_EQ(config.top_k, 2);
  EXPECT_EQ(config.routing.method, RoutingMethod::kDeepSeekV3);
  EXPECT_EQ(config.routing.groups, 2);
  EXPECT_EQ(config.routing.topk_groups, 1);
  EXPECT_EQ(config.routing.scale, 2.5f);
  EXPECT_EQ(config.routing.renormalize, Renormalize::kNever);
  EXPECT_EQ(config.activation.kind, Activation::kGegluTanh);
  EXPECT_EQ(config.input_dtype, DType::kBF16);

  const LayerConfig other = c.layer_config(1, {.top_k = 3,
                                               .routing = RoutingMethod::kSigmoid,
                                               .activation = Activation::kSwiglu,
                                               .scheme = Scheme::kF16,
                                               .local = {1, 2},
                                               .max_tokens = 9});
  EXPECT_EQ(other.top_k, 3);
  EXPECT_EQ(other.routing.method, RoutingMethod::kSigmoid);
  EXPECT_EQ(other.routing.renormalize, Renormalize::kDefault);
  EXPECT_EQ(other.activation.kind, Activation::kSwiglu);
  EXPECT_EQ(other.input_dtype, DType::kF16);
  EXPECT_EQ(other.max_tokens, 9);
  const HostWeights local = c.experts(1, other);  // experts 1 and 2 of 4, converted
  EXPECT_EQ(local.weights.fc2.weight.shape[0], 2);
  EXPECT_EQ(f16_to_float(local.weights.fc2.weight.as<const std::uint16_t>()[0]),
            f16_to_float(float_to_f16(bf16_to_float(m.down[kHidden * kWidth]))));
  EXPECT_THROW(c.layer_config(1, {.top_k = 5}), Error);
  EXPECT_THROW(c.layer_config(1, {.shared = SharedExperts::kOn}), Error);
  EXPECT_THROW(c.layer_config(2), Error);
}

TEST(Families, RefusalsNameWhatToDo) {
  const auto standard = [](Model& m) {
    m.per_expert("model.layers.0.mlp", "gate_proj", "up_proj", "down_proj");
  };
  const auto says = [](const std::string& text, const std::string& words) {
    EXPECT_NE(text.find(words), std::string::npos) << "'" << text << "' lacks '" << words << "'";
  };
  {
    Model m;
    standard(m);
    m.config["model_type"] = "llama";
    says(m.complaint(ErrorCode::kUnsupported), "model_type 'llama' is not known");
    m.config.erase("model_type");
    says(m.complaint(ErrorCode::kUnsupported), "no model_type");
    m.config["model_type"] = 7;
    says(m.complaint(ErrorCode::kCorruptFile), "should be a string");
    EXPECT_NO_THROW(m.open({.family = "qwen3_moe"}));
    says(m.complaint(ErrorCode::kUnsupported, {.family = "qwen9"}), "known: mixtral");
  }
  {
    Model m;  // a dense model
    m.put_zeros("model.layers.0.mlp.gate_proj.weight", {4, 4});
    says(m.complaint(ErrorCode::kUnsupported), "no tensors of experts");
  }
  {
    Model m;
    standard(m);
    m.config["hidden_act"] = "mish";
    const Checkpoint c = m.open();  // inspect works; running needs a word
    EXPECT_THROW(c.layer_config(0), Error);
    EXPECT_NO_THROW(c.layer_config(0, {.activation = Activation::kSwiglu}));
  }
  {
    Model m;
    standard(m);
    m.config.update({{"model_type", "deepseek_v3"}, {"scoring_func", "sqrtsoftplus"}});
    EXPECT_THROW(m.open().layer_config(0), Error);
    EXPECT_NO_THROW(m.open().layer_config(0, {.routing = RoutingMethod::kSqrtSoftplus}));
  }
  {
    Model m;
    standard(m);
    m.config["quantization_config"] = {{"quant_method", "bitsandbytes"}};
    EXPECT_NO_THROW(m.open().layer_config(0)) << "the experts are plain bf16, whatever the rest is";
    m.config["quantization_config"] = 3;
    says(m.complaint(ErrorCode::kCorruptFile), "should be an object");
  }
  {
    Model m;  // DeepSeek-V4's first layers: experts by token id
    standard(m);
    m.put_zeros("model.layers.0.mlp.gate.tid2eid", {16, 2});
    const Checkpoint c = m.open();
    try {
      c.layer_config(0);
      ADD_FAILURE() << "a hash-routed layer was not refused";
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), ErrorCode::kUnsupported);
      says(e.what(), "is hash-routed");
    }
    EXPECT_NO_THROW(c.layer_config(0, {.routing = RoutingMethod::kTopK}));
  }
  {
    Model m;  // two stacks with the same numbers
    standard(m);
    m.per_expert("other.layers.0.mlp", "gate_proj", "up_proj", "down_proj");
    says(m.complaint(ErrorCode::kUnsupported), "both layer 0");
  }
}

TEST(Families, IncompleteOrContradictoryFiles) {
  const auto fresh = [] {
    auto m = std::make_unique<Model>();
    m->per_expert("model.layers.0.mlp", "gate_proj", "up_proj", "down_proj");
    return m;
  };
  const auto corrupt = [](Model& m, const std::string& words) {
    const std::string text = m.complaint(ErrorCode::kCorruptFile);
    EXPECT_NE(text.find(words), std::string::npos) << "'" << text << "' lacks '" << words << "'";
  };
  const std::string prefix = "model.layers.0.mlp.experts.";
  {
    auto m = fresh();
    m->remove(prefix + "2.up_proj.weight");
    corrupt(*m, "shard may be missing");
  }
  {
    auto m = fresh();
    for (const char* p : {"gate_proj", "up_proj", "down_proj"})
      m->remove(prefix + "1." + p + ".weight");
    corrupt(*m, "numbered up to 3");
  }
  {
    auto m = fresh();
    m->config["num_experts"] = 5;
    corrupt(*m, "num_experts is 5");
  }
  {
    auto m = fresh();
    m->config["num_experts_per_tok"] = 9;
    corrupt(*m, "9 experts per token");
  }
  for (const auto& shape : {std::vector<std::int64_t>{kWidth, kHidden + 1},
                            {kWidth + 1, kHidden},
                            {kWidth * kHidden},
                            {0, kHidden}}) {
    auto m = fresh();
    m->remove(prefix + "3.up_proj.weight");
    m->put_zeros(prefix + "3.up_proj.weight", shape);
    corrupt(*m, "expert 0 has");
  }
  {
    auto m = fresh();
    for (int e = 0; e < kExperts; ++e) {
      m->remove(prefix + std::to_string(e) + ".down_proj.weight");
      m->put_zeros(prefix + std::to_string(e) + ".down_proj.weight", {kHidden, kWidth + 2});
    }
    corrupt(*m, "does not fit the second product");
  }
  {
    auto m = fresh();
    m->put_zeros("model.layers.0.mlp.gate.weight", {kExperts + 1, kHidden});
    corrupt(*m, "gate.weight");
  }
  {
    auto m = fresh();
    m->put_zeros("model.layers.0.mlp.shared_expert.gate_proj.weight", {6, kHidden + 1});
    m->put_zeros("model.layers.0.mlp.shared_expert.up_proj.weight", {6, kHidden + 1});
    m->put_zeros("model.layers.0.mlp.shared_expert.down_proj.weight", {kHidden + 1, 6});
    corrupt(*m, "shared experts do not fit");
  }
  {
    auto m = fresh();
    m->open();
    std::ofstream(m->path() + "/config.json") << "{\"model_type\":";
    EXPECT_THROW(Checkpoint::open(m->path()), Error);
    std::ofstream(m->path() + "/config.json") << "[]";
    EXPECT_THROW(Checkpoint::open(m->path()), Error);
  }
  EXPECT_THROW(Checkpoint::open("/nowhere/at/all"), Error);
}

// The format does not promise alignment; only the official writer does.
TEST(Families, MisalignedTensorsAreCopied) {
  Model m;
  m.per_expert("model.layers.0.mlp", "gate_proj", "up_proj", "down_proj");
  m.router("model.layers.0.mlp.gate.weight");
  m.open();
  const std::string path = m.path() + "/model.safetensors";
  std::string bytes;
  {
    std::ifstream in(path, std::ios::binary);
    bytes.assign(std::istreambuf_iterator<char>(in), {});
  }
  std::uint64_t header = 0;
  std::memcpy(&header, bytes.data(), 8);
  bytes.insert(8 + header, 1, ' ');  // one more space ends the header
  ++header;
  std::memcpy(bytes.data(), &header, 8);
  std::ofstream(path, std::ios::binary) << bytes;
  const Checkpoint c = Checkpoint::open(m.path());
  expect_same_layer(m, c, 0);
  const HostRouter router = c.router(0);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(router.weights.weight.data) % 2, 0u);
}

// What the native layout says about itself must fit its tensors.
TEST(Families, NativeMetadataIsChecked) {
  Model m;
  m.per_expert("model.layers.0.mlp", "gate_proj", "up_proj", "down_proj");
  const std::string out = m.path() + "/native.safetensors";
  quantize_layer(m.open(), 0, {.scheme = Scheme::kInt4W4A16, .group_size = 4, .zero_points = true},
                 out);
  const TensorFile file = TensorFile::open(out);
  const Json good = Json::parse(file.metadata().at("moesaic"));
  std::vector<NamedTensor> tensors;
  for (const StoredTensor& t : file.tensors()) tensors.push_back({t.name, file.tensor(t.name)});
  const auto with = [&](const std::string& key, const Json& value) {
    Json j = good;
    if (value.is_null())
      j.erase(key);
    else
      j[key] = value;
    const std::string path = m.path() + "/bad.safetensors";
    save_safetensors(path, tensors, {{"moesaic", j.dump()}});
    return Checkpoint::open(path);
  };
  EXPECT_NO_THROW(with("version", 1));
  const std::pair<std::string, Json> bad[] = {{"version", 2},
                                              {"version", "1"},
                                              {"experts", 5},
                                              {"experts", 0},
                                              {"experts", -1},
                                              {"experts", 1e300},
                                              {"experts", nullptr},
                                              {"hidden", 14},
                                              {"hidden", 1ull << 62},
                                              {"intermediate", 8},
                                              {"top_k", 9},
                                              {"group_size", 6},
                                              {"group_size", -4},
                                              {"zero_points", 1},
                                              {"scheme", "int3"},
                                              {"scheme", "bf16"},
                                              {"scheme", "fp8_block"},
                                              {"weight_scale", "row"},
                                              {"routing", "dice"},
                                              {"activation", "relu"},
                                              {"dtype", "i8"},
                                              {"shared_experts", 1},
                                              {"groups", 0},
                                              {"alpha", "x"}};
  for (const auto& [key, value] : bad)
    EXPECT_THROW(with(key, value), Error) << key << " = " << value;
  const Checkpoint unknown = with("routing", nullptr);  // allowed: the caller must say
  EXPECT_THROW(unknown.layer_config(0), Error);
  EXPECT_NO_THROW(unknown.layer_config(0, {.routing = RoutingMethod::kTopK}));
}

}  // namespace
}  // namespace moesaic
