// SPDX-License-Identifier: Apache-2.0
// quantize_and_align on the device, where few slots share a launch with the quantizer, against both
// stages of the CPU backend: every list, value and scale.
#include "tests/cuda/tile_list.h"
#include "tests/cuda/twin.h"

namespace moesaic {
namespace {

struct Both {
  std::int64_t tokens = 1, top_k = 8, experts = 16, columns = 256;
  DType input = DType::kBF16;
  ActScale granularity = ActScale::kGroup;
};
std::ostream& operator<<(std::ostream& out, const Both& c) {
  return out << "T " << c.tokens << " k " << c.top_k << " E " << c.experts << " K " << c.columns
             << ' ' << name(c.input) << " granularity " << static_cast<int>(c.granularity);
}

void check(const Both& c, std::uint64_t seed) {
  SCOPED_TRACE(testing::Message() << c);
  constexpr std::int64_t kGroup = 128;
  const std::int64_t slots = c.tokens * c.top_k, tile_rows = 16;
  const std::int64_t groups =
      c.granularity == ActScale::kGroup ? (c.columns + kGroup - 1) / kGroup : 1;
  harness::Rng rng(seed);
  std::vector<std::int32_t> chosen(static_cast<std::size_t>(slots));
  for (std::int32_t& id : chosen) id = static_cast<std::int32_t>(rng.below(c.experts + 2)) - 1;
  std::vector<std::uint8_t> values(static_cast<std::size_t>(c.tokens * c.columns) *
                                   size_of(c.input));
  for (std::int64_t i = 0; i < c.tokens * c.columns; ++i)
    harness::store_element(values.data(), c.input, i, 4.0 * rng.uniform() - 2.0);
  Twin<std::int32_t> ids(chosen), row_slot(chosen.size()), slot_row(chosen.size()), num_tiles(1);
  Twin<std::uint8_t> x(values), q(static_cast<std::size_t>(c.tokens * c.columns));
  Twin<float> fixed(std::vector<float>{0.0078125f});
  Twin<float> scale(static_cast<std::size_t>(c.tokens * groups));
  const std::int64_t most = max_tiles(slots, c.experts, tile_rows);
  Twin<std::int64_t> tiles(static_cast<std::size_t>(most) * sizeof(Tile) / 8);
  for (const Device device : kBoth) {
    const Scratch sorting(device, of(device).align_scratch_bytes(slots, c.experts));
    const Scratch largest(device, of(device).quantize_scratch_bytes(c.tokens, c.experts));
    QuantizeStage quantizer{
        .input = Tensor::contiguous(x.on(device), c.input, {c.tokens, c.columns}, device),
        .granularity = c.granularity,
        .group = kGroup,
        .output = Tensor::contiguous(q.on(device), DType::kF8E4M3, {c.tokens, c.columns}, device),
        .scale = scale.on(device),
        .scale_row_stride = groups,
        .scratch = largest.get()};
    if (c.granularity == ActScale::kTensorStatic)
      quantizer.static_scale = Tensor::contiguous(fixed.on(device), DType::kF32, {1}, device);
    of(device).quantize_and_align(
        quantizer,
        {.topk_ids = Tensor::contiguous(ids.on(device), DType::kI32, {c.tokens, c.top_k}, device),
         .ids_age = ListAge::kSettled,
         .experts = c.experts,
         .local = {0, c.experts},
         .rows = {.tiles = reinterpret_cast<Tile*>(tiles.on(device)),
                  .num_tiles = num_tiles.on(device),
                  .row_slot = row_slot.on(device),
                  .max_tiles = most,
                  .tile_rows = tile_rows,
                  .positions = slots,
                  .slot_count = slots},
         .slot_row = slot_row.on(device),
         .scratch = sorting.get()},
        {});
  }
  EXPECT_EQ(q.differences(), "") << "values";
  EXPECT_EQ(scale.differences(), "") << "scales";
  EXPECT_EQ(slot_row.differences(), "") << "slot_row";
  EXPECT_EQ(row_slot.differences(), "") << "row_slot";
  EXPECT_EQ(num_tiles.differences(), "") << "num_tiles";
  EXPECT_EQ(tile_differences(tiles, *num_tiles.cpu()), "") << "tiles";
}

TEST(QuantizeAndAlignCuda, LikeTheCpu) {
  MOESAIC_NEEDS_CUDA();
  std::uint64_t seed = 1;
  for (const ActScale granularity : {ActScale::kGroup, ActScale::kToken, ActScale::kTensorStatic})
    for (const DType input : {DType::kBF16, DType::kF16, DType::kF32})
      for (const std::int64_t tokens : {1, 3, 4, 5, 100, 600})  // to 4: one launch
        for (const std::int64_t columns : {8, 200, 256, 7168})
          check({.tokens = tokens, .columns = columns, .input = input, .granularity = granularity},
                seed++);
}

}  // namespace
}  // namespace moesaic
