// SPDX-License-Identifier: Apache-2.0
// Text of unknown origin as a terminal and a UTF-8 reader may have it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace moesaic {

// What is no UTF-8, or moves a cursor, becomes '?'.
inline std::string printable(std::string_view text) {
  std::string out;
  for (std::size_t i = 0; i < text.size();) {
    const auto at = [&](std::size_t n) {
      return i + n < text.size() ? static_cast<unsigned char>(text[i + n]) : 0u;
    };
    const unsigned lead = at(0);
    const std::size_t length = lead < 0x80 ? 1 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
    std::uint32_t point = length == 1 ? lead : lead & (0x7fu >> length);
    bool ok = lead < 0x80 || (lead >= 0xc2 && lead < 0xf5);
    for (std::size_t n = 1; n < length; ++n) {
      ok = ok && (at(n) & 0xc0) == 0x80;
      point = point << 6 | (at(n) & 0x3f);
    }
    // Overlong forms, surrogates, what lies beyond, and both ranges of control codes.
    ok = ok &&
         point >= (length == 3   ? 0x800u
                   : length == 4 ? 0x10000u
                                 : 0x20u) &&
         point < 0x110000 && (point < 0xd800 || point > 0xdfff) && (point < 0x7f || point > 0x9f);
    if (ok)
      out += text.substr(i, length);
    else
      out += '?';
    i += ok ? length : 1;
  }
  return out;
}

}  // namespace moesaic
