// SPDX-License-Identifier: Apache-2.0
// Level 3: everything invoke_fused_moe_kernel can be asked, against the oracle.
#include <gtest/gtest.h>

#include "harness/fixture.h"
#include "harness/grouped.h"
#include "scheme.h"

namespace moesaic::harness {
namespace {

std::string describe(const GroupedCase& c) {
  return c.variant.name + (c.format == Format::kBatched ? " batched" : " sorted") +
         (c.bias == Biases::kAll ? " bias" : "") +
         (c.a_order == RowOrder::kSorted ? " a_sorted" : "") +
         (c.c_order == RowOrder::kSorted ? " c_sorted" : "") +
         (c.placement == Placement::kStrided ? " strided" : "") + " c " + std::string(name(c.c)) +
         " k " + std::to_string(c.k);
}

class EachVariant : public testing::TestWithParam<std::size_t> {
 protected:
  GroupedCase base() const {
    GroupedCase c;
    c.variant = variants()[GetParam()];
    c.a = c.variant.input;
    c.c = c.variant.output;
    c.seed = 3 + GetParam();
    if (c.variant.extras != Extras::kNone) c.variant.extras = Extras::kNone;
    return c;
  }
  void expect_right(const GroupedCase& c) const {
    const std::string complaint = check_grouped(c);
    EXPECT_TRUE(complaint.empty()) << describe(c) << ": " << complaint;
  }
};

TEST_P(EachVariant, Sorted) {
  GroupedCase c = base();
  expect_right(c);
  c.bias = Biases::kAll;  // also in the group-quantized path, where the original forbids it
  c.row_weights = GroupedCase::RowWeights::kGiven;
  expect_right(c);
  c.load = Load::kDuplicates;
  c.placement = Placement::kStrided;
  expect_right(c);
}

TEST_P(EachVariant, SortedRowsOfAAndC) {
  for (const RowOrder a : {RowOrder::kSlot, RowOrder::kSorted}) {
    for (const RowOrder order : {RowOrder::kSlot, RowOrder::kSorted}) {
      GroupedCase c = base();
      // A in sorted order has rows for padding, whose absmax no rule mentions.
      if (c.variant.quant.act_scale == ActScale::kTensorDynamic && a == RowOrder::kSorted) continue;
      c.a_order = a;
      c.c_order = order;
      c.row_weights = GroupedCase::RowWeights::kGiven;
      expect_right(c);
    }
  }
}

TEST_P(EachVariant, FilteredBlocksAreZeroInTheirOwnRows) {
  for (const RowOrder order : {RowOrder::kSlot, RowOrder::kSorted}) {
    GroupedCase c = base();
    if (c.variant.static_scales == StaticScales::kPerExpert)
      c.variant.static_scales = StaticScales::kShared;
    c.local = {1, 3};
    c.c_order = order;
    if (c.variant.quant.act_scale == ActScale::kTensorDynamic)
      continue;  // see FilteredRowsEnterNoAbsmax
    expect_right(c);
  }
}

TEST_P(EachVariant, Batched) {
  GroupedCase c = base();
  c.format = Format::kBatched;
  expect_right(c);
  c.bias = Biases::kAll;
  c.placement = Placement::kStrided;
  expect_right(c);
}

TEST_P(EachVariant, OutputDtypesAndPaddedK) {
  GroupedCase c = base();
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    c.c = dtype;
    c.k_padding = 32;
    c.top_k = 1;
    expect_right(c);
  }
}

TEST_P(EachVariant, OneTokenOneExpertAndNone) {
  GroupedCase c = base();
  c.tokens = 1;
  expect_right(c);
  c.tokens = 0;
  expect_right(c);
  c.tokens = 70;
  c.load = Load::kOne;
  c.block_rows = 64;
  expect_right(c);
}

INSTANTIATE_TEST_SUITE_P(Variants, EachVariant, testing::Range<std::size_t>(0, variants().size()),
                         [](const auto& info) {
                           std::string n = variants()[info.param].name;
                           for (char& ch : n)
                             if (ch == '+') ch = '_';
                           return n;
                         });

TEST(GroupedGemm, TwelveShortGroupsAndOddShapes) {
  for (const std::int64_t k : {8, 40, 100, 200}) {
    for (const std::int64_t n : {2, 12, 50, 136}) {
      GroupedCase c;
      c.k = k;
      c.n = n;
      c.variant = default_variant(Scheme::kInt4W4A16);
      c.variant.quant.group_size = 32;
      c.variant.quant.zero_points = true;
      EXPECT_EQ(check_grouped(c), "") << n << " x " << k;
      c.variant = default_variant(Scheme::kFp8Block);
      c.variant.quant.block_n = 24;
      c.variant.quant.block_k = 16;
      EXPECT_EQ(check_grouped(c), "") << n << " x " << k;
    }
  }
}

// "A in f32/f16/bf16: A_scale is only the optional static scalar": the same as the weights' own.
TEST(GroupedGemm, AScaleOfFloatRowsIsTheStaticOne) {
  for (const Scheme scheme : {Scheme::kFp8Tensor, Scheme::kInt4W4A8Int8}) {
    LayerConfig config = small_config(scheme);
    config.activation.kind = Activation::kIdentity;
    const WeightData weights = make_weights(config, {});
    const Batch batch = make_batch(config, {.tokens = 5, .seed = 12});
    HostTensor live(DType::kI32, {8}), rows(DType::kBF16, {8, 5, 64});
    for (int e = 0; e < 8; ++e) {
      live.as<std::int32_t>()[e] = e % 6;
      std::copy_n(batch.hidden_states.bytes().begin(), 5 * 64 * 2,
                  rows.bytes().begin() + e * 5 * 64 * 2);
    }
    float scale = 0.03f;
    HostTensor own(DType::kF32, {8, 5, 48}), given(DType::kF32, {8, 5, 48});
    GroupedGemmArgs args;
    args.quant = config.quant;
    args.quant.act_scale = ActScale::kDefault;
    args.a = rows.view();
    args.b = weights.weights.fc1;
    args.batched.num_tokens = live.view();
    args.a_scale = Tensor::contiguous(&scale, DType::kF32, {1});
    args.c = given.view();
    const WorkspaceBuffer workspace({}, grouped_gemm_workspace_bytes(args));
    args.workspace = workspace.view();
    grouped_gemm(args);
    args.quant.act_scale = ActScale::kTensorStatic;
    args.b.input_scale = args.a_scale;
    args.a_scale = {};
    args.c = own.view();
    grouped_gemm(args);
    EXPECT_TRUE(same_bits(own, given)) << name(scheme);
    scale = 0.05f;  // not a power of two apart: e4m3 would hold the same digits
    grouped_gemm(args);
    EXPECT_FALSE(same_bits(own, given)) << name(scheme) << ": the scale is not used";
  }
}

// "With a w8a8 flag and A in f32/f16/bf16 the function quantizes A itself."
TEST(GroupedGemm, EveryFloatRowIsQuantizedHere) {
  for (const Scheme scheme : {Scheme::kFp8Tensor, Scheme::kFp8Channel, Scheme::kFp8Block,
                              Scheme::kInt8Channel, Scheme::kInt8Block, Scheme::kInt4W4A8Fp8,
                              Scheme::kInt4W4A8Int8}) {
    for (const DType a : {DType::kF32, DType::kF16, DType::kBF16}) {
      for (const Format format : {Format::kSorted, Format::kBatched}) {
        GroupedCase c;
        c.variant = default_variant(scheme);
        c.a = a;
        c.c = DType::kF32;
        c.format = format;
        c.bias = Biases::kAll;
        EXPECT_EQ(check_grouped(c), "") << describe(c) << " a " << name(a);
      }
    }
  }
}

TEST(GroupedGemm, EveryGroupSizeWithAndWithoutZeroPoints) {
  for (const Scheme scheme :
       {Scheme::kInt4W4A16, Scheme::kInt4W4A8Fp8, Scheme::kInt4W4A8Int8, Scheme::kInt8W8A16}) {
    for (const std::int64_t group : {32, 64, 128, 0}) {  // 0: the whole of K
      for (const int zero_points : {0, 1}) {
        GroupedCase c;
        c.variant = default_variant(scheme);
        c.variant.quant.weight_scale = WeightScale::kGroup;
        c.variant.quant.group_size = group;
        c.variant.quant.zero_points = zero_points == 1;
        c.k = 264;
        c.seed = static_cast<std::uint64_t>(group + zero_points + 1);
        EXPECT_EQ(check_grouped(c), "")
            << name(scheme) << ", group " << group << ", zero points " << zero_points;
      }
    }
  }
}

TEST(GroupedGemm, RefusalsNameTheArgument) {
  GroupedGemmArgs args;
  std::vector<std::uint16_t> a(4 * 8), b(2 * 8 * 8), c(4 * 8);
  args.quant.scheme = Scheme::kBF16;
  args.a = Tensor::contiguous(a.data(), DType::kBF16, {4, 8});
  args.b.weight = Tensor::contiguous(b.data(), DType::kBF16, {2, 8, 8});
  args.c = Tensor::contiguous(c.data(), DType::kBF16, {4, 8});
  const auto message = [&] {
    try {
      grouped_gemm(args);
    } catch (const Error& error) {
      return std::string(error.what());
    }
    return std::string("nothing was thrown");
  };
  EXPECT_NE(message().find("sorted, batched: expected exactly one of the two formats, got neither"),
            std::string::npos)
      << message();
  args.quant.scheme = Scheme::kInt4W4A16;  // "int4 without a group is meaningless: reject it"
  args.quant.weight_scale = WeightScale::kChannel;
  std::vector<std::int32_t> lists(64);
  args.sorted = {.slots = Tensor::contiguous(lists.data(), DType::kI32, {16}),
                 .block_experts = Tensor::contiguous(lists.data(), DType::kI32, {1}),
                 .num_padded = Tensor::contiguous(lists.data(), DType::kI32, {1}),
                 .block_rows = 16};
  EXPECT_NE(message().find("int4_w4a16"), std::string::npos) << message();
  args.quant = {.scheme = Scheme::kBF16};
  args.c = Tensor::contiguous(c.data(), DType::kBF16, {4, 1, 8, 1});
  EXPECT_NE(message().find("c: expected rank 2 or 3"), std::string::npos) << message();
}

// Weights are read in place here: what lies elsewhere, or not densely, is refused before a kernel
// reads it.
TEST(GroupedGemm, WeightsInPlaceMustBeThereAndSmallTensorsDense) {
  const LayerConfig config = small_config(Scheme::kFp8Tensor);
  const WeightData weights =
      make_weights(config, {.bias = Biases::kAll, .static_scales = StaticScales::kPerExpert});
  HostTensor live(DType::kI32, {8}), rows(DType::kBF16, {8, 5, 64}), c(DType::kF32, {8, 5, 96});
  GroupedGemmArgs good;
  good.quant = config.quant;
  good.quant.act_scale = ActScale::kTensorStatic;
  good.a = rows.view();
  good.b = weights.weights.fc1;
  std::vector<float> scales(16, 0.5f);
  good.b.input_scale = Tensor::contiguous(scales.data(), DType::kF32, {8});
  good.batched.num_tokens = live.view();
  good.c = c.view();
  const WorkspaceBuffer workspace({}, grouped_gemm_workspace_bytes(good));
  good.workspace = workspace.view();
  EXPECT_EQ(complaint([&] { grouped_gemm(good); }), "");
  const auto says = [&](const char* text, auto change) {
    GroupedGemmArgs bad = good;
    change(&bad);
    const std::string got = complaint([&] { grouped_gemm(bad); });
    EXPECT_TRUE(got.starts_with(text)) << got;
  };
  const Device elsewhere{DeviceType::kCuda, 0};
  says("b.scale: expected on cpu, got", [&](auto* a) { a->b.scale.device = elsewhere; });
  says("b.bias: expected on cpu, got", [&](auto* a) { a->b.bias.device = elsewhere; });
  says("b.input_scale: expected on cpu", [&](auto* a) { a->b.input_scale.device = elsewhere; });
  says("b.input_scale: must be contiguous", [&](auto* a) { a->b.input_scale.strides[0] = 2; });
  says("c: is written, and its elements overlap", [&](auto* a) { a->c.strides[1] = 90; });
  // A part of every expert's rows: they are no longer evenly apart.
  says("a: the stride of the first dimension", [&](auto* a) { a->c.shape[1] = a->a.shape[1] = 4; });
}

TEST(Pieces, RefusalsNameTheArgument) {
  std::vector<float> x(64), y(64);
  const auto view = [](std::vector<float>& data, std::initializer_list<std::int64_t> shape) {
    return Tensor::contiguous(data.data(), DType::kF32, shape);
  };
  std::vector<std::int32_t> rows(4);
  SumArgs sum;
  sum.input = view(x, {2, 2, 4, 4});
  sum.slot_row = Tensor::contiguous(rows.data(), DType::kI32, {2, 2});
  sum.output = view(y, {2, 4});
  EXPECT_NE(complaint([&] { sum_slots(sum); }).find("input: expected rank 2 or 3"),
            std::string::npos);
  ActivateArgs act;
  act.input = view(x, {4, 8});
  act.output = view(y, {4, 4});
  act.parameters.beta = view(x, {2, 2});
  act.row_expert = Tensor::contiguous(rows.data(), DType::kI32, {4});
  EXPECT_NE(complaint([&] { activate(act); }).find("parameters.beta: expected rank 1"),
            std::string::npos);
  act.parameters = {.alpha = view(x, {4}), .beta = view(x, {2})};
  EXPECT_NE(complaint([&] { activate(act); }).find("parameters.beta: expected shape [4]"),
            std::string::npos);
  EXPECT_NE(complaint([&] { align_workspace_bytes(-1, 8); }).find("slot_count"), std::string::npos);
  EXPECT_NE(complaint([&] { parse_routing("hash"); }).find("topk_ids"), std::string::npos);
}

}  // namespace
}  // namespace moesaic::harness
