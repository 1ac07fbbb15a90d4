// SPDX-License-Identifier: Apache-2.0
// The same bits: on repeat, at 1, 2, 3 and 7 threads, for a token alone or in any batch, and
// through every format; at every instruction set this machine has.
#include <gtest/gtest.h>

#include "harness/verify.h"

namespace moesaic::harness {
namespace {

class Bits : public testing::TestWithParam<std::tuple<std::string, int>> {};

TEST_P(Bits, DependOnTheTokenAlone) {
  const auto& [level, scheme] = GetParam();
  set_kernels(DeviceType::kCpu, level);
  for (const Variant& variant : variants()) {
    if (variant.quant.scheme != static_cast<Scheme>(scheme)) continue;
    for (const Shape& shape : {Shape{"bits", 6, 136, 80, 3}, Shape{"tp192", 8, 128, 192, 2}}) {
      for (const std::int64_t tokens : {13, 150}) {
        Case c;
        c.variant = variant;
        c.shape = shape;
        c.tokens = tokens;
        c.bias = tokens == 13 ? Biases::kAll : Biases::kNone;
        c.load = tokens == 13 ? Load::kDuplicates : Load::kZipf;
        c.activation.kind = tokens == 13 ? Activation::kSwiglu : Activation::kGeluTanh;
        c.seed = 5;
        const VerifyResult r = check_bits(c);
        EXPECT_EQ(r.status, Status::kPassed) << r.name << " on " << level << ": " << r.reason;
      }
    }
  }
  set_kernels(DeviceType::kCpu, "");
}

INSTANTIATE_TEST_SUITE_P(Levels, Bits,
                         testing::Combine(testing::ValuesIn(available_kernels(DeviceType::kCpu)),
                                          testing::Range(0, kNumSchemes)),
                         [](const auto& info) {
                           return std::get<0>(info.param) + "_" +
                                  std::string(name(static_cast<Scheme>(std::get<1>(info.param))));
                         });

}  // namespace
}  // namespace moesaic::harness
