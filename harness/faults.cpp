// SPDX-License-Identifier: Apache-2.0
#include "harness/faults.h"

#include <algorithm>
#include <cstring>

#include "scheme.h"

namespace moesaic::harness {
namespace {

constexpr std::string_view kNames[kNumFaults] = {
    "none",           "tail_dropped", "neighbours_scale",  "nibbles_swapped",
    "zero_point_off", "bias_skipped", "gate_up_exchanged", "last_row_skipped"};
constexpr Fault kAll[] = {Fault::kTailDropped,   Fault::kNeighboursScale, Fault::kNibblesSwapped,
                          Fault::kZeroPointOff,  Fault::kBiasSkipped,     Fault::kGateUpExchanged,
                          Fault::kLastRowSkipped};

// The faults change what the views look at; the memory behind them belongs to WeightData::storage.
std::uint8_t* bytes(const Tensor& t) { return static_cast<std::uint8_t*>(t.data); }
std::size_t row_bytes(const Tensor& t) {
  return static_cast<std::size_t>(t.strides[static_cast<std::size_t>(t.rank - 2)]) *
         size_of(t.dtype);
}
bool four_bit(const WeightSpec& spec) {
  return spec.format == WeightFormat::kU4 || spec.format == WeightFormat::kE2M1;
}

// The last weight of every row of `w` becomes the number that stands for zero.
void drop_tail(const WeightSpec& spec, const GemmWeights& w) {
  for (std::int64_t row = 0; row < spec.experts * spec.n; ++row) {
    std::uint8_t* end = bytes(w.weight) + static_cast<std::size_t>(row + 1) * row_bytes(w.weight);
    if (!four_bit(spec)) {
      const std::size_t size = size_of(w.weight.dtype);
      std::memset(end - size, spec.implicit_zero(), size);
      continue;
    }
    unsigned zero = static_cast<unsigned>(spec.implicit_zero());
    if (spec.zero_points) {
      const std::int64_t e = row / spec.n, n = row % spec.n, groups = spec.scale.grid_k;
      const std::uint8_t pair =
          bytes(w.zero_point)[(e * (spec.n / 2) + n / 2) * groups + groups - 1];
      zero = n % 2 == 0 ? pair & 15u : pair >> 4;
    }
    end[-1] = static_cast<std::uint8_t>((end[-1] & 0x0fu) | zero << 4);  // odd k: the high nibble
  }
}

// Zero points are u8: subtract one instead of adding where it would not fit.
void move_zero_point(const WeightSpec& spec, GemmWeights* w) {
  const bool nibbles = spec.format == WeightFormat::kU4;
  for (std::int64_t i = 0; i < w->zero_point.numel(); ++i) {
    std::uint8_t& z = bytes(w->zero_point)[i];
    if (!nibbles) {
      z = z == 255 ? 254 : static_cast<std::uint8_t>(z + 1);
      continue;
    }
    const unsigned low = z & 15u, high = z >> 4;
    z = static_cast<std::uint8_t>((low == 15 ? 14 : low + 1) | (high == 15 ? 14 : high + 1) << 4);
  }
}

// Without a tensor of zero points: every stored number one higher is the zero point one lower.
void move_numbers(const WeightSpec& spec, const GemmWeights& w) {
  for (std::int64_t i = 0; i < w.weight.numel(); ++i) {
    std::uint8_t& b = bytes(w.weight)[i];
    if (spec.format == WeightFormat::kU8) {
      b = b == 255 ? 255 : static_cast<std::uint8_t>(b + 1);
      continue;
    }
    const unsigned low = b & 15u, high = b >> 4;
    b = static_cast<std::uint8_t>(std::min(low + 1, 15u) | std::min(high + 1, 15u) << 4);
  }
}

// Row n of every expert gets the scale of row n + 1 (of expert e + 1 when there is one per expert).
void shift_scales(const Tensor& scale) {
  const std::int64_t experts = scale.shape[0], rows = scale.rank > 1 ? scale.shape[1] : 1;
  const std::int64_t rest = scale.rank > 2 ? scale.shape[2] : 1;
  const std::size_t size = static_cast<std::size_t>(rest) * size_of(scale.dtype);
  const std::vector<std::uint8_t> old(
      bytes(scale), bytes(scale) + static_cast<std::size_t>(experts * rows) * size);
  const std::int64_t cells = rows > 1 ? rows : experts;
  for (std::int64_t i = 0; i < experts * rows; ++i) {
    const std::int64_t first = i / cells * cells, next = first + (i - first + 1) % cells;
    std::memcpy(bytes(scale) + static_cast<std::size_t>(i) * size,
                old.data() + static_cast<std::size_t>(next) * size, size);
  }
}

void exchange_gate_and_up(const WeightSpec& spec, const GemmWeights& w) {
  const auto swap_rows = [&](const Tensor& t) {
    if (!t.defined() || t.rank < 2 || t.shape[1] != spec.n) return;
    const std::size_t size = static_cast<std::size_t>(t.strides[1]) * size_of(t.dtype);
    for (std::int64_t e = 0; e < spec.experts; ++e) {
      std::uint8_t* first =
          bytes(t) + static_cast<std::size_t>(e * t.strides[0]) * size_of(t.dtype);
      for (std::int64_t i = 0; i < spec.n / 2; ++i)
        std::swap_ranges(first + static_cast<std::size_t>(spec.gate_row(i)) * size,
                         first + static_cast<std::size_t>(spec.gate_row(i) + 1) * size,
                         first + static_cast<std::size_t>(spec.up_row(i)) * size);
    }
  };
  swap_rows(w.weight);
  swap_rows(w.bias);
}

}  // namespace

std::string_view name(Fault fault) { return kNames[static_cast<int>(fault)]; }
std::span<const Fault> all_faults() { return kAll; }

bool applies(Fault fault, const Case& c) {
  const LayerConfig config = layer_config(c);
  const WeightSpec fc1 = weight_spec(config, Product::kFc1);
  switch (fault) {
    case Fault::kNone:
    case Fault::kTailDropped:
      return true;
    case Fault::kNeighboursScale:
      return fc1.scale.has_scale && (fc1.scale.grid_n > 1 || c.shape.experts > 1);
    case Fault::kNibblesSwapped:
      return four_bit(fc1);
    case Fault::kZeroPointOff:
      return fc1.format == WeightFormat::kU4 || fc1.format == WeightFormat::kU8;
    case Fault::kBiasSkipped:
      return c.bias == Biases::kAll;
    case Fault::kGateUpExchanged:
      return is_gated(c.activation.kind);
    case Fault::kLastRowSkipped:
      return c.tokens > 0;
  }
  return false;
}

void apply(Fault fault, const Case& c, WeightData& data, HostTensor& ids) {
  const LayerConfig config = layer_config(c);
  const WeightSpec fc1 = weight_spec(config, Product::kFc1),
                   fc2 = weight_spec(config, Product::kFc2);
  GemmWeights& w = data.weights.fc1;
  switch (fault) {
    case Fault::kNone:
      return;
    case Fault::kTailDropped:
      drop_tail(fc2, data.weights.fc2);
      return;
    case Fault::kNeighboursScale:
      shift_scales(w.scale);
      return;
    case Fault::kNibblesSwapped:
      for (std::int64_t i = 0; i < w.weight.numel(); ++i) {
        std::uint8_t& b = bytes(w.weight)[i];
        b = static_cast<std::uint8_t>(b << 4 | b >> 4);
      }
      return;
    case Fault::kZeroPointOff:
      if (w.zero_point.defined())
        move_zero_point(fc1, &w);
      else
        move_numbers(fc1, w);
      return;
    case Fault::kBiasSkipped:
      std::memset(data.weights.fc2.bias.data, 0,
                  static_cast<std::size_t>(data.weights.fc2.bias.numel()) *
                      size_of(data.weights.fc2.bias.dtype));
      return;
    case Fault::kGateUpExchanged:
      exchange_gate_and_up(fc1, w);
      return;
    case Fault::kLastRowSkipped: {
      const std::int64_t k = ids.shape()[1], first = (ids.shape()[0] - 1) * k;
      for (std::int64_t i = first; i < first + k; ++i)
        store_element(ids.bytes().data(), ids.dtype(), i, -1);
      return;
    }
  }
}

}  // namespace moesaic::harness
