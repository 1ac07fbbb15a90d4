// SPDX-License-Identifier: Apache-2.0
// What the three originals get wrong, leave undefined or forbid, one test each, through the public
// interface. The nine numbered ones are contracts.md's list of defects of the batched original.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>

#include "harness/compare.h"
#include "harness/fixture.h"
#include "harness/grouped.h"
#include "numeric.h"
#include "reference/align.h"
#include "scheme.h"

namespace moesaic::harness {
namespace {

const Variant& variant_named(std::string_view wanted) {
  for (const Variant& v : variants())
    if (v.name == wanted) return v;
  throw std::runtime_error("no variant " + std::string(wanted));
}
void expect_passes(const Case& c) {
  const VerifyResult r = run_case(c);
  EXPECT_EQ(r.status, Status::kPassed) << r.name << ": " << r.reason;
}

// A batched run with every tensor in the open.
struct Batched {
  LayerConfig config;
  std::int64_t tokens, capacity;
  DeviceTensor rows, row_scale, num_tokens, slot_row, status, slots, output;
  WorkspaceBuffer workspace;

  Batched(const LayerConfig& c, std::int64_t t, std::int64_t rows_per_expert, DType slot_dtype = DType::kF32)
      : config(c), tokens(t), capacity(rows_per_expert) {
    const WeightSpec fc1 = weight_spec(c, Product::kFc1);
    const bool per_tensor = fc1.act_scale == ActScale::kTensorDynamic;
    const std::int64_t groups = fc1.act_scale == ActScale::kGroup ? (fc1.k + fc1.act_group - 1) / fc1.act_group : 1;
    rows = DeviceTensor({}, fc1.act_dtype, {fc1.experts, capacity, c.hidden});
    row_scale = DeviceTensor({}, DType::kF32, {fc1.experts, per_tensor ? 1 : capacity, groups});
    num_tokens = DeviceTensor({}, DType::kI32, {fc1.experts});
    slot_row = DeviceTensor({}, DType::kI32, {tokens, c.top_k});
    status = DeviceTensor({}, DType::kI32, {1});
    slots = DeviceTensor({}, slot_dtype, {fc1.experts, capacity, c.hidden});
    output = DeviceTensor({}, c.output_dtype, {tokens, c.hidden});
    workspace = WorkspaceBuffer({}, stage_workspace_bytes(c, Format::kBatched, tokens, capacity));
  }
  void run_prepare(const Batch& b) {
    PrepareArgs args;
    args.hidden_states = b.hidden_states.view();
    args.topk_ids = b.topk_ids.view();
    args.topk_weights = b.topk_weights.view();
    args.rows = rows.view();
    if (weight_spec(config, Product::kFc1).act_scale != ActScale::kDefault) args.row_scale = row_scale.view();
    args.num_tokens = num_tokens.view();
    args.slot_row = slot_row.view();
    args.status = status.view();
    args.workspace = workspace.view();
    prepare(config, args);
  }
  void run_experts(const Layer& layer) {
    ExpertsArgs args;
    args.rows = rows.view();
    if (weight_spec(config, Product::kFc1).act_scale != ActScale::kDefault) args.row_scale = row_scale.view();
    args.batched.num_tokens = num_tokens.view();
    args.output = slots.view();
    args.workspace = workspace.view();
    experts(layer, args);
  }
  void run_finalize(const Batch& b) {
    FinalizeArgs args;
    args.expert_output = slots.view();
    args.topk_ids = b.topk_ids.view();
    args.topk_weights = b.topk_weights.view();
    args.output = output.view();
    args.workspace = workspace.view();
    finalize(config, args);
  }
  HostTensor run(const Layer& layer, const Batch& b) {
    run_prepare(b);
    run_experts(layer);
    run_finalize(b);
    return output.to_host();
  }
};

// --- the nine of fused_batched_moe (contracts, section 2) --------------------------------------------

TEST(Defect1, WeightOnlyScalesOfTheSecondTileOfNOnAreTheirOwn) {
  for (const char* name : {"int8_w8a16", "fp8_w8a16", "int4_w4a16", "int8_w8a16+g64+zp", "mxfp4_w4a16"}) {
    Case c;
    c.variant = variant_named(name);
    c.format = Format::kBatched;
    c.shape = {"wide", 3, 448, 320, 2};  // N of 640 and 448: several tiles of any kernel
    c.tokens = 7;
    c.seed = 31;
    expect_passes(c);
    EXPECT_EQ(run_case(c, {}, Fault::kNeighboursScale).status, Status::kFailed);
  }
}

TEST(Defect2, APerTensorWeightScaleIsItsOwnExperts) {
  for (const char* name : {"fp8_tensor", "fp8_tensor+static", "fp8_tensor+static_each+two", "fp8_w8a16+tensor"}) {
    Case c;
    c.variant = variant_named(name);
    c.format = Format::kBatched;
    c.shape = {"tensor", 6, 96, 64, 3};
    c.tokens = 11;
    c.seed = 32;
    expect_passes(c);
    EXPECT_EQ(run_case(c, {}, Fault::kNeighboursScale).status, Status::kFailed) << name;
  }
  // Per-tensor weights with per-token activations are not in the matrix: refused by name.
  LayerConfig config = small_config(Scheme::kFp8Channel);
  config.quant.weight_scale = WeightScale::kTensor;
  EXPECT_NE(complaint([&] { Layer layer(config); }).find("fp8_channel takes channel"), std::string::npos);
}

TEST(Defect3, TheNumberOfPaddedRowsChangesNothing) {
  for (const Scheme scheme : {Scheme::kBF16, Scheme::kFp8Block, Scheme::kInt4W4A16}) {
    const Fixture f(small_config(scheme));
    const Batch batch = f.batch(6);
    HostTensor first;
    for (const std::int64_t capacity : {12, 64, 1024}) {
      const HostTensor y = Batched(f.config, 6, capacity).run(f.layer, batch);
      if (!first.defined()) first = y;
      EXPECT_TRUE(same_bits(first, y)) << name(scheme) << " with capacity " << capacity;
    }
  }
}

TEST(Defect4, PaddingRowsAreNeitherClearedNorComputed) {
  for (int s = 0; s < kNumSchemes; ++s) {
    const Fixture f(small_config(static_cast<Scheme>(s)));
    const Batch batch = f.batch(9, Load::kHoles);
    Batched b(f.config, 9, 18);
    b.run(f.layer, batch);
    const HostTensor rows = b.rows.to_host(), slots = b.slots.to_host(), count = b.num_tokens.to_host();
    for (const HostTensor* t : {&rows, &slots}) {
      const std::size_t width = static_cast<std::size_t>(f.config.hidden) * size_of(t->dtype());
      for (std::int64_t e = 0; e < 8; ++e) {
        const std::size_t live = static_cast<std::size_t>(e * 18 + count.as<std::int32_t>()[e]) * width;
        const std::size_t end = static_cast<std::size_t>((e + 1) * 18) * width;
        for (std::size_t i = live; i < end; ++i) ASSERT_EQ(t->bytes()[i], DeviceTensor::kPoison);
      }
    }
  }
}

TEST(Defect5, DynamicScalesSeeLiveRowsOnlyOneExpertEach) {
  LayerConfig config = small_config(Scheme::kFp8Tensor);
  const Fixture f(config);
  Batch batch = f.batch(10, Load::kZipf);
  Batched b(config, 10, 20);
  // A stale buffer: numbers far beyond any live row, where padding is.
  HostTensor stale(DType::kF8E4M3, {8, 20, 64});
  std::memset(stale.bytes().data(), 0x7e, stale.bytes().size());  // 448 everywhere
  b.rows.assign(stale.view());
  b.run_prepare(batch);
  const HostTensor scale = b.row_scale.to_host();
  for (std::int64_t e = 0; e < 8; ++e) {
    float absmax = 0;
    bool any = false;
    for (std::int64_t s = 0; s < 20; ++s) {
      if (batch.topk_ids.as<std::int32_t>()[s] != e) continue;
      any = true;
      for (std::int64_t h = 0; h < 64; ++h)
        absmax = std::max(absmax, std::abs(static_cast<float>(element(batch.hidden_states.view(), {s / 2, h}))));
    }
    if (any) {
      EXPECT_EQ(scale.as<float>()[e], activation_scale(absmax, 448.0f)) << "expert " << e;
    }
  }
}

TEST(Defect6, RowsBeyondCapacityAreDroppedAndCounted) {
  for (const Scheme scheme : {Scheme::kF32, Scheme::kBF16, Scheme::kFp8Channel}) {
    const Fixture f(small_config(scheme));
    const Batch batch = f.batch(12, Load::kOne);  // 24 slots on one expert
    for (const std::int64_t capacity : {1, 7, 24}) {
      Batched b(f.config, 12, capacity);
      const HostTensor y = b.run(f.layer, batch);
      EXPECT_EQ(b.status.to_host().as<std::int32_t>()[0], 24 - capacity);
      EXPECT_EQ(b.num_tokens.to_host().as<std::int32_t>()[4], capacity);
      for (const DeviceTensor* t : {&b.rows, &b.row_scale, &b.slots, &b.output}) EXPECT_TRUE(t->guards_intact());
      reference::LayerInput input;
      input.hidden_states = batch.hidden_states.view();
      input.topk_ids = batch.topk_ids.view();
      input.topk_weights = batch.topk_weights.view();
      input.format = Format::kBatched;
      input.capacity = capacity;
      const auto oracle = reference::layer(f.config, f.weights.weights, nullptr, input, {});
      EXPECT_EQ(oracle.dropped, 24 - capacity);
      EXPECT_EQ(compare(y, oracle.output).reason, "");
    }
  }
}

TEST(Defect7, DuplicateExpertsInATokenCountEach) {
  for (const Format format : {Format::kStandard, Format::kSorted, Format::kBatched}) {
    const Fixture f(small_config(Scheme::kF32));
    Batch twice = f.batch(5);
    for (std::int64_t t = 0; t < 5; ++t) {
      twice.topk_ids.as<std::int32_t>()[2 * t] = twice.topk_ids.as<std::int32_t>()[2 * t + 1] = 3;
      twice.topk_weights.as<float>()[2 * t] = 0.25f;
      twice.topk_weights.as<float>()[2 * t + 1] = 0.5f;
    }
    Batch once = twice;
    for (std::int64_t t = 0; t < 5; ++t) {
      once.topk_ids.as<std::int32_t>()[2 * t + 1] = -1;
      once.topk_weights.as<float>()[2 * t] = 0.75f;
    }
    EXPECT_LT(distance(f.run(twice, format), f.run(once, format)), 1e-6) << name(format);
  }
}

TEST(Defect8, FinalizeLeavesItsInputAndSumsInFp32InSlotOrder) {
  LayerConfig config = small_config();
  config.experts = 32;
  config.top_k = 22;
  const Batch batch = make_batch(config, {.tokens = 3, .seed = 81});
  Batched b(config, 3, 3, DType::kBF16);
  b.run_prepare(batch);
  HostTensor slots(DType::kBF16, {32, 3, 64});
  Rng rng(82);
  for (std::int64_t i = 0; i < slots.numel(); ++i) store_element(slots.bytes().data(), DType::kBF16, i, 100.0 * rng.normal());
  b.slots.assign(slots.view());
  b.run_finalize(batch);
  EXPECT_TRUE(same_bits(b.slots.to_host(), slots));
  const HostTensor y = b.output.to_host(), slot_row = b.slot_row.to_host();
  for (std::int64_t t = 0; t < 3; ++t) {
    for (std::int64_t h = 0; h < 64; ++h) {
      float sum = 0;  // an output-dtype or expert-order sum would differ in the last place
      for (std::int64_t j = 0; j < 22; ++j) {
        const std::int64_t row = slot_row.as<std::int32_t>()[t * 22 + j];
        const float v = bf16_to_float(slots.as<std::uint16_t>()[row * 64 + h]);
        sum += batch.topk_weights.as<float>()[t * 22 + j] * v;
      }
      EXPECT_EQ(y.as<std::uint16_t>()[t * 64 + h], float_to_bf16(sum));
    }
  }
}

TEST(Defect9, TokensPerExpertHasOneEntryPerLocalExpert) {
  LayerConfig config = small_config();
  config.local = {5, 2};
  const Batch batch = make_batch(config, {.tokens = 30, .seed = 91});
  Batched b(config, 30, 60);  // num_tokens is [2], between guard bands
  b.run_prepare(batch);
  EXPECT_TRUE(b.num_tokens.guards_intact());
  std::int32_t count[2] = {0, 0};
  for (std::int64_t s = 0; s < 60; ++s) {
    const std::int32_t e = batch.topk_ids.as<std::int32_t>()[s];
    if (e >= 5 && e < 7) ++count[e - 5];
  }
  EXPECT_EQ(b.num_tokens.to_host().as<std::int32_t>()[0], count[0]);
  EXPECT_EQ(b.num_tokens.to_host().as<std::int32_t>()[1], count[1]);
}

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
    expect_passes(c);
  }
}

