// SPDX-License-Identifier: Apache-2.0
// Memory that runs out while weights replace others: the layer is what it was, or what it was to
// become, or says that it is not ready. Every allocation of the call fails once.
#include <gtest/gtest.h>

#include "allocations.h"
#include "harness/fixture.h"

namespace moesaic::harness {
namespace {

using testing::until_failure;

// `put` with the n-th allocation failing, for every n that it comes to.
template <typename Put, typename PutBack>
void fail_everywhere(Fixture& f, const Batch& batch, Put put, PutBack put_back) {
  put_back();
  const HostTensor old = f.run(batch);
  put();
  const HostTensor fresh = f.run(batch);
  ASSERT_FALSE(same_bits(old, fresh));
  std::int64_t failed = 0;
  for (bool done = false; !done; ++failed) {
    ASSERT_LT(failed, 10000);
    put_back();
    until_failure = failed;
    try {
      put();
      done = until_failure >= 0;  // it did not come so far
    } catch (const std::exception&) {
    }
    until_failure = -1;
    if (!f.layer.ready()) continue;
    const HostTensor got = f.run(batch);
    EXPECT_TRUE(same_bits(got, old) || same_bits(got, fresh)) << "allocation " << failed;
  }
  EXPECT_GT(failed, 3);
}

struct GatedShared {
  HostTensor fc1, fc2, gate;  // the gate strided, so that it is copied by way of the host
  LayerWeights weights;
  explicit GatedShared(const LayerConfig& config, std::uint64_t seed)
      : fc1(DType::kBF16, {1, 2 * config.intermediate, config.hidden}),
        fc2(DType::kBF16, {1, config.hidden, config.intermediate}),
        gate(DType::kF32, {2 * config.hidden}) {
    std::uint64_t bits = seed;
    for (HostTensor* t : {&fc1, &fc2, &gate})
      for (std::int64_t i = 0; i < t->view().numel(); ++i) {
        bits = bits * 6364136223846793005u + 1442695040888963407u;
        store_element(t->bytes().data(), t->view().dtype, i,
                      static_cast<double>(bits >> 40) / (1 << 24) - 0.5);
      }
    weights.fc1.weight = fc1.view();
    weights.fc2.weight = fc2.view();
  }
  Tensor gate_view() const {
    Tensor t = gate.view();
    t.shape[0] /= 2;
    t.strides[0] = 2;
    return t;
  }
};

TEST(ReloadFailure, SharedExpertsAndTheirGate) {
  LayerConfig config = small_config();
  config.shared_experts = 1;
  Fixture f(config, {.bias = Biases::kNone});
  const GatedShared a(f.config, 1), b(f.config, 2);
  const Batch batch = f.batch(4);
  fail_everywhere(
      f, batch, [&] { f.layer.load_shared(b.weights, b.gate_view()); },
      [&] { f.layer.load_shared(a.weights, a.gate_view()); });
}

TEST(ReloadFailure, AllExperts) {
  Fixture f(small_config(), {.bias = Biases::kAll});
  const WeightData other = make_weights(f.config, {.seed = 77, .bias = Biases::kAll});
  const Batch batch = f.batch(4);
  fail_everywhere(
      f, batch, [&] { f.layer.load(other.weights); }, [&] { f.layer.load(f.weights.weights); });
}

TEST(ReloadFailure, ARouter) {
  Fixture f(small_config(), {.bias = Biases::kNone});
  const RouterData a = make_router(f.config, RouterBias::kBoth, 5),
                   b = make_router(f.config, RouterBias::kBoth, 6);
  Batch batch = f.batch(4);
  const auto run = [&] {
    Execution how;
    how.source = Execution::Source::kRouter;
    return execute(f.layer, batch, how).output;
  };
  f.layer.set_router(b.weights);
  const HostTensor fresh = run();
  f.layer.set_router(a.weights);
  const HostTensor old = run();
  ASSERT_FALSE(same_bits(old, fresh));
  for (std::int64_t n = 0;; ++n) {
    f.layer.set_router(a.weights);
    until_failure = n;
    bool failed = false;
    try {
      f.layer.set_router(b.weights);
    } catch (const std::exception&) {
      failed = true;
    }
    until_failure = -1;
    EXPECT_TRUE(same_bits(run(), failed ? old : fresh)) << "allocation " << n;
    if (!failed) break;
  }
}

}  // namespace
}  // namespace moesaic::harness
