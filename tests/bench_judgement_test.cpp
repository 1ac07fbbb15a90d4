// SPDX-License-Identifier: Apache-2.0
// Which rows of a benchmark count: a probe under 90% of the machine's recorded ceiling makes them
// INVALID, and the file that the tables are made from says so row by row.
#include <gtest/gtest.h>

#include "harness/bench.h"

namespace moesaic::harness {
namespace {

constexpr DeviceType kGpu = DeviceType::kCuda;

Roof scaled(Roof roof, double read, double bf16, double eight_bit) {
  roof.read_gbytes_s *= read;
  roof.bf16_gflops *= bf16;
  roof.int8_gops *= eight_bit;
  return roof;
}

// Two rows of a run whose probes were `before` and `after`; the second's own read probe is low.
BenchResult run_between(const Roof& before, const Roof& after,
                        const std::optional<Roof>& reference) {
  BenchResult result;
  result.machine.before = before;
  result.machine.after = after;
  result.machine.reference = reference;
  result.rows.resize(2);
  if (reference) {
    result.rows[0].read_gbytes_s = 0.91 * reference->read_gbytes_s;
    result.rows[1].read_gbytes_s = 0.89 * reference->read_gbytes_s;
  }
  judge(&result, kGpu);
  return result;
}

class Judgement : public testing::Test {
 protected:
  std::optional<Roof> h100_ = reference_gpu("NVIDIA H100 80GB HBM3");
};

TEST_F(Judgement, OfProbesHasALineAt90Percent) {
  ASSERT_TRUE(h100_.has_value());
  EXPECT_EQ(low_read(0.91 * h100_->read_gbytes_s, h100_), "");
  EXPECT_NE(low_read(0.89 * h100_->read_gbytes_s, h100_).find("memory read"), std::string::npos);
  EXPECT_EQ(low_product(scaled(*h100_, 0.5, 0.91, 0.91), h100_, kGpu), "");
  EXPECT_NE(low_product(scaled(*h100_, 1, 0.89, 1), h100_, kGpu).find("bf16 product"),
            std::string::npos);
  EXPECT_NE(low_product(scaled(*h100_, 1, 1, 0.89), h100_, kGpu).find("fp8 product"),
            std::string::npos);
}

TEST_F(Judgement, ALowReadMarksItsRowAlone) {
  const BenchResult r = run_between(*h100_, *h100_, h100_);
  EXPECT_EQ(r.rows[0].invalid, "");
  EXPECT_NE(r.rows[1].invalid, "");
  EXPECT_EQ(r.machine.invalid, "");
}

TEST_F(Judgement, ALowProductMarksEveryRow) {
  const Roof low_bf16 = scaled(*h100_, 1, 0.89, 1), low_fp8 = scaled(*h100_, 1, 1, 0.89);
  for (const BenchResult& r :
       {run_between(low_bf16, *h100_, h100_), run_between(*h100_, low_fp8, h100_)}) {
    EXPECT_NE(r.rows[0].invalid.find("product"), std::string::npos);
    EXPECT_NE(r.rows[1].invalid.find("read"), std::string::npos);  // its own reason comes first
    EXPECT_NE(r.machine.invalid, "");
    const auto written = to_json(r);
    for (const auto& row : written["rows"]) EXPECT_EQ(row["valid"], false);
  }
}

TEST_F(Judgement, OfAnUnknownMachineIsNone) {
  EXPECT_FALSE(reference_gpu("another").has_value());
  const BenchResult r = run_between({}, {}, std::nullopt);
  EXPECT_EQ(r.rows[0].invalid + r.rows[1].invalid + r.machine.invalid, "");
}

}  // namespace
}  // namespace moesaic::harness
