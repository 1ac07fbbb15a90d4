// SPDX-License-Identifier: Apache-2.0
// A forward's workspace is what docs/layer.md computes from the shape, and at most a fifth
// more, on every device that is there.
#include <gtest/gtest.h>

#include <algorithm>

#include "forward.h"
#include "harness/cases.h"
#include "moesaic/moesaic.h"
#include "plan.h"
#include "scheme.h"

namespace moesaic::harness {
namespace {

// The formula, term by term. Slots: S = T k.
double by_arithmetic(const LayerConfig& c, std::int64_t tokens, const LayerPlan& plan) {
  const auto t = static_cast<double>(tokens), slots = t * static_cast<double>(c.top_k);
  const auto hidden = static_cast<double>(c.hidden), inner = static_cast<double>(c.intermediate);
  const auto rows_of = [](const WeightSpec& spec, double rows) {  // quantized rows and their scales
    return rows * (static_cast<double>(spec.k) * static_cast<double>(size_of(spec.act_dtype)) +
                   4.0 * static_cast<double>(scale_row_stride(spec)));
  };
  double bytes =
      t * (8.0 * static_cast<double>(c.top_k) + 4.0 * static_cast<double>(c.experts));  // routing
  bytes += 10 * slots;  // the row map: two lists, and 16 bytes for every 8 slots
  const bool expands =
      must_expand(plan, nullptr) || input_layout(plan, tokens * c.top_k) == RowOf::kPosition;
  if (expands || plan.quantizes_input()) bytes += rows_of(plan.fc1, expands ? slots : t);
  // Where GEMM1 always quantizes there are neither 16-bit rows nor scales of its own.
  const bool staged = plan.hidden_quantized_by != QuantizedBy::kGemm1;
  if (staged) bytes += slots * inner * static_cast<double>(size_of(plan.fc2.dtype16));
  if (plan.quantizes_hidden()) bytes += rows_of(plan.fc2, slots);
  bytes += slots * hidden * static_cast<double>(size_of(plan.slot_dtype));
  return bytes;
}

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

}  // namespace
}  // namespace moesaic::harness
