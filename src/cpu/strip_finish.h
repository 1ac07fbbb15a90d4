// SPDX-License-Identifier: Apache-2.0
// Behind the sums of a tile: scales, bias, activation, routing weight, rounding, in fp32, and out.
#pragma once

#include "cpu/strip_activation.h"

namespace moesaic {
namespace {

// Sixteen floats to a line of which nothing has to be read first, and finally all of them visible to other threads.
inline bool can_stream([[maybe_unused]] const std::byte* to) {
#if defined(__AVX512F__)
  return reinterpret_cast<std::uintptr_t>(to) % sizeof(Floats) == 0;
#else
  return false;
#endif
}
#if defined(__AVX512F__)
MOESAIC_INLINE void stream(std::byte* to, Floats x) {
  _mm512_stream_ps(reinterpret_cast<float*>(to), (__m512)x);
}
inline void end_streams() { _mm_sfence(); }
#else
MOESAIC_INLINE void stream(std::byte*, Floats) {}
inline void end_streams() {}
#endif

inline std::size_t size_of_element(DType dtype) {
  switch (dtype) {
    case DType::kF32: return 4;
    case DType::kF16:
    case DType::kBF16: return 2;
    default: return 1;
  }
}

// 16 columns of a row into an element type. A row's full runs are stored as they are; what sticks out
// or is strided goes element by element.
template <DType kDtype>
struct StoreAs {
  using Element = std::conditional_t<kDtype == DType::kF32, float, std::uint16_t>;
  MOESAIC_INLINE static void store(std::byte* to, std::int64_t stride, std::int64_t count, Floats x) {
    Element values[16];
    if constexpr (kDtype == DType::kF32) {
      if (stride == 1 && count >= 16) return (void)std::memcpy(to, &x, sizeof(x));
      std::memcpy(values, &x, sizeof(x));
    } else {
      Halves halves;
      if constexpr (kDtype == DType::kF16)
        halves = to_f16(x);
      else
        halves = to_bf16(x);
      if (stride == 1 && count >= 16) return (void)std::memcpy(to, &halves, sizeof(halves));
      std::memcpy(values, &halves, sizeof(halves));
    }
    auto* out = reinterpret_cast<Element*>(to);
    for (std::int64_t i = 0; i < 16 && i < count; ++i) out[i * stride] = values[i];
  }
};

// Everything of a strip that its tiles share: where the rows go, and by what they are multiplied.
class StripEpilogue {
 public:
  // `row_scales`: one factor per row; null entries or pointer: none.
  StripEpilogue(const GemmCall& call, const Strip& strip, const float* const* row_scales)
      : call_(call), strip_(strip), side_(call.stage->b->side), c_(call.stage->c) {
    const GemmStage& stage = *call.stage;
    const auto element = static_cast<std::int64_t>(size_of_element(c_.dtype));
    for (std::int64_t r = 0; r < strip.rows; ++r) {
      const std::int64_t position = strip.positions[r];
      out_[r] = row_of(c_, row_index(stage.rows, stage.c_row, stage.top_k, position), element);
      scale_[r] = row_scales != nullptr && row_scales[r] != nullptr ? *row_scales[r] : 1.0f;
      weight_[r] =
          stage.row_weights != nullptr ? stage.row_weights[stage.rows.row_slot[position]] : 1.0f;
    }
    // Slots are megabytes that nobody reads before the sum over them; kept out of the caches, they leave those to
    // weights, and no line of them is fetched in order to be overwritten.
    streams_ = c_.dtype == DType::kF32 && stage.activation == nullptr;
    alpha_ = per_expert(side_.alpha, 1.0f);
    if (stage.activation != nullptr)
      values_ = {.alpha = per_expert(side_.activation.alpha, stage.activation->alpha),
                 .beta = per_expert(side_.activation.beta, stage.activation->beta),
                 .limit = per_expert(side_.activation.limit, stage.activation->limit)};
  }

  ~StripEpilogue() {
    if (streams_) end_streams();
  }
  StripEpilogue(const StripEpilogue&) = delete;
  StripEpilogue& operator=(const StripEpilogue&) = delete;

  // Tile `t` of the strip; sums [rows][64] at `stride`, weight scales applied.
  void finish(std::int64_t t, const float* sums, std::int64_t stride) const {
    switch (c_.dtype) {
      case DType::kF32: return rows<DType::kF32>(t, sums, stride);
      case DType::kF16: return rows<DType::kF16>(t, sums, stride);
      default: return rows<DType::kBF16>(t, sums, stride);
    }
  }

 private:
  float per_expert(const Tensor& t, float otherwise) const {
    return t.defined() ? float_at(t, strip_.expert * t.strides[0]) : otherwise;
  }

  template <DType kDtype>
  void rows(std::int64_t t, const float* sums, std::int64_t stride) const {
    const std::int64_t tile = strip_.first_tile + t;
    const bool gated = call_.spec->gated;
    alignas(64) float bias[kTileCols];
    if (side_.bias.defined()) read_bias(tile, bias);
    const std::int64_t column = tile * (gated ? kTileCols / 2 : kTileCols);
    const std::int64_t c_stride = c_.strides[c_.rank - 1], count = c_.shape[c_.rank - 1] - column;
    constexpr auto kElement = static_cast<std::int64_t>(sizeof(typename StoreAs<kDtype>::Element));
    const ActivationSpec* activation = call_.stage->activation;
    for (std::int64_t r = 0; r < strip_.rows; ++r, sums += stride) {
      Floats x[4];
      const Floats scale = all(scale_[r]), alpha = all(alpha_), weight = all(weight_[r]);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) x[i] = load16(sums + 16 * i) * scale * alpha;
      if (side_.bias.defined()) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) x[i] = x[i] + load16(bias + 16 * i);
      }
      std::byte* out = out_[r] + column * c_stride * kElement;
      if (gated) {
        const Floats h0 = gated16(activation->kind, x[0], x[2], values_);
        const Floats h1 = gated16(activation->kind, x[1], x[3], values_);
        StoreAs<kDtype>::store(out, c_stride, count, h0 * weight);
        StoreAs<kDtype>::store(out + 16 * c_stride * kElement, c_stride, count - 16, h1 * weight);
        continue;
      }
      if (kDtype == DType::kF32 && streams_ && c_stride == 1 && count >= kTileCols && can_stream(out)) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) stream(out + 64 * i, x[i] * weight);
        continue;
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        if (activation != nullptr) x[i] = plain16(activation->kind, x[i]);
        StoreAs<kDtype>::store(out + 16 * i * c_stride * kElement, c_stride, count - 16 * i,
                               x[i] * weight);
      }
    }
  }

  void read_bias(std::int64_t tile, float* bias) const {
    for (std::int64_t i = 0; i < kTileCols; ++i) {
      const std::int64_t row = row_of_column(*call_.spec, tile, i);
      bias[i] = row < 0 ? 0.0f
                        : float_at(side_.bias, strip_.expert * side_.bias.strides[0] +
                                                   row * side_.bias.strides[1]);
    }
  }

  const GemmCall& call_;
  const Strip& strip_;
  const SideTensors& side_;
  const Tensor& c_;
  bool streams_ = false;
  float alpha_ = 1.0f;
  ActivationValues values_{};
  std::byte* out_[kStripRows];
  float scale_[kStripRows], weight_[kStripRows];
};

}  // namespace
}  // namespace moesaic
