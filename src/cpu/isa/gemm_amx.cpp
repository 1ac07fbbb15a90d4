// SPDX-License-Identifier: Apache-2.0
// Level amx: AMX with bf16 and int8, Sapphire Rapids and later; the rest is level avx512_bf16's.
//
// The packed layouts are what tiles want: 16 steps of 16 columns are a tile of B, 256 bytes between its
// rows. Weights that are stored otherwise are unpacked first, whatever the number of rows: a tile is read
// from memory in any case. Products of bf16 are tiles for a single row, too, or the bits would depend on
// the batch (the instruction adds 32 of K before it adds them to the sum); integers are exact either way,
// so few rows of bytes take the vector instructions.
#include <sys/syscall.h>
#include <unistd.h>

#include "cpu/strip_avx512.h"

namespace moesaic {
namespace {

constexpr std::int64_t kTileSteps = 16, kTileRows = 16;
constexpr std::int64_t kVectorRows = 4;  // up to here bytes are not worth a tile

// Tiles of sums (0-3) and the first of A (4) have as many rows as the strip, up to 16: the fewer, the less
// time each instruction takes. Tile 5 is A's second, or B's.
struct alignas(64) TileConfig {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};

  explicit TileConfig(std::int64_t strip_rows) {
    for (int tile = 0; tile < 5; ++tile)
      rows[tile] = static_cast<std::uint8_t>(std::min(strip_rows, kTileRows));
  }
};

// A tail of K, both sides filled up with zeros; and the sums of a panel on their way.
struct alignas(64) TileScratch {
  Unit a[2 * kTileRows * kTileSteps];
  std::uint8_t b[kTileSteps * 256];
  float sums[2 * kTileRows * kTileCols];
};

// Assembly: GCC 12's intrinsics do not say that a tile's load reads memory, and stores before it vanish.
template <int kTile>
inline __attribute__((always_inline)) void load_tile(const void* from, std::int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
inline __attribute__((always_inline)) void store_tile(void* to, std::int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
inline __attribute__((always_inline)) void zero_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
template <Compute kCompute, int kTo, int kA, int kB>
inline __attribute__((always_inline)) void multiply_tiles() {
  if constexpr (kCompute == Compute::kB16)
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kTo), "i"(kA), "i"(kB));
  else
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kTo), "i"(kA), "i"(kB));
}

// 16 steps.
struct Operands {
  const Unit* a;
  std::int64_t a_stride;  // bytes
  const std::uint8_t* b;  // 256 bytes between steps
};

// Up to 16 rows x 64 columns: sums in tiles 0-3.
template <Compute kCompute>
void one_row_of_tiles(const Operands& o) {
  load_tile<4>(o.a, o.a_stride);
  load_tile<5>(o.b, 256);
  multiply_tiles<kCompute, 0, 4, 5>();
  load_tile<6>(o.b + 64, 256);
  multiply_tiles<kCompute, 1, 4, 6>();
  load_tile<7>(o.b + 128, 256);
  multiply_tiles<kCompute, 2, 4, 7>();
  load_tile<5>(o.b + 192, 256);
  multiply_tiles<kCompute, 3, 4, 5>();
}
// Up to 32 rows x 32 columns: sums in tiles 0, 1 (first 16 rows) and 2, 3.
template <Compute kCompute>
void two_rows_of_tiles(const Operands& o) {
  load_tile<4>(o.a, o.a_stride);
  load_tile<6>(o.b, 256);
  multiply_tiles<kCompute, 0, 4, 6>();
  load_tile<7>(o.b + 64, 256);
  multiply_tiles<kCompute, 1, 4, 7>();
  load_tile<5>(o.a + kTileRows * o.a_stride / 4, o.a_stride);
  multiply_tiles<kCompute, 2, 5, 6>();
  multiply_tiles<kCompute, 3, 5, 7>();
}

struct AmxLevel : Level {
  template <Compute kCompute>
  static std::int64_t panel_rows(Code code) {
    return kCompute == Compute::kF32 ? Level::panel_rows<kCompute>(code) : 2 * kTileRows;
  }
  template <Compute kCompute>
  static constexpr std::int64_t streamed_rows() {
    return kCompute == Compute::kF32 ? Level::streamed_rows<kCompute>() : 2 * kTileRows;
  }
  template <Compute kCompute>
  static constexpr std::int64_t readable_rows() {
    return kCompute == Compute::kF32 ? 1 : 2 * kTileRows;
  }
  template <Compute kCompute>
  static constexpr bool can_fuse() {
    return kCompute == Compute::kF32;
  }

  template <Compute kCompute>
  static void unpack(const Segments& s, void* out) {
    with_unpacker<kCompute>(s.code, [&]<typename Unpack>(std::type_identity<Unpack>) {
      const Unpack unpack(s, 0, 0);
      auto* to = static_cast<std::uint8_t*>(out);
      const std::uint8_t* data = s.data;
      for (std::int64_t step = 0; step < s.steps; ++step, data += Unpack::kBytes) {
        for (std::int64_t line = 0; line < Unpack::kBytes; line += 64)
          _mm_prefetch(reinterpret_cast<const char*>(data + kNearAhead + line), _MM_HINT_T0);
        for (int which = 0; which < Unpack::kUnits; ++which, to += 256) {
          __m512i b[4];
          unpack.template unit<1, 4>(data, which, b);
          for (int i = 0; i < 4; ++i) _mm512_store_si512(to + 64 * i, b[i]);
        }
      }
    });
  }

