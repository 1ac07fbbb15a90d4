// SPDX-License-Identifier: Apache-2.0
// Configurations and tensors made of a fuzzer's bytes. The tensors' memory is real and poisoned
// around; their shapes, dtypes, strides and presence are the fuzzer's. Values inside are hostile,
// too: ids, counts, NaN.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "moesaic/moesaic.h"

namespace moesaic::fuzz {

// Small numbers from the input; zeros when it ends.
class Source {
 public:
  Source(const std::uint8_t* data, std::size_t size) : data_(data), size_(size) {}
  std::uint8_t byte() { return at_ < size_ ? data_[at_++] : 0; }
  std::int64_t below(std::int64_t limit) { return byte() % limit; }
  template <typename E>
  E choice(int count) {
    return static_cast<E>(byte() % count);
  }
  bool rare() { return byte() >= 240; }
  // Mostly `usual`; sometimes near it, negative or enormous (only where nothing is allocated from
  // it).
  std::int64_t extent(std::int64_t usual) {
    if (!rare()) return usual;
    constexpr std::int64_t kOdd[] = {
        0, -1, 1, INT64_MIN, INT64_MAX, INT64_C(1) << 32, INT64_C(1) << 62};
    const std::int64_t i = below(9);
    return i < 7 ? kOdd[i] : usual + (i == 7 ? 1 : -1);
  }

 private:
  const std::uint8_t* data_;
  std::size_t size_;
  std::size_t at_ = 0;
};

// Owns the memory of every tensor of one run.
class Memory {
 public:
  explicit Memory(Source& source) : source_(source) {}
  // `shape` is what the call wants; now and then something else comes, in memory of the right size
  // for what is said, or no tensor at all.
  Tensor tensor(DType dtype, std::vector<std::int64_t> shape) {
    if (source_.rare()) return {};
    if (source_.rare()) dtype = source_.choice<DType>(9);
    for (std::int64_t& extent : shape) extent = source_.extent(extent);
    if (source_.rare() && shape.size() < Tensor::kMaxRank) shape.push_back(2);
    if (source_.rare() && shape.size() > 1) shape.pop_back();
    Tensor t = Tensor::contiguous(nullptr, dtype, shape);
    if (source_.rare()) {
      std::int64_t& stride = t.strides[static_cast<std::size_t>(source_.below(t.rank))];
      const std::int64_t change = source_.below(7) - 3;
      if (stride < INT64_MAX - 3) stride += change;
    }
    // Room for what shape and strides address; impossible ones get none.
    __int128 low = 0, high = 0;
    bool empty = false, bad = false;
    for (int i = 0; i < t.rank; ++i) {
      const std::int64_t extent = t.shape[static_cast<std::size_t>(i)],
                         stride = t.strides[static_cast<std::size_t>(i)];
      bad |= extent < 0;
      empty |= extent == 0;
      (stride < 0 ? low : high) += (static_cast<__int128>(extent) - 1) * stride;
    }
    constexpr std::int64_t kMaxBytes = 1 << 20;
    const __int128 span = std::min<__int128>(high - low + 1, 2 * kMaxBytes);  // four bytes each fit
    const __int128 bytes = span * static_cast<__int128>(size_of(dtype));
    if (bad || empty || bytes > kMaxBytes) {
      // A call that accepts an enormous view of no memory must crash here: that is a finding,
      // except for the library trusting the caller about how much memory there is. So none is
      // passed on.
      if (!bad && !empty) skip_ = true;
      return t;
    }
    blocks_.emplace_back(static_cast<std::size_t>(bytes) + 64);
    std::vector<std::uint8_t>& block = blocks_.back();
    const std::uint8_t seed = source_.byte();
    for (std::size_t i = 0; i < block.size(); ++i)
      block[i] = static_cast<std::uint8_t>(i * seed + (i >> 5));
    // The end of the block is the end of the tensor, up to alignment.
    const auto end = reinterpret_cast<std::uintptr_t>(block.data() + block.size()) -
                     static_cast<std::size_t>(bytes);
    const std::uintptr_t begin = end / 64 * 64;
    t.data = reinterpret_cast<void*>(
        begin - static_cast<std::uintptr_t>(static_cast<std::int64_t>(low) *
                                            static_cast<std::int64_t>(size_of(dtype))));
    return t;
  }
  bool skip() const { return skip_; }

