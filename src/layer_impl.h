// SPDX-License-Identifier: Apache-2.0
// What a Layer holds. Shared with the stages, which use a layer's packed weights.
#pragma once

#include <list>
#include <memory>
#include <mutex>
#include <vector>

#include "forward.h"
#include "moesaic/layer.h"
#include "plan.h"
#include "weights.h"

namespace moesaic {

// One product's packed weights and the small tensors beside them.
class PackedProduct {
 public:
  PackedProduct(const LayerPlan& plan, const WeightSpec& spec);
  void load(std::int64_t expert, const GemmWeights& weights, const ActivationWeights& activation,
            std::string_view argument);
  // In place: all experts' normalized weights, in front of load, which then attaches the small
  // tensors alone.
  void keep(const GemmWeights& all);
  void unpack(std::int64_t expert, const Tensor& weight, std::string_view argument) const;
  // Which small tensor only some experts have, or "".
  std::string missing(std::string_view argument) const { return side_.missing(argument); }
  void finish();  // all experts came, and nothing is missing
  const WeightOperand& operand() const { return operand_; }
  std::size_t bytes() const { return (packed_ ? packed_->bytes() : 0) + side_.bytes(); }

 private:
  const Backend* backend_;
  WeightStorage storage_;
  std::unique_ptr<PackedWeights> packed_;  // in place: from `keep` on
  SideStore side_;
  WeightOperand operand_;
};

struct SharedLayer {
  explicit SharedLayer(LayerPlan shared_plan);
  LayerPlan plan;
  PackedProduct fc1, fc2;
  Tensor gate;           // f32 [1, H] or undefined
  std::list<WorkspaceBuffer> gate_memory;
  WorkspaceBuffer ids;   // i32 [max_tokens] zeros: every token's only expert
  bool loaded = false;
};

struct Layer::Impl {
  Impl(const LayerConfig& config, Device device);

  LayerPlan plan;
  PackedProduct fc1, fc2;
  std::unique_ptr<SharedLayer> shared;
  RouterWeights router;
  TacticPair tactics{};
  std::vector<bool> loaded;
  bool is_ready = false;
  std::list<WorkspaceBuffer> router_memory;
  std::mutex mutex;

  // A dense copy in `memory`, on the layer's device; f32 unless already dense.
  Tensor keep(const Tensor& tensor, std::initializer_list<std::int64_t> shape,
              std::list<WorkspaceBuffer>* memory) const;
  void attach(std::int64_t local_expert, const LayerWeights& weights);  // checked
  std::string missing() const;  // what forward waits for, or ""
  void finish_if_complete();
  LoadedLayer loaded_layer() const;
};

}  // namespace moesaic
