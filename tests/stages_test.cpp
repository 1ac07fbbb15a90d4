// SPDX-License-Identifier: Apache-2.0
// Level 2: prepare, experts and finalize apart, as a foreign dispatch and combine would use them.
#include <gtest/gtest.h>

#include <cstring>
#include <limits>

#include "harness/compare.h"
#include "harness/fixture.h"
#include "reference/align.h"
#include "reference/quantize.h"
#include "scheme.h"

namespace moesaic::harness {
namespace {

// What prepare writes, on the host.
struct Prepared {
  HostTensor rows, row_scale, num_tokens, slot_row;
  std::int32_t dropped = 0;
};
Prepared run_prepare(const LayerConfig& config, const Batch& batch, std::int64_t capacity,
                     const Tensor& expert_map = {}) {
  const WeightSpec fc1 = weight_spec(config, Product::kFc1);
  const std::int64_t tokens = batch.hidden_states.shape()[0];
  DeviceTensor rows({}, fc1.act_dtype, {fc1.experts, capacity, config.hidden});
  DeviceTensor scale(
      {}, DType::kF32,
      {fc1.experts, fc1.act_scale == ActScale::kTensorDynamic ? 1 : capacity,
       fc1.act_scale == ActScale::kGroup ? (fc1.k + fc1.act_group - 1) / fc1.act_group : 1});
  DeviceTensor count({}, DType::kI32, {fc1.experts}),
      slot_row({}, DType::kI32, {tokens, config.top_k});
  DeviceTensor status({}, DType::kI32, {1});
  const WorkspaceBuffer workspace(
      {}, stage_workspace_bytes(config, {.tokens = tokens, .capacity = capacity}));
  PrepareArgs args;
  args.hidden_states = batch.hidden_states.view();
  args.hidden_scale = batch.hidden_scale.view();
  args.topk_ids = batch.topk_ids.view();
  args.topk_weights = batch.topk_weights.view();
  args.expert_map = expert_map;
  args.rows = rows.view();
  if (fc1.act_scale != ActScale::kDefault) args.row_scale = scale.view();
  args.num_tokens = count.view();
  args.slot_row = slot_row.view();
  args.status = status.view();
  args.workspace = workspace.view();
  prepare(config, args);
  EXPECT_TRUE(rows.guards_intact() && scale.guards_intact() && count.guards_intact() &&
              slot_row.guards_intact());
  return {rows.to_host(), scale.to_host(), count.to_host(), slot_row.to_host(),
          status.to_host().as<std::int32_t>()[0]};
}

class EachScheme : public testing::TestWithParam<int> {
 protected:
  LayerConfig config() const { return small_config(static_cast<Scheme>(GetParam())); }
};
std::string scheme_name(const testing::TestParamInfo<int>& info) {
  return std::string(name(static_cast<Scheme>(info.param)));
}

TEST_P(EachScheme, PrepareWritesLiveRowsAndNothingBehindThem) {
  const LayerConfig c = config();
  const WeightSpec fc1 = weight_spec(c, Product::kFc1);
  const Batch batch = make_batch(c, {.tokens = 19, .load = Load::kZipf, .seed = 4});
  const std::int64_t capacity = needed_capacity(c, batch.topk_ids) + 3;
  const Prepared p = run_prepare(c, batch, capacity);
  EXPECT_EQ(p.dropped, 0);
  std::vector<std::int32_t> count(8, 0);
  const std::size_t row_bytes = static_cast<std::size_t>(c.hidden) * size_of(fc1.act_dtype);
  std::vector<bool> live(static_cast<std::size_t>(8 * capacity), false);
  for (std::int64_t s = 0; s < 19 * c.top_k; ++s) {
    const std::int32_t e = batch.topk_ids.as<std::int32_t>()[s];
    const std::int64_t row =
        e * capacity + count[static_cast<std::size_t>(e)]++;  // slots in their order
    ASSERT_EQ(p.slot_row.as<std::int32_t>()[s], row);
    live[static_cast<std::size_t>(row)] = true;
    const std::byte* got = p.rows.bytes().data() + static_cast<std::size_t>(row) * row_bytes;
    if (fc1.act_scale == ActScale::kDefault) {
      EXPECT_EQ(std::memcmp(got,
                            batch.hidden_states.bytes().data() +
                                static_cast<std::size_t>(s / c.top_k) * row_bytes,
                            row_bytes),
                0);
      continue;
    }
    if (fc1.act_scale == ActScale::kTensorDynamic) continue;  // its scale: see the defects
    std::vector<reference::Bounded> x;
    for (std::int64_t h = 0; h < c.hidden; ++h)
      x.push_back({element(batch.hidden_states.view(), {s / c.top_k, h}), 0});
    const reference::Row want = reference::quantize(
        {.to = fc1.act_dtype, .group = fc1.act_group, .int8_rounding = fc1.int8_rounding}, x);
    const std::int64_t groups = p.row_scale.shape()[2];
    for (std::int64_t h = 0; h < c.hidden; ++h) {
      const double scale =
          p.row_scale.as<float>()[row * groups + (groups > 1 ? h / fc1.act_group : 0)];
      ASSERT_EQ(load_element(got, fc1.act_dtype, h) * scale,
                want.value[static_cast<std::size_t>(h)]);
    }
  }
  for (std::size_t e = 0; e < 8; ++e) EXPECT_EQ(p.num_tokens.as<std::int32_t>()[e], count[e]);
  for (std::size_t r = 0; r < live.size(); ++r) {
    if (live[r]) continue;
    for (std::size_t i = 0; i < row_bytes; ++i)
      ASSERT_EQ(p.rows.bytes()[r * row_bytes + i], DeviceTensor::kPoison)
          << "row " << r << " has no token";
  }
}

TEST_P(EachScheme, ExpertsReadTheCallersOwnWeightsInPlaceWithTheSameBits) {
  const LayerConfig c = config();
  const Fixture f(c);
  const Batch batch = f.batch(23, Load::kZipf);
  const std::int64_t capacity = needed_capacity(c, batch.topk_ids);
  const Prepared p = run_prepare(c, batch, capacity);
  const WorkspaceBuffer workspace({},
                                  stage_workspace_bytes(c, {.tokens = 23, .capacity = capacity}));
  ExpertsArgs args;
  args.rows = p.rows.view();
  if (weight_spec(c, Product::kFc1).act_scale != ActScale::kDefault)
    args.row_scale = p.row_scale.view();
  args.batched.num_tokens = p.num_tokens.view();
  args.workspace = workspace.view();
  DeviceTensor packed({}, DType::kF32, {8, capacity, c.hidden}),
      plain({}, DType::kF32, {8, capacity, c.hidden});
  args.output = packed.view();
  experts(f.layer, args);
  args.output = plain.view();
  experts(c, f.weights.weights, args);
  EXPECT_TRUE(same_bits(packed.to_host(), plain.to_host()));
  EXPECT_TRUE(plain.guards_intact());
}

TEST_P(EachScheme, TwoRanksWithAnExpertMapGiveTheWhole) {
  LayerConfig whole_config = config();
  if (whole_config.quant.act_scale == ActScale::kTensorDynamic)
    GTEST_SKIP() << "one scale per call";
  const Fixture whole(whole_config);
  const Batch batch = whole.batch(15, Load::kDuplicates);
  // Rank r holds the experts of parity r, in descending order: no range says that, a map does.
  std::vector<double> sum(static_cast<std::size_t>(15 * whole_config.hidden));
  for (const std::int64_t rank : {0, 1}) {
    LayerConfig c = whole_config;
    c.local = {0, 4};
    c.output_dtype = DType::kF32;
    std::vector<std::int32_t> map(8, -1);
    Layer layer(c);
    for (std::int64_t local = 0; local < 4; ++local) {
      const std::int64_t global = 6 - 2 * local + rank;
      map[static_cast<std::size_t>(global)] = static_cast<std::int32_t>(local);
      layer.load_expert(local,
                        make_experts(whole_config, {.bias = Biases::kAll}, global, 1).weights);
    }
    const Tensor expert_map = Tensor::contiguous(map.data(), DType::kI32, {8});
    const std::int64_t capacity = 30;
    const Prepared p = run_prepare(c, batch, capacity, expert_map);
    const WorkspaceBuffer workspace({},
                                    stage_workspace_bytes(c, {.tokens = 15, .capacity = capacity}));
    ExpertsArgs e;
    e.rows = p.rows.view();
    if (weight_spec(c, Product::kFc1).act_scale != ActScale::kDefault)
      e.row_scale = p.row_scale.view();
    e.batched.num_tokens = p.num_tokens.view();
    e.workspace = workspace.view();
    DeviceTensor slots({}, DType::kF32, {4, capacity, c.hidden}),
        y({}, DType::kF32, {15, c.hidden});
    e.output = slots.view();
    experts(layer, e);
    FinalizeArgs fin;
    fin.expert_output = slots.view();
    fin.topk_ids = batch.topk_ids.view();
    fin.topk_weights = batch.topk_weights.view();
    fin.expert_map = expert_map;
    fin.output = y.view();
    fin.workspace = workspace.view();
    finalize(c, fin);
    const HostTensor part = y.to_host();
    for (std::int64_t i = 0; i < part.numel(); ++i)
      sum[static_cast<std::size_t>(i)] += part.as<float>()[i];
  }
  HostTensor total(DType::kF32, {15, whole_config.hidden});
  for (std::int64_t i = 0; i < total.numel(); ++i)
    total.as<float>()[i] = static_cast<float>(sum[static_cast<std::size_t>(i)]);
  const double limit =
      whole_config.output_dtype == DType::kF32 ? 1e-6 : 5e-3;  // the whole's own last rounding
  EXPECT_LT(distance(total, whole.run(batch)), limit);
}

TEST_P(EachScheme, SortedRowsTakeRoutingWeights) {
  const LayerConfig c = config();
  const Fixture f(c);
  const Batch batch = f.batch(11);
  const reference::Aligned lists = reference::align(batch.topk_ids.view(), 8, {}, {}, 8);
  const auto length = static_cast<std::int64_t>(lists.slots.size());
  std::int32_t used = static_cast<std::int32_t>(length);
  const WorkspaceBuffer workspace(
      {}, stage_workspace_bytes(c, {.format = Format::kSorted, .tokens = 11, .capacity = length}));
  DeviceTensor weighted({}, DType::kF32, {22, c.hidden}), plain({}, DType::kF32, {22, c.hidden});
  ExpertsArgs args;
  args.format = Format::kSorted;
  args.rows = batch.hidden_states.view();
  args.sorted = {
      .slots = Tensor::contiguous(lists.slots.data(), DType::kI32, {length}),
      .block_experts = Tensor::contiguous(lists.block_experts.data(), DType::kI32, {length / 8}),
      .num_padded = Tensor::contiguous(&used, DType::kI32, {1}),
      .block_rows = 8};
  args.workspace = workspace.view();
  args.output = plain.view();
  experts(f.layer, args);
  args.row_weights = Tensor::contiguous(batch.topk_weights.as<float>(), DType::kF32, {22});
  args.output = weighted.view();
  experts(f.layer, args);
  ExpertsArgs few = args;  // fewer weights than slots would be read beyond their end
  few.row_weights = few.row_weights.slice(0, 21);
  EXPECT_NE(complaint([&] { experts(f.layer, few); }).find("row_weights: expected 22"),
            std::string::npos);
  const HostTensor a = plain.to_host(), b = weighted.to_host();
  for (std::int64_t i = 0; i < a.numel(); ++i)
    ASSERT_EQ(b.as<float>()[i], a.as<float>()[i] * batch.topk_weights.as<float>()[i / c.hidden]);
  EXPECT_TRUE(weighted.guards_intact());
}

INSTANTIATE_TEST_SUITE_P(Schemes, EachScheme, testing::Range(0, kNumSchemes), scheme_name);

TEST(Stages, AHintOfLiveTokensNeverChangesBits) {
  const LayerConfig c = small_config();
  const Fixture f(c);
  const Batch batch = f.batch(40);
  const Prepared p = run_prepare(c, batch, 64);
  const WorkspaceBuffer workspace({}, stage_workspace_bytes(c, {.tokens = 40, .capacity = 64}));
  ExpertsArgs args;
  args.rows = p.rows.view();
  args.batched.num_tokens = p.num_tokens.view();
  args.workspace = workspace.view();
  HostTensor first;
  for (const std::int64_t hint : {std::int64_t{0}, std::int64_t{1}, std::int64_t{40},
                                  std::int64_t{5000}, std::numeric_limits<std::int64_t>::max()}) {
    DeviceTensor out({}, DType::kF32, {8, 64, c.hidden});
    args.output = out.view();
    args.expected_tokens = hint;
    experts(f.layer, args);
    if (!first.defined()) first = out.to_host();
    EXPECT_TRUE(same_bits(first, out.to_host())) << hint;
  }
}

TEST(Stages, EightBitRowsFromAForeignDispatchAreUsedAsTheyAre) {
  for (const Scheme scheme : {Scheme::kFp8Channel, Scheme::kFp8Block, Scheme::kInt8Channel}) {
    LayerConfig c = small_config(scheme);
    const Fixture f(c);
    LayerConfig eight = c;
    eight.input_dtype = scheme == Scheme::kInt8Channel ? DType::kI8 : DType::kF8E4M3;
    const Batch batch = make_batch(eight, {.tokens = 12, .seed = 8});
    Layer layer(eight);
    layer.load(f.weights.weights);
    Case same;  // prepare moves rows and scales, experts reads them: as the layer on the same 8-bit
                // input
    same.variant = default_variant(scheme);
    Execution how;
    const HostTensor standard = execute(layer, batch, how).output;
    how.format = Format::kBatched;
    EXPECT_TRUE(same_bits(standard, execute(layer, batch, how).output)) << name(scheme);
    how.format = Format::kSorted;
    EXPECT_TRUE(same_bits(standard, execute(layer, batch, how).output)) << name(scheme);
  }
}

TEST(StagesErrors, NameTheArgument) {
  const LayerConfig c = small_config(Scheme::kFp8Channel);
  const Fixture f(c);
  ExpertsArgs args;
  args.format = Format::kStandard;
  EXPECT_NE(complaint([&] { experts(f.layer, args); }).find("format"), std::string::npos);
  args.format = Format::kBatched;
  EXPECT_NE(complaint([&] { experts(f.layer, args); }).find("rows"), std::string::npos);
  HostTensor rows(DType::kF8E4M3, {8, 4, 64}), y(DType::kBF16, {8, 4, 64}), count(DType::kI32, {8});
  args.rows = rows.view();
  args.output = y.view();
  args.batched.num_tokens = count.view();
  EXPECT_NE(complaint([&] { experts(f.layer, args); }).find("row_scale"), std::string::npos);
  LayerConfig fixed = c;
  fixed.quant = {.scheme = Scheme::kFp8Tensor, .act_scale = ActScale::kTensorStatic};
  const Batch batch = make_batch(fixed, {.tokens = 2});
  HostTensor scale(DType::kF32, {8, 1, 1});
  PrepareArgs p;
  p.hidden_states = batch.hidden_states.view();
  p.topk_ids = batch.topk_ids.view();
  p.topk_weights = batch.topk_weights.view();
  p.rows = rows.view();
  p.row_scale = scale.view();
  p.num_tokens = count.view();
  EXPECT_NE(complaint([&] { prepare(fixed, p); }).find("static"), std::string::npos);
}

}  // namespace
}  // namespace moesaic::harness
