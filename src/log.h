// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string_view>

namespace moesaic {
void log(std::string_view message);  // to the sink of set_log_sink, if any
}  // namespace moesaic
