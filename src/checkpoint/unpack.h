// SPDX-License-Identifier: Apache-2.0
// Integer codes packed into int32 words, as GPTQ, AWQ and compressed-tensors pack them. Codes come
// out one per byte, row-major.
#pragma once

#include <cstdint>
#include <span>

namespace moesaic {

// words [rows, columns * bits / 32 rounded up] -> codes [rows, columns]: code c lies in word
// c / per_word at bit (c % per_word) * bits. compressed-tensors' weights; zero points of GPTQ.
void unpack_columns(std::span<const std::int32_t> words, std::int64_t rows, std::int64_t columns,
                    int bits, std::uint8_t* codes);
// words [rows * bits / 32 rounded up, columns] -> codes [rows, columns]: packed along the first
// dimension. GPTQ's weights; zero points of compressed-tensors.
void unpack_rows(std::span<const std::int32_t> words, std::int64_t rows, std::int64_t columns,
                 int bits, std::uint8_t* codes);
// AWQ: words [rows, columns / 8]; nibble i of a word is column order[i] of its eight, with order
// 0 2 4 6 1 3 5 7. (Its kernels take two nibbles apart at once.)
void unpack_awq(std::span<const std::int32_t> words, std::int64_t rows, std::int64_t columns,
                std::uint8_t* codes);

}  // namespace moesaic
