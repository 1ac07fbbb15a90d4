// SPDX-License-Identifier: Apache-2.0
// The bodies behind StageKernels, included once by each src/cpu/isa/stages_<level>.cpp and compiled
// with that level's flags.
#pragma once

#include "cpu/lanes.h"
#include "cpu/stage_kernels.h"

namespace moesaic {
namespace {

// Closed switch over the float storages; calls f.template operator()<Storage>().
template <typename Call>
MOESAIC_LANE void with_storage(DType dtype, Call&& call) {
  switch (dtype) {
    case DType::kF16:
      return call.template operator()<F16Storage>();
    case DType::kBF16:
      return call.template operator()<BF16Storage>();
    default:
      return call.template operator()<F32Storage>();
  }
}

void widen_row(DType from, const void* src, std::int64_t n, float* dst) {
  if (from == DType::kF8E4M3) {
    const auto* p = static_cast<const std::uint8_t*>(src);
    std::int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) store(dst + i, widen_e4m3(load<U8>(p + i)));
    if (i < n) {
      std::uint8_t tail[kWidth] = {};
      std::memcpy(tail, p + i, static_cast<std::size_t>(n - i));
      put_tail<F32Storage>(dst + i, widen_e4m3(load<U8>(tail)), n - i);
    }
    return;
  }
  with_storage(from, [&]<typename S>() {
    const auto* p = static_cast<const typename S::Element*>(src);
    std::int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) store(dst + i, S::get(p + i));
    if (i < n) put_tail<F32Storage>(dst + i, get_tail<S>(p + i, n - i), n - i);
  });
}

void narrow_row(DType to, const float* src, std::int64_t n, void* dst) {
  with_storage(to, [&]<typename S>() {
    auto* p = static_cast<typename S::Element*>(dst);
    std::int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) S::put(p + i, load<F>(src + i));
    if (i < n) put_tail<S>(p + i, get_tail<F32Storage>(src + i, n - i), n - i);
  });
}

MOESAIC_LANE F rounded(const F& x, DType to) {
  if (to == DType::kBF16) return widen_bf16(narrow_bf16(x));
  if (to == DType::kF16) return widen_f16(narrow_f16(x));
  return x;
}

void premultiply_row(DType round_to, float weight, const float* factor, std::int64_t n, float* x) {
  std::int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    F v = load<F>(x + i) * weight;
    if (factor) v = v * load<F>(factor + i);
    store(x + i, rounded(v, round_to));
  }
  if (i < n) {
    F v = get_tail<F32Storage>(x + i, n - i) * weight;
    if (factor) v = v * get_tail<F32Storage>(factor + i, n - i);
    put_tail<F32Storage>(x + i, rounded(v, round_to), n - i);
  }
}

// Magnitudes compare as integers, and every NaN is above infinity and so survives. Signed: that is
// one instruction where the unsigned maximum is a comparison and a blend.
MOESAIC_LANE I magnitude(const F& v) { return reinterpret_cast<I>(bits(v) & 0x7fffffffu); }
MOESAIC_LANE I larger(const I& a, const I& b) { return a > b ? a : b; }

float absmax_row(const float* x, std::int64_t n) {
  I top[4] = {};  // four chains hide the latency of one
  std::int64_t i = 0;
  for (; i + 4 * kWidth <= n; i += 4 * kWidth)
    for (int c = 0; c < 4; ++c) top[c] = larger(magnitude(load<F>(x + i + c * kWidth)), top[c]);
  for (; i < n; i += kWidth) {
    const F v = i + kWidth <= n ? load<F>(x + i) : get_tail<F32Storage>(x + i, n - i);
    top[0] = larger(magnitude(v), top[0]);
  }
  std::int32_t lane[kWidth];
  store(lane, larger(larger(top[0], top[1]), larger(top[2], top[3])));
  for (int l = 1; l < kWidth; ++l) lane[0] = lane[l] > lane[0] ? lane[l] : lane[0];
  float result;
  std::memcpy(&result, lane, sizeof result);
  return result;
}

float finite_absmax_row(const float* x, std::int64_t n) {
  F top{};
  std::int64_t i = 0;
  for (; i < n; i += kWidth) {
    const F v = i + kWidth <= n ? load<F>(x + i) : get_tail<F32Storage>(x + i, n - i);
    const F a = absolute(v);
    top = maximum(bits(a) < 0x7f800000u ? a : F{}, top);
  }
  return largest(top);
}

