// SPDX-License-Identifier: Apache-2.0
// grouped_gemm on blocks that a product on Hopper takes as tiles as they are, against the same
// blocks at the head of a list so long that its tiles are listed first: the same bits, whatever the
// lists say, in every scheme that has kernels for it.
#include <gtest/gtest.h>

#include <algorithm>
#include <climits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "backend.h"
#include "device_buffer.h"
#include "moesaic/gemm.h"
#include "moesaic/runtime.h"
#include "plan.h"
#include "scheme.h"

namespace moesaic::test {
namespace {

constexpr Device kGpu{DeviceType::kCuda, 0};
// So few slots that tiles of 16 rows are wanted: else blocks are not taken as tiles.
constexpr std::int64_t kExperts = 8, kK = 256, kTokens = 24, kTopK = 3, kBlockRows = 16;
// The first are as many as a warp has lanes, the second more; the third are too many.
constexpr int kSlots = kTokens * kTopK, kFewBlocks = 20, kMoreBlocks = 75, kManyBlocks = 1040;

struct BlocksCase {
  std::string name;
  QuantSpec quant;
  DType dtype;  // of A and C
  std::int64_t n = 64;
  int more_blocks = kMoreBlocks;
};
std::vector<BlocksCase> blocks_cases() {
  std::vector<BlocksCase> cases = {
      {"bf16", {.scheme = Scheme::kBF16}, DType::kBF16},
      {"f16", {.scheme = Scheme::kF16}, DType::kF16},
      // So many that their weight rows are walked in runs.
      {"bf16_in_runs", {.scheme = Scheme::kBF16}, DType::kBF16, 256, 1000}};
  for (const DType dtype : {DType::kBF16, DType::kF16}) {
    const std::string suffix = dtype == DType::kBF16 ? "_bf16" : "_f16";
    const QuantSpec int4{.scheme = Scheme::kInt4W4A16, .weight_scale = WeightScale::kGroup};
    QuantSpec zeros = int4;
    zeros.zero_points = true;
    cases.push_back({"int4" + suffix, int4, dtype});
    cases.push_back({"int4_zeros" + suffix, zeros, dtype});
    for (const Scheme scheme : {Scheme::kInt8W8A16, Scheme::kFp8W8A16}) {
      cases.push_back({std::string(name(scheme)) + suffix,
                       {.scheme = scheme, .weight_scale = WeightScale::kChannel},
                       dtype});
    }
  }
  return cases;
}

struct Lists {
  std::vector<std::int32_t> slots, experts;
  std::int32_t num_padded = 0;
};
// Of magnitudes up to 2, read as bf16 or f16.
std::vector<std::uint16_t> random_halves(std::mt19937& random, std::int64_t count) {
  std::vector<std::uint16_t> v(static_cast<std::size_t>(count));
  for (auto& x : v) x = static_cast<std::uint16_t>(random() % 512 + 0x3e00 + (random() % 2 << 15));
  return v;
}
std::vector<std::uint8_t> random_bytes(std::mt19937& random, std::int64_t count) {
  std::vector<std::uint8_t> v(static_cast<std::size_t>(count));
  for (auto& x : v) {
    x = static_cast<std::uint8_t>(random());
    if ((x & 0x7f) == 0x7f) x = 0;  // NaN in e4m3
  }
  return v;
}

class Blocks : public ::testing::TestWithParam<BlocksCase> {
 protected:
  void SetUp() override {
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0)
      GTEST_SKIP() << "no CUDA device";
    const WeightSpec spec =
        weight_spec(GetParam().quant, kExperts, GetParam().n, kK, dtype(), dtype());
    a_ = upload(random_halves(random_, kTokens * kK));
    const auto keep = [&](Buffer data, DType of, std::vector<std::int64_t> shape) {
      buffers_.push_back(std::move(data));
      return Tensor::contiguous(buffers_.back()->data(), of, shape, kGpu);
    };
    const bool four = is_four_bit(spec.format);
    const std::int64_t stored = four ? kK / 2 : kK, count = kExperts * GetParam().n * stored;
    const DType of = weight_dtype(spec.format);
    b_.weight = keep(
        is_16bit(of) ? upload(random_halves(random_, count)) : upload(random_bytes(random_, count)),
        of, {kExperts, GetParam().n, stored});
    if (spec.scale.has_scale) {
      const std::int64_t groups = spec.scale.grid_k;
      std::vector<float> scale(static_cast<std::size_t>(kExperts * GetParam().n * groups));
      for (float& s : scale) s = 0.001f * static_cast<float>(1 + random_() % 16);
      std::vector<std::int64_t> shape = {kExperts, GetParam().n};
      if (four) shape.push_back(groups);
      b_.scale = keep(upload(scale), DType::kF32, shape);
      if (spec.zero_points) {
        b_.zero_point = keep(upload(random_bytes(random_, kExperts * GetParam().n / 2 * groups)),
                             DType::kU8, {kExperts, GetParam().n / 2, groups});
      }
    }
    const std::string kernels = level();
    EXPECT_EQ(are_tiles(spec, kFewBlocks), kernels == "sm90a") << kernels;
    EXPECT_EQ(are_tiles(spec, GetParam().more_blocks), kernels == "sm90a" && is_16bit(of))
        << kernels;
    EXPECT_FALSE(are_tiles(spec, kManyBlocks));
  }
  static DType dtype() { return GetParam().dtype; }
  static std::string level() {
    for (const DeviceInfo& info : devices())
      if (info.device == kGpu) return info.kernels;
    return {};
  }
  // Whether grouped_gemm takes so many blocks as tiles, as it asks itself.
  static bool are_tiles(const WeightSpec& spec, std::int64_t blocks) {
    const Backend& gpu = backend(kGpu);
    std::int32_t lists = 0;  // nobody reads them
    const SortedRows sorted{.slots = {},
                            .block_experts = Tensor::contiguous(&lists, DType::kI32, {1}, kGpu),
                            .num_padded = Tensor::contiguous(&lists, DType::kI32, {1}, kGpu),
                            .block_rows = kBlockRows};
    RowMap rows{.positions = blocks * kBlockRows, .slot_count = kSlots};
    set_tile_rows_of_blocks(rows, sorted, gpu.tile_rows(spec, kSlots));
    return gpu.makes_tiles(spec, rows, unlisted_blocks(rows, sorted),
                           /*all_quantized=*/false);
  }
  // The first `compared` blocks' part of C, which is poisoned before. `empty`: no tokens, and an A
  // without memory.
  std::vector<std::uint8_t> run(Lists lists, int blocks, int compared, RowOrder c_order,
                                bool empty = false) const {
    lists.slots.resize(static_cast<std::size_t>(blocks * kBlockRows), kSlots);
    lists.experts.resize(static_cast<std::size_t>(blocks), -1);
    const Buffer slots = upload(lists.slots), experts = upload(lists.experts);
    const Buffer padded = upload(std::vector<std::int32_t>{lists.num_padded});
    const std::int64_t rows = empty ? 0 : kTokens;
    const std::int64_t c_rows = c_order == RowOrder::kSorted ? compared * kBlockRows : kSlots;
    const std::int64_t all_rows = c_order == RowOrder::kSorted ? blocks * kBlockRows : rows * kTopK;
    const Buffer c = upload(std::vector<std::uint8_t>(
        static_cast<std::size_t>(std::max<std::int64_t>(blocks * kBlockRows, kSlots) *
                                 GetParam().n * 2),
        0xdb));
    GroupedGemmArgs args{
        .quant = GetParam().quant,
        .a = Tensor::contiguous(empty ? nullptr : a_->data(), dtype(), {rows, kK}, kGpu),
        .b = b_,
        .sorted = {.slots =
                       Tensor::contiguous(slots->data(), DType::kI32, {blocks * kBlockRows}, kGpu),
                   .block_experts =
                       Tensor::contiguous(experts->data(), DType::kI32, {blocks}, kGpu),
                   .num_padded = Tensor::contiguous(padded->data(), DType::kI32, {1}, kGpu),
                   .block_rows = kBlockRows},
        .top_k = kTopK,
        .c_order = c_order,
        .c = Tensor::contiguous(c->data(), dtype(), {all_rows, GetParam().n}, kGpu)};
    const DeviceBuffer workspace(grouped_gemm_workspace_bytes(args));
    args.workspace = {workspace.data(), grouped_gemm_workspace_bytes(args)};
    grouped_gemm(args);
    cuda_ok(cudaDeviceSynchronize());
    std::vector<std::uint8_t> bytes = c->read();
    bytes.resize(static_cast<std::size_t>(c_rows * GetParam().n * 2));
    return bytes;
  }

