// SPDX-License-Identifier: Apache-2.0
// One product of the SM90 family as its tests want it: random tensors, a float64 reference on the
// host, poisoned outputs with guard bands. Stages are built by hand, so nothing but the kernels is
// under test.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cuda/gemm.h"
#include "gemm_sm90_case.h"
#include "numeric.h"
#include "reference/activation.h"

namespace moesaic::cuda {

// --- device memory
template <typename T>
class OnDevice {
 public:
  explicit OnDevice(const std::vector<T>& host) : count_(host.size()) {
    check_cuda(cudaMalloc(&data_, count_ * sizeof(T) + 16), "cudaMalloc");
    if (count_ > 0)
      check_cuda(cudaMemcpy(data_, host.data(), count_ * sizeof(T), cudaMemcpyHostToDevice),
                 "copy");
  }
  ~OnDevice() { (void)cudaFree(data_); }
  OnDevice(const OnDevice&) = delete;
  T* get() const { return static_cast<T*>(data_); }
  std::vector<T> host() const {
    std::vector<T> out(count_);
    check_cuda(cudaMemcpy(out.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost), "copy");
    return out;
  }

 private:
  void* data_ = nullptr;
  std::size_t count_;
};

using Bytes = std::vector<std::uint8_t>;

inline float read_element(const std::uint8_t* data, DType dtype, std::size_t i) {
  std::uint16_t h = 0;
  float f = 0;
  switch (dtype) {
    case DType::kF8E4M3:
      return e4m3_to_float(data[i]);
    case DType::kF16:
      std::memcpy(&h, data + 2 * i, 2);
      return f16_to_float(h);
    case DType::kBF16:
      std::memcpy(&h, data + 2 * i, 2);
      return bf16_to_float(h);
    default:
      std::memcpy(&f, data + 4 * i, 4);
      return f;
  }
}
inline void write_element(std::uint8_t* data, DType dtype, std::size_t i, float v) {
  const std::uint16_t h = dtype == DType::kF16 ? float_to_f16(v) : float_to_bf16(v);
  if (dtype == DType::kF8E4M3)
    data[i] = float_to_e4m3(v);
  else if (dtype == DType::kF32)
    std::memcpy(data + 4 * i, &v, 4);
  else
    std::memcpy(data + 2 * i, &h, 2);
}

inline constexpr std::uint8_t kPoison = 0x5b;
inline constexpr std::size_t kGuard = 512;

class Problem {
 public:
  Problem(const Case& c, unsigned seed) : c_(c), random_(seed) {
    make_rows();
    make_tensors();
  }

  // C in e4m3, of what the case would have stored: with static scales, or in groups of 128.
  struct Quantize {
    ActScale granularity = ActScale::kDefault;  // kDefault: no
    std::vector<float> scale;                   // static: one, or one for each expert
  };
  struct Quantized {
    Bytes c;
    std::vector<float> scale;  // of groups
    bool operator==(const Quantized&) const = default;
  };

