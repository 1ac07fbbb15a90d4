// SPDX-License-Identifier: Apache-2.0
// One grouped product on the device, built by hand: random operands of any format, a row map of
// either format, and the float64 result with its error bound. For tests of one kernel family,
// without the layer.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <optional>
#include <random>
#include <vector>

#include "cuda/weights.h"
#include "device_buffer.h"
#include "product_case.h"

namespace moesaic::test {

class Product {
 public:
  explicit Product(const ProductCase& c) : case_(c), random_(c.seed) {
    make_spec();
    make_weights();
    make_activations();
    route();
  }

  const WeightSpec& spec() const { return operand_.spec; }

  cuda::Arrangement arrangement() const { return cuda::arrangement_of(operand_); }

  // From now on from a layer's own copy of the weights, in the arrangement asked for: what it was
  // made from is poisoned.
  void pack(cuda::Arrangement arrangement) {
    const WeightSpec& s = operand_.spec;
    packed_ = cuda::make_cuda_weights(s, device_traits(), arrangement);
    GemmWeights all = operand_.plain;
    if (s.scale.has_scale) {  // rank 3, as a layer hands them over
      const Tensor& given = operand_.plain.scale;
      const std::int64_t row = given.rank > 1 ? given.strides[1] : s.scale.grid_k;
      all.scale.rank = 3;
      all.scale.shape = {s.experts, s.scale.grid_n, s.scale.grid_k};
      all.scale.strides = {given.strides[0], row, 1};
    }
    for (std::int64_t e = 0; e < s.experts; ++e) {
      GemmWeights one = all;
      for (Tensor* t : {&one.weight, &one.scale, &one.zero_point})
        if (t->defined()) *t = t->slice(e, 1);
      packed_->load(e, one);
    }
    for (const Tensor* t :
         {&operand_.plain.weight, &operand_.plain.scale, &operand_.plain.zero_point}) {
      if (t->defined()) {
        const auto cells = static_cast<std::size_t>(t->shape[0] * t->strides[0]);
        cuda_ok(cudaMemset(t->data, 0xff, cells * size_of(t->dtype)));
      }
    }
    cuda_ok(cudaDeviceSynchronize());
    operand_.packed = packed_.get();
  }

  // Runs one tactic over tiles of at most `rows_per_tile` rows; C's bytes with everything around
  // it. Verifies guards, untouched rows and, once, the values.
  std::vector<std::uint8_t> run(const cuda::GemmFamily& family, int tactic, std::int64_t tile_rows,
                                std::int64_t rows_per_tile) {
    make_rows(tile_rows, rows_per_tile);
    const std::size_t size = size_of(case_.c_dtype);
    const std::int64_t rows = stage_.c_row == RowOf::kPosition ? stage_.rows.positions : slots_;
    const std::int64_t columns = n_out();
    const std::int64_t pitch =
        case_.c_transposed ? rows + case_.c_padding : columns + case_.c_padding;
    const std::int64_t body =
        (case_.c_transposed ? columns : rows) * pitch * static_cast<std::int64_t>(size);
    constexpr std::int64_t kGuard = 4096;
    std::vector<std::uint8_t> poison(static_cast<std::size_t>(body + 2 * kGuard), 0xfb);
    DeviceBuffer c(poison.data(), poison.size());
    stage_.c = {.data = static_cast<char*>(c.data()) + kGuard,
                .dtype = case_.c_dtype,
                .device = kGpu,
                .rank = 2};
    stage_.c.shape = {rows, columns};
    stage_.c.strides = {case_.c_transposed ? 1 : pitch, case_.c_transposed ? pitch : 1};
    stage_.tactic = tactic;
    const Buffer counter = upload(std::vector<std::int32_t>{0});
    stage_.next_task = deals_ ? static_cast<std::int32_t*>(counter->data()) : nullptr;
    family.run(stage_, device_traits(), nullptr);
    cuda_ok(cudaDeviceSynchronize());
    std::memcpy(&dealt_, counter->read().data(), sizeof dealt_);
    std::vector<std::uint8_t> bytes = c.read();
    const auto intact = [](std::uint8_t b) { return b == 0xfb; };
    EXPECT_TRUE(std::all_of(bytes.begin(), bytes.begin() + kGuard, intact))
        << case_.name << ": guard before C";
    EXPECT_TRUE(std::all_of(bytes.end() - kGuard, bytes.end(), intact))
        << case_.name << ": guard behind C";
    bytes.erase(bytes.begin(), bytes.begin() + kGuard);
    bytes.resize(static_cast<std::size_t>(body));
    verify(bytes, rows, pitch);
    return bytes_by_slot(bytes, pitch);
  }

