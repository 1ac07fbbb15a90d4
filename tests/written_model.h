// SPDX-License-Identifier: Apache-2.0
// A small checkpoint under construction: tensors by name, config.json, and a folder that goes away.
#pragma once

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <vector>

#include "moesaic/moesaic.h"
#include "numeric.h"

namespace moesaic {

namespace fs = std::filesystem;
using Json = nlohmann::json;

inline constexpr std::int64_t kExperts = 4, kHidden = 12, kWidth = 10;

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
    tensors_.push_back({name, Tensor::contiguous(storage_.back()->data(), DType::kBF16, shape)});
  }
  // One tensor of any bytes.
  template <typename T>
  void put_as(const std::string& name, DType dtype, std::vector<std::int64_t> shape,
              const std::vector<T>& data) {
    storage_.push_back(
        std::make_unique<std::vector<std::uint16_t>>((data.size() * sizeof(T) + 1) / 2));
    std::memcpy(storage_.back()->data(), data.data(), data.size() * sizeof(T));
    tensors_.push_back({name, Tensor::contiguous(storage_.back()->data(), dtype, shape)});
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

}  // namespace moesaic