  // Runs with a tactic and returns all bytes of C, guards included.
  Bytes run(int tactic, const DeviceTraits& device) { return run(tactic, device, {}).c; }
  Quantized run(int tactic, const DeviceTraits& device, const Quantize& quantize) {
    const bool quantizes = quantize.granularity != ActScale::kDefault;
    const DType out_dtype = quantizes ? DType::kF8E4M3 : c_.out;
    const std::size_t c_bytes = c_rows_ * c_stride_ * size_of(out_dtype);
    OnDevice<Tile> tiles(tiles_);
    OnDevice<std::int32_t> count(std::vector<std::int32_t>{num_tiles_}), slots(slots_);
    OnDevice<std::uint8_t> a(a_), w(w_), bias(bias_), out(Bytes(c_bytes + 2 * kGuard, kPoison));
    OnDevice<float> w_scale(w_scale_), a_scale(a_scale_), weights(row_weights_), alpha(alpha_),
        given(quantize.scale), scale(no_scales());
    OnDevice<std::int32_t> counter(std::vector<std::int32_t>{0});
    const Device on{DeviceType::kCuda, 0};
    WeightOperand b{.spec = spec_};
    b.plain.weight = Tensor::contiguous(w.get(), c_.dtype, {c_.experts, c_.n, c_.k}, on);
    if (c_.scales == Scales::kTensor)
      b.plain.scale = Tensor::contiguous(w_scale.get(), DType::kF32, {c_.experts}, on);
    if (c_.scales == Scales::kHalves)
      b.plain.scale = Tensor::contiguous(w_scale.get(), DType::kF32, {c_.experts, 2}, on);
    if (c_.scales == Scales::kChannel)
      b.plain.scale = Tensor::contiguous(w_scale.get(), DType::kF32, {c_.experts, c_.n, 1}, on);
    if (c_.scales == Scales::kBlock)
      b.plain.scale = Tensor::contiguous(w_scale.get(), DType::kF32,
                                         {c_.experts, spec_.scale.grid_n, spec_.scale.grid_k}, on);
    if (c_.bias >= 0)
      b.side.bias =
          Tensor::contiguous(bias.get(), static_cast<DType>(c_.bias), {c_.experts, c_.n}, on);
    if (c_.alpha) b.side.alpha = Tensor::contiguous(alpha.get(), DType::kF32, {c_.experts}, on);
    GemmStage stage;
    stage.rows = {.tiles = tiles.get(),
                  .num_tiles = count.get(),
                  .row_slot = c_.layout == Layout::kBatched ? nullptr : slots.get(),
                  .max_tiles = static_cast<std::int64_t>(tiles_.size()),
                  .tile_rows = c_.tile_rows,
                  .positions = positions_,
                  .slot_count = c_.tokens * c_.top_k};
    stage.a = Tensor::contiguous(a.get(), c_.dtype, {a_rows_, c_.k}, on);
    if (c_.scales != Scales::kNone)
      stage.a_scale = {a_scale.get(), a_scale_row_, a_scale_group_, 0};
    stage.a_row = c_.a_row;
    stage.top_k = c_.top_k;
    stage.b = &b;
    stage.activation = c_.activation >= 0 ? &activation_ : nullptr;
    stage.row_weights = c_.row_weights ? weights.get() : nullptr;
    stage.c = Tensor::contiguous(out.get() + kGuard, out_dtype, {c_rows_, columns_}, on);
    if (quantizes) {
      const auto scales = static_cast<std::int64_t>(quantize.scale.size());
      stage.quantizer = {.granularity = quantize.granularity,
                         .round_to = c_.out,
                         .static_scale = Tensor::contiguous(given.get(), DType::kF32, {scales}, on),
                         .scale = scale.get() + groups(),
                         .scale_row_stride = groups()};
    }
    stage.c.strides = {c_stride_, c_.c_column};
    stage.c_row = c_.c_row;
    stage.next_task = deals_ ? counter.get() : nullptr;
    stage.tactic = tactic;
    EXPECT_TRUE(!quantizes || family_sm90().gemm1_quantizes(stage, device)) << c_.text();
    family_sm90().run(stage, device, nullptr);
    check_cuda(cudaDeviceSynchronize(), c_.text().c_str());
    dealt_ = counter.host()[0];
    return {out.host(), scale.host()};
  }

  // From the next run on, a counter deals out the tasks; and how many it has dealt in the last run.
  void deal_tasks() { deals_ = true; }
  std::int32_t tasks_dealt() const { return dealt_; }

  // Norm-wise and per element; every byte that is not an expected element must be poison.
  ::testing::AssertionResult check(const Bytes& got) {
    if (expected_.empty()) make_reference();
    double error = 0, norm = 0;
    std::size_t wrong = 0;
    std::string first;
    const std::size_t width = size_of(c_.out);
    std::vector<bool> written(got.size(), false);
    for (std::size_t row = 0; row < static_cast<std::size_t>(c_rows_); ++row) {
      if (!row_written_[row]) continue;
      for (std::int64_t i = 0; i < columns_; ++i) {
        const std::size_t at = row * c_stride_ + i * c_.c_column;
        const double ref = expected_[row * columns_ + i];
        const double v = read_element(got.data() + kGuard, c_.out, at);
        for (std::size_t byte = 0; byte < width; ++byte) written[kGuard + at * width + byte] = true;
        error += (v - ref) * (v - ref);
        norm += ref * ref;
        const double bound = tolerance() * (std::abs(ref) + scale_[row * columns_ + i]);
        if (!(std::abs(v - ref) <= bound)) {
          if (wrong++ == 0)
            first = "row " + std::to_string(row) + " column " + std::to_string(i) + ": " +
                    std::to_string(v) + " instead of " + std::to_string(ref);
        }
      }
    }
    for (std::size_t i = 0; i < got.size(); ++i) {
      if (!written[i] && got[i] != kPoison)
        return ::testing::AssertionFailure()
               << "byte " << i << " of C was written and should not be";
    }
    const double relative = norm > 0 ? std::sqrt(error / norm) : std::sqrt(error);
    if (wrong > 0 || !(relative < tolerance()))
      return ::testing::AssertionFailure()
             << wrong << " elements wrong, relative error " << relative << "; " << first;
    return ::testing::AssertionSuccess();
  }
  const WeightSpec& spec() const { return spec_; }