  // From the next run on, a counter deals out the tasks; and how many it has dealt in the last run.
  void deal_tasks() { deals_ = true; }
  std::int32_t tasks_dealt() const { return dealt_; }

 private:
  static constexpr Device kGpu{DeviceType::kCuda, 0};
  std::int64_t n_out() const { return gated() ? case_.n / 2 : case_.n; }
  bool gated() const { return case_.activation && is_gated(case_.activation->kind); }
  float normal() { return std::normal_distribution<float>()(random_); }
  std::int64_t below(std::int64_t n) {
    return std::uniform_int_distribution<std::int64_t>(0, n - 1)(random_);
  }
  template <typename T>
  Tensor keep(const std::vector<T>& v, DType dtype, std::vector<std::int64_t> shape) {
    buffers_.push_back(upload(v));
    return Tensor::contiguous(buffers_.back()->data(), dtype, shape, kGpu);
  }

  void make_spec() {
    WeightSpec& s = operand_.spec;
    s.format = case_.format;
    s.act = case_.act;
    s.act_dtype = case_.act_dtype;
    s.dtype16 = is_16bit(case_.act_dtype) ? case_.act_dtype : DType::kBF16;
    s.experts = case_.experts, s.n = case_.n, s.k = case_.k;
    s.zero_points = case_.zero_points;
    s.e8m0_scales = case_.format == WeightFormat::kE2M1;
    ScaleGrid& g = s.scale;
    g = {.has_scale = case_.scales != Scales::kNone, .group_n = case_.n, .group_k = case_.k};
    if (case_.scales == Scales::kHalves) g.group_n = case_.n / 2;
    if (case_.scales == Scales::kChannel || case_.scales == Scales::kGroup) g.group_n = 1;
    if (case_.scales == Scales::kBlock) g.group_n = case_.group_n;
    if (case_.scales == Scales::kBlock || case_.scales == Scales::kGroup) g.group_k = case_.group_k;
    g.grid_n = (case_.n + g.group_n - 1) / g.group_n;
    g.grid_k = (case_.k + g.group_k - 1) / g.group_k;
    if (case_.token_scales == TokenScales::kGroup)
      s.act_scale = ActScale::kGroup, s.act_group = g.group_k;
    if (case_.token_scales == TokenScales::kToken) s.act_scale = ActScale::kToken;
    if (case_.token_scales == TokenScales::kTensor) s.act_scale = ActScale::kTensorStatic;
    if (case_.activation) {
      s.gated = gated();
      s.order = case_.activation->order;
      s.layout = case_.activation->layout;
    }
  }

