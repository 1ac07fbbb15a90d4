// SPDX-License-Identifier: Apache-2.0
// What a layer's calls refuse, by the argument's name.
#pragma once

#include <string_view>

#include "layer_impl.h"

namespace moesaic {

// All weights are there; otherwise says which are not, to the caller of `call`.
void check_ready(const Layer::Impl& layer, std::string_view call);
void check_forward(const Layer::Impl& layer, const ForwardArgs& args);

}  // namespace moesaic
