// SPDX-License-Identifier: Apache-2.0
// Checkpoints: safetensors files, the models' names and layouts, and one MoE layer of them as
// weights. docs/checkpoints.md lists the families, the quantized layouts and this library's own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "moesaic/layer.h"
#include "moesaic/types.h"

namespace moesaic {

// --- safetensors --------------------------------------------------------------------------------
// One tensor of a file. Its bytes lie in the memory map.
struct StoredTensor {
  std::string name;
  std::string dtype;                // as the file spells it: "BF16", "F8_E4M3", ...
  std::vector<std::int64_t> shape;  // any rank
  const std::byte* data = nullptr;
  std::size_t bytes = 0;
};

// All tensors of a .safetensors file, of the shards that a model.safetensors.index.json names, or
// of a directory that holds either. Mapped read-only, never copied; views stay valid while a copy
// of this object lives. Every header is checked whole, also for tensors that nobody asks for.
// Throws kIo (missing, unreadable) and kCorruptFile (the bytes contradict themselves).
class MOESAIC_API TensorFile {
 public:
  static TensorFile open(const std::string& path);
  // The same checks on bytes already in memory, which must outlive the result. For fuzzers.
  static TensorFile from_bytes(std::span<const std::byte> bytes);

  std::span<const StoredTensor> tensors() const;          // sorted by name
  const StoredTensor* find(std::string_view name) const;  // null: no such tensor
  // A view. Throws kInvalidArgument when there is no such tensor, kUnsupported when its dtype, rank
  // or alignment has no view (kMaxRank dimensions; dtypes of DType; aligned to its element).
  Tensor tensor(std::string_view name) const;
  const std::map<std::string, std::string>& metadata() const;  // of the first file
  // Whether `path` names one of the mapped files or their index, by whatever spelling or link: no
  // place to write to.
  bool is_mapped(const std::string& path) const;
  // Tells the system that the mapped bytes of a tensor are not needed any more (they are read again
  // from disk if they are).
  void release(const StoredTensor& tensor) const;

