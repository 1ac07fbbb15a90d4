// SPDX-License-Identifier: Apache-2.0
// The sum over slots: order, rounding, what is skipped.
#include <cmath>
#include <limits>

#include "backend.h"
#include "numeric.h"
#include "stage_testing.h"

namespace moesaic {
namespace {

using harness::HostTensor;
using testing::for_each_level;
using testing::for_each_thread_count;
using testing::random_tensor;

// The contract, one element at a time: fp32, slots ascending, one rounding at the end.
float combined(const CombineStage& s, std::int64_t t, std::int64_t h) {
  const auto at = [&](const Tensor& x, std::int64_t row) {
    return static_cast<float>(harness::element(x, {row, h}));
  };
  float sum = 0;
  for (std::int64_t j = 0; j < s.top_k; ++j) {
    const std::int64_t slot = t * s.top_k + j;
    if (s.topk_ids != nullptr && s.topk_ids[slot] < 0) continue;
    const std::int64_t row = s.slot_row != nullptr ? s.slot_row[slot] : slot;
    if (row < 0 || row >= s.rows.shape[0]) continue;
    sum = sum + at(s.rows, row) * (s.weights != nullptr ? s.weights[slot] : 1.0f);
  }
  sum = sum * s.scale;
  if (s.shared.defined())
    sum = sum + at(s.shared, t) * (s.shared_weight != nullptr ? s.shared_weight[t] : 1.0f);
  if (s.accumulate == Accumulate::kAdd) sum = sum + at(s.output, t);
  return sum;
}

void expect_combined(CombineStage stage, const HostTensor& initial) {
  HostTensor expected = initial;
  stage.output = initial.view();
  for (std::int64_t t = 0; t < initial.shape()[0]; ++t)
    for (std::int64_t h = 0; h < initial.shape()[1]; ++h)
      harness::store_element(expected.bytes().data(), initial.dtype(), t * initial.shape()[1] + h,
                             combined(stage, t, h));
  for_each_level([&] {
    for_each_thread_count([&] {
      HostTensor output = initial;
      stage.output = output.view();
      backend({}).combine(stage, {});
      EXPECT_TRUE(output.bytes() == expected.bytes()) << "not the same bits";
    });
  });
}

TEST(Combine, Fp32InSlotOrderRoundedOnce) {
  FRESH_RNG(rng);
  for (const DType rows_dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    for (const DType out_dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
      for (const std::int64_t hidden : {1, 15, 33, 4096 + 17}) {
        const std::int64_t tokens = 5, top_k = 1 + rng.below(9);
        const HostTensor rows = random_tensor(rng, rows_dtype, {tokens * top_k, hidden});
        const HostTensor weights = random_tensor(rng, DType::kF32, {tokens * top_k});
        const HostTensor shared = random_tensor(rng, rows_dtype, {tokens, hidden});
        const HostTensor shared_weight = random_tensor(rng, DType::kF32, {tokens});
        std::vector<std::int32_t> slot_row, ids;
        for (std::int64_t s = 0; s < tokens * top_k; ++s) {
          slot_row.push_back(static_cast<std::int32_t>(rng.below(tokens * top_k + 2) - 1));
          ids.push_back(static_cast<std::int32_t>(rng.below(6) - 1));
        }
        slot_row[0] = std::numeric_limits<std::int32_t>::max();  // a hostile list reads nothing
        CombineStage stage{.rows = rows.view(), .weights = weights.as<float>(), .top_k = top_k};
        const HostTensor before = random_tensor(rng, out_dtype, {tokens, hidden});
        expect_combined(stage, before);
        stage.slot_row = slot_row.data();
        stage.topk_ids = ids.data();
        stage.scale = 2.5f;
        expect_combined(stage, before);
        stage.shared = shared.view();
        stage.shared_weight = shared_weight.as<float>();
        stage.accumulate = Accumulate::kAdd;
        expect_combined(stage, before);
        stage.weights = stage.shared_weight = nullptr;
        expect_combined(stage, before);
      }
    }
  }
}

// Defect 8 of the original: finalize mutates the expert output and accumulates in the output dtype.
TEST(Combine, OriginalMutatesAndRoundsEachStepOursDoesNot) {
  const std::int64_t top_k = 8;
  HostTensor rows(DType::kBF16, {1, top_k, 1});
  for (std::int64_t j = 0; j < top_k; ++j)
    harness::store_element(rows.bytes().data(), DType::kBF16, j, j == 0 ? 256.0 : 0.75);
  const auto before = rows.bytes();
  HostTensor y(DType::kBF16, {1, 1});
  sum_slots({.input = rows.view(), .output = y.view()});
  EXPECT_TRUE(rows.bytes() == before);
  EXPECT_EQ(harness::element(y.view(), {0, 0}), 262.0);  // 261.25; step by step in bf16: 256
}

TEST(Combine, TokensWithoutSlotsAreZeroWhateverWasThere) {
  HostTensor rows = HostTensor(DType::kF32, {2, 3}), y(DType::kF32, {2, 3});
  std::fill_n(rows.as<float>(), 6, std::numeric_limits<float>::quiet_NaN());
  std::fill_n(y.as<float>(), 6, std::numeric_limits<float>::quiet_NaN());
  HostTensor slot_row(DType::kI32, {2, 1});
  std::fill_n(slot_row.as<std::int32_t>(), 2, -1);
  sum_slots({.input = rows.view(), .slot_row = slot_row.view(), .output = y.view()});
  for (int i = 0; i < 6; ++i) EXPECT_EQ(y.as<float>()[i], 0.0f);
}

TEST(Combine, NaNStaysInItsToken) {
  FRESH_RNG(rng);
  HostTensor rows = random_tensor(rng, DType::kF32, {4, 2, 8});
  rows.as<float>()[2 * 16 + 3] = std::numeric_limits<float>::quiet_NaN();
  HostTensor y(DType::kF32, {4, 8});
  sum_slots({.input = rows.view(), .output = y.view()});
  for (int i = 0; i < 32; ++i) EXPECT_EQ(std::isnan(y.as<float>()[i]), i == 2 * 8 + 3);
}

TEST(Combine, StridedRows) {
  FRESH_RNG(rng);
  const HostTensor wide = random_tensor(rng, DType::kBF16, {3, 2, 40});
  Tensor narrow = wide.view();
  narrow.shape[2] = 24;
  HostTensor y(DType::kF32, {3, 24});
  sum_slots({.input = narrow, .output = y.view()});
  for (std::int64_t t = 0; t < 3; ++t)
    for (std::int64_t h = 0; h < 24; ++h)
      EXPECT_EQ(harness::element(y.view(), {t, h}),
                static_cast<float>(harness::element(narrow, {t, 0, h})) +
                    static_cast<float>(harness::element(narrow, {t, 1, h})));
}

}  // namespace
}  // namespace moesaic