  void make_weights() {
    const WeightSpec& s = operand_.spec;
    const std::int64_t e_count = case_.experts, n = case_.n, k = case_.k;
    const bool four = s.format == WeightFormat::kU4 || s.format == WeightFormat::kE2M1;
    const DType dtype = four ? DType::kU8 : weight_dtype(s.format);
    const std::int64_t pitch = (four ? k / 2 : k) + case_.w_padding;
    std::vector<std::uint8_t> bytes(e_count * n * pitch * size_of(dtype), 0x7d);
    std::vector<float> scale(e_count * s.scale.grid_n * s.scale.grid_k);
    std::vector<std::uint8_t> scale_e8m0(scale.size());
    for (std::size_t i = 0; i < scale.size(); ++i) {
      scale[i] = 0.01f + 0.001f * std::fabs(normal());
      if (s.e8m0_scales) {
        scale_e8m0[i] = static_cast<std::uint8_t>(118 + below(6));
        scale[i] = std::ldexp(1.0f, scale_e8m0[i] - 127);
      }
    }
    const std::int64_t zero_rows = s.format == WeightFormat::kU4 ? n / 2 : n;
    std::vector<std::uint8_t> zero(e_count * zero_rows * s.scale.grid_k);
    for (auto& z : zero) z = static_cast<std::uint8_t>(below(256));
    values_.resize(e_count * n * k);
    for (std::int64_t e = 0; e < e_count; ++e) {
      for (std::int64_t r = 0; r < n; ++r) {
        for (std::int64_t c = 0; c < k; ++c) {
          const std::int64_t cell =
              (e * s.scale.grid_n + r / s.scale.group_n) * s.scale.grid_k + c / s.scale.group_k;
          const double factor = s.scale.has_scale ? scale[cell] : 1.0;
          const std::int64_t at = (e * n + r) * pitch;
          double q = 0;
          if (four) {
            std::uint8_t& byte = bytes[at + c / 2];
            const auto nibble = static_cast<std::uint8_t>(below(16));
            byte = c % 2 ? static_cast<std::uint8_t>((byte & 15) | nibble << 4)
                         : static_cast<std::uint8_t>((byte & 0xf0) | nibble);
            if (s.e8m0_scales) {
              q = kE2M1[nibble];
            } else {
              const std::int64_t z = (e * (n / 2) + r / 2) * s.scale.grid_k + c / s.scale.group_k;
              q = nibble - (case_.zero_points ? (zero[z] >> (r % 2 * 4)) & 15 : 8);
            }
          } else if (s.format == WeightFormat::kU8) {
            bytes[at + c] = static_cast<std::uint8_t>(below(256));
            q = bytes[at + c] - (case_.zero_points
                                     ? zero[(e * n + r) * s.scale.grid_k + c / s.scale.group_k]
                                     : 128);
          } else {
            q = put(bytes, at + c, dtype, normal());
          }
          values_[(e * n + r) * k + c] = q * factor;
        }
      }
    }
    Tensor w = keep(bytes, dtype, {e_count, n, pitch});
    w.shape[2] = four ? k / 2 : k;
    operand_.plain.weight = w;
    if (s.e8m0_scales) {
      operand_.plain.scale = keep(scale_e8m0, DType::kE8M0, {e_count, n, s.scale.grid_k});
    } else if (s.scale.has_scale) {
      std::vector<std::int64_t> shape = {e_count};
      if (s.scale.grid_n > 1 || s.scale.grid_k > 1) shape.push_back(s.scale.grid_n);
      if (s.scale.grid_k > 1) shape.push_back(s.scale.grid_k);
      if (case_.scale_padding > 0) {
        std::vector<float> padded;
        for (std::size_t i = 0; i < scale.size(); ++i) {
          padded.push_back(scale[i]);
          if ((i + 1) % static_cast<std::size_t>(shape.back()) == 0)
            padded.insert(padded.end(), static_cast<std::size_t>(case_.scale_padding), NAN);
        }
        scale = padded;
        shape.back() += case_.scale_padding;
      }
      Tensor cells = keep(scale, DType::kF32, shape);
      cells.shape[cells.rank - 1] -= case_.scale_padding;
      operand_.plain.scale = cells;
    }
    if (case_.zero_points)
      operand_.plain.zero_point = keep(zero, DType::kU8, {e_count, zero_rows, s.scale.grid_k});
    if (case_.bias) {
      std::vector<std::uint8_t> data(e_count * n * size_of(*case_.bias));
      bias_.resize(e_count * n);
      for (std::size_t i = 0; i < bias_.size(); ++i) bias_[i] = put(data, i, *case_.bias, normal());
      operand_.side.bias = keep(data, *case_.bias, {e_count, n});
    }
    alpha_.assign(e_count, 1.0f);
    if (case_.alpha) {
      for (float& a : alpha_) a = 0.5f + std::fabs(normal());
      operand_.side.alpha = keep(alpha_, DType::kF32, {e_count});
    }
    if (case_.activation) {
      const ActivationSpec& a = *case_.activation;
      for (auto& [values, value] :
           {std::pair{&terms_[0], a.alpha}, {&terms_[1], a.beta}, {&terms_[2], a.limit}}) {
        values->assign(e_count, value);
        if (case_.per_expert_terms)
          for (float& x : *values) x = 0.5f + std::fabs(normal());
      }
      if (case_.per_expert_terms) {
        operand_.side.activation = {keep(terms_[0], DType::kF32, {e_count}),
                                    keep(terms_[1], DType::kF32, {e_count}),
                                    keep(terms_[2], DType::kF32, {e_count})};
      }
    }
  }

