// SPDX-License-Identifier: Apache-2.0
// A strip: some rows of one expert against a few tiles of its weights. The same walk for every level;
// `Level` brings the dot products:
//   static constexpr bool has_b16();
//   template <Compute> static void native(const Panel&, const void* b, std::int64_t units);
//   template <Compute> static void unpack(const Segment&, void* out);
//   template <Compute> static bool fused(const Panel&, const Segment&);  // or false: not this one
//
// K is walked in chunks: A's rows of a chunk are converted once for all tiles of the strip, and a tile's
// chunk is multiplied with all rows while it is in the cache. Sums that are not finished stay in fp32
// (or int32) between chunks, so the order of additions of an element is that of K, wherever the cuts lie.
#pragma once

#include <algorithm>

#include "cpu/strip_epilogue.h"
#include "cpu/strip_rows.h"
#include "cpu/strip_unpack.h"

namespace moesaic {
namespace {

inline constexpr std::int64_t kChunkUnits = 256;        // with many rows
inline constexpr std::int64_t kFusedChunkUnits = 2048;  // with at most kFusedRows
inline constexpr std::int64_t kUnitPadding = 16;        // keeps rows off one cache set
inline constexpr std::int64_t kStripCols = kStripTiles * kTileCols;

// Two chunks' shapes in one buffer.
inline constexpr std::int64_t kRowUnits =
    std::max(kStripRows * (kChunkUnits + kUnitPadding), kFusedRows*(kFusedChunkUnits + kUnitPadding));
inline constexpr std::int64_t kRowSums = std::max(kStripRows * kChunkUnits, kFusedRows* kFusedChunkUnits);

// All of it on the stack of the thread that runs the strip: no allocation, and no scratch whose size
// would depend on the number of threads.
struct alignas(64) StripBuffers {
  std::uint32_t rows[kRowUnits];
  float total[kStripRows * kStripCols];
  float raw[kStripRows * kStripCols];
  std::int32_t row_sums[kRowSums];
  std::uint8_t plain[kChunkUnits * 256 + 512];   // a caller's weights, packed on the fly
  std::uint8_t unpacked[kChunkUnits * 256];
};

// A run of whole segments, or part of one.
struct Chunk {
  std::int64_t segment = 0, segments = 0;
  std::int64_t first_step = 0, steps = 0;  // of each segment; of a whole last one, at most
};

template <typename Level, Compute kCompute>
class StripRun {
 public:
  StripRun(const GemmCall& call, const Strip& strip, StripBuffers& buffers)
      : call_(call), layout_(*call.layout), stage_(*call.stage), strip_(strip), b_(buffers) {
    element_ = static_cast<std::int64_t>(size_of_element(stage_.a.dtype));
    for (std::int64_t r = 0; r < strip.rows; ++r) {
      const std::int64_t row =
          row_index(stage_.rows, stage_.a_row, stage_.top_k, strip.positions[r]);
      a_[r] = row_of(stage_.a, row, element_);
      const ActScaleView& view = stage_.a_scale;
      if (view.data != nullptr)
        a_scale_[r] = view.data + row * view.row_stride + strip.expert * view.expert_stride;
    }
    per_step_ = units_per_step<kCompute>(layout_.kind);
    set_code();
  }

  void run() {
    const bool few = strip_.rows <= kFusedRows && call_.packed != nullptr;
    const std::int64_t chunk_steps = (few ? kFusedChunkUnits : kChunkUnits) / per_step_;
    const std::int64_t whole = chunk_steps / layout_.segment_steps;
    for (std::int64_t segment = 0; segment < layout_.segments;) {
      if (whole > 0) {
        const std::int64_t count = std::min(whole, layout_.segments - segment);
        run_chunk({.segment = segment, .segments = count, .first_step = 0,
                   .steps = layout_.segment_steps});
        segment += count;
        continue;
      }
      const std::int64_t steps = layout_.steps(segment);
      for (std::int64_t s = 0; s < steps; s += chunk_steps)
        run_chunk({.segment = segment, .segments = 1, .first_step = s,
                   .steps = std::min(chunk_steps, steps - s)});
      ++segment;
    }
    finish();
  }

 private:
  static std::size_t size_of_element(DType dtype) {
    switch (dtype) {
      case DType::kF32: return 4;
      case DType::kF16:
      case DType::kBF16: return 2;
      default: return 1;
    }
  }

