// SPDX-License-Identifier: Apache-2.0
// The quantizers through a row map: which rows count, factors on the way, rows that are 8 bit
// already.
#include <cmath>
#include <cstring>

#include "backend.h"
#include "numeric.h"
#include "stage_testing.h"

namespace moesaic {
namespace {

using harness::HostTensor;
using testing::for_each_level;
using testing::random_tensor;

struct Mapped {
  HostTensor input, output, scale;
  std::vector<Tile> tiles;
  std::vector<std::int32_t> row_slot;
  std::int32_t num_tiles = 0;
  RowMap map;
};
// Batched rows: two experts of capacity 4 with 3 and 1 live rows; the rest of the input is NaN.
Mapped batched_rows(harness::Rng& rng, std::int64_t k) {
  Mapped m{.input = random_tensor(rng, DType::kBF16, {8, k}),
           .output = HostTensor(DType::kF8E4M3, {8, k}),
           .scale = HostTensor(DType::kF32, {8}),
           .tiles = {{0, 3, 0}, {1, 1, 4}},
           .num_tiles = 2};
  std::fill(m.output.bytes().begin(), m.output.bytes().end(), std::byte{0x33});
  for (const std::int64_t row : {3, 5, 6, 7})
    for (std::int64_t c = 0; c < k; ++c) m.input.as<std::uint16_t>()[row * k + c] = 0x7fc0;
  m.map = {
      .tiles = m.tiles.data(), .max_tiles = 2, .tile_rows = 48, .positions = 8, .slot_count = 8};
  return m;
}

// Defects 4 and 5 of the original: all padding rows are quantized and enter a dynamic scale, so
// that captured and eager results differ.
TEST(QuantizeRows, OriginalQuantizesPaddingOursOnlyLiveRows) {
  FRESH_RNG(rng);
  const std::int64_t k = 40;
  Mapped m = batched_rows(rng, k);
  m.map.num_tiles = &m.num_tiles;
  std::vector<std::byte> scratch(backend({}).quantize_scratch_bytes(8, 2));
  backend({}).quantize({.input = m.input.view(),
                        .rows = &m.map,
                        .granularity = ActScale::kTensorDynamic,
                        .per_expert_absmax = true,
                        .output = m.output.view(),
                        .scale = m.scale.as<float>(),
                        .scratch = scratch.data()},
                       {});
  float largest[2] = {};
  for (const std::int64_t row : {0, 1, 2, 4})
    for (std::int64_t c = 0; c < k; ++c)
      largest[row / 4] = std::max(
          largest[row / 4], std::abs(bf16_to_float(m.input.as<std::uint16_t>()[row * k + c])));
  for (int e = 0; e < 2; ++e)
    EXPECT_EQ(m.scale.as<float>()[e], activation_scale(largest[e], kE4M3Max));
  for (std::int64_t i = 0; i < 8 * k; ++i) {
    const bool live = i / k < 3 || i / k == 4;
    const float x = bf16_to_float(m.input.as<std::uint16_t>()[i]);
    const std::uint8_t expected =
        live ? float_to_e4m3(x * inverse_scale(m.scale.as<float>()[i / k / 4]))
             : std::uint8_t{0x33};
    EXPECT_EQ(m.output.as<std::uint8_t>()[i], expected);
  }
}

// A filtered block's rows of the original are uninitialized memory whose absmax enters the scale.
TEST(QuantizeRows, FilteredBlocksAndPaddingSlotsDoNotCount) {
  FRESH_RNG(rng);
  const std::int64_t k = 24;
  HostTensor x = random_tensor(rng, DType::kBF16, {3, k});
  for (std::int64_t c = 0; c < k; ++c) x.as<std::uint16_t>()[2 * k + c] = float_to_bf16(1e30f);
  std::vector<Tile> tiles{{0, 3, 0}, {-1, 1, 3}};
  std::vector<std::int32_t> row_slot{0, 7, 1, 2};  // slot_count 3: 7 is padding; slot 2 is filtered
  std::int32_t num_tiles = 2;
  const RowMap map{.tiles = tiles.data(),
                   .num_tiles = &num_tiles,
                   .row_slot = row_slot.data(),
                   .max_tiles = 2,
                   .tile_rows = 48,
                   .positions = 4,
                   .slot_count = 3};
  HostTensor q(DType::kF8E4M3, {4, k}), scale(DType::kF32, {1});
  backend({}).quantize({.input = x.view(),
                        .rows = &map,
                        .source = RowOf::kSlot,
                        .granularity = ActScale::kTensorDynamic,
                        .output = q.view(),
                        .scale = scale.as<float>()},
                       {});
  EXPECT_LT(scale.as<float>()[0], 1.0f);
  for (std::int64_t c = 0; c < k; ++c)
    EXPECT_EQ(q.as<std::uint8_t>()[2 * k + c],
              float_to_e4m3(bf16_to_float(x.as<std::uint16_t>()[k + c]) *
                            inverse_scale(scale.as<float>()[0])));
}

// AWQ factors and routing weights on the input: the product is rounded to 16 bit, then quantized.
TEST(QuantizeRows, FactorsAreRoundedBeforeTheyAreQuantized) {
  FRESH_RNG(rng);
  for (const DType dtype : {DType::kF16, DType::kBF16, DType::kF32}) {
    const std::int64_t k = 70, tokens = 3, top_k = 2, experts = 2;
    const HostTensor x = random_tensor(rng, dtype, {tokens, k});
    const HostTensor factor = random_tensor(rng, DType::kBF16, {experts, k});
    const HostTensor weights = random_tensor(rng, DType::kF32, {tokens * top_k});
    std::vector<Tile> tiles{{0, 3, 0}, {1, 3, 3}};
    std::vector<std::int32_t> row_slot{0, 3, 4, 1, 2, 5};
    std::int32_t num_tiles = 2;
    const RowMap map{.tiles = tiles.data(),
                     .num_tiles = &num_tiles,
                     .row_slot = row_slot.data(),
                     .max_tiles = 2,
                     .tile_rows = 48,
                     .positions = 6,
                     .slot_count = 6};
    for_each_level([&] {
      HostTensor q(DType::kI8, {6, k}), scale(DType::kF32, {6});
      backend({}).quantize({.input = x.view(),
                            .rows = &map,
                            .source = RowOf::kToken,
                            .top_k = top_k,
                            .row_weights = weights.as<float>(),
                            .prequant = factor.view(),
                            .round_to = dtype,
                            .granularity = ActScale::kToken,
                            .output = q.view(),
                            .scale = scale.as<float>(),
                            .scale_row_stride = 1},
                           {});
      for (std::int64_t p = 0; p < 6; ++p) {
        const std::int64_t slot = row_slot[static_cast<std::size_t>(p)], token = slot / top_k,
                           e = p / 3;
        std::vector<float> row;
        float largest = 0;
        for (std::int64_t c = 0; c < k; ++c) {
          float v = static_cast<float>(harness::element(x.view(), {token, c})) *
                    weights.as<float>()[slot];
          v = v * static_cast<float>(harness::element(factor.view(), {e, c}));
          if (dtype == DType::kF16) v = f16_to_float(float_to_f16(v));
          if (dtype == DType::kBF16) v = bf16_to_float(float_to_bf16(v));
          row.push_back(v);
          largest = std::max(largest, std::abs(v));
        }
        const float s = activation_scale(largest, kI8Max);
        EXPECT_EQ(scale.as<float>()[p], s);
        for (std::int64_t c = 0; c < k; ++c)
          EXPECT_EQ(q.as<std::int8_t>()[p * k + c],
                    float_to_i8(row[static_cast<std::size_t>(c)] * inverse_scale(s)));
      }
    });
  }
}

TEST(QuantizeRows, EightBitRowsMoveWithTheirScales) {
  FRESH_RNG(rng);
  const std::int64_t k = 40, group = 16, groups = 3;
  HostTensor x(DType::kI8, {3, k});
  for (std::int64_t i = 0; i < x.numel(); ++i)
    x.as<std::int8_t>()[i] = static_cast<std::int8_t>(rng.below(256) - 128);
  const HostTensor scale = random_tensor(rng, DType::kF32, {3, groups});
  std::vector<Tile> tiles{{0, 2, 0}, {1, 2, 2}};
  std::vector<std::int32_t> row_slot{1, 5, 0, 9};  // 9 is padding
  std::int32_t num_tiles = 2;
  const RowMap map{.tiles = tiles.data(),
                   .num_tiles = &num_tiles,
                   .row_slot = row_slot.data(),
                   .max_tiles = 2,
                   .tile_rows = 48,
                   .positions = 4,
                   .slot_count = 6};
  HostTensor q(DType::kI8, {4, k}), out_scale(DType::kF32, {4, groups});
  backend({}).quantize(
      {.input = x.view(),
       .input_scale = {.data = scale.as<float>(), .row_stride = groups, .group_stride = 1},
       .rows = &map,
       .source = RowOf::kToken,
       .top_k = 2,
       .granularity = ActScale::kGroup,
       .group = group,
       .output = q.view(),
       .scale = out_scale.as<float>(),
       .scale_row_stride = groups},
      {});
  const std::int64_t tokens[] = {0, 2, 0};
  for (std::int64_t p = 0; p < 3; ++p) {
    EXPECT_EQ(std::memcmp(q.as<std::int8_t>() + p * k, x.as<std::int8_t>() + tokens[p] * k, k), 0);
    for (std::int64_t g = 0; g < groups; ++g)
      EXPECT_EQ(out_scale.as<float>()[p * groups + g], scale.as<float>()[tokens[p] * groups + g]);
  }
  for (std::int64_t g = 0; g < groups; ++g) EXPECT_EQ(out_scale.as<float>()[3 * groups + g], 0.0f);
}

}  // namespace
}  // namespace moesaic