  void route() {
    slots_ = case_.tokens * case_.top_k;
    ids_.resize(slots_);
    for (auto& id : ids_) id = below(8) == 0 ? -1 : below(case_.experts);
    if (case_.layout == Layout::kBatched) {
      capacity_ = 0;
      for (std::int64_t e = 0; e < case_.experts; ++e)
        capacity_ = std::max<std::int64_t>(capacity_, std::count(ids_.begin(), ids_.end(), e));
      capacity_ += 3;
    }
    weights_.resize(slots_);
    for (float& w : weights_) w = normal();
    if (case_.layout == Layout::kBatched) weights_.assign(slots_, 1.0f);
  }

  // Per token; make_rows puts them where the layout wants them. Bits are compared by slot, so a
  // slot must meet its token's values wherever it stands.
  void make_activations() {
    base_.resize(case_.tokens * case_.k);
    for (auto& x : base_) x = normal();
    a_scale_groups_ = case_.token_scales == TokenScales::kGroup ? operand_.spec.scale.grid_k : 1;
    base_scale_.resize(case_.tokens * a_scale_groups_);
    for (float& s : base_scale_) {
      s = case_.token_scales == TokenScales::kNone ? 1.0f : 0.02f + 0.01f * std::fabs(normal());
    }
    if (case_.token_scales == TokenScales::kTensor)
      base_scale_.assign(base_scale_.size(), base_scale_[0]);
  }

  // Tiles of the layout, and A arranged for it.
  void make_rows(std::int64_t tile_rows, std::int64_t rows_per_tile) {
    rows_buffers_.clear();
    std::vector<Tile> tiles;
    std::vector<std::int32_t> row_slot;
    position_slot_.clear();
    const auto push_tiles = [&](std::int32_t expert, std::int64_t first, std::int64_t rows) {
      for (std::int64_t r = 0; r < rows; r += rows_per_tile) {
        tiles.push_back(
            {expert, static_cast<std::int32_t>(std::min(rows_per_tile, rows - r)), first + r});
      }
    };
    for (std::int64_t e = -1; e < case_.experts; ++e) {
      if (e < 0 && case_.layout != Layout::kSortedPadded) continue;
      std::int64_t first = static_cast<std::int64_t>(position_slot_.size());
      if (case_.layout == Layout::kBatched) {
        first = e * capacity_;
        position_slot_.resize(first, -1);
      }
      for (std::int64_t s = 0; s < slots_; ++s) {
        if (ids_[s] == e) position_slot_.push_back(s);
      }
      std::int64_t rows = static_cast<std::int64_t>(position_slot_.size()) - first;
      if (case_.layout == Layout::kSortedPadded) {
        rows = (rows + rows_per_tile - 1) / rows_per_tile * rows_per_tile;
        position_slot_.resize(first + rows, -1);
      }
      push_tiles(static_cast<std::int32_t>(e), first, rows);
    }
    if (case_.layout == Layout::kBatched) position_slot_.resize(case_.experts * capacity_, -1);
    for (const std::int64_t s : position_slot_) {
      row_slot.push_back(s < 0 ? static_cast<std::int32_t>(slots_ + below(3))
                               : static_cast<std::int32_t>(s));
    }
    const auto positions = static_cast<std::int64_t>(position_slot_.size());
    RowMap& rows = stage_.rows;
    const auto count = static_cast<std::int32_t>(tiles.size());
    tiles.resize(tiles.size() + 2,
                 Tile{99, 1 << 20, std::int64_t{1} << 40});  // beyond num_tiles: never read
    rows_buffers_.push_back(upload(tiles));
    rows.tiles = static_cast<Tile*>(rows_buffers_.back()->data());
    rows_buffers_.push_back(upload(std::vector<std::int32_t>{count}));
    rows.num_tiles = static_cast<std::int32_t*>(rows_buffers_.back()->data());
    rows_buffers_.push_back(upload(row_slot));
    rows.row_slot = case_.layout == Layout::kBatched
                        ? nullptr
                        : static_cast<std::int32_t*>(rows_buffers_.back()->data());
    rows.max_tiles = static_cast<std::int64_t>(tiles.size());
    rows.tile_rows = tile_rows;
    rows.positions = positions;
    rows.slot_count = slots_;
    const bool gather = case_.layout == Layout::kSortedPadded;
    stage_.a_row = gather ? RowOf::kToken : RowOf::kPosition;
    stage_.c_row = gather ? RowOf::kSlot : RowOf::kPosition;
    stage_.top_k = case_.top_k;

    const std::int64_t a_rows = gather ? case_.tokens : positions,
                       pitch = case_.k + case_.a_padding;
    std::vector<std::uint8_t> bytes(a_rows * pitch * size_of(case_.act_dtype), 0x7d);
    std::vector<float> scales(a_rows * a_scale_groups_, NAN);
    a_.assign(case_.tokens * case_.k, 0);
    for (std::int64_t r = 0; r < a_rows; ++r) {
      const std::int64_t slot = gather ? r * case_.top_k : position_slot_[r];
      if (slot < 0) continue;
      const std::int64_t token = slot / case_.top_k;
      for (std::int64_t c = 0; c < case_.k; ++c) {
        a_[token * case_.k + c] =
            put(bytes, r * pitch + c, case_.act_dtype, base_[token * case_.k + c]);
      }
      for (std::int64_t g = 0; g < a_scale_groups_; ++g)
        scales[r * a_scale_groups_ + g] = base_scale_[token * a_scale_groups_ + g];
    }
    rows_buffers_.push_back(upload(bytes));
    stage_.a =
        Tensor::contiguous(rows_buffers_.back()->data(), case_.act_dtype, {a_rows, pitch}, kGpu);
    stage_.a.shape[1] = case_.k;
    if (case_.token_scales != TokenScales::kNone) {
      if (case_.token_scales == TokenScales::kTensor) scales = {base_scale_[0]};
      rows_buffers_.push_back(upload(scales));
      stage_.a_scale.data = static_cast<const float*>(rows_buffers_.back()->data());
      stage_.a_scale.row_stride = case_.token_scales == TokenScales::kTensor ? 0 : a_scale_groups_;
      stage_.a_scale.group_stride = case_.token_scales == TokenScales::kGroup ? 1 : 0;
    }
    if (case_.row_weights) {
      rows_buffers_.push_back(upload(weights_));
      stage_.row_weights = static_cast<const float*>(rows_buffers_.back()->data());
    }
    stage_.b = &operand_;
    stage_.activation = case_.activation ? &*case_.activation : nullptr;
  }