  void set_code() {
    const WeightFormat format = call_.spec->format;
    const bool zero = layout_.zero_points;
    switch (layout_.kind) {
      case PackKind::kF32: code_ = Code::kF32; break;
      case PackKind::kF16: code_ = Code::kF16; break;
      case PackKind::kB16Pair: code_ = Code::kB16; break;
      case PackKind::kB8Pair:
        code_ = format == WeightFormat::kE4M3 ? Code::kE4M3 : zero ? Code::kByteZero : Code::kByte;
        break;
      case PackKind::kB8Quad: code_ = Code::kByteQuad; break;
      case PackKind::kU4Pair: code_ = zero ? Code::kNibbleZero : Code::kNibble; break;
      case PackKind::kU4Quad: code_ = Code::kNibbleQuad; break;
    }
    // Without a tensor of zero points: the integer kernels subtract this one.
    implicit_zero_ = layout_.kind == PackKind::kU4Quad ? 8 : 128;
  }

  std::int64_t steps_of(const Chunk& chunk, std::int64_t i) const {
    return std::min(chunk.steps, layout_.steps(chunk.segment + i) - chunk.first_step);
  }

  void convert_rows(const Chunk& chunk) {
    a_stride_ = chunk.segments * chunk.steps * per_step_ + kUnitPadding;
    for (std::int64_t r = 0; r < strip_.rows; ++r) {
      for (std::int64_t i = 0; i < chunk.segments; ++i) {
        const std::int64_t steps = steps_of(chunk, i);
        const std::int64_t k0 = chunk.first_step * layout_.step_k;
        const std::int64_t count =
            std::min(layout_.length(chunk.segment + i) - k0, steps * layout_.step_k);
        const std::byte* in =
            a_[r] + ((chunk.segment + i) * layout_.segment_k + k0) * element_;
        std::uint32_t* out = b_.rows + r * a_stride_ + i * chunk.steps * per_step_;
        convert_row<kCompute>(stage_.a.dtype, in, count, steps * per_step_, out);
        if constexpr (kCompute == Compute::kByte) {
          std::int32_t& sum = b_.row_sums[r * chunk.segments + i];
          sum = (chunk.first_step == 0 ? 0 : sum) + sum_of_bytes(in, count);
        }
      }
    }
  }

  void run_chunk(const Chunk& chunk) {
    convert_rows(chunk);
    for (std::int64_t t = 0; t < strip_.tiles; ++t)
      for (std::int64_t i = 0; i < chunk.segments; ++i) run_segment(chunk, t, i);
  }

  void run_segment(const Chunk& chunk, std::int64_t t, std::int64_t i) {
    const std::int64_t index = chunk.segment + i;
    const std::int64_t steps = steps_of(chunk, i);
    const PackPart part{.expert = strip_.expert, .tile = strip_.first_tile + t, .segment = index,
                        .first_step = chunk.first_step, .steps = steps};
    const auto* header = reinterpret_cast<const std::uint8_t*>(b_.plain);
    const std::uint8_t* data = header + layout_.header_bytes;
    if (call_.packed != nullptr) {
      header = reinterpret_cast<const std::uint8_t*>(call_.packed->expert(strip_.expert)) +
               part.tile * layout_.tile_bytes + index * layout_.segment_bytes;
      data = header + layout_.header_bytes + chunk.first_step * layout_.step_bytes;
    } else {
      auto* out = reinterpret_cast<std::byte*>(b_.plain);
      pack_header(*call_.spec, layout_, stage_.b->plain, part, out);
      pack_steps(*call_.spec, layout_, stage_.b->plain, part, out + layout_.header_bytes);
    }
    const bool last = chunk.first_step + steps == layout_.steps(index);
    Panel panel{.a_stride = a_stride_, .rows = strip_.rows, .c_stride = kStripCols,
                .begin = chunk.first_step == 0 ? Begin::kZero : Begin::kRaw,
                .end = !last ? End::kRaw : index == 0 ? End::kFirst : End::kAdd};
    alignas(64) float scale[kTileCols];
    alignas(64) std::int32_t zero[kTileCols];
    if (last && layout_.scale != ScaleKind::kNone) {
      read_scales(header, scale);
      panel.scale = scale;
    }
    if (last && kCompute == Compute::kByte) {
      for (std::int64_t c = 0; c < kTileCols; ++c)
        zero[c] = layout_.zero_points ? header[layout_.zero_offset + c] : implicit_zero_;
      panel.zero = zero;
      panel.row_sum_stride = chunk.segments;
    }
    const bool grouped_rows =
        call_.spec->act_scale == ActScale::kGroup && stage_.a_scale.data != nullptr;
    if (last && grouped_rows)
      panel.row_scale_at =
          index * layout_.segment_k / call_.spec->act_group * stage_.a_scale.group_stride;

    const std::int64_t panels = (strip_.rows + kPanelRows - 1) / kPanelRows;
    if (panels > 1) look_ahead(chunk, t, i, panels, &panel);
    const Segment segment{.code = code_, .data = data, .steps = steps,
                          .zero = header + layout_.zero_offset,
                          .e2m1 = call_.spec->format == WeightFormat::kE2M1};
    const void* native = data;
    const bool in_registers = !is_native<kCompute>(code_) && strip_.rows <= kFusedRows;
    bool unpacked = is_native<kCompute>(code_);
    for (std::int64_t p = 0, row = 0; p < panels; ++p) {
      const std::int64_t count = (strip_.rows - row + panels - p - 1) / (panels - p);  // even shares
      panel.rows = count;
      panel.a = b_.rows + row * a_stride_ + i * chunk.steps * per_step_;
      panel.total = b_.total + row * kStripCols + t * kTileCols;
      panel.raw = layout_.segments == 1 ? panel.total : b_.raw + row * kStripCols + t * kTileCols;
      panel.row_scale = grouped_rows ? a_scale_ + row : nullptr;
      panel.row_sum = b_.row_sums + row * chunk.segments + i;
      if (p > 0) panel.ahead += panel.ahead_step * steps * per_step_;
      row += count;
      if (in_registers && Level::template fused<kCompute>(panel, segment)) continue;
      if (!unpacked) {
        unpack_in_parts(segment, panel, native);
        if (native == nullptr) continue;  // done part by part
        unpacked = true;
      }
      Level::template native<kCompute>(panel, native, steps * per_step_);
    }
  }

