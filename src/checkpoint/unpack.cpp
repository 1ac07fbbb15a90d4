// SPDX-License-Identifier: Apache-2.0
#include "checkpoint/unpack.h"

namespace moesaic {
namespace {

std::uint8_t code_of(std::int32_t word, std::int64_t position, int bits) {
  const auto mask = (std::uint32_t{1} << bits) - 1;
  return static_cast<std::uint8_t>(static_cast<std::uint32_t>(word) >> (position * bits) & mask);
}

}  // namespace

void unpack_columns(std::span<const std::int32_t> words, std::int64_t rows, std::int64_t columns,
                    int bits, std::uint8_t* codes) {
  const std::int64_t per_word = 32 / bits, row_words = (columns + per_word - 1) / per_word;
  for (std::int64_t r = 0; r < rows; ++r)
    for (std::int64_t c = 0; c < columns; ++c)
      *codes++ = code_of(words[static_cast<std::size_t>(r * row_words + c / per_word)],
                         c % per_word, bits);
}

void unpack_rows(std::span<const std::int32_t> words, std::int64_t rows, std::int64_t columns,
                 int bits, std::uint8_t* codes) {
  const std::int64_t per_word = 32 / bits;
  for (std::int64_t r = 0; r < rows; ++r)
    for (std::int64_t c = 0; c < columns; ++c)
      *codes++ =
          code_of(words[static_cast<std::size_t>(r / per_word * columns + c)], r % per_word, bits);
}

void unpack_awq(std::span<const std::int32_t> words, std::int64_t rows, std::int64_t columns,
                std::uint8_t* codes) {
  constexpr int kOrder[8] = {0, 2, 4, 6, 1, 3, 5, 7};
  for (std::int64_t r = 0; r < rows; ++r)
    for (std::int64_t w = 0; w < columns / 8; ++w)
      for (int i = 0; i < 8; ++i)
        codes[r * columns + w * 8 + kOrder[i]] =
            code_of(words[static_cast<std::size_t>(r * (columns / 8) + w)], i, 4);
}

}  // namespace moesaic
