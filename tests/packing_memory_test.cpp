// SPDX-License-Identifier: Apache-2.0
// Packing never holds the checkpoint and the packed copy of more than one expert at once: the
// process's peak resident memory while a layer is loaded, against the size of what stays.
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <string>
#include <utility>
#include <vector>

#include "harness/data.h"
#include "moesaic/moesaic.h"

namespace moesaic {
namespace {

namespace fs = std::filesystem;

constexpr std::int64_t kExperts = 64, kHidden = 512, kIntermediate = 512;
constexpr std::int64_t kExpertBytes = 3 * kHidden * kIntermediate * 2;  // bf16
constexpr std::int64_t kSlack = std::int64_t{8} << 20;  // stacks, 2 MiB alignments, the heap's own

// In bytes; "VmHWM" is the most that was resident since the last reset, "VmRSS" what is now.
std::int64_t status(const std::string& field) {
  std::ifstream in("/proc/self/status");
  for (std::string line; std::getline(in, line);)
    if (line.starts_with(field + ":")) return std::stoll(line.substr(field.size() + 1)) * 1024;
  return -1;
}
bool reset_peak() {
  std::ofstream out("/proc/self/clear_refs");
  out << 5 << std::flush;
  return out.good();
}

// One bf16 layer in a generic checkpoint: a tensor per projection of all experts, or one of each
// expert.
enum class Names { kFused, kPerExpert };
std::string write_checkpoint(const fs::path& path, Names names) {
  std::vector<std::uint16_t> bits(static_cast<std::size_t>(kExperts * kExpertBytes / 2));
  for (std::size_t i = 0; i < bits.size(); ++i)  // small numbers of both signs
    bits[i] = static_cast<std::uint16_t>(0x3c00u + (i * 2654435761u >> 20) % 0x200u);
  const std::string prefix = "model.layers.0.mlp.experts.";
  std::vector<NamedTensor> tensors;
  const std::uint16_t* at = bits.data();
  if (names == Names::kFused) {
    tensors.push_back(
        {prefix + "gate_up_proj",
         Tensor::contiguous(at, DType::kBF16, {kExperts, 2 * kIntermediate, kHidden})});
    at += kExperts * 2 * kIntermediate * kHidden;
    tensors.push_back({prefix + "down_proj",
                       Tensor::contiguous(at, DType::kBF16, {kExperts, kHidden, kIntermediate})});
  } else {
    for (std::int64_t e = 0; e < kExperts; ++e)
      for (const auto& [name, n, k] : {std::tuple{"gate_proj", kIntermediate, kHidden},
                                       std::tuple{"up_proj", kIntermediate, kHidden},
                                       std::tuple{"down_proj", kHidden, kIntermediate}}) {
        tensors.push_back({prefix + std::to_string(e) + "." + name + ".weight",
                           Tensor::contiguous(at, DType::kBF16, {n, k})});
        at += n * k;
      }
  }
  save_safetensors(path.string(), tensors);
  return path.string();
}

class PackingMemory : public testing::TestWithParam<Names> {};

TEST_P(PackingMemory, AtMostOneExpertBesideThePackedWeights) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "a sanitizer's own memory hides the layer's";
#endif
  const fs::path path = fs::temp_directory_path() /
                        ("moesaic_packing_" + std::to_string(::getpid()) + ".safetensors");
  write_checkpoint(path, GetParam());
  {
    CheckpointOptions options{.family = "generic"};
    options.fused = CheckpointOptions::FusedLayout::kNK;
    const Checkpoint checkpoint = Checkpoint::open(path.string(), options);
    const LayerOverrides overrides{.top_k = 2,
                                   .routing = RoutingMethod::kRenormalize,
                                   .activation = Activation::kSwiglu,
                                   .max_tokens = 16};
    Layer layer(checkpoint.layer_config(0, overrides));
    const std::int64_t before = status("VmRSS");
    if (before < 0 || !reset_peak()) {
      fs::remove(path);
      GTEST_SKIP() << "this system does not reset the peak of resident memory";
    }
    checkpoint.load(0, layer);
    const std::int64_t grown = status("VmHWM") - before;
    const std::int64_t packed = status("VmRSS") - before;
    EXPECT_GE(packed, kExperts * kExpertBytes * 9 / 10)
        << "the weights did not stay: nothing was measured";
    EXPECT_LE(grown, (kExperts + 2) * kExpertBytes + kSlack)
        << "peak " << (grown >> 20) << " MiB for " << (kExperts * kExpertBytes >> 20)
        << " MiB of weights";
  }
  fs::remove(path);
}

INSTANTIATE_TEST_SUITE_P(Checkpoint, PackingMemory,
                         testing::Values(Names::kFused, Names::kPerExpert), [](const auto& info) {
                           return info.param == Names::kFused ? "fused" : "per_expert";
                         });

}  // namespace
}  // namespace moesaic
