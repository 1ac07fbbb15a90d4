// SPDX-License-Identifier: Apache-2.0
// A forward's workspace on CUDA, as a function of the shape alone: no device is needed, so both
// kernel families are held against the formula of docs/layer.md at every model shape.
#include <gtest/gtest.h>

#include <algorithm>

#include "../workspace_formula.h"
#include "cuda/backend_cuda.h"
#include "cuda/gemm.h"

namespace moesaic::harness {
namespace {

constexpr Device kDevice{DeviceType::kCuda, 0};
// (Of some models T * top_k = 2^18 and a little more, where align's scratch once had a step down.)
constexpr std::int64_t kTokens[] = {1,      2,      3,      4,      7,       8,       16,
                                    100,    128,    1000,   1024,   8192,    26'214,  26'215,
                                    32'768, 32'769, 50'000, 65'536, 65'537, 131'072, 131'073,
                                    400'000};

class WorkspacePlan : public testing::TestWithParam<bool> {
 protected:
  // An H100's traits.
  cuda::CudaBackend gpu_{{.sm_count = 132,
                          .compute_capability = 90,
                          .shared_per_block = 232'448,
                          .l2_bytes = std::size_t{50} << 20,
                          .use_sm90 = GetParam()},
                         "none",
                         ""};

  template <typename Look>
  void each_plan(Look look) const {
    for (const Variant& variant : variants())
      for (const Shape& shape : model_shapes()) {
        Case c;
        c.variant = variant;
        c.shape = shape;
        c.tokens = std::end(kTokens)[-1];
        const LayerConfig config = layer_config(c);
        if (!gpu_.supports(config, Format::kStandard).supported) continue;
        SCOPED_TRACE(variant.name + " " + shape.name);
        look(make_plan(config, gpu_, kDevice));
      }
  }
};

TEST_P(WorkspacePlan, IsWhatArithmeticNeedsAndAFifthMoreAtMost) {
  double few = 0, many = 0;
  int plans = 0;
  each_plan([&](const LayerPlan& plan) {
    ++plans;
    for (const std::int64_t tokens : kTokens) {
      const double ratio = static_cast<double>(forward_workspace_bytes(plan, nullptr, tokens)) /
                           by_arithmetic(plan.config, tokens, plan);
      EXPECT_LE(ratio, tokens < 16 ? 1.2 : 1.02) << "T = " << tokens;
      EXPECT_GE(ratio, 0.99) << "T = " << tokens;
      double& worst = tokens < 16 ? few : many;
      worst = std::max(worst, ratio);
    }
  });
  EXPECT_GT(plans, 200);
  std::printf("    %d plans: at most %.3f of the formula below 16 tokens, %.4f from there\n", plans,
              few, many);
}

// A workspace for T tokens serves fewer; tiles that shrank with more slots would need more of them.
TEST_P(WorkspacePlan, GrowsWithTheTokens) {
  each_plan([&](const LayerPlan& plan) {
    std::size_t bytes = 0;
    std::int64_t rows = 0;
    for (const std::int64_t tokens : kTokens) {
      const std::size_t next = forward_workspace_bytes(plan, nullptr, tokens);
      EXPECT_LE(bytes, next) << "T = " << tokens;
      bytes = next;
      const std::int64_t tile = gpu_.tile_rows(plan.fc1, tokens * plan.config.top_k);
      EXPECT_LE(rows, tile) << "T = " << tokens;
      rows = tile;
    }
    // A chunk's buffers serve a shorter chunk, which therefore must not be laid out where it is not.
    bool laid_out = false;
    for (std::int64_t slots = 1; slots < 4'000'000; slots += slots / 16 + 1) {
      const bool by_position = input_layout(plan, slots) == RowOf::kPosition;
      EXPECT_TRUE(by_position || !laid_out) << slots << " slots";
      laid_out = by_position;
    }
  });
}

INSTANTIATE_TEST_SUITE_P(Kernels, WorkspacePlan, testing::Bool(),
                         [](const auto& info) { return info.param ? "sm90a" : "sm80"; });

}  // namespace
}  // namespace moesaic::harness
