// SPDX-License-Identifier: Apache-2.0
// A strip: some rows of one expert against a few tiles of its weights. The same walk for every level;
// `Level` brings the dot products:
//   static constexpr bool has_b16();
//   template <Compute> static constexpr std::int64_t panel_rows(Code);  // that one call takes at most
//   template <Compute> static constexpr std::int64_t streamed_rows();  // a panel of these reads weights once
//   template <Compute> static constexpr std::int64_t readable_rows();  // A's room is a multiple of it
//   template <Compute> static constexpr bool can_fuse();               // unpacks in registers
//   static constexpr OddScales odd_scales();
//   template <Compute> static void native(const Panel&, const Segments&);  // units ready in memory
//   template <Compute> static void fused(const Panel&, const Segments&);   // packed
//   template <Compute> static void unpack(const Segments& one, void* out);
//
// A's rows are read where they lie, if they are what is multiplied and keep one distance; else they are
// converted once, for as much of K as fits (for all of it, unless K is very long): a chunk.
// A tile's chunk is multiplied with all rows piece by piece, so that the piece stays in the cache from one
// panel of rows to the next. A level that can unpacks it in registers, in each panel again, in the shadow of
// the products. (Unpacking before the first panel lost 10 to 20%, leaving it behind in the first panel 3 to
// 8%: stores take the products' time.) Other levels unpack it to memory before the first panel.
// Sums that are not finished stay in fp32 (or int32) between pieces, so the order of additions of an
// element is that of K, wherever the cuts lie.
#pragma once

#include <algorithm>

#include "cpu/strip_buffers.h"
#include "cpu/strip_finish.h"
#include "cpu/strip_rows.h"
#include "cpu/strip_unpack.h"

namespace moesaic {
namespace {

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
    const std::int64_t most = Level::template panel_rows<kCompute>(code_);
    panels_ = (strip.rows + most - 1) / most;
  }

  void run() {
    const Chunk all{.segment = 0, .segments = layout_.segments, .first_step = 0,
                    .steps = layout_.segment_steps};
    constexpr std::int64_t kRoom = Level::template readable_rows<kCompute>();
    const std::int64_t rows = (strip_.rows + kRoom - 1) / kRoom * kRoom;
    const PieceLimit limit{.units = kRowUnits / rows - kUnitPadding, .segments = kRowSegments / rows};
    std::int64_t chunks = 0;
    in_place_ = kRoom == 1 && rows_lie_well();
    for_each_piece(all, limit, [&](const Chunk&) { ++chunks; });
    c_stride_ = chunks == 1 ? kTileCols : kWaitingCols;
    const std::int64_t width = chunks == 1 ? strip_.tiles : kWaitingTiles;
    StripEpilogue epilogue(call_, strip_, grouped_rows_ ? nullptr : a_scale_);
    for (std::int64_t first = 0; first < strip_.tiles; first += width) {
      const std::int64_t last = std::min(first + width, strip_.tiles);
      for_each_piece(all, limit, [&](const Chunk& chunk) {
        if (chunks > 1 || first == 0) convert_rows(chunk);
        for (std::int64_t t = first; t < last; ++t) {
          if (kForecasts && chunks == 1 && t == std::max<std::int64_t>(0, last - kForecastTiles))
            look_forward(t);
          run_tile(chunk, t, chunks == 1 ? 0 : t - first);
          if (chunks == 1) epilogue.finish(t, b_.total, c_stride_);
        }
      });
      for (std::int64_t t = first; t < last && chunks > 1; ++t)
        epilogue.finish(t, b_.total + (t - first) * kTileCols, c_stride_);
    }
  }