  // What run(.., quantize) must give: the 16-bit C, quantized here.
  Quantized quantized(const Bytes& c, const Quantize& quantize) const {
    Quantized out{Bytes(c_rows_ * c_stride_ + 2 * kGuard, kPoison), no_scales()};
    for_rows([&](std::int32_t expert, std::int64_t row, std::int64_t, std::int64_t) {
      if (expert < 0) return;  // no product reads them
      const auto at = [&](std::int64_t i) { return row * c_stride_ + i * c_.c_column; };
      const auto value = [&](std::int64_t i) {
        return read_element(c.data() + kGuard, c_.out, at(i));
      };
      for (std::int64_t g = 0; g < groups(); ++g) {
        const std::int64_t end = std::min(columns_, 128 * (g + 1));
        float absmax = 0;
        for (std::int64_t i = 128 * g; i < end; ++i) absmax = std::max(absmax, std::fabs(value(i)));
        float scale = activation_scale(absmax, kE4M3Max);
        if (quantize.granularity == ActScale::kGroup)
          out.scale[(row + 1) * groups() + g] = scale;
        else
          scale = quantize.scale[quantize.scale.size() > 1 ? expert : 0];
        for (std::int64_t i = 128 * g; i < end; ++i)
          out.c[kGuard + at(i)] = float_to_e4m3(value(i) * inverse_scale(scale));
      }
    });
    return out;
  }

 private:
  std::int64_t groups() const { return (columns_ + 127) / 128; }
  std::vector<float> no_scales() const {  // a row of guards on either side
    return std::vector<float>((c_rows_ + 2) * groups(), -1.0f);
  }
  double tolerance() const {
    if (c_.out == DType::kBF16) return 6e-3;
    return c_.dtype == DType::kF8E4M3 ? 2e-3 : c_.out == DType::kF16 ? 1e-3 : 2e-4;
  }
  float uniform(float low, float high) {
    return std::uniform_real_distribution<float>(low, high)(random_);
  }
  float normal() { return std::normal_distribution<float>()(random_); }
  std::int64_t below(std::int64_t n) {
    return std::uniform_int_distribution<std::int64_t>(0, n - 1)(random_);
  }

  void make_rows() {
    const std::int64_t slots = c_.tokens * c_.top_k;
    std::vector<std::vector<std::int32_t>> of(c_.experts);
    for (std::int64_t s = 0; s < slots; ++s)
      of[below(c_.experts)].push_back(static_cast<std::int32_t>(s));
    std::int64_t position = 0, capacity = 1;
    for (const auto& list : of) capacity = std::max<std::int64_t>(capacity, list.size() + 3);
    for (std::int64_t e = 0; e < c_.experts; ++e) {
      if (c_.layout == Layout::kBatched) position = e * capacity;
      const auto rows = static_cast<std::int64_t>(of[e].size());
      const bool filtered = c_.filtered && e == c_.experts / 2;
      for (std::int64_t first = 0; first < rows; first += c_.tile_rows) {
        const std::int64_t live = std::min(c_.tile_rows, rows - first);
        const bool padded = c_.layout == Layout::kSorted;  // whole blocks, padding at the end
        tiles_.push_back({filtered ? -1 : static_cast<std::int32_t>(e),
                          static_cast<std::int32_t>(padded ? c_.tile_rows : live), position});
        for (std::int64_t i = 0; i < (padded ? c_.tile_rows : live); ++i) {
          if (static_cast<std::int64_t>(slots_.size()) <= position)
            slots_.resize(position + 1, static_cast<std::int32_t>(slots));
          slots_[position] = i < live ? of[e][first + i] : static_cast<std::int32_t>(slots);
          ++position;
        }
      }
      if (filtered && e > 0) tiles_.push_back({static_cast<std::int32_t>(e), 0, position});
    }
    num_tiles_ = static_cast<std::int32_t>(tiles_.size());
    tiles_.resize(tiles_.size() + 3,
                  Tile{0, 1 << 30, 0});  // capacity behind the list: must not be used
    positions_ = c_.layout == Layout::kBatched ? c_.experts * capacity : position;
    slots_.resize(positions_ + 1, static_cast<std::int32_t>(slots));
    const auto rows_for = [&](RowOf rule) {
      return rule == RowOf::kPosition ? positions_ : rule == RowOf::kSlot ? slots : c_.tokens;
    };
    a_rows_ = std::max<std::int64_t>(1, rows_for(c_.a_row));
    c_rows_ = std::max<std::int64_t>(1, rows_for(c_.c_row));
  }

