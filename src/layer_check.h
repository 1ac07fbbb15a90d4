// SPDX-License-Identifier: Apache-2.0
// What a layer's forward refuses, by the argument's name.
#pragma once

#include "layer_impl.h"

namespace moesaic {

// All weights are there; otherwise says which are not.
void check_ready(const Layer::Impl& layer);
void check_forward(const Layer::Impl& layer, const ForwardArgs& args);

}  // namespace moesaic