  // With several panels the same weights are multiplied several times: each panel fetches its share of
  // what follows, so that memory works while the arithmetic does.
  void look_ahead(const Chunk& chunk, std::int64_t t, std::int64_t i, std::int64_t panels,
                  Panel* panel) const {
    if (call_.packed == nullptr) return;
    const auto* base = reinterpret_cast<const std::uint8_t*>(call_.packed->expert(strip_.expert));
    std::int64_t tile = strip_.first_tile + t, segment = chunk.segment + i, step = chunk.first_step;
    if (i + 1 < chunk.segments) {
      ++segment;
    } else if (t + 1 < strip_.tiles) {
      ++tile;
      segment = chunk.segment;
    } else {  // the next chunk of the first tile
      tile = strip_.first_tile;
      step += chunk.steps;
      if (step >= layout_.segment_steps) {
        ++segment;
        step = 0;
      }
    }
    if (segment >= layout_.segments) return;
    panel->ahead = base + tile * layout_.tile_bytes + segment * layout_.segment_bytes +
                   (step == 0 ? 0 : layout_.header_bytes) + step * layout_.step_bytes;
    panel->ahead_step = (layout_.step_bytes / per_step_ + panels - 1) / panels;
  }

  // Few rows of a long chunk at a level that cannot unpack in registers: the scratch holds only part.
  void unpack_in_parts(const Segment& segment, Panel& panel, const void*& native) {
    const std::int64_t fits = kChunkUnits / per_step_;
    if (segment.steps <= fits) {
      Level::template unpack<kCompute>(segment, b_.unpacked);
      native = b_.unpacked;
      return;
    }
    native = nullptr;
    Segment part = segment;
    Panel p = panel;
    for (std::int64_t s = 0; s < segment.steps; s += fits) {
      part.data = segment.data + s * layout_.step_bytes;
      part.steps = std::min(fits, segment.steps - s);
      p.a = panel.a + s * per_step_;
      p.begin = s == 0 ? panel.begin : Begin::kRaw;
      p.end = s + fits < segment.steps ? End::kRaw : panel.end;
      Level::template unpack<kCompute>(part, b_.unpacked);
      Level::template native<kCompute>(p, b_.unpacked, part.steps * per_step_);
    }
  }

  void read_scales(const std::uint8_t* header, float* scale) const {
    switch (layout_.scale) {
      case ScaleKind::kColumns: std::memcpy(scale, header, sizeof(float) * kTileCols); return;
      case ScaleKind::kHalves: {
        float halves[2];
        std::memcpy(halves, header, sizeof(halves));
        for (std::int64_t c = 0; c < kTileCols; ++c) scale[c] = halves[c / 32];
        return;
      }
      case ScaleKind::kE8M0:
        for (std::int64_t c = 0; c < kTileCols; ++c) {
          const std::uint32_t e = header[c];  // 0 is 2^-127, which only a subnormal can hold
          scale[c] = std::bit_cast<float>(e == 0 ? 0x400000u : e == 255 ? 0x7fc00000u : e << 23);
        }
        return;
      case ScaleKind::kNone: return;
    }
  }