 private:
  Source& source_;
  std::vector<std::vector<std::uint8_t>> blocks_;
  bool skip_ = false;
};

// What its activations are quantized to, roughly.
inline DType eight_bit_of(Scheme scheme) {
  const bool integers = scheme == Scheme::kInt8Channel || scheme == Scheme::kInt8Block ||
                        scheme == Scheme::kInt4W4A8Int8;
  return integers ? DType::kI8 : DType::kF8E4M3;
}

inline LayerConfig make_config(Source& s) {
  LayerConfig c;
  c.experts = s.rare() ? s.below(9) - 4 : 1 + s.below(6);
  c.hidden = s.rare() ? s.below(9) - 4 : 2 * (1 + s.below(33));
  c.intermediate = s.rare() ? s.below(9) - 4 : 2 * (1 + s.below(33));
  c.top_k = s.rare() ? s.extent(1) : 1 + s.below(3);
  c.max_tokens = s.rare() ? s.below(9) - 4 : s.below(9);
  if (s.rare()) c.local = {s.below(9) - 2, s.below(9) - 2};
  c.quant.scheme = s.choice<Scheme>(kNumSchemes + 1);
  if (s.rare()) c.quant.weight_scale = s.choice<WeightScale>(6);
  if (s.rare()) c.quant.act_scale = s.choice<ActScale>(6);
  c.quant.block_n = s.rare() ? s.extent(16) : 16;
  c.quant.block_k = s.rare() ? s.extent(16) : 16;
  c.quant.group_size = s.rare() ? s.extent(16) : 16;
  c.quant.zero_points = s.rare();
  c.activation.kind = s.choice<Activation>(kNumActivations + 1);
  c.activation.order = s.choice<GateOrder>(s.rare() ? 3 : 2);
  c.activation.layout = s.choice<GateLayout>(s.rare() ? 3 : 2);
  c.routing.method = s.choice<RoutingMethod>(kNumRoutingMethods + 1);
  c.routing.groups = static_cast<int>(s.rare() ? s.below(9) - 4 : 1);
  c.routing.topk_groups = static_cast<int>(s.rare() ? s.below(9) - 4 : 1);
  c.weight_on = s.choice<WeightOn>(s.rare() ? 3 : 2);
  const DType usual = c.quant.scheme == Scheme::kF32   ? DType::kF32
                      : c.quant.scheme == Scheme::kF16 ? DType::kF16
                                                       : DType::kBF16;
  c.input_dtype = s.rare() ? s.choice<DType>(9) : usual;
  if (s.below(8) == 0) c.input_dtype = eight_bit_of(c.quant.scheme);
  c.output_dtype = s.rare() ? s.choice<DType>(9) : usual;
  c.workspace_cap = s.rare() ? static_cast<std::size_t>(s.byte()) * 64 : 0;
  return c;
}

// Weights roughly as the configuration wants them, from the scheme's own description of itself.
inline GemmWeights make_weights(const LayerConfig& c, std::int64_t n, std::int64_t k, Source& s,
                                Memory& m, std::int64_t experts = 1) {
  const Scheme scheme = c.quant.scheme;
  const bool four = scheme == Scheme::kInt4W4A16 || scheme == Scheme::kInt4W4A8Fp8 ||
                    scheme == Scheme::kInt4W4A8Int8 || scheme == Scheme::kMxfp4W4A16;
  const DType dtype = scheme == Scheme::kF32                                        ? DType::kF32
                      : scheme == Scheme::kF16                                      ? DType::kF16
                      : scheme == Scheme::kBF16                                     ? DType::kBF16
                      : four                                                        ? DType::kU8
                      : scheme >= Scheme::kFp8Tensor && scheme <= Scheme::kFp8W8A16 ? DType::kF8E4M3
                                                                                    : DType::kI8;
  GemmWeights w;
  w.weight = m.tensor(dtype, {experts, n, four ? k / 2 : k});
  if (scheme <= Scheme::kBF16) {
  } else if (scheme == Scheme::kMxfp4W4A16) {
    w.scale = m.tensor(DType::kU8, {experts, n, (k + 31) / 32});
  } else if (four) {
    w.scale = m.tensor(DType::kF32, {experts, n, (k + 15) / 16});
  } else if (scheme == Scheme::kFp8Block || scheme == Scheme::kInt8Block) {
    w.scale = m.tensor(DType::kF32, {experts, (n + 15) / 16, (k + 15) / 16});
  } else if (scheme == Scheme::kFp8Tensor) {
    w.scale = m.tensor(DType::kF32, {experts});
  } else {
    w.scale = m.tensor(DType::kF32, {experts, n});
  }
  if (c.quant.zero_points)
    w.zero_point = m.tensor(DType::kU8, {experts, four ? n / 2 : n, (k + 15) / 16});
  if (s.rare()) w.bias = m.tensor(DType::kF32, {experts, n});
  if (s.rare()) w.prequant = m.tensor(DType::kF32, {k});
  if (s.rare()) w.alpha = m.tensor(DType::kF32, {experts});
  if (c.quant.act_scale == ActScale::kTensorStatic) w.input_scale = m.tensor(DType::kF32, {1});
  return w;
}

}  // namespace moesaic::fuzz
