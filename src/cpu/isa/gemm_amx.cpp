// SPDX-License-Identifier: Apache-2.0
// Level amx: AMX with bf16 and int8, Sapphire Rapids and later; the rest is level avx512_bf16's.
//
// The packed layouts are what tiles want: 16 steps of 16 columns are a tile of B, 256 bytes between its
// rows. Weights that are stored otherwise are unpacked to memory, whatever the number of rows: a tile is read
// from memory in any case. Products of bf16 are tiles for a single row, too, or the bits would depend on
// the batch (the instruction adds 32 of K before it adds them to the sum); integers are exact either way,
// so few rows of bytes take the vector instructions.
#include <sys/syscall.h>
#include <unistd.h>

#include "cpu/strip_amx.h"

namespace moesaic {
namespace {

// Up to how many rows of bytes take the vector instructions: where they are unpacked, or sums end in groups; and bytes that
// lie ready, whose stream is fetched better beside tiles (2 to 4 rows of it made T = 64 slower by a tenth).
constexpr std::int64_t kVectorRows = 4, kReadyVectorRows = 1;

struct AmxLevel : Level {
  template <Compute kCompute>
  static std::int64_t panel_rows(Code code) {
    return kCompute == Compute::kF32 ? Level::panel_rows<kCompute>(code) : kStripRows;
  }
  template <Compute kCompute>
  static constexpr std::int64_t streamed_rows() {
    return kCompute == Compute::kF32 ? Level::streamed_rows<kCompute>() : kStripRows;
  }

  template <Compute kCompute>
  static void native(const Panel& p, const Segments& s) {
    if (!takes_tiles<kCompute>(p, s.count == 1 ? kReadyVectorRows : kVectorRows))
      return Level::native<kCompute>(p, s);
    if constexpr (kCompute != Compute::kF32) multiply<kCompute, ReadyWeights>(p, s);
  }
  template <Compute kCompute>
  static void fused(const Panel& p, const Segments& s) {
    if (!takes_tiles<kCompute>(p, kVectorRows)) return Level::fused<kCompute>(p, s);
    if constexpr (kCompute != Compute::kF32)
      with_unpacker<kCompute>(s.code, [&]<typename Unpack>(std::type_identity<Unpack>) {
        multiply<kCompute, UnpackedWeights<Unpack>>(p, s);
      });
  }

 private:
  template <Compute kCompute>
  static bool takes_tiles(const Panel& p, std::int64_t vector_rows) {
    return kCompute == Compute::kB16 || (kCompute == Compute::kByte && p.rows > vector_rows);
  }

  template <Compute kCompute, typename Weights>
  static void multiply(const Panel& panel, const Segments& s) {
    TileScratch scratch;
    const RowTiles rows(panel.rows);
    Weights weights(s, scratch);
    const bool throughout = panel.sums == Sums::kThroughout;
    const std::int64_t sums = throughout ? 1 : s.count;
    const auto steps_of = [&](std::int64_t i) {
      if (i == sums) return std::int64_t{0};
      return throughout ? (s.count - 1) * s.steps + s.last_steps : s.steps_of(i);
    };
    weights.prepare(std::min(Weights::runs(rows) * kRunSteps, steps_of(0)));
    for (std::int64_t i = 0; i < sums; ++i) {
      const Panel p = panel.at(i);
      TileSums<kCompute, Weights>(p, rows, scratch).run(i, steps_of(i), steps_of(i + 1), weights);
      finish<kCompute>(p, rows, scratch);
    }
  }

  template <Compute kCompute>
  static void finish(const Panel& p, const RowTiles& rows, const TileScratch& scratch) {
    const Finish finish{.total = p.total, .c_stride = p.c_stride, .end = p.end,
                        .row_scale = p.row_scale, .row_stride = p.row_stride};
    for (std::int64_t r = 0; r < p.rows; ++r) {
      const float* const sums = scratch.sums + rows.place(r) * kTileCols;
      for (std::int64_t c = 0; c < kTileCols; c += 16) {
        typename Dot<kCompute>::Sum sum;
        std::memcpy(&sum, sums + c, sizeof(sum));
        if constexpr (kCompute == Compute::kByte)
          if (p.begin == Begin::kZero)
            sum = _mm512_add_epi32(sum, Dot<kCompute>::begin(p, 0, r, c));
        if (p.end == End::kRaw)
          Dot<kCompute>::store(p.raw + r * p.c_stride + c, sum);
        else
          finish(r, c, Dot<kCompute>::value(sum),
                 p.scale != nullptr ? _mm512_loadu_ps(p.scale + c) : _mm512_set1_ps(1.0f));
      }
    }
  }
};

void run_amx_strip(const GemmCall& call, const Strip& strip) {
  const TileConfig config(strip.rows);
  asm volatile("ldtilecfg %0" ::"m"(config));
  run_strip<AmxLevel>(call, strip);
  asm volatile("tilerelease");  // tiles in use make every switch of threads dearer
}

}  // namespace

// The kernel gives tile registers only to processes that ask.
bool request_amx() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

const CpuKernels kCpuAmx{"amx", run_amx_strip};

}  // namespace moesaic