  template <Compute kCompute>
  static void native(const Panel& panel, const Segments& s) {
    if constexpr (kCompute == Compute::kF32) {
      Level::native<kCompute>(panel, s);
    } else {
      if (kCompute == Compute::kByte && panel.rows <= kVectorRows)
        return Level::native<kCompute>(panel, s);
      TileScratch scratch;
      for (std::int64_t i = 0; i < s.count; ++i) {
        const Panel p = panel.at(i);
        segment<kCompute>(p, s.at(i), scratch);
        finish<kCompute>(p, scratch);
      }
    }
  }

 private:
  // One segment's sums to scratch.sums [32][64].
  template <Compute kCompute>
  static void segment(const Panel& p, const Segments& s, TileScratch& scratch) {
    const std::uint8_t* b = s.data;
    const std::int64_t units = s.steps;
    const bool streams = s.code == Code::kB16 || s.code == Code::kByteQuad;  // else it was unpacked
    const std::int64_t whole = units / kTileSteps, tail = units % kTileSteps;
    if (tail > 0) copy_tail(p, b, whole * kTileSteps, tail, scratch);
    if (p.begin == Begin::kRaw)
      for (std::int64_t r = 0; r < p.rows; ++r)
        std::memcpy(scratch.sums + r * kTileCols, p.raw + r * p.c_stride, kTileCols * 4);
    if (p.rows <= kTileRows) {
      begin(p, scratch.sums, 16, 32, 48);
      walk(p, b, whole, streams, [](const Operands& o) { one_row_of_tiles<kCompute>(o); });
      if (tail > 0) one_row_of_tiles<kCompute>({scratch.a, kTileSteps * 4, scratch.b});
      end(scratch.sums, 16, 32, 48);
      return;
    }
    for (std::int64_t c = 0; c < kTileCols; c += 32) {
      constexpr std::int64_t kLower = kTileRows * kTileCols;
      begin(p, scratch.sums + c, 16, kLower, kLower + 16);
      walk(p, b + 4 * c, whole, streams && c == 0, [](const Operands& o) { two_rows_of_tiles<kCompute>(o); });
      if (tail > 0) two_rows_of_tiles<kCompute>({scratch.a, kTileSteps * 4, scratch.b + 4 * c});
      end(scratch.sums + c, 16, kLower, kLower + 16);
    }
  }

  template <typename Body>
  static void walk(const Panel& p, const std::uint8_t* b, std::int64_t count, bool streams,
                   const Body& body) {
    const std::uint8_t* ahead = p.ahead;
    for (std::int64_t i = 0; i < count; ++i) {
      body({p.a + i * kTileSteps, p.a_stride * 4, b + i * kTileSteps * 256});
      if (ahead != nullptr) {
        for (std::int64_t line = 0; line < kTileSteps * p.ahead_step; line += 64)
          _mm_prefetch(reinterpret_cast<const char*>(ahead + line), _MM_HINT_T1);
        ahead += kTileSteps * p.ahead_step;
      } else if (streams) {
        for (std::int64_t line = 0; line < kTileSteps * 256; line += 64)
          _mm_prefetch(reinterpret_cast<const char*>(b + i * kTileSteps * 256 + 2 * kNearAhead + line),
                       _MM_HINT_T0);
      }
    }
  }

  static void begin(const Panel& p, const float* sums, std::int64_t second, std::int64_t third,
                    std::int64_t fourth) {
    if (p.begin == Begin::kRaw) {
      load_tile<0>(sums, kTileCols * 4);
      load_tile<1>(sums + second, kTileCols * 4);
      load_tile<2>(sums + third, kTileCols * 4);
      load_tile<3>(sums + fourth, kTileCols * 4);
    } else {
      zero_tile<0>();
      zero_tile<1>();
      zero_tile<2>();
      zero_tile<3>();
    }
  }
  static void end(float* sums, std::int64_t second, std::int64_t third, std::int64_t fourth) {
    store_tile<0>(sums, kTileCols * 4);
    store_tile<1>(sums + second, kTileCols * 4);
    store_tile<2>(sums + third, kTileCols * 4);
    store_tile<3>(sums + fourth, kTileCols * 4);
  }

  static void copy_tail(const Panel& p, const std::uint8_t* b, std::int64_t first, std::int64_t tail,
                        TileScratch& scratch) {
    std::memset(scratch.a, 0, sizeof(scratch.a));
    std::memset(scratch.b, 0, sizeof(scratch.b));
    for (std::int64_t r = 0; r < p.rows; ++r)
      std::memcpy(scratch.a + r * kTileSteps, p.a + r * p.a_stride + first,
                  static_cast<std::size_t>(tail) * 4);
    std::memcpy(scratch.b, b + first * 256, static_cast<std::size_t>(tail) * 256);
  }

  template <Compute kCompute>
  static void finish(const Panel& p, const TileScratch& scratch) {
    const Finish finish{.total = p.total, .c_stride = p.c_stride, .end = p.end,
                        .row_scale = p.row_scale, .row_stride = p.row_stride};
    for (std::int64_t r = 0; r < p.rows; ++r) {
      for (std::int64_t c = 0; c < kTileCols; c += 16) {
        const float* from = scratch.sums + r * kTileCols + c;
        typename Dot<kCompute>::Sum sum;
        std::memcpy(&sum, from, sizeof(sum));
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