TEST(BatchedOriginal, SchemesThatAreNotYetImplementedThereWork) {
  for (const char* name : {"int8_channel", "int8_w8a16", "int4_w4a16", "int4_w4a16+g32+zp"}) {
    Case c;  // and biases, and zero points
    c.variant = variant_named(name);
    c.format = Format::kBatched;
    c.shape = {"nyi", 4, 96, 64, 2};
    c.bias = Biases::kAll;
    c.seed = 42;
    expect_passes(c);
  }
}

// --- remarks on the sorted original (section 1) ----------------------------------------------------

TEST(SortedOriginal, BiasIsAllowedWithGroupedWeights) {
  for (const char* name : {"int4_w4a16", "int8_w8a16+g64+zp"}) {
    GroupedCase c;
    c.variant = variant_named(name);
    c.bias = Biases::kAll;
    c.row_weights = GroupedCase::RowWeights::kGiven;  // scale, bias, routed weight, cast: in this order
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
    batch.topk_ids.as<std::int32_t>()[s] = static_cast<std::int32_t>(s / 2 % 2 == 0 ? s % 4 : 4 + s % 4);
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
    ids.as<std::int32_t>()[i] = static_cast<std::int32_t>(rng.below(12)) - (i % 7 == 0 ? 100 : 0) + (i % 11 == 0 ? 100000 : 0);
  const std::int64_t capacity = align_capacity(150, 12, 16);
  DeviceTensor slots({}, DType::kI32, {capacity}), experts({}, DType::kI32, {(capacity + 15) / 16}), used({}, DType::kI32, {1});
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
  for (std::size_t i = 0; i < want.block_experts.size(); ++i) EXPECT_EQ(blocks.as<std::int32_t>()[i], want.block_experts[i]);
  for (std::size_t i = 0; i < 150; ++i) EXPECT_EQ(rows.as<std::int32_t>()[i], want.slot_row[i]);
  for (const DeviceTensor* t : {&slots, &experts, &used, &slot_row, &count}) EXPECT_TRUE(t->guards_intact());
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
      for (const ActScale granularity : {ActScale::kTensorDynamic, ActScale::kToken, ActScale::kGroup}) {
        HostTensor x(DType::kF32, {2, 32}), q(to, {2, 32});
        for (int i = 0; i < 64; ++i) x.as<float>()[i] = value;
        HostTensor scale(DType::kF32, granularity == ActScale::kTensorDynamic ? std::vector<std::int64_t>{1}
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
        for (std::int64_t i = 0; i < scale.numel(); ++i) EXPECT_TRUE(scale.as<float>()[i] > 0 && std::isfinite(scale.as<float>()[i]));
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
  EXPECT_TRUE(same_bits(scaled.run(batch), plain.run(batch)));  // given weights carry their factor already
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
  config.quant = {.scheme = Scheme::kInt8W8A16, .weight_scale = WeightScale::kGroup, .group_size = 16, .zero_points = true};
  WeightData data = make_weights(config, {});
  // The same zero point in every group of a channel, written as [E, N] and as [E, N, K / g].
  LayerWeights flat = data.weights;
  std::deque<HostTensor> kept;
  for (GemmWeights* g : {&flat.fc1, &flat.fc2}) {
    const Tensor z = g->zero_point;
    HostTensor& one = kept.emplace_back(DType::kU8, std::vector<std::int64_t>{z.shape[0], z.shape[1]});
    for (std::int64_t r = 0; r < one.numel(); ++r) {
      one.as<std::uint8_t>()[r] = z.as<std::uint8_t>()[r * z.shape[2]];
      for (std::int64_t i = 0; i < z.shape[2]; ++i) z.as<std::uint8_t>()[r * z.shape[2] + i] = one.as<std::uint8_t>()[r];
    }
    g->zero_point = one.view();
  }
  Layer grouped(config), channel(config);
  grouped.load(data.weights);
  channel.load(flat);
  const Batch batch = make_batch(config, {.tokens = 6});
  EXPECT_TRUE(same_bits(execute(grouped, batch, {}).output, execute(channel, batch, {}).output));
}

// --- remarks on the runner (section 3) ---------------------------------------------------------------

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
        fc1.as<float>()[(e * 2 * half + n) * hidden + k] = static_cast<float>(element(swapped.fc1.weight, {e, from, k}));
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
    constexpr std::int32_t kMin = std::numeric_limits<std::int32_t>::min(), kMax = std::numeric_limits<std::int32_t>::max();
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
      expect_passes(c);
    }
  }
}

TEST(RunnerOriginal, NoTokensReturnCleanly) {
  const Fixture f(small_config());
  ForwardArgs args;
  HostTensor x(DType::kBF16, {0, 64}), ids(DType::kI32, {0, 2}), w(DType::kF32, {0, 2}), y(DType::kBF16, {0, 64});
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
  expect_passes(c);
}

TEST(RunnerOriginal, TheEightTensorModeAppliesFactorsScalesAndAlphas) {
  Case c;
  c.variant = variant_named("int4_w4a8_fp8+static+awq");
  c.shape = {"w4a8", 4, 256, 128, 2};
  c.bias = Biases::kAll;
  c.seed = 63;
  for (const Format format : {Format::kStandard, Format::kSorted, Format::kBatched}) {
    c.format = format;
    expect_passes(c);
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
