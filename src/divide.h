// SPDX-License-Identifier: Apache-2.0
// How many blocks of b cover a, and how far they reach. For sizes: a >= 0, b > 0.
#pragma once

#include <cstdint>

namespace moesaic {

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
constexpr std::int64_t round_up(std::int64_t a, std::int64_t b) { return ceil_div(a, b) * b; }

}  // namespace moesaic
