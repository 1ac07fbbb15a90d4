// SPDX-License-Identifier: Apache-2.0
// What the three originals get wrong, leave undefined or forbid beside the nine defects of
// defects_test, one test each, through the public interface.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>

#include "harness/fixture.h"
#include "harness/grouped.h"
#include "reference/align.h"

namespace moesaic::harness {
namespace {

// --- remarks on the batched original -------------------------------------------------------------

TEST(BatchedOriginal, RouterWeightOnInputWorksForAnyTopKAndLeavesTheInput) {
  for (const Format format : {Format::kStandard, Format::kSorted, Format::kBatched}) {
    Case c;  // there: top_k 1 only, and the input is overwritten (`execute` watches inputs)
    c.variant = default_variant(Scheme::kBF16);
    c.shape = {"on_input", 6, 64, 48, 3};
    c.format = format;
    c.weight_on = WeightOn::kInput;
    c.load = Load::kDuplicates;
    c.seed = 41;
    EXPECT_EQ(failure(c), "");
  }
}

TEST(BatchedOriginal, SchemesThatTheOriginalRefusesWork) {
  for (const char* name : {"int8_channel", "int8_w8a16", "int4_w4a16", "int4_w4a16+g32+zp"}) {
    Case c;  // and biases, and zero points
    c.variant = variant_named(name);
    c.format = Format::kBatched;
    c.shape = {"integers", 4, 96, 64, 2};
    c.bias = Biases::kAll;
    c.seed = 42;
    EXPECT_EQ(failure(c), "");
  }
}

// --- remarks on the sorted original (section 1) --------------------------------------------------

TEST(SortedOriginal, BiasIsAllowedWithGroupedWeights) {
  for (const char* name : {"int4_w4a16", "int8_w8a16+g64+zp"}) {
    GroupedCase c;
    c.variant = variant_named(name);
    c.bias = Biases::kAll;
    c.row_weights =
        GroupedCase::RowWeights::kGiven;  // scale, bias, routed weight, cast: in this order
    EXPECT_EQ(check_grouped(c), "");
  }
}

TEST(SortedOriginal, AInSortedOrderIsAnOptionOfItsOwn) {  // a_use_tma there
  GroupedCase c;
  c.variant = default_variant(Scheme::kFp8Block);
  c.a_order = RowOrder::kSorted;
  EXPECT_EQ(check_grouped(c), "");
  c.a = DType::kF8E4M3;  // with A_scale in sorted order, too
  EXPECT_EQ(check_grouped(c), "");
}

// filter_expert=False with an id of -1 is undefined there. Here such a block is always filtered, and the
// rows of its own places become zero, where the original writes them by slot.
TEST(SortedOriginal, FilteredBlocksWriteZerosInSortedRowsNotBySlot) {
  GroupedCase c;
  c.variant = default_variant(Scheme::kBF16);
  c.local = {2, 2};
  c.c_order = RowOrder::kSorted;
  EXPECT_EQ(check_grouped(c), "");
  c.c_order = RowOrder::kSlot;
  EXPECT_EQ(check_grouped(c), "");
}

TEST(SortedOriginal, FilteredRowsEnterNoAbsmax) {
  LayerConfig config = small_config(Scheme::kFp8Tensor);
  config.local = {0, 4};
  const Fixture f(config);
  Batch batch = f.batch(8);
  for (std::int64_t s = 0; s < 16; ++s)  // even tokens stay here, odd ones go elsewhere
    batch.topk_ids.as<std::int32_t>()[s] =
        static_cast<std::int32_t>(s / 2 % 2 == 0 ? s % 4 : 4 + s % 4);
  for (const Format format : {Format::kStandard, Format::kSorted}) {
    const HostTensor before = f.run(batch, format);
    Batch loud = batch;
    for (std::int64_t t = 1; t < 8; t += 2)
      for (std::int64_t h = 0; h < 64; ++h)
        store_element(loud.hidden_states.bytes().data(), DType::kBF16, t * 64 + h, 1e4);
    EXPECT_TRUE(same_bits(before, f.run(loud, format))) << name(format);
  }
}

TEST(SortedOriginal, AlignChecksIdsAndKeepsSlotOrder) {
  HostTensor ids(DType::kI32, {50, 3});
  Rng rng(51);
  for (std::int64_t i = 0; i < ids.numel(); ++i)
    ids.as<std::int32_t>()[i] = static_cast<std::int32_t>(rng.below(12)) - (i % 7 == 0 ? 100 : 0) +
                                (i % 11 == 0 ? 100000 : 0);
  const std::int64_t capacity = align_capacity(150, 12, 16);
  DeviceTensor slots({}, DType::kI32, {capacity}), experts({}, DType::kI32, {(capacity + 15) / 16}),
      used({}, DType::kI32, {1});
  DeviceTensor slot_row({}, DType::kI32, {150}), count({}, DType::kI32, {5});
  const WorkspaceBuffer workspace({}, align_workspace_bytes(150, 12));
  AlignArgs args;
  args.topk_ids = ids.view();
  args.experts = 12;
  args.local = {3, 5};
  args.rows = {slots.view(), experts.view(), used.view(), 16};
  args.slot_row = slot_row.view();
  args.tokens_per_expert = count.view();
  args.workspace = workspace.view();
  align(args);
  const reference::Aligned want = reference::align(ids.view(), 12, {3, 5}, {}, 16);
  const HostTensor got = slots.to_host(), blocks = experts.to_host(), rows = slot_row.to_host();
  ASSERT_EQ(used.to_host().as<std::int32_t>()[0], static_cast<std::int32_t>(want.slots.size()));
  for (std::size_t i = 0; i < want.slots.size(); ++i) {
    const std::int32_t slot = got.as<std::int32_t>()[i];
    EXPECT_EQ(slot >= 150 ? 150 : slot, want.slots[i]);
  }
  for (std::size_t i = 0; i < want.block_experts.size(); ++i)
    EXPECT_EQ(blocks.as<std::int32_t>()[i], want.block_experts[i]);
  for (std::size_t i = 0; i < 150; ++i) EXPECT_EQ(rows.as<std::int32_t>()[i], want.slot_row[i]);
  for (const DeviceTensor* t : {&slots, &experts, &used, &slot_row, &count})
    EXPECT_TRUE(t->guards_intact());
}

TEST(SortedOriginal, Int8GroupsRoundToNearestAndTruncateOnRequest) {
  HostTensor x(DType::kF32, {1, 8});
  const float values[] = {127.0f, 1.5f, -1.5f, 1.4f, -1.6f, 0.5f, -0.5f, 0.9f};
  std::memcpy(x.bytes().data(), values, sizeof values);
  HostTensor q(DType::kI8, {1, 8}), scale(DType::kF32, {1, 1});
  QuantizeArgs args;
  args.input = x.view();
  args.to = DType::kI8;
  args.granularity = ActScale::kGroup;
  args.group_size = 8;
  args.output = q.view();
  args.scale = scale.view();
  quantize(args);
  const int nearest[] = {127, 2, -2, 1, -2, 1, -1, 1}, truncated[] = {127, 1, -1, 1, -1, 0, 0, 0};
  for (int i = 0; i < 8; ++i) EXPECT_EQ(q.as<std::int8_t>()[i], nearest[i]) << values[i];
  args.int8_rounding = Int8Rounding::kTruncate;
  quantize(args);
  for (int i = 0; i < 8; ++i) EXPECT_EQ(q.as<std::int8_t>()[i], truncated[i]) << values[i];
}

TEST(SortedOriginal, RowsOfZerosAndOfTinyNumbersQuantizeWithoutNaN) {
  for (const DType to : {DType::kF8E4M3, DType::kI8}) {
    for (const float value : {0.0f, 1e-30f, 1e-40f}) {
      for (const ActScale granularity :
           {ActScale::kTensorDynamic, ActScale::kToken, ActScale::kGroup}) {
        HostTensor x(DType::kF32, {2, 32}), q(to, {2, 32});
        for (int i = 0; i < 64; ++i) x.as<float>()[i] = value;
        HostTensor scale(DType::kF32,
                         granularity == ActScale::kTensorDynamic ? std::vector<std::int64_t>{1}
                         : granularity == ActScale::kToken       ? std::vector<std::int64_t>{2, 1}
                                                                 : std::vector<std::int64_t>{2, 2});
        const WorkspaceBuffer workspace({}, quantize_workspace_bytes(2));
        QuantizeArgs args;
        args.input = x.view();
        args.to = to;
        args.granularity = granularity;
        args.group_size = 16;
        args.output = q.view();
        args.scale = scale.view();
        args.workspace = workspace.view();
        quantize(args);
        for (int i = 0; i < 64; ++i) EXPECT_EQ(load_element(q.bytes().data(), to, i), 0);
        for (std::int64_t i = 0; i < scale.numel(); ++i)
          EXPECT_TRUE(scale.as<float>()[i] > 0 && std::isfinite(scale.as<float>()[i]));
      }
    }
  }
}

TEST(SortedOriginal, TheRoutedScalingFactorIsAppliedExactlyOnce) {
  LayerConfig config = small_config(Scheme::kF32);
  Fixture plain(config);
  config.routing.scale = 2.5f;
  Fixture scaled(config);
  const Batch batch = plain.batch(7);
  Execution how;
  how.source = Execution::Source::kLogits;
  HostTensor y = execute(plain.layer, batch, how).output;
  for (std::int64_t i = 0; i < y.numel(); ++i) y.as<float>()[i] *= 2.5f;
  EXPECT_LT(distance(execute(scaled.layer, batch, how).output, y), 1e-6);
  EXPECT_TRUE(
      same_bits(scaled.run(batch), plain.run(batch)));  // given weights carry their factor already
}

TEST(SortedOriginal, ALastGroupOfKMayBeShort) {
  for (const char* name : {"int4_w4a16", "int8_w8a16+g64+zp", "fp8_block", "int8_block"}) {
    GroupedCase c;
    c.variant = variant_named(name);
    c.k = 200;  // 128 + 72
    EXPECT_EQ(check_grouped(c), "") << name;
  }
}

TEST(SortedOriginal, OneZeroPointPerChannelCountsAsOneGroup) {
  LayerConfig config = small_config(Scheme::kInt8W8A16);
  config.quant = {.scheme = Scheme::kInt8W8A16,
                  .weight_scale = WeightScale::kGroup,
                  .group_size = 16,
                  .zero_points = true};
  WeightData data = make_weights(config, {});
  // The same zero point in every group of a channel, written as [E, N] and as [E, N, K / g].
  LayerWeights flat = data.weights;
  std::deque<HostTensor> kept;
  for (GemmWeights* g : {&flat.fc1, &flat.fc2}) {
    const Tensor z = g->zero_point;
    HostTensor& one =
        kept.emplace_back(DType::kU8, std::vector<std::int64_t>{z.shape[0], z.shape[1]});
    for (std::int64_t r = 0; r < one.numel(); ++r) {
      one.as<std::uint8_t>()[r] = z.as<std::uint8_t>()[r * z.shape[2]];
      for (std::int64_t i = 0; i < z.shape[2]; ++i)
        z.as<std::uint8_t>()[r * z.shape[2] + i] = one.as<std::uint8_t>()[r];
    }
    g->zero_point = one.view();
  }
  Layer grouped(config), channel(config);
  grouped.load(data.weights);
  channel.load(flat);
  const Batch batch = make_batch(config, {.tokens = 6});
  EXPECT_TRUE(same_bits(execute(grouped, batch, {}).output, execute(channel, batch, {}).output));
}

// --- remarks on the runner (section 3) -----------------------------------------------------------

TEST(RunnerOriginal, Fc1MayBeUpFirstAsThere) {
  LayerConfig config = small_config(Scheme::kF32);
  const Fixture gate_first(config);
  config.activation.order = GateOrder::kUpFirst;
  LayerWeights swapped = gate_first.weights.weights;
  const std::int64_t half = config.intermediate, hidden = config.hidden;
  HostTensor fc1(DType::kF32, {8, 2 * half, hidden}), bias(DType::kF32, {8, 2 * half});
  for (std::int64_t e = 0; e < 8; ++e)
    for (std::int64_t n = 0; n < 2 * half; ++n) {
      const std::int64_t from = (n + half) % (2 * half);
      bias.as<float>()[e * 2 * half + n] = static_cast<float>(element(swapped.fc1.bias, {e, from}));
      for (std::int64_t k = 0; k < hidden; ++k)
        fc1.as<float>()[(e * 2 * half + n) * hidden + k] =
            static_cast<float>(element(swapped.fc1.weight, {e, from, k}));
    }
  swapped.fc1.weight = fc1.view();
  swapped.fc1.bias = bias.view();
  Layer up_first(config);
  up_first.load(swapped);
  const Batch batch = gate_first.batch(6);
  EXPECT_TRUE(same_bits(gate_first.run(batch), execute(up_first, batch, {}).output));
}

TEST(RunnerOriginal, IdsOutsideTheLocalRangeContributeNothingAndATokenWithoutAnyIsZero) {
  for (const Format format : {Format::kStandard, Format::kSorted, Format::kBatched}) {
    LayerConfig config = small_config();
    config.local = {4, 4};
    const Fixture f(config);
    Batch batch = f.batch(6);
    constexpr std::int32_t kMin = std::numeric_limits<std::int32_t>::min(),
                           kMax = std::numeric_limits<std::int32_t>::max();
    const std::int32_t ids[12] = {0, 3, -1, 8, kMin, kMax, 4, -1, 7, 100000, 4, 5};
    std::memcpy(batch.topk_ids.bytes().data(), ids, sizeof ids);
    const HostTensor y = f.run(batch, format);
    for (std::int64_t t = 0; t < 6; ++t) {
      bool zero = true;
      for (std::int64_t h = 0; h < 64; ++h) zero = zero && element(y.view(), {t, h}) == 0;
      EXPECT_EQ(zero, t < 3) << "token " << t << " in " << name(format);
    }
  }
}

TEST(RunnerOriginal, DuplicatesCountInEveryFormatAndScheme) {
  for (int s = 0; s < kNumSchemes; ++s) {
    for (const Format format : {Format::kStandard, Format::kSorted, Format::kBatched}) {
      Case c;
      c.variant = default_variant(static_cast<Scheme>(s));
      c.shape = {"duplicates", 4, 64, 48, 3};
      c.format = format;
      c.load = Load::kOne;
      c.tokens = 5;
      c.seed = 61;
      EXPECT_EQ(failure(c), "");
    }
  }
}

// The seed's SM80 path is SwiGLU only.
TEST(RunnerOriginal, EveryActivationWorksNotSwigluOnly) {
  for (int a = 0; a < kNumActivations; ++a) {
    Case c;
    c.variant = default_variant(Scheme::kBF16);
    c.shape = {"activations", 4, 64, 48, 2};
    c.activation.kind = static_cast<Activation>(a);
    c.activation.order = GateOrder::kUpFirst;  // as there
    c.activation.limit = 1.25f;
    c.bias = Biases::kAll;
    c.seed = 64;
    EXPECT_EQ(failure(c), "");
  }
}

TEST(RunnerOriginal, NoTokensReturnCleanly) {
  const Fixture f(small_config());
  ForwardArgs args;
  HostTensor x(DType::kBF16, {0, 64}), ids(DType::kI32, {0, 2}), w(DType::kF32, {0, 2}),
      y(DType::kBF16, {0, 64});
  args.hidden_states = x.view();
  args.topk_ids = ids.view();
  args.topk_weights = w.view();
  args.output = y.view();
  const WorkspaceBuffer workspace({}, std::max<std::size_t>(1, f.layer.workspace_bytes(0)));
  args.workspace = workspace.view();
  EXPECT_EQ(complaint([&] { f.layer.forward(args); }), "");
}

TEST(RunnerOriginal, Int8WeightOnlyIsReachable) {
  Case c;
  c.variant = variant_named("int8_w8a16");
  c.shape = {"int8", 4, 96, 64, 2};
  c.seed = 62;
  EXPECT_EQ(failure(c), "");
}

TEST(RunnerOriginal, TheEightTensorModeAppliesFactorsScalesAndAlphas) {
  Case c;
  c.variant = variant_named("int4_w4a8_fp8+static+awq");
  c.shape = {"w4a8", 4, 256, 128, 2};
  c.bias = Biases::kAll;
  c.seed = 63;
  for (const Format format : {Format::kStandard, Format::kSorted, Format::kBatched}) {
    c.format = format;
    EXPECT_EQ(failure(c), "");
  }
}

TEST(RunnerOriginal, TheWorkspaceCanBeAskedForBefore) {
  LayerConfig config = small_config();
  config.max_tokens = 1 << 20;
  const Layer layer(config);
  EXPECT_GT(layer.workspace_bytes(1 << 20), layer.workspace_bytes(1));
}

}  // namespace
}  // namespace moesaic::harness
