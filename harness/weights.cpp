// SPDX-License-Identifier: Apache-2.0
// Random weights in every scheme. The quantizers here are the harness's own: what a checkpoint's
// author would have run, not what the library does.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "check.h"
#include "divide.h"
#include "harness/data.h"
#include "numeric.h"
#include "scheme.h"

namespace moesaic::harness {
namespace {

// One product's tensors while they are filled, expert by expert.
struct Filling {
  const WeightSpec& spec;
  const LayerConfig& config;
  const WeightOptions& options;
  HostTensor* weight = nullptr;
  HostTensor* scale = nullptr;
  HostTensor* zero_point = nullptr;
  HostTensor* original = nullptr;
  std::int64_t cells_n = 1;  // scale cells along N as stored
};

bool four_bit(const WeightSpec& spec) {
  return spec.format == WeightFormat::kU4 || spec.format == WeightFormat::kE2M1;
}

void put_nibble(std::uint8_t* byte, bool high, unsigned value) {
  *byte = static_cast<std::uint8_t>(high ? (*byte & 0x0fu) | value << 4 : (*byte & 0xf0u) | value);
}

// Normal numbers whose size differs from row to row and from 32 columns to the next by up to 4, so
// that a neighbour's scale is a wrong one.
void random_matrix(std::int64_t n, std::int64_t k, std::uint64_t seed, float* out) {
  Rng rng(seed);
  const double size = (0.7 + 0.6 * rng.uniform()) / std::sqrt(static_cast<double>(k));
  const std::int64_t groups = ceil_div(k, 32);
  std::vector<double> column(static_cast<std::size_t>(groups));
  for (double& c : column) c = std::exp2(rng.uniform() - 0.5);
  for (std::int64_t i = 0; i < n; ++i) {
    const double row = size * std::exp2(rng.uniform() - 0.5);
    for (std::int64_t j = 0; j < k; ++j)
      *out++ = static_cast<float>(rng.normal() * row * column[static_cast<std::size_t>(j / 32)]);
  }
}

struct Cell {
  float scale = 1;
  int zero = 0;
};

// Scale and zero point that cover the numbers of one cell.
Cell choose_cell(const WeightSpec& spec, float low, float high) {
  const float largest = std::max({-low, high, 1e-8f});
  switch (spec.format) {
    case WeightFormat::kE4M3:
      return {largest / 448.0f, 0};
    case WeightFormat::kI8:
      return {largest / 127.0f, 0};
    case WeightFormat::kE2M1:
      return {std::exp2(static_cast<float>(std::ilogb(largest) - 2)), 0};
    case WeightFormat::kU8:
    case WeightFormat::kU4: {
      const int steps = spec.format == WeightFormat::kU4 ? 15 : 255;
      if (!spec.zero_points)
        return {largest / static_cast<float>(spec.implicit_zero() - 1), spec.implicit_zero()};
      const float scale = std::max(high - low, 1e-8f) / static_cast<float>(steps);
      const int zero = static_cast<int>(std::lround(-low / scale));
      return {scale, std::clamp(zero, 0, steps)};
    }
    default:
      return {};
  }
}

unsigned nearest_e2m1(float v) {
  unsigned best = 0;
  for (unsigned i = 1; i < 16; ++i)
    if (std::abs(kE2M1[i] - v) < std::abs(kE2M1[best] - v)) best = i;
  return best;
}

void store_weight(const Filling& f, std::uint8_t* row, std::int64_t k, float value,
                  const Cell& cell) {
  switch (f.spec.format) {
    case WeightFormat::kF32:
    case WeightFormat::kF16:
    case WeightFormat::kBF16:
      store_element(row, f.weight->dtype(), k, value);
      return;
    case WeightFormat::kE4M3:
      row[k] = float_to_e4m3(value / cell.scale);
      return;
    case WeightFormat::kI8:
      row[k] =
          static_cast<std::uint8_t>(std::clamp<long>(std::lround(value / cell.scale), -127, 127));
      return;
    case WeightFormat::kU8:
      row[k] = static_cast<std::uint8_t>(
          std::clamp<long>(std::lround(value / cell.scale) + cell.zero, 0, 255));
      return;
    case WeightFormat::kU4:
      put_nibble(row + k / 2, k % 2 != 0,
                 static_cast<unsigned>(
                     std::clamp<long>(std::lround(value / cell.scale) + cell.zero, 0, 15)));
      return;
    case WeightFormat::kE2M1:
      put_nibble(row + k / 2, k % 2 != 0, nearest_e2m1(value / cell.scale));
      return;
  }
}

void store_cell(const Filling& f, std::int64_t expert, std::int64_t cell_n, std::int64_t cell_k,
                const Cell& cell) {
  const ScaleGrid& grid = f.spec.scale;
  const std::int64_t at = (expert * f.cells_n + cell_n) * grid.grid_k + cell_k;
  if (f.spec.e8m0_scales)
    f.scale->as<std::uint8_t>()[at] = static_cast<std::uint8_t>(std::ilogb(cell.scale) + 127);
  else
    f.scale->as<float>()[at] = cell.scale;
  if (!f.zero_point->defined()) return;
  auto* zeros = f.zero_point->as<std::uint8_t>();
  if (f.spec.format == WeightFormat::kU4)
    put_nibble(zeros + (expert * (f.spec.n / 2) + cell_n / 2) * grid.grid_k + cell_k,
               cell_n % 2 != 0, static_cast<unsigned>(cell.zero));
  else
    zeros[at] = static_cast<std::uint8_t>(cell.zero);
}

void fill_quantized(const Filling& f, std::int64_t expert, std::uint64_t seed) {
  const WeightSpec& spec = f.spec;
  float* original = f.original->as<float>() + expert * spec.n * spec.k;
  random_matrix(spec.n, spec.k, seed, original);
  auto* bytes = f.weight->as<std::uint8_t>() + expert * spec.n * spec.row_bytes();
  if (!spec.scale.has_scale) {
    for (std::int64_t n = 0; n < spec.n; ++n)
      for (std::int64_t k = 0; k < spec.k; ++k)
        store_weight(f, bytes + n * spec.row_bytes(), k, original[n * spec.k + k], {});
    return;
  }
  const std::int64_t rows = ceil_div(spec.n, f.cells_n) <= spec.scale.group_n
                                ? spec.scale.group_n
                                : ceil_div(spec.n, f.cells_n);
  for (std::int64_t n0 = 0; n0 < spec.n; n0 += rows) {
    for (std::int64_t k0 = 0; k0 < spec.k; k0 += spec.scale.group_k) {
      const std::int64_t n1 = std::min(n0 + rows, spec.n),
                         k1 = std::min(k0 + spec.scale.group_k, spec.k);
      float low = 0, high = 0;
      for (std::int64_t n = n0; n < n1; ++n) {
        for (std::int64_t k = k0; k < k1; ++k) {
          low = std::min(low, original[n * spec.k + k]);
          high = std::max(high, original[n * spec.k + k]);
        }
      }
      const Cell cell = choose_cell(spec, low, high);
      store_cell(f, expert, n0 / rows, k0 / spec.scale.group_k, cell);
      for (std::int64_t n = n0; n < n1; ++n)
        for (std::int64_t k = k0; k < k1; ++k)
          store_weight(f, bytes + n * spec.row_bytes(), k, original[n * spec.k + k], cell);
    }
  }
}

// Storage straight from a pool: sensible numbers, no quantizer.
void fill_fast(const Filling& f, std::int64_t expert, std::uint64_t seed) {
  const WeightSpec& spec = f.spec;
  Rng rng(seed);
  constexpr std::int64_t kPool = 1 << 16;  // elements
  HostTensor pool(f.weight->dtype(), {kPool});
  const double size = 1 / std::sqrt(static_cast<double>(spec.k));
  for (std::int64_t i = 0; i < kPool; ++i) {
    if (is_float(pool.dtype()))
      store_element(pool.bytes().data(), pool.dtype(), i, rng.normal() * size);
    else if (pool.dtype() == DType::kF8E4M3)
      store_element(pool.bytes().data(), pool.dtype(), i, rng.normal() * 100.0);
    else
      pool.as<std::uint8_t>()[i] = static_cast<std::uint8_t>(rng.bits());
  }
  const auto total = static_cast<std::size_t>(spec.n * spec.row_bytes());
  std::byte* out = f.weight->bytes().data() + static_cast<std::size_t>(expert) * total;
  const std::size_t element = size_of(pool.dtype());
  for (std::size_t done = 0; done < total;) {
    const std::size_t skip = static_cast<std::size_t>(rng.below(kPool / 2)) * element;
    const std::size_t part = std::min(total - done, pool.bytes().size() - skip);
    std::memcpy(out + done, pool.bytes().data() + skip, part);
    done += part;
  }
  if (!spec.scale.has_scale) return;
  double range = 100;
  if (spec.format == WeightFormat::kI8 || spec.format == WeightFormat::kU8) range = 74;
  if (four_bit(spec)) range = spec.format == WeightFormat::kU4 ? 4.6 : 3;
  for (std::int64_t n = 0; n < f.cells_n; ++n)
    for (std::int64_t k = 0; k < spec.scale.grid_k; ++k)
      store_cell(f, expert, n, k,
                 {static_cast<float>(size / range * (0.5 + rng.uniform())), spec.implicit_zero()});
}

void fill_normal(HostTensor* t, std::int64_t first, std::int64_t count, std::uint64_t seed,
                 double size, double mean) {
  Rng rng(seed);
  for (std::int64_t i = first; i < first + count; ++i)
    store_element(t->bytes().data(), t->dtype(), i, mean + size * rng.normal());
}

class Maker {
 public:
  Maker(const LayerConfig& config, const WeightOptions& options, std::int64_t first,
        std::int64_t count)
      : config_(config), options_(options), first_(first), count_(count) {}

