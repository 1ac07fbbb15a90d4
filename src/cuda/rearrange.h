// SPDX-License-Identifier: Apache-2.0
// The arrangement of a layer's uint4 weights for the SM90 weight-only kernels. Of every 32
// neighbours along K, 16 bytes, lane q of a quad multiplies byte q of each of the four words (see
// sm90/unpack.h); rearranged, these lie in word q, so that a lane reads one word where it read
// four, and as halves that two instructions, not three, make a pair of.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace moesaic::cuda {

// How uint4 weights lie: as the caller stores them, or as below.
enum class Arrangement : std::uint8_t { kPlain, kRearranged };

// Byte i of those that lane q wants: its low nibble at bit 4 i of word q, its high one at 4 i + 16.
// Both ways are done to 16 bytes alone, so in place, too.
__host__ __device__ inline void rearrange(const std::uint32_t (&plain)[4],
                                          std::uint32_t (&words)[4]) {
  for (int q = 0; q < 4; ++q) {
    words[q] = 0;
    for (int i = 0; i < 4; ++i) {
      const std::uint32_t byte = plain[i] >> (8 * q) & 0xffu;
      words[q] |= (byte & 15u) << (4 * i) | byte >> 4 << (4 * i + 16);
    }
  }
}
__host__ __device__ inline void restore(const std::uint32_t (&words)[4],
                                        std::uint32_t (&plain)[4]) {
  for (int i = 0; i < 4; ++i) {
    plain[i] = 0;
    for (int q = 0; q < 4; ++q) {
      const std::uint32_t low = words[q] >> (4 * i) & 15u, high = words[q] >> (4 * i + 16) & 15u;
      plain[i] |= (low | high << 4) << (8 * q);
    }
  }
}

}  // namespace moesaic::cuda