  Bytes random_bytes(std::int64_t count, DType dtype, float scale) {
    Bytes out(count * size_of(dtype));
    for (std::int64_t i = 0; i < count; ++i) write_element(out.data(), dtype, i, normal() * scale);
    return out;
  }

  void make_tensors() {
    const bool fp8 = c_.dtype == DType::kF8E4M3;
    a_ = random_bytes(a_rows_ * c_.k, c_.dtype, fp8 ? 60.0f : 1.0f);
    w_ = random_bytes(c_.experts * c_.n * c_.k, c_.dtype,
                      fp8 ? 60.0f : 1.5f / std::sqrt(float(c_.k)));
    spec_ = {.scheme = fp8                       ? Scheme::kFp8Block
                       : c_.dtype == DType::kF16 ? Scheme::kF16
                                                 : Scheme::kBF16,
             .format = fp8                       ? WeightFormat::kE4M3
                       : c_.dtype == DType::kF16 ? WeightFormat::kF16
                                                 : WeightFormat::kBF16,
             .act = fp8 ? ActFormat::kE4M3 : ActFormat::k16,
             .act_dtype = c_.dtype,
             .experts = c_.experts,
             .n = c_.n,
             .k = c_.k};
    spec_.scale = {.has_scale = fp8, .group_n = c_.n, .group_k = c_.k, .grid_n = 1, .grid_k = 1};
    if (c_.scales == Scales::kHalves) spec_.scale.group_n = c_.n / 2, spec_.scale.grid_n = 2;
    if (c_.scales == Scales::kChannel) spec_.scale.group_n = 1, spec_.scale.grid_n = c_.n;
    if (c_.scales == Scales::kBlock) {
      spec_.scale = {.has_scale = true,
                     .group_n = 128,
                     .group_k = 128,
                     .grid_n = (c_.n + 127) / 128,
                     .grid_k = (c_.k + 127) / 128};
      spec_.act_group = 128;
    }
    spec_.act_scale = !fp8                            ? ActScale::kDefault
                      : c_.scales == Scales::kBlock   ? ActScale::kGroup
                      : c_.scales == Scales::kChannel ? ActScale::kToken
                                                      : ActScale::kTensorDynamic;
    const float unit = fp8 ? 1.0f / 60.0f : 1.0f;
    for (std::int64_t i = 0; i < c_.experts * spec_.scale.grid_n * spec_.scale.grid_k; ++i)
      w_scale_.push_back(unit / std::sqrt(float(c_.k)) * uniform(0.5f, 2.0f));
    const std::int64_t groups = c_.scales == Scales::kBlock ? spec_.scale.grid_k : 1;
    a_scale_row_ = c_.scales == Scales::kTensor || c_.scales == Scales::kHalves ? 0 : groups + 1;
    a_scale_group_ = 1;
    for (std::int64_t i = 0; i < (a_rows_ + 1) * (groups + 1); ++i)
      a_scale_.push_back(unit * uniform(0.5f, 2.0f));
    if (c_.bias >= 0) bias_ = random_bytes(c_.experts * c_.n, static_cast<DType>(c_.bias), 1.0f);
    for (std::int64_t i = 0; i < c_.tokens * c_.top_k; ++i)
      row_weights_.push_back(uniform(0.1f, 1.0f));
    for (std::int64_t i = 0; i < c_.experts; ++i) alpha_.push_back(uniform(0.5f, 2.0f));
    activation_ = {.kind = static_cast<Activation>(std::max(c_.activation, 0)),
                   .order = c_.order,
                   .layout = c_.gates,
                   .limit = 1.5f};
    gated_ = c_.activation >= 0 && is_gated(activation_.kind);
    columns_ = gated_ ? c_.n / 2 : c_.n;
    c_stride_ = columns_ * c_.c_column + c_.c_padding;
  }

  // f(expert, row of C, slot, row of A) of every row that is stored; expert < 0: filtered.
  template <typename F>
  void for_rows(F&& f) const {
    for (int t = 0; t < num_tiles_; ++t) {
      const Tile& tile = tiles_[t];
      for (int i = 0; i < tile.rows; ++i) {
        const std::int64_t position = tile.first + i;
        const std::int64_t slot = c_.layout == Layout::kBatched ? position : slots_[position];
        if (c_.layout != Layout::kBatched && slot >= c_.tokens * c_.top_k) continue;
        const auto row_of = [&](RowOf rule) {
          return rule == RowOf::kPosition ? position
                 : rule == RowOf::kSlot   ? slot
                                          : slot / c_.top_k;
        };
        f(tile.expert, row_of(c_.c_row), slot, row_of(c_.a_row));
      }
    }
  }

