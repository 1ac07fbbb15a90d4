// SPDX-License-Identifier: Apache-2.0
// A strip: some rows of one expert against a few tiles of its weights. The same walk for every level;
// `Level` brings the dot products:
//   static constexpr bool has_b16();
//   static constexpr bool can_fuse();       // unpacks in registers
//   static constexpr bool can_fold_e8m0();  // has Code::kE2M1Scaled
//   template <Compute> static void native(const Panel&, const Segments&);  // units ready in memory
//   template <Compute> static void fused(const Panel&, const Segments&);   // packed, at most kFusedRows
//   template <Compute> static void unpack(const Segments& one, void* out);
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

inline constexpr std::int64_t kChunkUnits = 256, kChunkSegments = 32;  // with many rows
inline constexpr std::int64_t kFusedChunkUnits = 2048, kFusedChunkSegments = 128;
inline constexpr std::int64_t kUnitPadding = 16;  // keeps rows off one cache set
inline constexpr std::int64_t kStripCols = kStripTiles * kTileCols;

// Either chunk's shape in one buffer.
inline constexpr std::int64_t kRowUnits =
    std::max(kStripRows * (kChunkUnits + kUnitPadding), kFusedRows*(kFusedChunkUnits + kUnitPadding));
inline constexpr std::int64_t kRowSegments =
    std::max(kStripRows * kChunkSegments, kFusedRows* kFusedChunkSegments);

// All of it on the stack of the thread that runs the strip: no allocation, and no scratch whose size
// would depend on the number of threads.
struct alignas(64) StripBuffers {
  std::uint32_t rows[kRowUnits];
  float total[kStripRows * kStripCols];
  float raw[kStripRows * kStripCols];
  std::int32_t row_sums[kRowSegments];
  float row_scales[kRowSegments];
  float scales[kFusedChunkSegments * kTileCols];
  std::int32_t zeros[kFusedChunkSegments * kTileCols];
  // A caller's weights, packed on the fly.
  std::uint8_t plain[kChunkUnits * 256 + kChunkSegments * (5 * kTileCols)];
  std::uint8_t unpacked[kChunkUnits * 256];
};