void to_e4m3_row(const float* x, float inverse, std::int64_t n, std::uint8_t* out) {
  std::int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(out + i, narrow_e4m3(load<F>(x + i) * inverse));
  if (i < n) {
    std::uint8_t tail[kWidth];
    store(tail, narrow_e4m3(get_tail<F32Storage>(x + i, n - i) * inverse));
    std::memcpy(out + i, tail, static_cast<std::size_t>(n - i));
  }
}

// Saturated to [-128, 127]; NaN goes through, and its conversion to a byte is 0.
MOESAIC_LANE F saturated(const F& v) {
  const F low = splat(-128.0f), high = splat(127.0f);
  const F raised = low > v ? low : v;
  return high < raised ? high : raised;
}
MOESAIC_LANE I8 truncated_i8(const F& quotient) {
  return __builtin_convertvector(__builtin_convertvector(saturated(quotient), I), I8);
}
// Halves away from zero: adding the number before 0.5 and truncating. (0.5 itself would carry
// 0.49999997 up to 1.)
MOESAIC_LANE I8 nearest_i8(const F& scaled) {
  const U half = (bits(scaled) & 0x80000000u) | 0x3effffffu;
  return truncated_i8(scaled + from_bits(half));
}

void to_i8_row(const float* x, float inverse, std::int64_t n, std::int8_t* out) {
  std::int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(out + i, nearest_i8(load<F>(x + i) * inverse));
  if (i < n) {
    std::int8_t tail[kWidth];
    store(tail, nearest_i8(get_tail<F32Storage>(x + i, n - i) * inverse));
    std::memcpy(out + i, tail, static_cast<std::size_t>(n - i));
  }
}

void to_i8_truncate_row(const float* x, float scale, std::int64_t n, std::int8_t* out) {
  if (scale == 0.0f) {
    std::memset(out, 0, static_cast<std::size_t>(n));
    return;
  }
  std::int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(out + i, truncated_i8(load<F>(x + i) / scale));
  if (i < n) {
    std::int8_t tail[kWidth];
    store(tail, truncated_i8(get_tail<F32Storage>(x + i, n - i) / scale));
    std::memcpy(out + i, tail, static_cast<std::size_t>(n - i));
  }
}

// All rows at once, some columns after the other, so that sums stay in registers and every row is a stream of its own.
void accumulate_rows(const RowSum& s) {
  with_storage(s.dtype, [&]<typename S>() {
    using Element = typename S::Element;
    constexpr std::int64_t kRegs = 4, kColumns = kRegs * kWidth;
    const auto at = [](const void* row, std::int64_t i) { return static_cast<const Element*>(row) + i; };
    std::int64_t i = 0;
    for (; i + kColumns <= s.n; i += kColumns) {
      F sum[kRegs];
      for (int c = 0; c < kRegs; ++c) sum[c] = load<F>(s.sum + i + c * kWidth);
      for (std::int64_t j = 0; j < s.count; ++j)
        for (int c = 0; c < kRegs; ++c)
          sum[c] = sum[c] + S::get(at(s.rows[j], i + c * kWidth)) * s.weights[j];
      for (int c = 0; c < kRegs; ++c) store(s.sum + i + c * kWidth, sum[c]);
      for (std::int64_t j = 0; j < s.next_count; ++j)
        for (std::int64_t e = 0; e < kColumns; e += 64 / static_cast<std::int64_t>(sizeof(Element)))
          __builtin_prefetch(at(s.next[j], i + e), 0, 2);
    }
    for (; i < s.n; i += kWidth) {
      const std::int64_t n = s.n - i < kWidth ? s.n - i : kWidth;
      F sum = get_tail<F32Storage>(s.sum + i, n);
      for (std::int64_t j = 0; j < s.count; ++j)
        sum = sum + get_tail<S>(at(s.rows[j], i), n) * s.weights[j];
      put_tail<F32Storage>(s.sum + i, sum, n);
    }
  });
}

void multiply_row(float factor, std::int64_t n, float* x) {
  std::int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(x + i, load<F>(x + i) * factor);
  if (i < n) put_tail<F32Storage>(x + i, get_tail<F32Storage>(x + i, n - i) * factor, n - i);
}

