// SPDX-License-Identifier: Apache-2.0
#include "checkpoint/convert.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "check.h"
#include "numeric.h"

namespace moesaic {
namespace {

constexpr float kTiny = 1e-10f;  // the floor of an absmax, as the activation quantizers have it

bool is_plain(WeightFormat f) {
  return f == WeightFormat::kF32 || f == WeightFormat::kF16 || f == WeightFormat::kBF16;
}

// Integer code of element (n, k) of dense rows.
int nibble(const std::uint8_t* row, std::int64_t k) { return (row[k / 2] >> (k % 2 * 4)) & 0xf; }

float decode(WeightFormat format, const std::byte* row, std::int64_t k) {
  const auto* u8 = reinterpret_cast<const std::uint8_t*>(row);
  switch (format) {
    case WeightFormat::kE4M3:
      return e4m3_to_float(u8[k]);
    case WeightFormat::kI8:
      return static_cast<float>(static_cast<std::int8_t>(u8[k]));
    case WeightFormat::kU8:
      return static_cast<float>(u8[k]);
    case WeightFormat::kU4:
      return static_cast<float>(nibble(u8, k));
    case WeightFormat::kE2M1:
      return kE2M1[nibble(u8, k)];
    default:
      return 0;  // plain formats never come here
  }
}

float load_float(const Tensor& t, std::int64_t offset) {
  if (t.dtype == DType::kF32) return t.as<const float>()[offset];
  const std::uint16_t h = t.as<const std::uint16_t>()[offset];
  return t.dtype == DType::kBF16 ? bf16_to_float(h) : f16_to_float(h);
}

// Scale cell (i, j) of the dense [1, grid_n, grid_k] that this directory always makes.
float scale_at(const WeightSpec& spec, const Tensor& scale, std::int64_t i, std::int64_t j) {
  const std::int64_t at = i * spec.scale.grid_k + j;
  return spec.e8m0_scales ? e8m0_to_float(scale.as<const std::uint8_t>()[at])
                          : scale.as<const float>()[at];
}

int zero_at(const WeightSpec& spec, const Tensor& zero, std::int64_t n, std::int64_t j) {
  const auto* z = zero.as<const std::uint8_t>();
  if (spec.format != WeightFormat::kU4) return z[n * spec.scale.grid_k + j];
  return (z[n / 2 * spec.scale.grid_k + j] >> (n % 2 * 4)) & 0xf;
}

void store_zero(const WeightSpec& spec, Tensor& zero, std::int64_t n, std::int64_t j, int value) {
  auto* z = zero.as<std::uint8_t>();
  if (spec.format != WeightFormat::kU4) {
    z[n * spec.scale.grid_k + j] = static_cast<std::uint8_t>(value);
    return;
  }
  std::uint8_t& byte = z[n / 2 * spec.scale.grid_k + j];
  byte = static_cast<std::uint8_t>(n % 2 == 0 ? value : byte | value << 4);  // n even comes first
}

// Nearest e2m1 code, ties to the even mantissa; beyond 6 saturates.
std::uint8_t to_e2m1(float v) {
  const float a = std::fabs(v);
  int code = 7;
  // Midpoints between neighbours; a tie goes to the code whose last bit is 0.
  constexpr float kMid[7] = {0.25f, 0.75f, 1.25f, 1.75f, 2.5f, 3.5f, 5.0f};
  for (int i = 0; i < 7; ++i) {
    if (a < kMid[i] || (a == kMid[i] && i % 2 == 0)) {
      code = i;
      break;
    }
  }
  return static_cast<std::uint8_t>(code | (std::signbit(v) ? 8 : 0));
}

// One cell's scale and zero point from its extremes.
struct CellCode {
  float scale = 1;
  int zero = 0;
  std::uint8_t e8m0 = 127;
};

CellCode choose_code(const WeightSpec& spec, float low, float high) {
  const float absmax = std::max(-low, high);
  CellCode c{.zero = spec.implicit_zero()};
  switch (spec.format) {
    case WeightFormat::kE4M3:
      c.scale = std::max(absmax, kTiny) / kE4M3Max;
      break;
    case WeightFormat::kI8:
      c.scale = std::max(absmax, kTiny) / 127.0f;
      break;
    case WeightFormat::kE2M1: {
      // OCP MX: the shared exponent is that of the largest element less e2m1's largest exponent, 2.
      int exponent = 0;
      std::frexp(std::max(absmax, 0x1p-120f), &exponent);
      const int shared = std::clamp(exponent - 1 - 2, -127, 127);
      c.e8m0 = static_cast<std::uint8_t>(shared + 127);
      c.scale = e8m0_to_float(c.e8m0);
      break;
    }
    default: {  // kU4, kU8
      const int top = spec.format == WeightFormat::kU4 ? 15 : 255;
      if (spec.zero_points) {
        low = std::min(low, 0.0f);  // 0 must have a code
        high = std::max(high, 0.0f);
        c.scale = std::max(high - low, kTiny) / static_cast<float>(top);
        c.zero = std::clamp(static_cast<int>(std::lround(-low / c.scale)), 0, top);
      } else {
        // One more code below zero than above.
        c.scale = std::max(
            {-low / static_cast<float>(c.zero), high / static_cast<float>(top - c.zero), kTiny});
      }
    }
  }
  return c;
}

std::uint8_t encode(WeightFormat format, float v, const CellCode& c) {
  const float q = v / c.scale;
  const auto clamped = [&](int low, int high, int offset) {
    return static_cast<std::uint8_t>(
        static_cast<int>(std::clamp(std::nearbyint(q) + static_cast<float>(offset),
                                    static_cast<float>(low), static_cast<float>(high))));
  };
  if (std::isnan(q)) return format == WeightFormat::kE4M3 ? 0x7f : 0;  // integers have no NaN
  switch (format) {
    case WeightFormat::kE4M3:
      return float_to_e4m3(q);
    case WeightFormat::kI8:
      return static_cast<std::uint8_t>(
          static_cast<std::int8_t>(std::clamp(std::nearbyint(q), -127.0f, 127.0f)));
    case WeightFormat::kU8:
      return clamped(0, 255, c.zero);
    case WeightFormat::kU4:
      return clamped(0, 15, c.zero);
    default:
      return to_e2m1(q);
  }
}

// Copies scales (and zero points) into the finer grid of `to`.
void refine(const WeightSpec& from, const WeightSpec& to, const GemmWeights& one, GemmWeights& out,
            Arena& arena) {
  const ScaleGrid& a = from.scale;
  const ScaleGrid& b = to.scale;
  if (a.grid_n == b.grid_n && a.grid_k == b.grid_k && a.group_n == b.group_n &&
      a.group_k == b.group_k)
    return;
  out.scale = arena.tensor(one.scale.dtype, {1, b.grid_n, b.grid_k});
  const std::size_t size = size_of(one.scale.dtype);
  for (std::int64_t i = 0; i < b.grid_n; ++i)
    for (std::int64_t j = 0; j < b.grid_k; ++j)
      std::memcpy(out.scale.as<std::byte>() + static_cast<std::size_t>(i * b.grid_k + j) * size,
                  one.scale.as<const std::byte>() +
                      static_cast<std::size_t>(i * b.group_n / a.group_n * a.grid_k +
                                               j * b.group_k / a.group_k) *
                          size,
                  size);
  if (!to.zero_points) return;
  const std::int64_t rows = to.format == WeightFormat::kU4 ? to.n / 2 : to.n;
  out.zero_point = arena.tensor(DType::kU8, {1, rows, b.grid_k});
  for (std::int64_t n = 0; n < to.n; ++n)
    for (std::int64_t j = 0; j < b.grid_k; ++j)
      store_zero(to, out.zero_point, n, j,
                 zero_at(from, one.zero_point, n, j * b.group_k / a.group_k));
}

GemmWeights to_plain(const WeightSpec& spec, const std::vector<float>& values, Arena& arena) {
  GemmWeights out;
  out.weight = arena.tensor(weight_dtype(spec.format), {1, spec.n, spec.k});
  if (spec.format == WeightFormat::kF32) {
    std::memcpy(out.weight.data, values.data(), values.size() * sizeof(float));
    return out;
  }
  auto* h = out.weight.as<std::uint16_t>();
  for (std::size_t i = 0; i < values.size(); ++i)
    h[i] = spec.format == WeightFormat::kBF16 ? float_to_bf16(values[i]) : float_to_f16(values[i]);
  return out;
}

}  // namespace

bool same_numbers(const WeightSpec& from, const WeightSpec& to) {
  if (from.format != to.format || from.n != to.n || from.k != to.k) return false;
  if (is_plain(from.format)) return true;
  if (from.zero_points != to.zero_points || from.e8m0_scales != to.e8m0_scales) return false;
  const auto refines = [](std::int64_t coarse, std::int64_t fine, std::int64_t extent) {
    return coarse >= extent || coarse % fine == 0;
  };
  return refines(from.scale.group_n, to.scale.group_n, from.n) &&
         refines(from.scale.group_k, to.scale.group_k, from.k);
}

std::vector<float> dequantize(const WeightSpec& spec, const GemmWeights& one) {
  std::vector<float> out(static_cast<std::size_t>(spec.n * spec.k));
  const Tensor& w = one.weight;
  float* at = out.data();
  if (is_plain(spec.format)) {
    for (std::int64_t n = 0; n < spec.n; ++n)
      for (std::int64_t k = 0; k < spec.k; ++k)
        *at++ = load_float(w, n * w.strides[1] + k * w.strides[2]);
    return out;
  }
  for (std::int64_t n = 0; n < spec.n; ++n) {
    const std::byte* row = w.as<const std::byte>() + n * w.strides[1];
    for (std::int64_t k = 0; k < spec.k; ++k) {
      const std::int64_t j = k / spec.scale.group_k;
      const float zero = static_cast<float>(spec.zero_points ? zero_at(spec, one.zero_point, n, j)
                                                             : spec.implicit_zero());
      *at++ = (decode(spec.format, row, k) - zero) *
              scale_at(spec, one.scale, n / spec.scale.group_n, j);
    }
  }
  return out;
}

GemmWeights quantize_weights(const WeightSpec& spec, const std::vector<float>& values,
                             Arena& arena) {
  if (is_plain(spec.format)) return to_plain(spec, values, arena);
  const ScaleGrid& g = spec.scale;
  GemmWeights out;
  out.weight = arena.tensor(weight_dtype(spec.format),
                            {1, spec.n, is_four_bit(spec.format) ? spec.k / 2 : spec.k});
  out.scale = arena.tensor(spec.e8m0_scales ? DType::kU8 : DType::kF32, {1, g.grid_n, g.grid_k});
  if (spec.zero_points)
    out.zero_point = arena.tensor(
        DType::kU8, {1, spec.format == WeightFormat::kU4 ? spec.n / 2 : spec.n, g.grid_k});

  for (std::int64_t i = 0; i < g.grid_n; ++i) {
    const std::int64_t n_end = std::min((i + 1) * g.group_n, spec.n);
    for (std::int64_t j = 0; j < g.grid_k; ++j) {
      const std::int64_t k_begin = j * g.group_k, k_end = std::min(k_begin + g.group_k, spec.k);
      float low = 0, high = 0;
      for (std::int64_t n = i * g.group_n; n < n_end; ++n)
        for (std::int64_t k = k_begin; k < k_end; ++k) {
          const float v = values[static_cast<std::size_t>(n * spec.k + k)];
          if (!std::isfinite(v)) continue;  // one bad weight must not spoil the scale of its cell
          low = std::min(low, v);
          high = std::max(high, v);
        }
      const CellCode code = choose_code(spec, low, high);
      if (spec.e8m0_scales)
        out.scale.as<std::uint8_t>()[i * g.grid_k + j] = code.e8m0;
      else
        out.scale.as<float>()[i * g.grid_k + j] = code.scale;
      for (std::int64_t n = i * g.group_n; n < n_end; ++n) {
        if (spec.zero_points) store_zero(spec, out.zero_point, n, j, code.zero);
        auto* row = out.weight.as<std::uint8_t>() + n * out.weight.strides[1];
        for (std::int64_t k = k_begin; k < k_end; ++k) {
          const std::uint8_t q =
              encode(spec.format, values[static_cast<std::size_t>(n * spec.k + k)], code);
          if (!is_four_bit(spec.format))
            row[k] = q;
          else if (k % 2 == 0)
            row[k / 2] = q;
          else
            row[k / 2] = static_cast<std::uint8_t>(row[k / 2] | q << 4);
        }
      }
    }
  }
  return out;
}

GemmWeights convert(const WeightSpec& from, const WeightSpec& to, const GemmWeights& one,
                    Arena& arena) {
  GemmWeights out = one;
  if (same_numbers(from, to)) {
    if (to.scale.has_scale) refine(from, to, one, out, arena);
  } else {
    const GemmWeights made = quantize_weights(to, dequantize(from, one), arena);
    out.weight = made.weight;
    out.scale = made.scale;
    out.zero_point = made.zero_point;
  }
  if (to.act_scale != ActScale::kTensorStatic) {
    out.input_scale = {};
  } else if (!out.input_scale.defined()) {
    unsupported(
        "act_scale tensor_static: the checkpoint has no input scales; use tensor_dynamic or a "
        "scheme with per-token scales");
  }
  return out;
}

}  // namespace moesaic