  WeightData make() {
    out_.weights.fc1 = product(Product::kFc1, &out_.fc1_original);
    out_.weights.fc2 = product(Product::kFc2, &out_.fc2_original);
    if (options_.parameters == ExpertParameters::kTensors) {
      out_.weights.activation = {.alpha = per_expert(0x61, 1.5, 0.2),
                                 .beta = per_expert(0x62, 0.8, 0.2),
                                 .limit = per_expert(0x63, 1.2, 0.25)};
    }
    return std::move(out_);
  }

 private:
  HostTensor* add(DType dtype, std::vector<std::int64_t> shape) {
    return &out_.storage.emplace_back(dtype, std::move(shape));
  }
  std::uint64_t seed(std::int64_t e, std::uint64_t what) const {
    const auto global = static_cast<std::uint64_t>(config_.local.first + first_ + e);
    return mix(mix(options_.seed, global), what);
  }
  Tensor per_expert(std::uint64_t what, double mean, double size) {
    HostTensor* t = add(DType::kF32, {count_});
    for (std::int64_t e = 0; e < count_; ++e) fill_normal(t, e, 1, seed(e, what), size, mean);
    return t->view();
  }

  GemmWeights product(Product which, HostTensor* original) {
    const WeightSpec spec = weight_spec(config_, which);
    const std::uint64_t what = which == Product::kFc1 ? 1 : 2;
    const ScaleGrid& grid = spec.scale;
    Filling f{.spec = spec, .config = config_, .options = options_};
    f.weight =
        add(weight_dtype(spec.format), {count_, spec.n, four_bit(spec) ? spec.k / 2 : spec.k});
    f.cells_n = grid.grid_n;
    std::vector<std::int64_t> scale_shape{count_, grid.grid_n, grid.grid_k};
    const WeightScale granularity = config_.quant.weight_scale != WeightScale::kDefault
                                        ? config_.quant.weight_scale
                                        : traits(spec.scheme).default_weight_scale;
    const bool by_tensor = granularity == WeightScale::kTensor;
    if (by_tensor) {
      const bool two = grid.grid_n == 2 && options_.tensor_scales == TensorScales::kTwo;
      f.cells_n = two ? 2 : 1;
      scale_shape = two ? std::vector<std::int64_t>{count_, 2} : std::vector<std::int64_t>{count_};
    } else if (granularity == WeightScale::kChannel) {
      scale_shape = {count_, grid.grid_n};
    }
    HostTensor none_scale, none_zero;
    f.scale = grid.has_scale ? add(spec.e8m0_scales ? DType::kU8 : DType::kF32, scale_shape)
                             : &none_scale;
    f.zero_point = &none_zero;
    if (spec.zero_points)
      f.zero_point =
          add(DType::kU8,
              {count_, spec.format == WeightFormat::kU4 ? spec.n / 2 : spec.n, grid.grid_k});
    f.original = original;
    if (options_.fill == Fill::kQuantized)
      *original = HostTensor(DType::kF32, {count_, spec.n, spec.k});
    for (std::int64_t e = 0; e < count_; ++e) {
      if (options_.fill == Fill::kQuantized)
        fill_quantized(f, e, seed(e, what));
      else
        fill_fast(f, e, seed(e, what));
    }
    GemmWeights w;
    w.weight = f.weight->view();
    w.scale = f.scale->view();
    w.zero_point = f.zero_point->view();
    if (options_.bias == Biases::kAll) {
      const DType dtype = config_.quant.scheme == Scheme::kF32 ? DType::kF32 : spec.dtype16;
      HostTensor* bias = add(dtype, {count_, spec.n});
      for (std::int64_t e = 0; e < count_; ++e)
        fill_normal(bias, e * spec.n, spec.n, seed(e, what + 10), 0.4, 0);
      w.bias = bias->view();
    }
    if (spec.act_scale == ActScale::kTensorStatic) {
      const bool shared = options_.static_scales == StaticScales::kShared;
      HostTensor* scale = add(DType::kF32, {shared ? 1 : count_});
      const double largest =
          (which == Product::kFc1 ? 5.0 : 8.0) / (spec.act_dtype == DType::kI8 ? 127.0 : 448.0);
      for (std::int64_t e = 0; e < scale->numel(); ++e) {
        Rng rng(shared ? mix(options_.seed, what + 20) : seed(e, what + 20));
        scale->as<float>()[e] = static_cast<float>(largest * (0.8 + 0.4 * rng.uniform()));
      }
      w.input_scale = scale->view();
    }
    if (options_.extras == Extras::kPrequantAlpha) {
      // fc1's factors are the same for every expert, fc2's are each expert's own: both layouts.
      const bool one = which == Product::kFc1;
      HostTensor* factors = one ? add(DType::kF32, {spec.k}) : add(DType::kF32, {count_, spec.k});
      if (one) fill_normal(factors, 0, spec.k, mix(options_.seed, 0x70), 0.15, 1);
      for (std::int64_t e = 0; e < count_ && !one; ++e)
        fill_normal(factors, e * spec.k, spec.k, seed(e, 0x71), 0.15, 1);
      w.prequant = factors->view();
      w.alpha = per_expert(what + 0x72, 1.1, 0.1);
    }
    return w;
  }

