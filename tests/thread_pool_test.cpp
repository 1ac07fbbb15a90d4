// SPDX-License-Identifier: Apache-2.0
// The pool: every task once, from any number of threads and callers, through a host's hook, nested,
// and when a task throws.
#include "cpu/thread_pool.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <ctime>
#include <stdexcept>
#include <thread>
#include <vector>

#include "harness/fixture.h"
#include "moesaic/runtime.h"

namespace moesaic {
namespace {

class ThreadPool : public ::testing::Test {
 protected:
  void SetUp() override { threads_ = num_threads(); }
  void TearDown() override {
    set_parallel_hook({});
    set_num_threads(threads_);
  }

 private:
  int threads_ = 1;
};

void expect_each_once(std::int64_t tasks) {
  std::vector<std::atomic<int>> seen(static_cast<std::size_t>(tasks));
  parallel_for(tasks, [&](std::int64_t i) { seen[static_cast<std::size_t>(i)].fetch_add(1); });
  for (const auto& s : seen) ASSERT_EQ(s.load(), 1);
}

TEST_F(ThreadPool, RunsEachTaskOnce) {
  for (const int threads : {1, 2, 3, 7, 64}) {
    set_num_threads(threads);
    EXPECT_EQ(num_threads(), threads);
    for (const std::int64_t tasks : {0, 1, 2, 3, 64, 1000}) expect_each_once(tasks);
  }
}

TEST_F(ThreadPool, WritesAreVisibleBehindTheCall) {
  set_num_threads(4);
  std::vector<std::int64_t> values(257);
  for (int round = 0; round < 500; ++round) {
    parallel_for(257, [&](std::int64_t i) { values[static_cast<std::size_t>(i)] += i; });
  }
  for (std::int64_t i = 0; i < 257; ++i) ASSERT_EQ(values[static_cast<std::size_t>(i)], 500 * i);
}

TEST_F(ThreadPool, ManyCallersAtOnce) {
  set_num_threads(3);
  std::vector<std::thread> callers;
  for (int c = 0; c < 8; ++c)
    callers.emplace_back([] {
      for (int round = 0; round < 50; ++round) expect_each_once(37);
    });
  for (std::thread& c : callers) c.join();
}

TEST_F(ThreadPool, ThreadCountMayChangeWhileOthersRun) {
  std::thread other([] {
    for (int round = 0; round < 200; ++round) expect_each_once(20);
  });
  for (int round = 0; round < 200; ++round) {
    set_num_threads(1 + round % 5);
    expect_each_once(10);
  }
  other.join();
}

TEST_F(ThreadPool, SixtyFourThreadsOnFewCores) {
  set_num_threads(64);
  for (int round = 0; round < 30; ++round) expect_each_once(500);
}

TEST_F(ThreadPool, NestedCallsRunInPlace) {
  set_num_threads(4);
  std::atomic<int> count{0};
  parallel_for(8, [&](std::int64_t) {
    const auto outer = std::this_thread::get_id();
    parallel_for(5, [&](std::int64_t) {
      EXPECT_EQ(std::this_thread::get_id(), outer);
      count.fetch_add(1);
    });
  });
  EXPECT_EQ(count.load(), 40);
}

TEST_F(ThreadPool, FirstExceptionComesBackAndTheRestStillRuns) {
  set_num_threads(3);
  std::atomic<int> ran{0};
  EXPECT_THROW(parallel_for(50,
                            [&](std::int64_t i) {
                              ran.fetch_add(1);
                              if (i == 7) throw std::runtime_error("seven");
                            }),
               std::runtime_error);
  EXPECT_EQ(ran.load(), 50);
  expect_each_once(10);
}

TEST_F(ThreadPool, HostHookRunsTheTasks) {
  set_num_threads(4);
  std::atomic<int> calls{0}, largest{0};
  set_parallel_hook([&](int n, const std::function<void(int)>& body) {
    calls.fetch_add(1);
    largest.store(n);
    std::vector<std::thread> threads;
    for (int i = 0; i < n; ++i) threads.emplace_back([&, i] { body(i); });
    for (std::thread& t : threads) t.join();
  });
  expect_each_once(100);
  EXPECT_EQ(calls.load(), 1);
  EXPECT_EQ(largest.load(), 4);
  set_parallel_hook([&](int n, const std::function<void(int)>& body) {
    for (int i = n - 1; i >= 0; --i) body(i);  // a hook may be sequential, in any order
  });
  expect_each_once(100);
  set_parallel_hook({});
  expect_each_once(100);
}

// How often a decode waits for all threads: every barrier costs microseconds, and a small layer has only some tens.
TEST_F(ThreadPool, ADecodeHasAtMostThreeBarriers) {
  set_num_threads(2);
  std::atomic<int> barriers{0};
  for (int scheme = 0; scheme < kNumSchemes; ++scheme) {
    harness::Case c;
    c.variant = harness::default_variant(static_cast<Scheme>(scheme));
    c.shape = {"decode", 8, 1024, 256, 4};
    c.tokens = 1;
    if (!harness::supported(c, {}).supported) continue;
    const harness::Fixture fixture(harness::layer_config(c));
    const harness::Batch batch = fixture.batch(1);
    barriers.store(0);
    set_parallel_hook([&](int n, const std::function<void(int)>& body) {
      barriers.fetch_add(1);
      for (int i = 0; i < n; ++i) body(i);
    });
    fixture.run(batch);
    set_parallel_hook({});
    EXPECT_GE(barriers.load(), 2) << name(static_cast<Scheme>(scheme)) << ": both products are shared out";
    EXPECT_LE(barriers.load(), 3) << name(static_cast<Scheme>(scheme));
  }
}

// What idle workers burn, in processor time: they may look out for work for a moment, not for as
// long as nobody asks. Two threads: a worker per core looks out; eight: there are more than cores.
TEST_F(ThreadPool, IdleWorkersSleep) {
  for (const int threads : {2, 8}) {
    set_num_threads(threads);
    parallel_for(64, [](std::int64_t) {});
    const std::clock_t before = std::clock();
    std::this_thread::sleep_for(std::chrono::milliseconds(500));
    const double seconds = static_cast<double>(std::clock() - before) / CLOCKS_PER_SEC;
    EXPECT_LT(seconds, 0.03) << threads << " threads; a single busy worker burns up to 0.5 s";
  }
}

TEST_F(ThreadPool, ThreadCountIsChecked) {
  EXPECT_THROW(set_num_threads(0), Error);
  EXPECT_THROW(set_num_threads(-3), Error);
}

}  // namespace
}  // namespace moesaic