  std::mt19937 random_{std::random_device{}()};
  Buffer a_;
  std::vector<Buffer> buffers_;
  GemmWeights b_;
};

TEST_P(Blocks, TakenAsTilesGiveTheBitsOfListedOnes) {
  constexpr std::int32_t kIds[] = {INT_MIN, -2, -1, kExperts, INT_MAX};
  bool computed = false;  // neither 0 nor poison
  for (int round = 0; round < 8; ++round) {
    const int blocks = round < 4 ? kFewBlocks : GetParam().more_blocks;
    Lists lists;
    lists.slots.resize(kSlots);
    std::iota(lists.slots.begin(), lists.slots.end(), 0);
    std::shuffle(lists.slots.begin(), lists.slots.end(), random_);
    // Padding anywhere, as no slot or a negative one, and a block of nothing else. Slots fill a
    // few blocks, or lie scattered over all.
    for (auto& slot : lists.slots)
      if (random_() % 4 == 0) slot = random_() % 2 ? kSlots : -1;
    lists.slots.resize(static_cast<std::size_t>(blocks * kBlockRows), kSlots);
    if (round % 2) std::shuffle(lists.slots.begin(), lists.slots.end(), random_);
    std::fill_n(lists.slots.begin() + 2 * kBlockRows, kBlockRows, kSlots);
    for (int i = 0; i < blocks; ++i) {
      const auto hostile = static_cast<int>(random_() % 12);
      lists.experts.push_back(hostile < 5 ? kIds[hostile]
                                          : static_cast<std::int32_t>(random_() % kExperts));
    }
    for (const std::int32_t padded : {-5, 0, 16, 17, 150, blocks * 16 - 1, blocks * 16, INT_MAX}) {
      lists.num_padded = padded;
      for (const RowOrder order : {RowOrder::kSlot, RowOrder::kSorted}) {
        const std::vector<std::uint8_t> taken = run(lists, blocks, blocks, order);
        EXPECT_TRUE(taken == run(lists, kManyBlocks, blocks, order))
            << "round " << round << ", num_padded " << padded << ", c_order "
            << static_cast<int>(order);
        computed = computed || std::any_of(taken.begin(), taken.end(),
                                           [](std::uint8_t b) { return b != 0xdb && b != 0; });
      }
    }
  }
  EXPECT_TRUE(computed);
}

TEST_P(Blocks, ListsOfPaddingReadNoRowsThatAreNotThere) {
  const Lists lists{
      .slots = std::vector<std::int32_t>(kBlockRows, 0), .experts = {0}, .num_padded = 16};
  const std::vector<std::uint8_t> c = run(lists, 1, 1, RowOrder::kSlot, true);
  EXPECT_TRUE(std::all_of(c.begin(), c.end(), [](std::uint8_t b) { return b == 0xdb; }));
}

INSTANTIATE_TEST_SUITE_P(Schemes, Blocks, testing::ValuesIn(blocks_cases()),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace moesaic::test