 private:
  static constexpr bool kFuses = Level::template can_fuse<kCompute>();
  // Integer products take half as long as others, so their waiting counts twice: bf16 gained nothing from it.
  static constexpr bool kForecasts = kCompute == Compute::kByte;

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
        if (layout_.scale != ScaleKind::kE8M0) break;
        if (Level::odd_scales() == OddScales::kAsTheyLie) code_ = Code::kE2M1Bytes;
        if (Level::odd_scales() == OddScales::kFolded) code_ = Code::kE2M1Scaled;
        break;
      case PackKind::kU4Quad: code_ = Code::kNibbleQuad; break;
    }
    // Integer sums begin at -zero point * sum of the row's activations: with one zero point for all, a
    // number per row.
    implicit_zero_ = zero ? 1 : layout_.kind == PackKind::kU4Quad ? 8 : 128;
  }

  std::int64_t steps_of(const Chunk& chunk, std::int64_t i) const {
    return std::min(chunk.steps, layout_.steps(chunk.segment + i) - chunk.first_step);
  }

  // Cuts a chunk into runs of whole segments, or, where one is longer than the limit, into parts: of a
  // multiple of 16 steps, since some levels add up 16 at a time.
  template <typename Body>
  void for_each_piece(const Chunk& chunk, const PieceLimit& limit, const Body& body) const {
    const std::int64_t most = limit.units / per_step_ / 16 * 16;
    const std::int64_t whole = std::min(most / chunk.steps, limit.segments);
    for (std::int64_t i = 0; i < chunk.segments;) {
      Chunk piece{.segment = chunk.segment + i, .segments = 1, .first_step = chunk.first_step,
                  .steps = chunk.steps};
      if (whole > 0) {
        piece.segments = std::min(whole, chunk.segments - i);
        body(piece);
        i += piece.segments;
        continue;
      }
      const std::int64_t steps = steps_of(chunk, i);
      for (std::int64_t s = 0; s < steps; s += most) {
        piece.first_step = chunk.first_step + s;
        piece.steps = std::min(most, steps - s);
        body(piece);
      }
      ++i;
    }
  }

  // Rows of units already, at one distance, and not all in the same cache sets.
  bool rows_lie_well() {
    const DType native = kCompute == Compute::kF32   ? DType::kF32
                         : kCompute == Compute::kB16 ? DType::kBF16
                                                     : DType::kI8;
    if (stage_.a.dtype != native || layout_.segment_k % layout_.step_k != 0 ||
        layout_.k % layout_.step_k != 0 || reinterpret_cast<std::uintptr_t>(a_[0]) % sizeof(Unit) != 0)
      return false;
    const std::int64_t distance = strip_.rows > 1 ? a_[1] - a_[0] : 0;
    if (distance % static_cast<std::int64_t>(sizeof(Unit)) != 0) return false;
    if (strip_.rows > 2 && distance % 4096 == 0) return false;
    for (std::int64_t r = 2; r < strip_.rows; ++r)
      if (a_[r] - a_[r - 1] != distance) return false;
    a_stride_ = distance / static_cast<std::int64_t>(sizeof(Unit));
    return true;
  }

  void convert_rows(const Chunk& chunk) {
    if (!in_place_) a_stride_ = chunk.segments * chunk.steps * per_step_ + kUnitPadding;
    const std::int64_t k0 = chunk.first_step * layout_.step_k;
    // Segments that nothing is counted or looked up for, and that end with a step, are one run: groups of 32 took
    // twice the time apart.
    const bool apart = kCompute == Compute::kByte || grouped_rows_ ||
                       chunk.steps * layout_.step_k != layout_.segment_k;
    const std::int64_t joined = apart ? 1 : chunk.segments;
    for (std::int64_t r = 0; r < strip_.rows; ++r) {
      for (std::int64_t i = 0; i < chunk.segments; i += joined) {
        const std::int64_t segment = chunk.segment + i, last = i + joined - 1;
        const std::int64_t steps = (joined - 1) * chunk.steps + steps_of(chunk, last);
        const std::int64_t count =
            std::min((joined - 1) * layout_.segment_k + layout_.length(chunk.segment + last) - k0,
                     steps * layout_.step_k);
        const std::byte* in = a_[r] + (segment * layout_.segment_k + k0) * element_;
        Unit* out = b_.rows + r * a_stride_ + i * chunk.steps * per_step_;
        if (!in_place_) convert_row<kCompute>(stage_.a.dtype, in, count, steps * per_step_, out);
        const std::int64_t at = r * chunk.segments + i;
        if (kCompute == Compute::kByte && chunk.first_step == 0)  // enters with the first step
          b_.row_begins[at] = -implicit_zero_ * sum_of_bytes(in, layout_.length(segment));
        if (grouped_rows_)
          b_.row_scales[at] =
              a_scale_[r][segment * layout_.segment_k / call_.spec->act_group *
                          stage_.a_scale.group_stride];
      }
    }
  }

  PieceLimit limit_of_pieces() const {
    if (call_.packed == nullptr) return kPlainPiece;
    if (!kFuses && !is_native<kCompute>(code_)) return kUnpackedPiece;
    if (streams()) return kStreamedPiece;
    return layout_.kind == PackKind::kU4Pair ? kFourBitPiece : kNativePiece;
  }

  void run_tile(const Chunk& chunk, std::int64_t t, std::int64_t slot) {
    if (code_ == Code::kE2M1Bytes && !grouped_rows_) {
      const std::int64_t tile = strip_.first_tile + t;
      near_ = call_.packed != nullptr
                  ? call_.packed->scales_are_near(strip_.expert, tile)
                  : scales_are_near(*call_.spec, layout_, stage_.b->plain, strip_.expert, tile);
    }
    for_each_piece(chunk, limit_of_pieces(),
                   [&](const Chunk& piece) { run_piece(chunk, piece, t, slot); });
  }

  // Whether weights are read once.
  bool streams() const { return strip_.rows <= Level::template streamed_rows<kCompute>(); }

  // The packed segments of a piece: in the layer, or made here from the caller's views.
  const std::uint8_t* packed_segments(const Chunk& piece, std::int64_t tile, std::int64_t* stride) {
    if (call_.packed != nullptr) {
      *stride = layout_.segment_bytes;
      return reinterpret_cast<const std::uint8_t*>(call_.packed->tile(strip_.expert, tile)) +
             piece.segment * layout_.segment_bytes;
    }
    *stride = layout_.header_bytes + piece.steps * layout_.step_bytes;
    for (std::int64_t i = 0; i < piece.segments; ++i) {
      auto* out = reinterpret_cast<std::byte*>(b_.plain) + i * *stride;
      const PackPart part{.expert = strip_.expert, .tile = tile, .segment = piece.segment + i,
                          .first_step = piece.first_step, .steps = steps_of(piece, i)};
      pack_header(*call_.spec, layout_, stage_.b->plain, part, out);
      pack_steps(*call_.spec, layout_, stage_.b->plain, part, out + layout_.header_bytes);
    }
    return b_.plain;
  }

  // The header in front of a piece's first; none in front of all.
  const std::uint8_t* header_before(const Chunk& piece, std::int64_t tile, const std::uint8_t* header) {
    if (piece.segment == 0) return nullptr;
    if (call_.packed != nullptr) return header - layout_.segment_bytes;
    const PackPart part{.expert = strip_.expert, .tile = tile, .segment = piece.segment - 1};
    pack_header(*call_.spec, layout_, stage_.b->plain, part, reinterpret_cast<std::byte*>(b_.before));
    return b_.before;
  }

  // `slot`: which of the waiting tiles' sums are this one's.
  void run_piece(const Chunk& chunk, const Chunk& piece, std::int64_t t, std::int64_t slot) {
    std::int64_t stride = 0;
    const std::uint8_t* header = packed_segments(piece, strip_.first_tile + t, &stride);
    Segments segments{.code = code_, .count = piece.segments, .steps = piece.steps,
                      .last_steps = steps_of(piece, piece.segments - 1),
                      .data = header + layout_.header_bytes, .data_stride = stride,
                      .zero = header + (folded() ? 0 : layout_.zero_offset),
                      .e2m1 = call_.spec->format == WeightFormat::kE2M1};
    if (call_.packed != nullptr) segments.data += piece.first_step * layout_.step_bytes;
    const bool first = piece.first_step == 0;
    const bool last = piece.first_step + segments.last_steps ==
                      layout_.steps(piece.segment + piece.segments - 1);
    Panel panel{.a_stride = a_stride_, .segment_units = piece.steps * per_step_,
                .c_stride = c_stride_,
                .begin = first ? Begin::kZero : Begin::kRaw,
                .end = !last ? End::kRaw : piece.segment == 0 ? End::kFirst : End::kAdd,
                .row_stride = chunk.segments};
    if (folded() || near_) {  // sums run through: as one segment of all of K, cut into pieces
      const bool ends = last && piece.segment + piece.segments == layout_.segments;
      panel.begin = piece.segment == 0 && first ? Begin::kZero : Begin::kRaw;
      panel.end = ends ? End::kFirst : End::kRaw;
      panel.sums = Sums::kThroughout;
      if (near_) {
        panel.header = header;
        panel.header_stride = stride;
        panel.header_before = first ? header_before(piece, strip_.first_tile + t, header) : header;
      }
    } else if (last && Level::odd_scales() == OddScales::kAsTheyLie &&
               (layout_.scale == ScaleKind::kE8M0 || layout_.scale == ScaleKind::kHalves)) {
      panel.header = header;
      panel.header_stride = stride;
    } else if (last) {
      panel.scale = b_.scales.read(layout_, header, stride, piece.segments, &panel.scale_stride);
    }
    if (kCompute == Compute::kByte && layout_.zero_points)
      panel.zero = b_.scales.read_zeros(segments.zero, stride, piece.segments);
    const std::int64_t segment_of_chunk = piece.segment - chunk.segment;
    const std::int64_t step_of_chunk =
        segment_of_chunk * chunk.steps + piece.first_step - chunk.first_step;
    const Unit* rows = b_.rows + step_of_chunk * per_step_;
    if (in_place_)
      rows = reinterpret_cast<const Unit*>(
          a_[0] + (piece.segment * layout_.segment_k + piece.first_step * layout_.step_k) * element_);
    const std::int64_t units = ((piece.segments - 1) * piece.steps + segments.last_steps) * per_step_;
    if (!streams()) look_ahead(chunk, piece, t, &panel);
    if (lines_.count > 0) panel.lines = &lines_;
    for (std::int64_t p = 0, row = 0; p < panels_; ++p) {
      panel.rows = (strip_.rows - row + panels_ - p - 1) / (panels_ - p);  // even shares
      panel.a = rows + row * a_stride_;
      panel.total = b_.total + row * c_stride_ + slot * kTileCols;
      panel.raw = layout_.segments == 1 || folded() || near_ ? panel.total
                                                    : b_.raw + row * c_stride_ + slot * kTileCols;
      panel.row_begin = b_.row_begins + row * chunk.segments + segment_of_chunk;
      if (grouped_rows_ && last)
        panel.row_scale = b_.row_scales + row * chunk.segments + segment_of_chunk;
      multiply(&panel, &segments, p);
      if (panel.ahead != nullptr) panel.ahead += panel.ahead_step * units;
      row += panel.rows;
    }
    if (folded()) mark_scales_above(252, header, stride, piece.segments, slot);
    if (code_ == Code::kE2M1Bytes) mark_scales_above(254, header, stride, piece.segments, slot);
  }

  bool folded() const { return code_ == Code::kE2M1Scaled; }

  void multiply(Panel* panel, Segments* segments, std::int64_t p) {
    if constexpr (kFuses) {
      if (!is_native<kCompute>(code_)) return Level::template fused<kCompute>(*panel, *segments);
    } else if (p == 0 && !is_native<kCompute>(code_)) {
      const std::int64_t bytes = segments->steps * per_step_ * 256;
      for (std::int64_t i = 0; i < segments->count; ++i)
        Level::template unpack<kCompute>(segments->at(i), b_.unpacked + i * bytes);
      view_unpacked(segments);
    }
    Level::template native<kCompute>(*panel, *segments);
  }

  void view_unpacked(Segments* segments) const {
    segments->data = b_.unpacked;
    segments->steps *= per_step_;
    segments->last_steps *= per_step_;
    segments->data_stride = segments->steps * 256;
    if (folded()) {
      segments->last_steps += (segments->count - 1) * segments->steps;
      segments->count = 1;
    }
  }

  // E8M0's NaN, and, folded, scales whose largest weight leaves bf16: NaN, which stays through later pieces.
  void mark_scales_above(std::uint8_t top, const std::uint8_t* header, std::int64_t stride,
                         std::int64_t count, std::int64_t slot) {
    typedef std::uint8_t Bytes __attribute__((vector_size(kTileCols)));
    Bytes largest{};
    for (std::int64_t i = 0; i < count; ++i) {
      Bytes next;
      std::memcpy(&next, header + i * stride, sizeof(next));
      largest = next > largest ? next : largest;
    }
    const Bytes over = (Bytes)(largest > top);
    std::uint64_t any[kTileCols / 8];
    std::memcpy(any, &over, sizeof(over));
    if ((any[0] | any[1] | any[2] | any[3] | any[4] | any[5] | any[6] | any[7]) == 0) return;
    for (std::int64_t c = 0; c < kTileCols; ++c)
      for (std::int64_t r = 0; r < strip_.rows && over[c] != 0; ++r)
        b_.total[r * c_stride_ + slot * kTileCols + c] = std::bit_cast<float>(0x7fc00000u);
  }

  // Behind the last tile this thread begins another strip, whose rows and weights are in no cache of its own. Beside
  // the last tiles, from `t` on, they are fetched.
  void look_forward(std::int64_t t) {
    if (strip_.forecast == nullptr || call_.packed == nullptr || streams()) return;
    Strip next;
    std::int64_t positions[kStripRows];
    if (!strip_.forecast->next(&next, positions)) return;
    if (next.expert < 0 || next.expert >= call_.spec->experts) return;
    next_tile_ = call_.packed->tile(next.expert, next.first_tile);
    std::int64_t lines = 0;
    for (std::int64_t r = 0; r < next.rows; ++r) {
      const std::byte* row =
          row_of(stage_.a, row_index(stage_.rows, stage_.a_row, stage_.top_k, positions[r]), element_);
      for (std::int64_t at = 0; at < layout_.k * element_ && lines < kMostLines; at += 64)
        b_.lines[lines++] = row + at;
    }
    const std::int64_t runs =
        layout_.segments * layout_.segment_steps * panels_ * (strip_.tiles - t) / LineFetch::kSteps;
    lines_ = {.lines = b_.lines, .count = lines, .at_once = lines / std::max<std::int64_t>(runs, 1) + 1};
  }

  // With several panels the same weights are multiplied several times: each panel fetches its share of
  // what follows, so that memory works while the arithmetic does. Within a tile pieces follow each other
  // in memory, and behind a tile the next one; only the last piece of a chunk of several knows better.
  void look_ahead(const Chunk& chunk, const Chunk& piece, std::int64_t t, Panel* panel) const {
    if (call_.packed == nullptr) return;
    std::int64_t tile = strip_.first_tile + t, segment = piece.segment, step = piece.first_step;
    step += piece.steps;
    if (step >= layout_.segment_steps) {
      segment += piece.segments;
      step = 0;
    }
    if (segment >= chunk.segment + chunk.segments ||
        (chunk.segments == 1 && step >= chunk.first_step + chunk.steps)) {
      if (t + 1 >= strip_.tiles && next_tile_ == nullptr) return;  // nothing known to follow
      ++tile;
      segment = chunk.segment;
      step = chunk.first_step;
    }
    const std::byte* from =
        tile < strip_.first_tile + strip_.tiles ? call_.packed->tile(strip_.expert, tile) : next_tile_;
    panel->ahead = reinterpret_cast<const std::uint8_t*>(from) + segment * layout_.segment_bytes +
                   (step == 0 ? 0 : layout_.header_bytes) + step * layout_.step_bytes;
    const std::int64_t units = piece.segments * piece.steps * per_step_ * panels_;
    const std::int64_t bytes =
        piece.segments * (layout_.header_bytes + piece.steps * layout_.step_bytes);
    panel->ahead_step = (bytes + units - 1) / units;
  }

  const GemmCall& call_;
  const PackLayout& layout_;
  const GemmStage& stage_;
  const Strip& strip_;
  StripBuffers& b_;
  std::int64_t element_ = 1, per_step_ = 1, a_stride_ = 0, c_stride_ = kTileCols, panels_ = 1;
  Code code_ = Code::kF32;
  std::int32_t implicit_zero_ = 1;
  const std::byte* next_tile_ = nullptr;
  LineFetch lines_;
  bool grouped_rows_ = false, in_place_ = false;
  bool near_ = false;  // this tile's E8M0 scales: sums run through, in the units of the scale at hand
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
