// SPDX-License-Identifier: Apache-2.0
// The flags that say how to read a checkpoint, shared by inspect, run and quantize.
#pragma once

#include <string>

#include "moesaic/checkpoint.h"
#include "tools/command.h"

namespace moesaic::tool {

struct CheckpointFlags {
  std::string path;
  std::string family, fused, gate_order, gate_layout;  // empty: not given
  // Overrides of what the checkpoint says.
  std::int64_t top_k = 0;
  std::string routing, activation, scheme;
  bool shared = false;
};

void add_reading(CLI::App& app, CheckpointFlags& flags);
void add_overrides(CLI::App& app, CheckpointFlags& flags);
Checkpoint open(const CheckpointFlags& flags);
LayerOverrides overrides(const CheckpointFlags& flags);
// A scheme's name, or a variant's such as int4_w4a16+g64+zp.
QuantSpec parse_quant(const std::string& text);
std::string shape_text(const CheckpointLayer& layer);  // "128 experts, top 8, hidden 2048, ..."
std::string quant_text(const QuantSpec& quant);        // "int4_w4a16, group 128, zero points"

}  // namespace moesaic::tool