  const LayerConfig& config_;
  const WeightOptions& options_;
  std::int64_t first_, count_;
  WeightData out_;
};

}  // namespace

WeightData make_experts(const LayerConfig& config, const WeightOptions& options, std::int64_t first,
                        std::int64_t count) {
  return Maker(config, options, first, count).make();
}

WeightData make_weights(const LayerConfig& config, const WeightOptions& options) {
  const std::int64_t all = config.experts - config.local.first;
  return make_experts(config, options, 0, config.local.count > 0 ? config.local.count : all);
}

WeightData make_shared(const LayerConfig& config, const WeightOptions& options) {
  LayerConfig one = config;
  one.experts = one.top_k = 1;
  one.local = {};
  one.intermediate = config.shared_intermediate > 0 ? config.shared_intermediate
                                                    : config.shared_experts * config.intermediate;
  one.shared_experts = one.shared_intermediate = 0;
  WeightOptions other = options;
  other.seed = mix(options.seed, 0x5a);
  return make_experts(one, other, 0, 1);
}

RouterData make_router(const LayerConfig& config, RouterBias bias, std::uint64_t seed) {
  RouterData out;
  const bool on_z = bias == RouterBias::kLogits || bias == RouterBias::kBoth;
  const bool on_selection = bias == RouterBias::kSelection || bias == RouterBias::kBoth;
  const DType dtype = is_16bit(config.input_dtype) ? config.input_dtype : DType::kF32;
  HostTensor* w =
      &out.storage.emplace_back(dtype, std::vector<std::int64_t>{config.experts, config.hidden});
  fill_normal(w, 0, w->numel(), mix(seed, 1), 1.5 / std::sqrt(static_cast<double>(config.hidden)),
              0);
  out.weights.weight = w->view();
  const auto vector = [&](std::uint64_t what, double size) {
    HostTensor* t =
        &out.storage.emplace_back(DType::kF32, std::vector<std::int64_t>{config.experts});
    fill_normal(t, 0, config.experts, mix(seed, what), size, 0);
    return t->view();
  };
  if (on_z) out.weights.bias = vector(2, 0.5);
  if (on_selection) out.weights.selection_bias = vector(3, 0.1);
  return out;
}

DeviceWeights to_device(const LayerWeights& host, Device device) {
  DeviceWeights out;
  const auto move = [&](Tensor GemmWeights::*member, const GemmWeights& from, GemmWeights* to) {
    if (!(from.*member).defined()) return;
    to->*member = out.storage.emplace_back(DeviceTensor::from(from.*member, device)).view();
  };
  for (const auto member :
       {&GemmWeights::weight, &GemmWeights::scale, &GemmWeights::zero_point, &GemmWeights::bias,
        &GemmWeights::input_scale, &GemmWeights::prequant, &GemmWeights::alpha}) {
    move(member, host.fc1, &out.weights.fc1);
    move(member, host.fc2, &out.weights.fc2);
  }
  for (const auto member :
       {&ActivationWeights::alpha, &ActivationWeights::beta, &ActivationWeights::limit})
    if ((host.activation.*member).defined())
      out.weights.activation.*member =
          out.storage.emplace_back(DeviceTensor::from(host.activation.*member, device)).view();
  return out;
}

}  // namespace moesaic::harness