  struct Bounded {
    double value, error;
  };
  Bounded sum(std::int64_t e, std::int64_t token, std::int64_t row) const {
    double value = 0, magnitude = 0;
    const double* w = &values_[(e * case_.n + row) * case_.k];
    const double* a = &a_[token * case_.k];
    const std::int64_t group = a_scale_groups_ > 1 ? operand_.spec.scale.group_k : case_.k;
    for (std::int64_t c = 0; c < case_.k; ++c) {
      const double term = a[c] * w[c] * base_scale_[token * a_scale_groups_ + c / group];
      value += term;
      magnitude += std::fabs(term);
    }
    value *= alpha_[e];
    magnitude *= alpha_[e];
    // One truncation of the accumulator per 8 of K, and a few roundings of scales.
    double error = magnitude * static_cast<double>(case_.k / 8 + 16) * 0x1p-23;
    if (!bias_.empty()) value += bias_[e * case_.n + row];
    return {value, error + std::fabs(value) * 0x1p-22};
  }

  Bounded expected(std::int64_t slot, std::int64_t column) const {
    const std::int64_t e = ids_[slot], token = slot / case_.top_k;
    if (e < 0) return {0, 0};
    const WeightSpec& s = operand_.spec;
    Bounded out;
    if (!case_.activation) {
      out = sum(e, token, column);
    } else {
      const Bounded g = sum(e, token, gated() ? s.gate_row(column) : column);
      const Bounded u = gated() ? sum(e, token, s.up_row(column)) : Bounded{0, 0};
      const auto f = [&](double x, double y) {
        return reference_activation(*case_.activation, x, y, terms_[0][e], terms_[1][e],
                                    terms_[2][e]);
      };
      out.value = f(g.value, u.value);
      out.error = 1e-6 + 4e-6 * std::fabs(out.value);
      for (const double i : {-1.0, 1.0})
        for (const double j : {-1.0, 1.0})
          out.error = std::max(
              out.error,
              1.5 * std::fabs(f(g.value + i * g.error, u.value + j * u.error) - out.value) + 1e-6 +
                  4e-6 * std::fabs(out.value));
    }
    if (case_.row_weights) {
      out.value *= weights_[slot];
      out.error *= std::fabs(weights_[slot]);
    }
    if (case_.c_dtype == DType::kBF16) out.error += std::fabs(out.value) * 0x1.02p-8;
    if (case_.c_dtype == DType::kF16) out.error += std::fabs(out.value) * 0x1.02p-11 + 0x1p-25;
    return out;
  }

