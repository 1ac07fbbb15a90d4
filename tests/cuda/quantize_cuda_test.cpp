// SPDX-License-Identifier: Apache-2.0
// The quantizers on the device against the CPU backend: the same bits.
#include "tests/cuda/twin_rows.h"

namespace moesaic {
namespace {

struct QuantizeCase {
  DType input = DType::kBF16, output = DType::kF8E4M3;
  ActScale granularity = ActScale::kToken;
  std::int64_t columns = 256, group = 128, tokens = 20, capacity = 0;
  Int8Rounding rounding = Int8Rounding::kNearest;
  bool mapped = false, weights = false, per_expert = false, odd_values = false;
  bool scattered =
      false;  // mapped, but the device is given each token's positions instead of the tiles
  bool in_place = false;  // mapped, and input rows are positions, as a product left them
  int prequant = 0;       // rank
  std::int64_t statics = 1;
};
std::ostream& operator<<(std::ostream& out, const QuantizeCase& c) {
  return out << name(c.input) << " to " << name(c.output) << " granularity "
             << static_cast<int>(c.granularity) << " K " << c.columns << " group " << c.group
             << " T " << c.tokens << " capacity " << c.capacity << (c.mapped ? " mapped" : "")
             << (c.weights ? " weights" : "") << (c.per_expert ? " per expert" : "")
             << (c.odd_values ? " odd values" : "") << (c.scattered ? " scattered" : "")
             << (c.in_place ? " in place" : "") << " prequant " << c.prequant << " statics "
             << c.statics;
}

void check_quantize(const QuantizeCase& c, std::uint64_t seed) {
  SCOPED_TRACE(testing::Message() << c);
  constexpr std::int64_t kTopK = 3, kExperts = 6;
  const Rows rows = random_rows(c.tokens, kTopK, kExperts, c.capacity, seed);
  TwinRows map(rows);
  const std::int64_t out_rows = c.mapped ? rows.positions : c.tokens;
  const std::int64_t in_rows = c.in_place ? rows.positions : c.tokens;
  std::vector<std::uint8_t> values =
      random_storage(c.input, static_cast<std::size_t>(in_rows * c.columns), seed + 1, 3.0f);
  if (c.odd_values && is_float(c.input)) {
    harness::store_element(values.data(), c.input, 5, std::nan(""));
    harness::store_element(values.data(), c.input, c.columns + 1, HUGE_VAL);
    for (std::int64_t i = 0; i < c.columns; ++i)
      harness::store_element(values.data(), c.input, 2 * c.columns + i, 0.0);
    for (std::int64_t i = 0; i < c.columns; ++i)
      harness::store_element(values.data(), c.input, 3 * c.columns + i, 1e-30);
  }
  Twin<std::uint8_t> input(values);
  Twin<std::uint8_t> output(static_cast<std::size_t>(out_rows * c.columns) * size_of(c.output));
  const std::int64_t groups =
      c.granularity == ActScale::kGroup ? (c.columns + c.group - 1) / c.group : 1;
  Twin<float> scale(static_cast<std::size_t>(std::max<std::int64_t>(kExperts, out_rows * groups)));
  harness::Rng rng(seed + 2);
  std::vector<float> weight(static_cast<std::size_t>(c.tokens * kTopK)),
      factor(static_cast<std::size_t>(kExperts * c.columns)), fixed, moved;
  for (float& w : weight) w = static_cast<float>(rng.uniform());
  for (float& f : factor) f = static_cast<float>(rng.uniform() + 0.5);
  for (std::int64_t e = 0; e < c.statics; ++e)
    fixed.push_back(static_cast<float>(0.01 + 0.01 * rng.uniform()));
  for (std::int64_t i = 0; i < c.tokens * groups + kExperts; ++i)
    moved.push_back(static_cast<float>(rng.uniform()));
  Twin<float> weights(weight), prequant(factor), statics(fixed), moves(moved);
  std::vector<std::int32_t> position(static_cast<std::size_t>(c.tokens * kTopK), -1);
  for (std::size_t i = 0; i < rows.row_slot.size(); ++i)
    if (rows.row_slot[i] < rows.slot_count)
      position[static_cast<std::size_t>(rows.row_slot[i])] = static_cast<std::int32_t>(i);
  Twin<std::int32_t> slot_row(position);
  const bool tensor =
      c.granularity == ActScale::kTensorStatic || c.granularity == ActScale::kTensorDynamic;
  for (const Device device : kBoth) {
    const Scratch scratch(
        device, of(device).quantize_scratch_bytes(std::max(out_rows, c.tokens), kExperts));
    const RowMap on_device = map.on(device);
    QuantizeStage stage{.input = on(device, input, c.input, {in_rows, c.columns}),
                        .rows = c.mapped ? &on_device : nullptr,
                        .source = c.mapped && !c.in_place ? RowOf::kToken : RowOf::kPosition,
                        .top_k = kTopK,
                        .row_weights = c.weights ? weights.on(device) : nullptr,
                        .round_to = is_16bit(c.input) ? c.input : DType::kBF16,
                        .granularity = c.granularity,
                        .group = c.group,
                        .int8_rounding = c.rounding,
                        .per_expert_absmax = c.per_expert,
                        .output = on(device, output, c.output, {out_rows, c.columns}),
                        .scale = scale.on(device),
                        .scale_row_stride = tensor ? 0 : groups,
                        .scratch = scratch.get()};
    if (c.scattered && device.type == DeviceType::kCuda) {
      stage.rows = nullptr;
      stage.source = RowOf::kPosition;
      stage.slot_row = slot_row.on(device);
    }
    if (!is_float(c.input))
      stage.input_scale = {.data = moves.on(device),
                           .row_stride = tensor ? 0 : groups,
                           .group_stride = groups > 1 ? 1 : 0,
                           .expert_stride = 0};
    if (c.prequant == 1)
      stage.prequant = Tensor::contiguous(prequant.on(device), DType::kF32, {c.columns}, device);
    if (c.prequant == 2)
      stage.prequant =
          Tensor::contiguous(prequant.on(device), DType::kF32, {kExperts, c.columns}, device);
    if (c.granularity == ActScale::kTensorStatic)
      stage.static_scale = Tensor::contiguous(statics.on(device), DType::kF32, {c.statics}, device);
    of(device).quantize(stage, {});
  }
  // A NaN's sign is nobody's business.
  std::vector<std::uint8_t> got = output.download();
  std::int64_t different = 0;
  for (std::size_t i = 0; i < got.size(); ++i) {
    const bool nan =
        c.output == DType::kF8E4M3 && (got[i] & 0x7f) == 0x7f && (output.cpu()[i] & 0x7f) == 0x7f;
    different += got[i] != output.cpu()[i] && !nan;
  }
  if (!is_float(c.output)) {
    EXPECT_EQ(different, 0);
  }
  if (is_float(c.output)) {
    for (std::size_t i = 0; i < got.size() / size_of(c.output); ++i) {
      const double a = harness::load_element(output.cpu(), c.output, static_cast<std::int64_t>(i));
      const double b = harness::load_element(got.data(), c.output, static_cast<std::int64_t>(i));
      if (!(std::isnan(a) && std::isnan(b))) {
        ASSERT_EQ(a, b) << i;
      }
    }
  }
  const std::vector<float> scales = scale.download();
  for (std::size_t i = 0; i < scales.size(); ++i)
    if (!(std::isnan(scales[i]) && std::isnan(scale.cpu()[i]))) {
      ASSERT_EQ(scales[i], scale.cpu()[i]) << "scale " << i;
    }
}

TEST(QuantizeCuda, EveryGranularityLikeTheCpu) {
  MOESAIC_NEEDS_CUDA();
  std::uint64_t seed = 1;
  for (const DType input : {DType::kF32, DType::kF16, DType::kBF16})
    for (const DType output : {DType::kF8E4M3, DType::kI8})
      for (const ActScale granularity :
           {ActScale::kToken, ActScale::kGroup, ActScale::kTensorStatic, ActScale::kTensorDynamic})
        for (const std::int64_t columns : {8, 100, 192, 768, 2056, 7168})
          for (const bool mapped : {false, true})
            check_quantize({.input = input,
                            .output = output,
                            .granularity = granularity,
                            .columns = columns,
                            .mapped = mapped,
                            .odd_values = columns == 192},
                           ++seed);
}

TEST(QuantizeCuda, ScatteredLikeGathered) {
  MOESAIC_NEEDS_CUDA();
  std::uint64_t seed = 6000;
  for (const DType input : {DType::kF32, DType::kF16, DType::kBF16})
    for (const ActScale granularity :
         {ActScale::kDefault, ActScale::kToken, ActScale::kGroup, ActScale::kTensorStatic})
      for (const std::int64_t columns : {100, 192, 7168})
        for (const std::int64_t tokens : {4, 1200})
          check_quantize({.input = input,
                          .output = granularity == ActScale::kDefault ? input : DType::kF8E4M3,
                          .granularity = granularity,
                          .columns = columns,
                          .tokens = tokens,
                          .capacity = columns == 7168 ? tokens / 2 : 0,
                          .mapped = true,
                          .odd_values = columns == 192,
                          .scattered = true},
                         ++seed);
}

TEST(QuantizeCuda, GroupsOfAnySize) {
  MOESAIC_NEEDS_CUDA();
  std::uint64_t seed = 1000;
  for (const std::int64_t group : {8, 16, 32, 64, 96, 128, 256, 512, 37})
    for (const std::int64_t columns : {128, 192, 1000, 2048})
      for (const Int8Rounding rounding : {Int8Rounding::kNearest, Int8Rounding::kTruncate})
        for (const DType output : {DType::kF8E4M3, DType::kI8})
          check_quantize({.output = output,
                          .granularity = ActScale::kGroup,
                          .columns = columns,
                          .group = group,
                          .rounding = rounding,
                          .mapped = group == 64},
                         ++seed);
}

TEST(QuantizeCuda, ManyRowsAndFactors) {
  MOESAIC_NEEDS_CUDA();
  std::uint64_t seed = 2000;
  for (const ActScale granularity : {ActScale::kDefault, ActScale::kToken, ActScale::kGroup,
                                     ActScale::kTensorStatic, ActScale::kTensorDynamic})
    for (const std::int64_t tokens : {1, 5000})
      for (const int prequant : {0, 1, 2})
        for (const std::int64_t columns : {136, 2048})
          check_quantize(
              {.output = granularity == ActScale::kDefault ? DType::kBF16 : DType::kF8E4M3,
               .granularity = granularity,
               .columns = columns,
               .tokens = tokens,
               .mapped = true,
               .weights = true,
               .prequant = prequant,
               .statics = 6},
              ++seed);
}

TEST(QuantizeCuda, BatchedRowsAndScalesPerExpert) {
  MOESAIC_NEEDS_CUDA();
  std::uint64_t seed = 3000;
  for (const ActScale granularity :
       {ActScale::kToken, ActScale::kGroup, ActScale::kTensorStatic, ActScale::kTensorDynamic})
    for (const std::int64_t tokens : {1, 30, 900})
      for (const std::int64_t capacity : {8, 1000})
        for (const std::int64_t statics : {1, 6})
          check_quantize({.granularity = granularity,
                          .columns = 512,
                          .tokens = tokens,
                          .capacity = capacity,
                          .mapped = true,
                          .per_expert = true,
                          .odd_values = tokens == 30,
                          .statics = statics},
                         ++seed);
}

// Many rows that nothing is looked up for: what a layer's hidden rows are.
TEST(QuantizeCuda, ManyRowsWhereTheyLie) {
  MOESAIC_NEEDS_CUDA();
  std::uint64_t seed = 7000;
  for (const DType input : {DType::kF16, DType::kBF16})
    for (const DType output : {DType::kF8E4M3, DType::kI8})
      for (const ActScale granularity :
           {ActScale::kToken, ActScale::kGroup, ActScale::kTensorStatic, ActScale::kTensorDynamic})
        for (const std::int64_t columns : {128, 192, 256, 768, 2056, 2048, 7168})
          for (const bool batched : {false, true}) {
            const std::int64_t tokens = 1500 / ((columns + 255) / 256) + 20;
            QuantizeCase c{
                .input = input,
                .output = output,
                .granularity = granularity,
                .columns = columns,
                .tokens = tokens,
                .capacity = batched ? tokens : 0,
                .rounding = columns == 768 ? Int8Rounding::kTruncate : Int8Rounding::kNearest,
                .mapped = true,
                .per_expert = batched,
                .odd_values = columns == 256 || columns == 2048,
                .in_place = true,
                .statics = columns == 256 ? 6 : 1};
            check_quantize(c, ++seed);
            if (batched) continue;
            c.tokens *= 3;
            c.mapped = c.in_place = false;
            c.statics = 1;
            check_quantize(c, ++seed);
          }
}

TEST(QuantizeCuda, EightBitRowsMoveWithTheirScales) {
  MOESAIC_NEEDS_CUDA();
  std::uint64_t seed = 4000;
  for (const DType type : {DType::kF8E4M3, DType::kI8})
    for (const ActScale granularity :
         {ActScale::kToken, ActScale::kGroup, ActScale::kTensorStatic, ActScale::kDefault})
      for (const std::int64_t columns : {100, 1024})
        for (const bool per_expert : {false, true})
          for (const bool scattered : {false, true}) {
            if (scattered && granularity == ActScale::kTensorStatic) continue;  // an expert's
            check_quantize({.input = type,
                            .output = type,
                            .granularity = granularity,
                            .columns = columns,
                            .tokens = 40,
                            .capacity = 30,
                            .mapped = true,
                            .per_expert = per_expert,
                            .scattered = scattered},
                           ++seed);
          }
}

}  // namespace
}  // namespace moesaic