 private:
  struct Impl;
  std::shared_ptr<const Impl> impl_;
};

// Writes host tensors (made dense if they are not) to one file, which appears whole or not at all.
// Throws kIo, and kInvalidArgument for a name twice or a tensor elsewhere.
struct NamedTensor {
  std::string name;
  Tensor tensor;
};
MOESAIC_API void save_safetensors(const std::string& path, std::span<const NamedTensor> tensors,
                                  const std::map<std::string, std::string>& metadata = {});

// --- checkpoints --------------------------------------------------------------------------------
// How to read what the files do not say. Only `family` matters for known models.
struct CheckpointOptions {
  std::string family;  // "": config.json's model_type; "generic": any recognizable expert tensors,
                       // read as the rest of this struct says; or a family's name
  enum class FusedLayout : std::uint8_t { kAuto, kNK, kKN };
  FusedLayout fused = FusedLayout::kAuto;  // generic: fused experts are [E, 2I, H] or [E, H, 2I]
  GateOrder gate_order = GateOrder::kGateFirst;  // generic, fused: halves
  GateLayout gate_layout = GateLayout::kHalves;  // generic, fused
};

// One MoE layer as the files hold it.
struct CheckpointLayer {
  std::int64_t index = 0;  // the model's own number
  std::string name;        // "model.layers.3.mlp"
  std::string
      storage;  // how it is stored, in words: "bf16, one tensor per expert", "AWQ, group 128"
  std::int64_t experts = 0, hidden = 0, intermediate = 0, top_k = 0;
  std::int64_t shared_experts = 0,
               shared_intermediate = 0;  // in the files; used only when asked for
  QuantSpec quant{};
  ActivationSpec activation{};
  RoutingSpec routing{};
  WeightOn weight_on = WeightOn::kOutput;
  DType dtype = DType::kBF16;  // of the model's activations
  bool has_bias = false, has_router = false, has_shared_gate = false;
  std::uint64_t bytes = 0;  // of all its tensors in the files
};

enum class SharedExperts : std::uint8_t { kOff, kOn };

// What the caller wants different from what the checkpoint says.
struct LayerOverrides {
  std::optional<std::int64_t> top_k;
  std::optional<RoutingMethod> routing;  // keeps the checkpoint's scale and groups
  std::optional<Activation> activation;
  std::optional<Scheme> scheme;  // read the same numbers as another scheme, or convert at load: see
                                 // docs/checkpoints.md for which pairs
  std::optional<QuantSpec> quant;  // all of it; instead of `scheme`
  SharedExperts shared = SharedExperts::kOff;
  ExpertRange local{};
  std::int64_t max_tokens = 4096;
  std::optional<DType> dtype;  // of input and output; default: the checkpoint's
  std::size_t workspace_cap = 0;
};

// Plain host weights with their storage: views into the map where the file's layout is ours, else
// converted copies. What the oracle reads.
struct HostWeights {
  LayerWeights weights;  // leading extent E_local, or 1
  std::shared_ptr<const void> storage;
};
struct HostRouter {
  RouterWeights weights;  // undefined members: not in the file
  std::shared_ptr<const void> storage;
};
struct HostShared {
  LayerWeights weights;  // leading extent 1
  Tensor gate;           // [H]; undefined: none
  std::shared_ptr<const void> storage;
};

// Called after each expert: how many are done, of how many.
using LoadProgress = std::function<void(std::int64_t done, std::int64_t total)>;

struct QuantizeLayerArgs {
  std::int64_t layer = 0;
  QuantSpec quant;
  std::string out_path;
  LoadProgress progress{};
};

class MOESAIC_API Checkpoint {
 public:
  // `path`: a directory with config.json, a .safetensors file, or an index.json. Throws kIo,
  // kCorruptFile, and kUnsupported for what it cannot read, by name.
  static Checkpoint open(const std::string& path, const CheckpointOptions& options = {});

  const std::string& family() const;
  const std::string& path() const;
  std::span<const CheckpointLayer> layers() const;         // ascending index
  const CheckpointLayer& layer(std::int64_t index) const;  // throws, lists the layers there are
  const TensorFile& files() const;
  // Whether `path` names a file that this checkpoint was read from, config.json and the index
  // included, by whatever spelling or link: no place to write to.
  bool reads(const std::string& path) const;

  // A configuration ready for Layer's constructor.
  LayerConfig layer_config(std::int64_t index, const LayerOverrides& overrides = {}) const;

  // Streams layer `index` into `layer`, expert by expert: beside the map and the packed copy at
  // most one expert is held, and its mapped pages are given back. Attaches the router when the file
  // has one, and the shared experts when layer.config() has them.
  void load(std::int64_t index, Layer& layer, const LoadProgress& progress = {}) const;

  // Host weights as `config` (of layer_config) asks for them.
  HostWeights expert(std::int64_t index, const LayerConfig& config,
                     std::int64_t global_expert) const;
  HostWeights experts(std::int64_t index, const LayerConfig& config) const;  // all of config.local
  HostShared shared(std::int64_t index, const LayerConfig& config) const;
  HostRouter router(std::int64_t index) const;

 private:
  friend MOESAIC_API void quantize_layer(const Checkpoint& checkpoint,
                                         const QuantizeLayerArgs& args);
  struct Impl;
  struct Kept;
  std::shared_ptr<const Impl> impl_;
};

// Converts a layer (16-bit or f32, or anything that can be dequantized) and writes it, router and
// shared experts included, in this library's own layout: one .safetensors file that
// Checkpoint::open reads without a config.json. Streams expert by expert. Throws what open and load
// throw, and kInvalidArgument where `out_path` is one of the checkpoint's own files.
MOESAIC_API void quantize_layer(const Checkpoint& checkpoint, const QuantizeLayerArgs& args);

}  // namespace moesaic
