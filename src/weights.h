// SPDX-License-Identifier: Apache-2.0
// The caller's weights: checked, brought to one shape of views, and (for a layer) the small tensors
// beside the packed ones copied to the device in f32.
#pragma once

#include <algorithm>
#include <cstdint>
#include <mutex>
#include <string_view>
#include <vector>

#include "backend.h"

namespace moesaic {

// Checks `given` against `spec` (with `experts` leading entries) and returns views in the shapes
// backend.h promises. `argument` ("fc1") begins every complaint.
GemmWeights normalize(const WeightSpec& spec, std::int64_t experts, const GemmWeights& given,
                      std::string_view argument);
// What is copied: in the host's memory or on the device. Memory of another device faults where a kernel reads it.
void check_within(Device device, const GemmWeights& given, const ActivationWeights& activation,
                  std::string_view argument);
// What weights that are used in place need beyond that: all of them on the device, the small ones dense.
void check_in_place(Device device, const GemmWeights& given, const ActivationWeights& activation,
                    std::string_view argument);
// What WeightStorage::kInPlace asks of the weight besides.
void check_keepable(Device device, const Tensor& weight, std::string_view argument);
// The small tensors of a caller's own weights, checked; `activation` for fc1 only.
SideTensors side_views(const WeightSpec& spec, std::int64_t experts, const GemmWeights& normalized,
                       const ActivationWeights& activation, std::string_view argument);

// Device copies of one product's side tensors, filled expert by expert. A tensor that one expert has
// every expert must have: `missing` names one that they have not. Loading an expert again replaces
// its tensors; one that no expert has any more is undefined again.
class SideStore {
 public:
  SideStore(const Backend& backend, const WeightSpec& spec) : backend_(&backend), spec_(spec) {}
  ~SideStore();
  SideStore(const SideStore&) = delete;
  SideStore& operator=(const SideStore&) = delete;

  void load(std::int64_t expert, const SideTensors& one, std::string_view argument);
  // Which tensor only some experts have, or "".
  std::string missing(std::string_view argument) const;
  void complete();  // every expert came, and nothing is missing
  const SideTensors& tensors() const { return tensors_; }
  std::size_t bytes() const { return bytes_; }

 private:
  struct Entry {
    std::string_view name;
    Tensor SideTensors::* tensor = nullptr;
    Tensor ActivationWeights::* parameter = nullptr;
    std::int64_t width = 1;  // values per expert
    Tensor memory{};  // of all experts, once one had such a tensor
    std::vector<bool> seen{};
    bool given() const { return std::find(seen.begin(), seen.end(), true) != seen.end(); }
  };
  Tensor& slot(const Entry& entry);

  const Backend* backend_;
  WeightSpec spec_;
  SideTensors tensors_{};
  std::vector<Entry> entries_{};
  std::vector<void*> memory_{};
  std::size_t bytes_ = 0;
  std::mutex mutex_;
};

// Host f32 copy of a float tensor of any strides, wherever it lies.
std::vector<float> to_host_f32(const Backend& backend, const Tensor& tensor);

}  // namespace moesaic