// A run of whole segments, or part of one.
struct Chunk {
  std::int64_t segment = 0, segments = 0;
  std::int64_t first_step = 0, steps = 0;  // of each segment; the last may have fewer
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
    grouped_rows_ =
        call_.spec->act_scale == ActScale::kGroup && stage_.a_scale.data != nullptr;
    set_code();
  }

  void run() {
    fused_ = Level::can_fuse() && strip_.rows <= kFusedRows;
    const bool long_chunks = strip_.rows <= kFusedRows && call_.packed != nullptr &&
                             (fused_ || is_native<kCompute>(code_));
    const std::int64_t chunk_steps = (long_chunks ? kFusedChunkUnits : kChunkUnits) / per_step_;
    const std::int64_t whole = std::min(chunk_steps / layout_.segment_steps,
                                        long_chunks ? kFusedChunkSegments : kChunkSegments);
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
      case PackKind::kU4Pair:
        code_ = zero ? Code::kNibbleZero : Code::kNibble;
        if (Level::can_fold_e8m0() && layout_.scale == ScaleKind::kE8M0) code_ = Code::kE2M1Scaled;
        break;
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
    const std::int64_t k0 = chunk.first_step * layout_.step_k;
    for (std::int64_t r = 0; r < strip_.rows; ++r) {
      for (std::int64_t i = 0; i < chunk.segments; ++i) {
        const std::int64_t segment = chunk.segment + i, steps = steps_of(chunk, i);
        const std::int64_t count =
            std::min(layout_.length(segment) - k0, steps * layout_.step_k);
        const std::byte* in = a_[r] + (segment * layout_.segment_k + k0) * element_;
        std::uint32_t* out = b_.rows + r * a_stride_ + i * chunk.steps * per_step_;
        convert_row<kCompute>(stage_.a.dtype, in, count, steps * per_step_, out);
        const std::int64_t at = r * chunk.segments + i;
        if constexpr (kCompute == Compute::kByte) b_.row_sums[at] = sum_of_bytes(in, count);
        if (grouped_rows_)
          b_.row_scales[at] =
              a_scale_[r][segment * layout_.segment_k / call_.spec->act_group *
                          stage_.a_scale.group_stride];
      }
    }
  }

  void run_chunk(const Chunk& chunk) {
    convert_rows(chunk);
    for (std::int64_t t = 0; t < strip_.tiles; ++t) run_tile(chunk, t);
  }

  // The packed segments of a chunk: in the layer, or made here from the caller's views.
  const std::uint8_t* packed_segments(const Chunk& chunk, std::int64_t tile, std::int64_t* stride) {
    if (call_.packed != nullptr) {
      *stride = layout_.segment_bytes;
      return reinterpret_cast<const std::uint8_t*>(call_.packed->expert(strip_.expert)) +
             tile * layout_.tile_bytes + chunk.segment * layout_.segment_bytes;
    }
    *stride = layout_.header_bytes + chunk.steps * layout_.step_bytes;
    for (std::int64_t i = 0; i < chunk.segments; ++i) {
      auto* out = reinterpret_cast<std::byte*>(b_.plain) + i * *stride;
      const PackPart part{.expert = strip_.expert, .tile = tile, .segment = chunk.segment + i,
                          .first_step = chunk.first_step, .steps = steps_of(chunk, i)};
      pack_header(*call_.spec, layout_, stage_.b->plain, part, out);
      pack_steps(*call_.spec, layout_, stage_.b->plain, part, out + layout_.header_bytes);
    }
    return b_.plain;
  }

  void run_tile(const Chunk& chunk, std::int64_t t) {
    std::int64_t stride = 0;
    const std::uint8_t* header = packed_segments(chunk, strip_.first_tile + t, &stride);
    Segments segments{.code = code_, .count = chunk.segments, .steps = chunk.steps,
                      .last_steps = steps_of(chunk, chunk.segments - 1),
                      .data = header + layout_.header_bytes, .data_stride = stride,
                      .zero = header + (folded() ? 0 : layout_.zero_offset),
                      .e2m1 = call_.spec->format == WeightFormat::kE2M1};
    if (call_.packed != nullptr) segments.data += chunk.first_step * layout_.step_bytes;
    const bool last = chunk.first_step + segments.last_steps ==
                      layout_.steps(chunk.segment + chunk.segments - 1);
    Panel panel{.a_stride = a_stride_, .segment_units = chunk.steps * per_step_,
                .c_stride = kStripCols,
                .begin = chunk.first_step == 0 ? Begin::kZero : Begin::kRaw,
                .end = !last ? End::kRaw : chunk.segment == 0 ? End::kFirst : End::kAdd,
                .row_stride = chunk.segments, .implicit_zero = implicit_zero_};
    if (folded()) {  // sums run through: as one segment of all of K, cut into chunks
      const bool ends = last && chunk.segment + chunk.segments == layout_.segments;
      panel.begin = chunk.segment == 0 && chunk.first_step == 0 ? Begin::kZero : Begin::kRaw;
      panel.end = ends ? End::kFirst : End::kRaw;
      panel.sums = Sums::kThroughout;
    } else if (last) {
      read_scales(header, stride, chunk.segments, &panel);
    }
    if (kCompute == Compute::kByte && layout_.zero_points) {
      for (std::int64_t i = 0; i < chunk.segments; ++i)
        for (std::int64_t c = 0; c < kTileCols; ++c)
          b_.zeros[i * kTileCols + c] = segments.zero[i * stride + c];
      panel.zero = b_.zeros;
    }
    const std::int64_t panels = (strip_.rows + kPanelRows - 1) / kPanelRows;
    const std::int64_t units = ((chunk.segments - 1) * chunk.steps + segments.last_steps) * per_step_;
    if (panels > 1) look_ahead(chunk, t, panels, &panel);
    if (!fused_) make_native(&segments);
    for (std::int64_t p = 0, row = 0; p < panels; ++p) {
      panel.rows = (strip_.rows - row + panels - p - 1) / (panels - p);  // even shares
      panel.a = b_.rows + row * a_stride_;
      panel.total = b_.total + row * kStripCols + t * kTileCols;
      panel.raw = layout_.segments == 1 || folded() ? panel.total
                                                    : b_.raw + row * kStripCols + t * kTileCols;
      panel.row_sum = b_.row_sums + row * chunk.segments;
      if (grouped_rows_ && last) panel.row_scale = b_.row_scales + row * chunk.segments;
      if (fused_ && !is_native<kCompute>(code_))
        Level::template fused<kCompute>(panel, segments);
      else
        Level::template native<kCompute>(panel, segments);
      if (panel.ahead != nullptr) panel.ahead += panel.ahead_step * units;
      row += panel.rows;
    }
    if (folded()) mark_huge_scales(header, stride, chunk.segments, t);
  }

  bool folded() const { return code_ == Code::kE2M1Scaled; }

  // E8M0's NaN, and scales whose largest weight leaves bf16: NaN, which stays through later chunks.
  void mark_huge_scales(const std::uint8_t* header, std::int64_t stride, std::int64_t count,
                        std::int64_t t) {
    typedef std::uint8_t Bytes __attribute__((vector_size(kTileCols)));
    Bytes largest{};
    for (std::int64_t i = 0; i < count; ++i) {
      Bytes next;
      std::memcpy(&next, header + i * stride, sizeof(next));
      largest = next > largest ? next : largest;
    }
    const Bytes over = (Bytes)(largest > 252);
    std::uint64_t any[kTileCols / 8];
    std::memcpy(any, &over, sizeof(over));
    if ((any[0] | any[1] | any[2] | any[3] | any[4] | any[5] | any[6] | any[7]) == 0) return;
    for (std::int64_t c = 0; c < kTileCols; ++c)
      for (std::int64_t r = 0; r < strip_.rows && over[c] != 0; ++r)
        b_.total[r * kStripCols + t * kTileCols + c] = std::bit_cast<float>(0x7fc00000u);
  }

  // Into units, in scratch, unless they are that already.
  void make_native(Segments* segments) {
    if (is_native<kCompute>(code_)) return;
    const std::int64_t bytes = segments->steps * per_step_ * 256;
    for (std::int64_t i = 0; i < segments->count; ++i)
      Level::template unpack<kCompute>(segments->at(i), b_.unpacked + i * bytes);
    segments->data = b_.unpacked;
    segments->data_stride = bytes;
    segments->steps *= per_step_;
    segments->last_steps *= per_step_;
    if (folded()) {
      segments->last_steps += (segments->count - 1) * segments->steps;
      segments->count = 1;
    }
  }

  // With several panels the same weights are multiplied several times: each panel fetches its share of
  // what follows, so that memory works while the arithmetic does.
  void look_ahead(const Chunk& chunk, std::int64_t t, std::int64_t panels, Panel* panel) const {
    if (call_.packed == nullptr) return;
    std::int64_t tile = strip_.first_tile + t, segment = chunk.segment, step = chunk.first_step;
    if (t + 1 < strip_.tiles) {
      ++tile;
    } else {  // the next chunk of the first tile
      tile = strip_.first_tile;
      step += chunk.steps;
      if (step >= layout_.segment_steps) {
        segment += chunk.segments;
        step = 0;
      }
    }
    if (segment >= layout_.segments) return;
    panel->ahead = reinterpret_cast<const std::uint8_t*>(call_.packed->expert(strip_.expert)) +
                   tile * layout_.tile_bytes + segment * layout_.segment_bytes +
                   (step == 0 ? 0 : layout_.header_bytes) + step * layout_.step_bytes;
    const std::int64_t units = chunk.steps * per_step_ * panels;
    panel->ahead_step = (layout_.header_bytes + chunk.steps * layout_.step_bytes + units - 1) / units;
  }

  void read_scales(const std::uint8_t* header, std::int64_t stride, std::int64_t count, Panel* panel) {
    panel->scale = layout_.scale == ScaleKind::kNone ? nullptr : b_.scales;
    panel->scale_stride = kTileCols;
    switch (layout_.scale) {
      case ScaleKind::kColumns:  // as they lie
        panel->scale = reinterpret_cast<const float*>(header);
        panel->scale_stride = stride / static_cast<std::int64_t>(sizeof(float));
        return;
      case ScaleKind::kHalves:
        for (std::int64_t i = 0; i < count; ++i) {
          float halves[2];
          std::memcpy(halves, header + i * stride, sizeof(halves));
          std::fill_n(b_.scales + i * kTileCols, kTileCols / 2, halves[0]);
          std::fill_n(b_.scales + i * kTileCols + kTileCols / 2, kTileCols / 2, halves[1]);
        }
        return;
      case ScaleKind::kE8M0:
        for (std::int64_t i = 0; i < count; ++i)
          for (std::int64_t c = 0; c < kTileCols; c += 16)
            e8m0_to_f32(header + i * stride + c, b_.scales + i * kTileCols + c);
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
        e.a_scale = grouped_rows_ ? nullptr : a_scale_[r];
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
  bool grouped_rows_ = false, fused_ = false;
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