  void finish() {
    const SideTensors& side = stage_.b->side;
    const std::int64_t expert = strip_.expert;
    Epilogue e{.activation = stage_.activation, .gated = call_.spec->gated};
    const auto per_expert = [&](const Tensor& t, float otherwise) {
      return t.defined() ? float_at(t, expert * t.strides[0]) : otherwise;
    };
    float alpha = 1.0f;
    if (side.alpha.defined()) {
      alpha = float_at(side.alpha, expert * side.alpha.strides[0]);
      e.alpha = &alpha;
    }
    if (stage_.activation != nullptr) {
      e.values = {.alpha = per_expert(side.activation.alpha, stage_.activation->alpha),
                  .beta = per_expert(side.activation.beta, stage_.activation->beta),
                  .limit = per_expert(side.activation.limit, stage_.activation->limit)};
    }
    const bool grouped_rows = call_.spec->act_scale == ActScale::kGroup;
    const std::int64_t outputs = call_.spec->gated ? kTileCols / 2 : kTileCols;
    alignas(64) float bias[kTileCols];
    const Tensor& c = stage_.c;
    for (std::int64_t t = 0; t < strip_.tiles; ++t) {
      const std::int64_t tile = strip_.first_tile + t;
      if (side.bias.defined()) {
        for (std::int64_t i = 0; i < kTileCols; ++i) {
          const std::int64_t row = row_of_column(*call_.spec, tile, i);
          bias[i] = row < 0 ? 0.0f
                            : float_at(side.bias, expert * side.bias.strides[0] +
                                                          row * side.bias.strides[1]);
        }
        e.bias = bias;
      }
      for (std::int64_t r = 0; r < strip_.rows; ++r) {
        const std::int64_t position = strip_.positions[r];
        e.sums = b_.total + r * kStripCols + t * kTileCols;
        e.a_scale = grouped_rows ? nullptr : a_scale_[r];
        if (stage_.row_weights != nullptr)
          e.row_weight = stage_.row_weights + stage_.rows.row_slot[position];
        const std::int64_t row = row_index(stage_.rows, stage_.c_row, stage_.top_k, position);
        e.out = {.dtype = c.dtype,
                 .data = row_of(c, row, static_cast<std::int64_t>(size_of_element(c.dtype))),
                 .stride = c.strides[c.rank - 1], .columns = c.shape[c.rank - 1]};
        e.first_column = tile * outputs;
        finish_row(e);
      }
    }
  }

  const GemmCall& call_;
  const PackLayout& layout_;
  const GemmStage& stage_;
  const Strip& strip_;
  StripBuffers& b_;
  std::int64_t element_ = 1, per_step_ = 1, a_stride_ = 0;
  Code code_ = Code::kF32;
  std::int32_t implicit_zero_ = 0;
  const std::byte* a_[kStripRows];
  const float* a_scale_[kStripRows] = {};
};

// Which numbers are multiplied: the integers of int8 activations as such; in bf16 what it holds exactly
// on both sides, if this level has its dot product; else fp32.
inline Compute compute_of(const WeightSpec& spec, DType a, bool has_b16) {
  if (spec.act == ActFormat::kI8) return Compute::kByte;
  const bool activations = a == DType::kBF16 || a == DType::kF8E4M3;
  const bool weights = spec.format != WeightFormat::kF32 && spec.format != WeightFormat::kF16;
  return has_b16 && activations && weights ? Compute::kB16 : Compute::kF32;
}

template <typename Level>
void run_strip(const GemmCall& call, const Strip& strip) {
  StripBuffers buffers;
  switch (compute_of(*call.spec, call.stage->a.dtype, Level::has_b16())) {
    case Compute::kF32: StripRun<Level, Compute::kF32>(call, strip, buffers).run(); return;
    case Compute::kB16:
      if constexpr (Level::has_b16())
        StripRun<Level, Compute::kB16>(call, strip, buffers).run();
      return;
    case Compute::kByte: StripRun<Level, Compute::kByte>(call, strip, buffers).run(); return;
  }
}

}  // namespace
}  // namespace moesaic
