// SPDX-License-Identifier: Apache-2.0
// Writing this library's own layout (docs/checkpoints.md, "Moesaic's own layout").
#pragma once

#include <map>
#include <string>
#include <vector>

#include "checkpoint/family.h"
#include "moesaic/checkpoint.h"

namespace moesaic {

struct NativeDescription {
  CheckpointLayer layer;
  ModelDescription model;  // for what is not known
};
std::map<std::string, std::string> native_metadata(const NativeDescription& description);
// The tensors of one expert ("experts.7.") or of the shared ones ("shared.") under their names.
void append_native(const std::string& prefix, const LayerWeights& weights,
                   std::vector<NamedTensor>& out);

}  // namespace moesaic
