// SPDX-License-Identifier: Apache-2.0
// Routing on the CPU against the routers of the transformers library (tests/golden/routing.json).
#include <algorithm>
#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>

#include "route_testing.h"

namespace moesaic {
namespace {

using harness::HostTensor;
using testing::for_each_level;
using testing::ids_of;
using testing::Result;
using testing::run_route;

RoutingSpec spec_of(const nlohmann::json& j) {
  RoutingSpec s{.method = parse_routing(j.at("method").get<std::string>())};
  s.scale = j.value("scale", s.scale);
  s.groups = j.value("groups", s.groups);
  s.topk_groups = j.value("topk_groups", s.topk_groups);
  s.jitter = j.value("jitter", s.jitter);
  s.sum_floor = j.value("sum_floor", s.sum_floor);
  const std::string renormalize = j.value("renormalize", "default");
  if (renormalize != "default")
    s.renormalize = renormalize == "always" ? Renormalize::kAlways : Renormalize::kNever;
  return s;
}
HostTensor tensor_of(const nlohmann::json& rows) {
  std::vector<std::int64_t> shape{static_cast<std::int64_t>(rows.size())};
  std::vector<float> flat;
  if (rows[0].is_array()) {
    shape.push_back(static_cast<std::int64_t>(rows[0].size()));
    for (const auto& row : rows)
      for (const auto& v : row) flat.push_back(v.get<float>());
  } else {
    for (const auto& v : rows) flat.push_back(v.get<float>());
  }
  HostTensor t(DType::kF32, shape);
  std::copy(flat.begin(), flat.end(), t.as<float>());
  return t;
}

TEST(RouteGolden, ChoosesWhatTheModelsThemselvesChoose) {
  std::ifstream file(MOESAIC_SOURCE_DIR "/tests/golden/routing.json");
  const nlohmann::json golden = nlohmann::json::parse(file);
  ASSERT_GE(golden.at("cases").size(), 15u);
  for_each_level([&] {
    for (const auto& c : golden.at("cases")) {
      SCOPED_TRACE(c.at("name").get<std::string>());
      const HostTensor x = tensor_of(c.at("hidden_states")), w = tensor_of(c.at("weight"));
      HostTensor bias, selection_bias;
      if (c.contains("bias")) bias = tensor_of(c.at("bias"));
      if (c.contains("selection_bias")) selection_bias = tensor_of(c.at("selection_bias"));
      const auto& ids = c.at("ids");
      const auto tokens = static_cast<std::int64_t>(ids.size());
      const auto top_k = static_cast<std::int64_t>(ids[0].size());
      const Result r = run_route({.spec = spec_of(c.at("spec")),
                                  .hidden_states = x.view(),
                                  .router = {.weight = w.view(),
                                             .bias = bias.view(),
                                             .selection_bias = selection_bias.view()}},
                                 tokens, top_k);
      for (std::int64_t t = 0; t < tokens; ++t) {
        for (std::int64_t j = 0; j < top_k; ++j) {
          const auto expected = ids[t][j].get<std::int32_t>();
          const auto chosen = ids_of(r, t);
          const auto at = std::find(chosen.begin(), chosen.end(), expected);
          ASSERT_NE(at, chosen.end()) << "token " << t << " misses expert " << expected;
          const float weight =
              r.weights[static_cast<std::size_t>(t * top_k + (at - chosen.begin()))];
          const auto theirs = c.at("weights")[t][j].get<float>();
          EXPECT_NEAR(weight, theirs, 1e-6f + 2e-5f * std::abs(theirs)) << "token " << t;
        }
      }
    }
  });
}

}  // namespace
}  // namespace moesaic