  void make_reference() {
    expected_.assign(c_rows_ * columns_, 0);
    scale_.assign(c_rows_ * columns_, 0);
    row_written_.assign(c_rows_, false);
    for_rows([&](std::int32_t expert, std::int64_t row, std::int64_t slot, std::int64_t a_row) {
      row_written_[row] = true;
      if (expert < 0) return;
      std::vector<double> sums(c_.n), magnitude(c_.n);
      for (std::int64_t n = 0; n < c_.n; ++n) sum_of(expert, a_row, n, sums[n], magnitude[n]);
      for (std::int64_t j = 0; j < columns_; ++j) {
        double v = sums[j], m = magnitude[j];
        if (c_.activation >= 0) {
          double g = sums[j], u = 0;
          if (gated_) {
            const bool halves = c_.gates == GateLayout::kHalves;
            const std::int64_t one = halves ? j : 2 * j, two = halves ? j + columns_ : 2 * j + 1;
            const bool up_first = c_.order == GateOrder::kUpFirst;
            g = sums[up_first ? two : one];
            u = sums[up_first ? one : two];
            m = (magnitude[one] + magnitude[two]) * (1 + std::abs(u) + std::abs(g));
          }
          v = reference::activate(activation_.kind, reference::parameters_of(activation_, {}, 0), g,
                                  u);
          if (!gated_) m *= 1 + 2 * std::abs(g);
        }
        const double weight = c_.row_weights ? row_weights_[slot] : 1.0;
        expected_[row * columns_ + j] = v * weight;
        scale_[row * columns_ + j] = (c_.dtype == DType::kF8E4M3 ? 0.1 : 0.02) * m * weight;
      }
    });
  }
  // One sum, and the size of its terms: rounding errors are proportional to that.
  void sum_of(std::int64_t e, std::int64_t a_row, std::int64_t n, double& sum, double& magnitude) {
    sum = magnitude = 0;
    for (std::int64_t k = 0; k < c_.k; ++k) {
      double x = double(read_element(a_.data(), c_.dtype, a_row * c_.k + k)) *
                 read_element(w_.data(), c_.dtype, (e * c_.n + n) * c_.k + k);
      if (c_.scales != Scales::kNone) {
        const std::int64_t cell =
            (e * spec_.scale.grid_n + n / spec_.scale.group_n) * spec_.scale.grid_k +
            k / spec_.scale.group_k;
        const std::int64_t group = c_.scales == Scales::kBlock ? k / 128 : 0;
        x *= double(w_scale_[cell]) * a_scale_[a_row * a_scale_row_ + group];
      }
      sum += x;
      magnitude += std::abs(x);
    }
    if (c_.alpha) sum *= alpha_[e];
    if (c_.bias >= 0) sum += read_element(bias_.data(), static_cast<DType>(c_.bias), e * c_.n + n);
    magnitude += std::abs(sum);
  }

  Case c_;
  bool deals_ = false;
  std::int32_t dealt_ = 0;
  std::mt19937 random_;
  WeightSpec spec_;
  ActivationSpec activation_;
  bool gated_ = false;
  std::vector<Tile> tiles_;
  std::int32_t num_tiles_ = 0;
  std::vector<std::int32_t> slots_;
  std::int64_t positions_ = 0, a_rows_ = 0, c_rows_ = 0, columns_ = 0, c_stride_ = 0;
  std::int64_t a_scale_row_ = 0, a_scale_group_ = 0;
  Bytes a_, w_, bias_;
  std::vector<float> w_scale_, a_scale_, row_weights_, alpha_;
  std::vector<double> expected_, scale_;
  std::vector<bool> row_written_;
};

// --- what runs it
inline const DeviceTraits* hopper() {
  static DeviceTraits traits;
  static const bool found = [] {
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) return false;
    cudaDeviceProp p{};
    if (cudaGetDeviceProperties(&p, 0) != cudaSuccess) return false;
    traits = {.index = 0,
              .sm_count = p.multiProcessorCount,
              .compute_capability = p.major * 10 + p.minor,
              .shared_per_block = p.sharedMemPerBlockOptin,
              .l2_bytes = static_cast<std::size_t>(p.l2CacheSize),
              .use_sm90 = true};
    return traits.compute_capability == 90;
  }();
  return found ? &traits : nullptr;
}

}  // namespace moesaic::cuda
