// SPDX-License-Identifier: Apache-2.0
// Large tiles of the SM80 family, those of prefill: what a CTA keeps in shared memory beside the
// stages. Between two such tiles lies the work of thousands of instructions and of three dependent
// reads of global memory (which tile, which slots, which scales); it is done in small pieces during
// the products of the tile before, and the board is where the pieces meet.
#pragma once

#include "cuda/sm80/table.h"

namespace moesaic::cuda {

template <typename T>
struct Sm80Board {
  static constexpr int kWorks = 8;  // more than stages: the loader is at most that many tiles ahead
  Sm80Table<T> tables[2];
  alignas(16) std::uint32_t
      weight[2][T::kRows];  // rows in units of their alignment, in the order of the loader's
  alignas(16) std::uint32_t act[2][T::kTokens];  // reads; tokens that are not there: kNone
  std::uint32_t slots[T::kTokens];               // of the tile that is prepared
  Sm80Work works[kWorks];  // of tile i at i % kWorks; rows = 0: there are no more
  Sm80Extent extent;
  std::uint32_t index;    // of the work that is looked at next
  std::int32_t filtered;  // a tile without an expert was met
};

template <typename Op_, int kWarpsM, int kWarpsN, int kMFrags, int kNFrags, int kDepth, int kStages,
          int kCtas>
struct Sm80LargeTile : Sm80Tile<Op_, kWarpsM, kWarpsN, kMFrags, kNFrags, kDepth, kStages, kCtas> {
  using Base = Sm80Tile<Op_, kWarpsM, kWarpsN, kMFrags, kNFrags, kDepth, kStages, kCtas>;
  static constexpr int kSharedBytes =
      kStages * Base::kStageBytes + static_cast<int>(sizeof(Sm80Board<Base>));
  static_assert(kStages < Sm80Board<Base>::kWorks);
  static_assert(kCtas * (kSharedBytes + 1024) <= 228 * 1024);
  // Tiles are prepared during the one before where it has this many stages at least; else between
  // them.
  static constexpr int kPreparingStages = kStages + 2;
  __device__ static bool prepares(const Sm80Params& p) {
    return p.k > (kPreparingStages - 1) * kDepth;
  }
};

}  // namespace moesaic::cuda
