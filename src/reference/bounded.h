// SPDX-License-Identifier: Apache-2.0
// A float64 value and how far a correct implementation may be from it. Every step of the oracle
// carries the error along ("running error analysis"); docs/numerics.md derives each rule.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "moesaic/types.h"
#include "numeric.h"

namespace moesaic::reference {

struct Bounded {
  double value = 0;
  double error = 0;  // |computed - value| <= error
};

// Half the distance between fp32 numbers next to 1: the relative error of one rounding.
inline constexpr double kUnit = 0x1p-24;
// Independent rounding errors add like a random walk. One rounding error is uniform within its
// limit, so a sum of them exceeds kConfidence * sqrt(sum of squared limits) with probability at
// most 2 exp(-3/2 kConfidence^2) = 8e-11 (docs/numerics.md).
inline constexpr double kConfidence = 4;

// `n` roundings in a row, in units of one rounding: never more than n.
inline double walk(double n) { return std::min(n, kConfidence * std::sqrt(n)); }
// A sum of independent errors from their sum and the sum of their squares.
inline double combine_errors(double sum, double sum_of_squares) {
  return std::min(sum, kConfidence * std::sqrt(sum_of_squares));
}

inline double load(const void* data, DType dtype, std::int64_t index) {
  switch (dtype) {
    case DType::kF32:
      return static_cast<const float*>(data)[index];
    case DType::kF16:
      return f16_to_float(static_cast<const std::uint16_t*>(data)[index]);
    case DType::kBF16:
      return bf16_to_float(static_cast<const std::uint16_t*>(data)[index]);
    case DType::kF8E4M3:
      return e4m3_to_float(static_cast<const std::uint8_t*>(data)[index]);
    case DType::kE8M0:
      return e8m0_to_float(static_cast<const std::uint8_t*>(data)[index]);
    case DType::kI8:
      return static_cast<const std::int8_t*>(data)[index];
    case DType::kU8:
      return static_cast<const std::uint8_t*>(data)[index];
    case DType::kI32:
      return static_cast<const std::int32_t*>(data)[index];
    case DType::kI64:
      return static_cast<double>(static_cast<const std::int64_t*>(data)[index]);
  }
  return 0;
}
inline double load(const Tensor& t, std::int64_t i) {
  return load(t.data, t.dtype, i * t.strides[0]);
}
inline double load(const Tensor& t, std::int64_t i, std::int64_t j) {
  return load(t.data, t.dtype, i * t.strides[0] + j * t.strides[1]);
}
inline double load(const Tensor& t, std::int64_t i, std::int64_t j, std::int64_t k) {
  return load(t.data, t.dtype, i * t.strides[0] + j * t.strides[1] + k * t.strides[2]);
}

// The nearest number of a float dtype.
inline double round_to(DType dtype, double v) {
  const auto f = static_cast<float>(v);
  if (dtype == DType::kBF16) return bf16_to_float(float_to_bf16(f));
  if (dtype == DType::kF16) return f16_to_float(float_to_f16(f));
  return f;
}
// How far rounding to `dtype` moves a number of magnitude up to `v`: half of its last place. bf16
// has 8 significant bits, f16 has 11, and f16's subnormals end at 2^-24.
inline double rounding_error(DType dtype, double v) {
  const double magnitude = std::abs(v);
  const int exponent = magnitude > 0x1p-126 ? std::ilogb(magnitude) : -126;
  switch (dtype) {
    case DType::kBF16:
      return std::ldexp(1.0, exponent - 8);
    case DType::kF16:
      return std::ldexp(1.0, std::max(exponent, -14) - 11);
    default:
      return std::ldexp(1.0, exponent - 24) + 0x1p-126;  // an FPU may flush subnormals
  }
}
// Rounding a bounded value. When the whole interval rounds to one number the result is exact;
// otherwise the error reaches to the furthest candidate: a decision near a tie may fall either way,
// and then by one step.
inline Bounded round_to(DType dtype, Bounded b) {
  if (!is_16bit(dtype)) return {b.value, b.error + rounding_error(DType::kF32, b.value)};
  const double nearest = round_to(dtype, b.value);
  if (b.error == 0) return {nearest, 0};
  const double low = round_to(dtype, b.value - b.error), high = round_to(dtype, b.value + b.error);
  return {nearest, std::max(high - nearest, nearest - low)};
}

}  // namespace moesaic::reference
