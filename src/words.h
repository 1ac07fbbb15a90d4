// SPDX-License-Identifier: Apache-2.0
// Lists of words in messages: "bf16, fp8_block, int4_w4a16".
#pragma once

#include <string>
#include <string_view>

namespace moesaic {

inline void append_word(std::string& list, std::string_view word) {
  if (!list.empty()) list += ", ";
  list += word;
}

}  // namespace moesaic
