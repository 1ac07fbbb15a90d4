// SPDX-License-Identifier: Apache-2.0
// grouped_gemm on few blocks, which a product on Hopper takes as tiles as they are, against the
// same blocks at the head of a list so long that its tiles are listed first: the same bits,
// whatever the lists say.
#include <gtest/gtest.h>

#include <algorithm>
#include <climits>
#include <numeric>
#include <random>
#include <vector>

#include "device_buffer.h"
#include "moesaic/gemm.h"

namespace moesaic::test {
namespace {

constexpr Device kGpu{DeviceType::kCuda, 0};
constexpr std::int64_t kExperts = 8, kN = 64, kK = 256, kTokens = 100, kTopK = 3, kBlockRows = 16;
constexpr int kSlots = kTokens * kTopK, kFewBlocks = 20, kManyBlocks = 40;

struct Lists {
  std::vector<std::int32_t> slots, experts;
  std::int32_t num_padded = 0;
};
std::vector<std::uint16_t> random_bf16(std::mt19937& random, std::int64_t count) {
  std::vector<std::uint16_t> v(static_cast<std::size_t>(count));
  for (auto& x : v) x = static_cast<std::uint16_t>(random() % 512 + 0x3e00 + (random() % 2 << 15));
  return v;
}

class Blocks : public ::testing::Test {
 protected:
  void SetUp() override {
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0)
      GTEST_SKIP() << "no CUDA device";
    a_ = upload(random_bf16(random_, kTokens * kK));
    w_ = upload(random_bf16(random_, kExperts * kN * kK));
  }
  // C, which is poisoned before. `empty`: no tokens, and an A without memory.
  std::vector<std::uint8_t> run(Lists lists, int blocks, RowOrder c_order,
                                bool empty = false) const {
    lists.slots.resize(static_cast<std::size_t>(blocks * kBlockRows), kSlots);
    lists.experts.resize(static_cast<std::size_t>(blocks), -1);
    const Buffer slots = upload(lists.slots), experts = upload(lists.experts);
    const Buffer padded = upload(std::vector<std::int32_t>{lists.num_padded});
    const std::int64_t rows = empty ? 0 : kTokens;
    const std::int64_t c_rows = c_order == RowOrder::kSorted ? kFewBlocks * kBlockRows : kSlots;
    const std::int64_t all_rows = c_order == RowOrder::kSorted ? blocks * kBlockRows : rows * kTopK;
    const Buffer c = upload(std::vector<std::uint8_t>(
        static_cast<std::size_t>(std::max<std::int64_t>(blocks * kBlockRows, kSlots) * kN * 2),
        0xdb));
    GroupedGemmArgs args{
        .a = Tensor::contiguous(empty ? nullptr : a_->data(), DType::kBF16, {rows, kK}, kGpu),
        .b = {.weight = Tensor::contiguous(w_->data(), DType::kBF16, {kExperts, kN, kK}, kGpu)},
        .sorted = {.slots =
                       Tensor::contiguous(slots->data(), DType::kI32, {blocks * kBlockRows}, kGpu),
                   .block_experts =
                       Tensor::contiguous(experts->data(), DType::kI32, {blocks}, kGpu),
                   .num_padded = Tensor::contiguous(padded->data(), DType::kI32, {1}, kGpu),
                   .block_rows = kBlockRows},
        .top_k = kTopK,
        .c_order = c_order,
        .c = Tensor::contiguous(c->data(), DType::kBF16, {all_rows, kN}, kGpu)};
    const DeviceBuffer workspace(grouped_gemm_workspace_bytes(args));
    args.workspace = {workspace.data(), grouped_gemm_workspace_bytes(args)};
    grouped_gemm(args);
    cuda_ok(cudaDeviceSynchronize());
    std::vector<std::uint8_t> bytes = c->read();
    bytes.resize(static_cast<std::size_t>(c_rows * kN * 2));  // what both have
    return bytes;
  }

  std::mt19937 random_{std::random_device{}()};
  Buffer a_, w_;
};

TEST_F(Blocks, TakenAsTilesGiveTheBitsOfListedOnes) {
  constexpr std::int32_t kIds[] = {INT_MIN, -2, -1, kExperts, INT_MAX};
  for (int round = 0; round < 12; ++round) {
    Lists lists;
    lists.slots.resize(kSlots);
    std::iota(lists.slots.begin(), lists.slots.end(), 0);
    std::shuffle(lists.slots.begin(), lists.slots.end(), random_);
    // Padding anywhere, as no slot or a negative one, and a block of nothing else.
    for (auto& slot : lists.slots)
      if (random_() % 4 == 0) slot = random_() % 2 ? kSlots : -1;
    std::fill_n(lists.slots.begin() + 2 * kBlockRows, kBlockRows, kSlots);
    for (int i = 0; i < kFewBlocks; ++i) {
      const auto hostile = static_cast<int>(random_() % 12);
      lists.experts.push_back(hostile < 5 ? kIds[hostile]
                                          : static_cast<std::int32_t>(random_() % kExperts));
    }
    for (const std::int32_t padded :
         {-5, 0, 16, 17, 150, kFewBlocks * 16 - 1, kFewBlocks * 16, INT_MAX}) {
      lists.num_padded = padded;
      for (const RowOrder order : {RowOrder::kSlot, RowOrder::kSorted}) {
        EXPECT_TRUE(run(lists, kFewBlocks, order) == run(lists, kManyBlocks, order))
            << "round " << round << ", num_padded " << padded << ", c_order "
            << static_cast<int>(order);
      }
    }
  }
}

TEST_F(Blocks, ListsOfPaddingReadNoRowsThatAreNotThere) {
  const Lists lists{
      .slots = std::vector<std::int32_t>(kBlockRows, 0), .experts = {0}, .num_padded = 16};
  const std::vector<std::uint8_t> c = run(lists, 1, RowOrder::kSlot, true);
  EXPECT_TRUE(std::all_of(c.begin(), c.end(), [](std::uint8_t b) { return b == 0xdb; }));
}

}  // namespace
}  // namespace moesaic::test
