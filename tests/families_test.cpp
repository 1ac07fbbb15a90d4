// SPDX-License-Identifier: Apache-2.0
// Finding layers and reading config.json, on checkpoints written here: every layout says the same
// layer, overrides, the generic family. Needs no Python; what real models look like is
// checkpoint_transformers_test's business, refusals are families_errors_test's.
#include "scheme.h"
#include "written_model.h"

namespace moesaic {
namespace {

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

// Quantized checkpoints mostly leave the router alone; where they do not, it becomes f32.
TEST(Families, RoutersInEveryFloat) {
  const std::string gate = "model.layers.0.mlp.gate.weight";
  const auto fresh = [] {
    auto m = std::make_unique<Model>();
    m->per_expert("model.layers.0.mlp", "gate_proj", "up_proj", "down_proj");
    return m;
  };
  std::vector<std::uint8_t> bytes(kExperts * kHidden);
  for (std::size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<std::uint8_t>(i * 5 % 0x7e);
  const std::vector<float> by_row = {0.5f, 2.0f, 3.0f, 0.25f}, whole = {0.75f};
  for (const bool rows : {false, true}) {
    auto m = fresh();
    m->put_as(gate, DType::kF8E4M3, {kExperts, kHidden}, bytes);
    if (rows)
      m->put_as(gate + "_scale", DType::kF32, {kExperts, 1}, by_row);
    else
      m->put_as(gate + "_scale_inv", DType::kF32, {1}, whole);
    const Checkpoint c = m->open();
    ASSERT_TRUE(c.layer(0).has_router);
    const HostRouter router = c.router(0);
    ASSERT_EQ(router.weights.weight.dtype, DType::kF32);
    for (std::size_t i = 0; i < bytes.size(); ++i)
      ASSERT_EQ(router.weights.weight.as<float>()[i],
                e4m3_to_float(bytes[i]) * (rows ? by_row[i / kHidden] : whole[0]));
    Layer layer(c.layer_config(0));
    c.load(0, layer);  // attaches it
    EXPECT_TRUE(layer.ready());
  }
  {  // 64-bit floats, which no Tensor holds: written by hand
    auto m = fresh();
    m->put_as(gate, DType::kI64, {kExperts, kHidden},
              std::vector<double>(static_cast<std::size_t>(kExperts * kHidden), 0.1));
    EXPECT_NE(m->complaint(ErrorCode::kUnsupported).find("F8_E4M3 with a scale, not from I64"),
              std::string::npos);
    const std::string path = m->path() + "/model.safetensors";
    std::ifstream in(path, std::ios::binary);
    std::string file{std::istreambuf_iterator<char>(in), {}};
    file.replace(file.find("I64"), 3, "F64");
    std::ofstream(path, std::ios::binary) << file;
    const HostRouter router = Checkpoint::open(m->path()).router(0);
    EXPECT_EQ(router.weights.weight.as<float>()[5], 0.1f);
  }
  {
    auto m = fresh();
    m->put_as(gate, DType::kF8E4M3, {kExperts, kHidden}, bytes);
    EXPECT_NE(m->complaint(ErrorCode::kCorruptFile).find("without its scale"), std::string::npos);
    m->put_as(gate + "_scale", DType::kF32, {3}, std::vector<float>(3, 1.0f));
    EXPECT_NE(m->complaint(ErrorCode::kCorruptFile).find("is no scale of"), std::string::npos);
  }
}

// All other tensors of the file would be gone.
TEST(Families, ALayerIsNotWrittenOverItsOwnCheckpoint) {
  Model m;
  m.per_expert("model.layers.0.mlp", "gate_proj", "up_proj", "down_proj");
  const Checkpoint c = m.open();
  const std::string own = m.path() + "/model.safetensors", link = m.path() + "/link.safetensors";
  fs::create_symlink(own, link);
  for (const std::string& out : {own, m.path() + "/./model.safetensors", link}) {
    EXPECT_TRUE(c.files().is_mapped(out));
    try {
      quantize_layer(c, {.quant = {.scheme = Scheme::kInt8Channel}, .out_path = out});
      ADD_FAILURE() << out << " was overwritten";
    } catch (const Error& e) {
      EXPECT_EQ(e.code(), ErrorCode::kInvalidArgument);
      EXPECT_NE(std::string(e.what()).find("the checkpoint itself"), std::string::npos);
    }
  }
  EXPECT_FALSE(c.files().is_mapped(m.path() + "/other.safetensors"));
  expect_same_layer(m, Checkpoint::open(m.path()), 0);
}

}  // namespace
}  // namespace moesaic