  std::size_t index(std::int64_t row, std::int64_t column, std::int64_t pitch) const {
    return static_cast<std::size_t>(case_.c_transposed ? column * pitch + row
                                                       : row * pitch + column);
  }

  void verify(const std::vector<std::uint8_t>& bytes, std::int64_t rows, std::int64_t pitch) {
    const std::size_t size = size_of(case_.c_dtype);
    std::vector<std::uint8_t> touched(bytes.size() / size, 0);
    const bool by_position = stage_.c_row == RowOf::kPosition;
    if (expected_.empty()) expected_.resize(slots_ * n_out(), {0, -1});
    for (const std::int64_t slot : position_slot_) {
      if (slot < 0) continue;
      const std::int64_t row = by_position ? row_of_slot(slot) : slot;
      for (std::int64_t column = 0; column < n_out(); ++column) {
        Bounded& want = expected_[slot * n_out() + column];
        if (want.error < 0) want = expected(slot, column);
        const std::size_t at = index(row, column, pitch);
        touched[at] = 1;
        const double got = get(bytes, at, case_.c_dtype);
        if (!(std::fabs(got - want.value) <= want.error)) {
          ADD_FAILURE() << case_.name << ": slot " << slot << " expert " << ids_[slot] << " column "
                        << column << ": got " << got << ", expected " << want.value << " within "
                        << want.error;
          return;
        }
      }
    }
    for (std::size_t i = 0; i < touched.size(); ++i) {
      if (touched[i]) continue;
      for (std::size_t b = 0; b < size; ++b) {
        if (bytes[i * size + b] != 0xfb) {
          ADD_FAILURE() << case_.name << ": element " << i << " of " << rows
                        << " rows was written, belongs to no row";
          return;
        }
      }
    }
  }

  std::int64_t row_of_slot(std::int64_t slot) const {
    for (std::size_t p = 0; p < position_slot_.size(); ++p)
      if (position_slot_[p] == slot) return static_cast<std::int64_t>(p);
    return -1;
  }

  std::vector<std::uint8_t> bytes_by_slot(const std::vector<std::uint8_t>& bytes,
                                          std::int64_t pitch) const {
    const std::size_t size = size_of(case_.c_dtype);
    std::vector<std::uint8_t> out;
    for (std::int64_t slot = 0; slot < slots_; ++slot) {
      if (ids_[slot] < 0) continue;
      const std::int64_t row = stage_.c_row == RowOf::kPosition ? row_of_slot(slot) : slot;
      for (std::int64_t column = 0; column < n_out(); ++column) {
        const std::size_t at = index(row, column, pitch) * size;
        out.insert(out.end(), bytes.begin() + at, bytes.begin() + at + size);
      }
    }
    return out;
  }

  ProductCase case_;
  std::mt19937 random_;
  std::unique_ptr<cuda::CudaWeights> packed_;
  WeightOperand operand_;
  GemmStage stage_;
  bool deals_ = false;
  std::int32_t dealt_ = 0;
  std::vector<Buffer> buffers_, rows_buffers_;
  std::vector<double> values_, a_, bias_;
  std::vector<float> base_, base_scale_, alpha_, weights_, terms_[3];
  std::vector<std::int64_t> ids_, position_slot_;
  std::vector<Bounded> expected_;
  std::int64_t slots_ = 0, capacity_ = 0, a_scale_groups_ = 1;
};

}  // namespace moesaic::test
