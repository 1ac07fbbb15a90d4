// SPDX-License-Identifier: Apache-2.0
// Checkpoints that cannot be read: what is not known is refused by name with a way out, what
// contradicts itself is called corrupt, and the native layout's metadata must fit its tensors.
#include "written_model.h"

namespace moesaic {
namespace {

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

// A list has a value for each layer of the model: nothing to compare one layer with.
TEST(Families, ListsInTheConfigAreNotHeldAgainstALayer) {
  for (const char* key : {"moe_intermediate_size", "num_local_experts", "hidden_size"}) {
    Model m;
    m.per_expert("model.layers.0.mlp", "gate_proj", "up_proj", "down_proj");
    m.config[key] = {1, 2};
    EXPECT_NO_THROW(m.open()) << key;
    EXPECT_NO_THROW(m.open({.family = "generic"})) << key;
  }
}

// A refusal says of which file it speaks, what is there, and what could be there instead.
TEST(Families, RefusalsNameFileValueAndChoices) {
  const auto fresh = [] {
    auto m = std::make_unique<Model>();
    m->per_expert("model.layers.0.mlp", "gate_proj", "up_proj", "down_proj");
    return m;
  };
  const auto says = [](const std::string& text, const std::string& words) {
    EXPECT_NE(text.find(words), std::string::npos) << "'" << text << "' lacks '" << words << "'";
  };
  const auto refusal = [](const Checkpoint& c) -> std::string {
    try {
      c.layer_config(0);
    } catch (const Error& e) {
      return e.what();
    }
    return "";
  };
  const std::string weight = "model.layers.0.mlp.experts.0.gate_proj.weight";
  {
    auto m = fresh();
    m->remove(weight);
    says(m->complaint(ErrorCode::kCorruptFile),
         m->path() + ": 'model.layers.0.mlp.experts.0.gate_proj': no weight tensor");
  }
  {
    auto m = fresh();
    m->open();
    // As a writer of int16 would: the same bytes under another name.
    std::string bytes;
    const std::string file = m->path() + "/model.safetensors";
    {
      std::ostringstream all;
      all << std::ifstream(file, std::ios::binary).rdbuf();
      bytes = all.str();
    }
    for (std::size_t at; (at = bytes.find("\"BF16\"")) != std::string::npos;)
      bytes.replace(at, 6, "\"I16\" ");
    std::ofstream(file, std::ios::binary) << bytes;
    try {
      Checkpoint::open(m->path());
      ADD_FAILURE() << "I16 was read";
    } catch (const Error& e) {
      says(e.what(), m->path() + ": tensor 'model.layers.0.mlp.experts.0.");
      says(e.what(), "dtype I16 is not read here, only F32, F16, BF16, F8_E4M3, F8_E8M0, I8, ");
    }
  }
  {
    auto m = fresh();
    m->config["num_experts_per_tok"] = 0;
    says(m->complaint(ErrorCode::kCorruptFile), "'num_experts_per_tok' is 0, expected 1 to 65536");
    m->config["num_experts_per_tok"] = 4.5;
    says(m->complaint(ErrorCode::kCorruptFile), "should be a whole number, is 4.5");
    m->config["num_experts_per_tok"] = "two\x1b";
    says(m->complaint(ErrorCode::kCorruptFile), "should be a whole number, is \"two\\u001b\"");
    m->config["num_experts_per_tok"] = Json::array({1});
    says(m->complaint(ErrorCode::kCorruptFile), "should be a whole number, is a JSON array");
  }
  {
    auto m = fresh();
    m->config["hidden_act"] = "foo";
    says(refusal(m->open()), "(--activation), one of: swiglu, geglu, geglu_tanh, swiglu_oai");
    says(refusal(m->open({.family = "generic"})), "(--routing), one of: softmax_topk, renormalize");
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
  // Every key that says something of the experts counts, not the first one alone.
  for (const char* first : {"num_local_experts", "n_routed_experts"})
    for (const char* second : {"num_experts", "moe_num_experts"}) {
      auto m = fresh();
      m->config.update({{first, kExperts}, {second, 16}});
      corrupt(*m, std::string(second) + " is 16");
    }
  for (const auto& [key, good] :
       {std::pair{"hidden_size", kHidden}, {"moe_intermediate_size", kWidth}}) {
    auto m = fresh();
    m->config.update({{key, good}, {"intermediate_size", 99}});
    EXPECT_NO_THROW(m->open()) << key;
    m->config[key] = good + 2;
    corrupt(*m, std::string(key) + " is ");
    EXPECT_NO_THROW(m->open({.family = "generic"})) << key;
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

// What the native layout says about itself must fit its tensors.
TEST(Families, NativeMetadataIsChecked) {
  Model m;
  m.per_expert("model.layers.0.mlp", "gate_proj", "up_proj", "down_proj");
  const std::string out = m.path() + "/native.safetensors";
  quantize_layer(m.open(),
                 {.quant = {.scheme = Scheme::kInt4W4A16, .group_size = 4, .zero_points = true},
                  .out_path = out});
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
