// SPDX-License-Identifier: Apache-2.0
// A forward's workspace is what docs/layer.md computes from the shape, and at most a fifth
// more, on every device that is there.
#include <gtest/gtest.h>

#include <algorithm>

#include "moesaic/moesaic.h"
#include "workspace_formula.h"

namespace moesaic::harness {
namespace {

TEST(Workspace, IsWhatArithmeticNeeds) {
  for (const DeviceInfo& info : devices())
    for (const Variant& variant : variants())
      for (const char* name :
           {"mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v3-tp8", "qwen3-next-512"}) {
        const Shape shape = parse_shape(name);
        LayerConfig c;
        c.experts = shape.experts;
        c.hidden = shape.hidden;
        c.intermediate = shape.intermediate;
        c.top_k = shape.top_k;
        c.max_tokens = 8192;
        c.quant = variant.quant;
        c.input_dtype = variant.input;
        c.output_dtype = variant.output;
        if (!supports(c, Format::kStandard, info.device).supported) continue;
        const LayerPlan plan = make_plan(c, info.device);
        for (const std::int64_t tokens : {16, 128, 1000, 8192}) {
          const double wanted = by_arithmetic(plan.config, tokens, plan);
          const auto taken = static_cast<double>(forward_workspace_bytes(plan, nullptr, tokens));
          EXPECT_LE(taken, 1.2 * wanted + 64 * 1024)
              << to_string(info.device) << " " << variant.name << " " << name << " T=" << tokens
              << ": " << taken / wanted << " of the formula";
          EXPECT_GE(taken, 0.99 * wanted) << variant.name << " " << name;
        }
      }
}

// A workspace for T tokens serves fewer, whatever chunks a cap makes of them.
TEST(Workspace, UnderACapOneServesFewerTokens) {
  LayerConfig config{
      .experts = 8, .hidden = 256, .intermediate = 256, .top_k = 2, .max_tokens = 512};
  for (const DeviceInfo& info : devices())
    for (const std::size_t cap : {0, 200000, 300000, 500000, 1000000}) {
      config.workspace_cap = cap;
      const LayerPlan plan = make_plan(config, info.device);
      LayerPlan free = plan;
      free.config.workspace_cap = 0;
      std::size_t before = 0;
      for (std::int64_t tokens = 0; tokens <= config.max_tokens; ++tokens) {
        const std::size_t bytes = forward_workspace_bytes(plan, nullptr, tokens);
        ASSERT_GE(bytes, before) << to_string(info.device) << " cap " << cap << " T=" << tokens;
        if (cap > 0) {
          ASSERT_LE(bytes, cap);
        }
        const std::size_t whole = forward_workspace_bytes(free, nullptr, tokens);
        if (whole <= cap) {
          ASSERT_EQ(bytes, whole) << "in chunks without need, T=" << tokens;
        }
        before = bytes;
      }
    }
}

}  // namespace
}  // namespace moesaic::harness