// kTokens x kExperts products at once: each keeps its own sixteen sums over the width in ascending
// order, so a product's bits do not depend on which others run beside it.
template <typename X, typename W, int kTokens, int kExperts>
MOESAIC_LANE void dot_tile(const DotBlock& b, std::int64_t token, std::int64_t expert) {
  const auto* x = static_cast<const typename X::Element*>(b.x) + token * b.x_stride;
  const auto* w = static_cast<const typename W::Element*>(b.w) + expert * b.w_stride;
  Sum sums[kTokens][kExperts];
  std::int64_t h = 0;
  for (; h + kLanes <= b.width; h += kLanes) {
    for (std::int64_t p = 0; p < kParts; ++p) {
      F column[kExperts];
      for (int e = 0; e < kExperts; ++e) column[e] = W::get(w + e * b.w_stride + h + p * kWidth);
      for (int t = 0; t < kTokens; ++t) {
        const F row = X::get(x + t * b.x_stride + h + p * kWidth);
        for (int e = 0; e < kExperts; ++e) sums[t][e].part[p] += row * column[e];
      }
    }
  }
  for (std::int64_t p = 0; h < b.width; ++p, h += kWidth) {
    const std::int64_t n = b.width - h < kWidth ? b.width - h : kWidth;
    for (int t = 0; t < kTokens; ++t) {
      const F row = get_tail<X>(x + t * b.x_stride + h, n);
      for (int e = 0; e < kExperts; ++e)
        sums[t][e].part[p] += row * get_tail<W>(w + e * b.w_stride + h, n);
    }
  }
  for (int t = 0; t < kTokens; ++t)
    for (int e = 0; e < kExperts; ++e)
      b.z[(token + t) * b.z_stride + expert + e] = total(sums[t][e]);
}

template <typename X, typename W, int kExperts>
void dot_strip(const DotBlock& b, std::int64_t expert) {
  std::int64_t t = 0;
  for (; t + 4 <= b.tokens; t += 4) dot_tile<X, W, 4, kExperts>(b, t, expert);
  for (; t < b.tokens; ++t) dot_tile<X, W, 1, kExperts>(b, t, expert);
}

void dots_block(const DotBlock& b) {
  with_storage(b.x_dtype, [&]<typename X>() {
    with_storage(b.w_dtype, [&]<typename W>() {
      std::int64_t e = 0;
      for (; e + 4 <= b.experts; e += 4) dot_strip<X, W, 4>(b, e);
      for (; e < b.experts; ++e) dot_strip<X, W, 1>(b, e);
    });
  });
}

// p[i] = function(z[i]).
template <typename Function>
MOESAIC_LANE void map_row(const float* z, std::int64_t n, float* p, Function&& function) {
  std::int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(p + i, function(load<F>(z + i)));
  if (i < n) put_tail<F32Storage>(p + i, function(get_tail<F32Storage>(z + i, n - i)), n - i);
}

float exponentials_row(const float* z, float subtract, std::int64_t n, float* p) {
  map_row(
      z, n,
      p, [&](const F& v) __attribute__((always_inline)) { return exponential(v - subtract); });
  Sum sum;
  std::int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) sum.part[i / kWidth % kParts] += load<F>(p + i);
  if (i < n) sum.part[i / kWidth % kParts] += get_tail<F32Storage>(p + i, n - i);
  return total(sum);
}

void sigmoids_row(const float* z, std::int64_t n, float* p) {
  map_row(
      z, n, p, [](const F& v) __attribute__((always_inline)) { return sigmoid(v); });
}

void sqrt_softplus_row(const float* z, std::int64_t n, float* p) {
  map_row(
      z, n, p, [](const F& v) __attribute__((always_inline)) { return softplus(v); });
  for (std::int64_t i = 0; i < n; ++i) p[i] = __builtin_sqrtf(p[i]);
}

constexpr StageKernels kStages{
    .widen = widen_row,
    .narrow = narrow_row,
    .premultiply = premultiply_row,
    .absmax = absmax_row,
    .finite_absmax = finite_absmax_row,
    .to_e4m3 = to_e4m3_row,
    .to_i8 = to_i8_row,
    .to_i8_truncate = to_i8_truncate_row,
    .accumulate = accumulate_rows,
    .multiply = multiply_row,
    .dots = dots_block,
    .exponentials = exponentials_row,
    .sigmoids = sigmoids_row,
    .sqrt_softplus = sqrt_softplus_row,
};

}  // namespace
}  // namespace moesaic
