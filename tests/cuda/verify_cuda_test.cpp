// SPDX-License-Identifier: Apache-2.0
// The one case list on the GPU, with every kernel family the device can run: pairs and special
// cases against the oracle, bits, the seeded faults, and the bare grouped GEMM.
#include <gtest/gtest.h>

#include <algorithm>

#include "harness/grouped.h"
#include "harness/verify.h"

namespace moesaic::harness {
namespace {

constexpr Device kGpu{DeviceType::kCuda, 0};

bool has_gpu() {
  const std::vector<DeviceInfo> all = devices();
  return std::any_of(all.begin(), all.end(), [](const DeviceInfo& d) { return d.device == kGpu; });
}

class OnGpu : public testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    if (!has_gpu()) GTEST_SKIP() << "no CUDA device, or a build without CUDA";
    const std::vector<std::string> levels = available_kernels(DeviceType::kCuda);
    if (std::find(levels.begin(), levels.end(), GetParam()) == levels.end())
      GTEST_SKIP() << "this device does not run " << GetParam();
    set_kernels(DeviceType::kCuda, GetParam());
  }
  void TearDown() override {
    if (has_gpu()) set_kernels(DeviceType::kCuda, "");
  }

  template <typename Run>
  void run_all(const std::vector<Case>& cases, Run run) {
    int ran = 0, refused = 0, failed = 0;
    for (const Case& c : cases) {
      const VerifyResult r = run(c);
      ran += r.status == Status::kPassed;
      refused += r.status == Status::kSkipped;
      if (r.status != Status::kFailed) continue;
      if (++failed <= 40) ADD_FAILURE() << r.name << ": " << r.reason;
    }
    std::cout << "    " << GetParam() << ": " << ran << " passed, " << failed << " failed, "
              << refused << " refused\n";
    EXPECT_GT(ran, 0);
  }
};

TEST_P(OnGpu, Pairs) {
  run_all(pair_cases(), [](const Case& c) { return run_case(c, kGpu); });
}

TEST_P(OnGpu, SpecialCases) {
  run_all(special_cases(), [](const Case& c) { return run_case(c, kGpu); });
}

TEST_P(OnGpu, BitsDependOnTheTokenAlone) {
  std::vector<Case> cases;
  for (const Variant& variant : variants()) {
    for (const std::int64_t tokens : {13, 150}) {
      Case c;
      c.variant = variant;
      c.shape = {"bits", 6, 136, 80, 3};
      c.tokens = tokens;
      c.bias = Biases::kAll;
      c.load = tokens == 13 ? Load::kDuplicates : Load::kZipf;
      c.seed = 5;
      cases.push_back(c);
    }
  }
  run_all(cases, [](const Case& c) { return check_bits(c, kGpu); });
}

TEST_P(OnGpu, SeededFaultsAreNoticed) {
  for (const Variant& variant : variants()) {
    Case c;
    c.variant = variant;
    c.shape = {"fault", 4, 192, 128, 2};
    c.bias = Biases::kAll;
    c.tokens = 9;
    c.seed = 11;
    if (!supported(c, kGpu).supported) continue;
    for (const Fault fault : all_faults())
      if (applies(fault, c)) {
        EXPECT_EQ(run_case(c, kGpu, fault).status, Status::kFailed)
            << name(c) << ": " << name(fault) << " went unnoticed";
      }
  }
}

// The bare product. What it refuses is outside the CUDA matrix, and refused by name.
class Products {
 public:
  ~Products() { EXPECT_GT(ran_, 0); }
  void expect_right(const GroupedCase& c, const std::string& what) {
    const std::string which = c.variant.name + " k " + std::to_string(c.k) + " " + what;
    try {
      EXPECT_EQ(check_grouped(c, kGpu), "") << which;
      ++ran_;
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kUnsupported) << which << ": " << error.what();
    }
  }
  static GroupedCase base(const Variant& variant) {
    GroupedCase c;
    c.variant = variant;
    c.variant.extras = Extras::kNone;
    c.a = variant.input;
    c.c = variant.output;
    return c;
  }

 private:
  int ran_ = 0;
};

TEST_P(OnGpu, GroupedGemm) {
  Products products;
  for (const Variant& variant : variants())
    for (const Format format : {Format::kSorted, Format::kBatched})
      for (const RowOrder c_order : {RowOrder::kSlot, RowOrder::kSorted}) {
        GroupedCase c = Products::base(variant);
        c.format = format;
        c.c_order = c_order;
        c.bias = Biases::kAll;
        if (format == Format::kSorted) c.row_weights = GroupedCase::RowWeights::kGiven;
        // Rows of weights that are no multiple of 16 bytes, and rows that TMA can fetch.
        for (const std::int64_t k : {136, 256}) {
          c.k = k;
          products.expect_right(c, "");
        }
      }
}

// Experts that live elsewhere are blocks of expert -1: their rows become zero, in either order.
TEST_P(OnGpu, GroupedGemmOfFilteredBlocks) {
  Products products;
  for (const Variant& variant : variants()) {
    if (variant.quant.act_scale == ActScale::kTensorDynamic) continue;  // one scale for all rows
    for (const RowOrder c_order : {RowOrder::kSlot, RowOrder::kSorted})
      for (const std::int64_t k : {136, 256}) {
        GroupedCase c = Products::base(variant);
        c.variant.static_scales = StaticScales::kShared;
        c.local = {1, 3};
        c.c_order = c_order;
        c.k = k;
        products.expect_right(c, "local");
        c.load = Load::kRemote;
        products.expect_right(c, "local, remote ids");
        c.a_order = RowOrder::kSorted;
        products.expect_right(c, "local, rows of A sorted");
      }
  }
}

// Lists and tensors that a layer of its own never makes.
TEST_P(OnGpu, GroupedGemmOfOtherLists) {
  Products products;
  for (const Variant& variant : variants())
    for (const std::int64_t k : {136, 256}) {
      GroupedCase c = Products::base(variant);
      c.k = k;
      c.bias = Biases::kAll;
      c.placement = Placement::kStrided;
      c.k_padding = 128;
      products.expect_right(c, "padded K, strided");
      c.load = Load::kDuplicates;
      c.block_rows = 64;
      products.expect_right(c, "blocks of 64");
      c.load = Load::kOne;
      c.tokens = 70;
      products.expect_right(c, "blocks of 64, one expert");
      c.tokens = 1;
      products.expect_right(c, "one token");
      c.tokens = 0;
      products.expect_right(c, "no token");
    }
}

INSTANTIATE_TEST_SUITE_P(Kernels, OnGpu, testing::Values("sm80", "sm90a"),
                         [](const auto& info) { return std::string(info.param); });

}  // namespace
}  // namespace moesaic::harness
