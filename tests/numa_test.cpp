// SPDX-License-Identifier: Apache-2.0
// Nodes of memory, on machines that are invented: what is read from the system's files, how work and weights are
// dealt to nodes, and that none of it changes a bit. Also how work is cut, and where threads are put.
#include "cpu/numa.h"

#include <gtest/gtest.h>
#include <sched.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <mutex>
#include <numeric>
#include <thread>

#include "cpu/cut.h"
#include "cpu/thread_pool.h"
#include "harness/fixture.h"
#include "moesaic/runtime.h"

namespace moesaic {
namespace {

namespace fs = std::filesystem;

// nodes[n]: the cpus of node n, taken in turn.
Topology invent(const std::vector<std::vector<int>>& nodes) {
  Topology t;
  std::size_t most = 0;
  for (const auto& cpus : nodes) {
    t.node_ids.push_back(static_cast<int>(t.node_ids.size()));
    most = std::max(most, cpus.size());
  }
  for (std::size_t i = 0; i < most; ++i)
    for (std::size_t n = 0; n < nodes.size(); ++n)
      if (i < nodes[n].size()) t.cores.push_back({.cpu = nodes[n][i], .node = static_cast<int>(n)});
  return t;
}
// Two even nodes, three uneven ones, one that has no core of ours, more cores than any machine here.
std::vector<Topology> invented() {
  std::vector<int> many(48);
  std::iota(many.begin(), many.end(), 0);
  return {invent({{0}, {1}}), invent({{0, 1, 2}, {3}, {4, 5}}), invent({{0, 1}, {}, {900}}),
          invent({many, many, many, many})};
}

// The pool as it was, whatever a test does to it.
class Numa : public ::testing::Test {
 protected:
  void SetUp() override { threads_ = num_threads(); }
  void TearDown() override {
    set_topology(nullptr);
    set_pinning(Pinning::kNone);
    set_num_threads(threads_);
  }

 private:
  int threads_ = 1;
};

class Sysfs {
 public:
  Sysfs() : root_(fs::temp_directory_path() / ("moesaic_nodes_" + std::to_string(::getpid()))) {
    fs::create_directories(root_);
  }
  ~Sysfs() { fs::remove_all(root_); }
  void node(const std::string& name, const std::string& cpulist) const {
    fs::create_directories(root_ / name);
    std::ofstream(root_ / name / "cpulist") << cpulist << "\n";
  }
  std::string root() const { return root_.string(); }

 private:
  fs::path root_;
};

std::vector<int> cpus_of(const Topology& t) {
  std::vector<int> cpus;
  for (const Topology::Core& core : t.cores) cpus.push_back(core.cpu);
  return cpus;
}

TEST_F(Numa, ReadsTheSystemsFiles) {
  const Sysfs sysfs;
  sysfs.node("node0", "0-2,8");
  sysfs.node("node2", "4-5");
  sysfs.node("node3", "");   // memory without cores
  sysfs.node("power", "6");  // not a node
  const Topology t = read_topology(sysfs.root(), {0, 1, 2, 4, 5, 8});
  EXPECT_EQ(t.node_ids, (std::vector<int>{0, 2}));
  EXPECT_EQ(cpus_of(t), (std::vector<int>{0, 4, 1, 5, 2, 8})) << "nodes in turn";
  EXPECT_EQ(t.node_of_cpu(8), 0);
  EXPECT_EQ(t.node_of_cpu(5), 1);
  EXPECT_EQ(t.core_of_thread(7).cpu, 4) << "more threads than cores begin again";

  // A process confined to one node sees one.
  const Topology confined = read_topology(sysfs.root(), {4, 5});
  EXPECT_EQ(confined.node_ids, (std::vector<int>{2}));
  EXPECT_EQ(cpus_of(confined), (std::vector<int>{4, 5}));
}

TEST_F(Numa, WhatTheFilesDoNotSayIsOneNode) {
  const std::vector<int> cpus{0, 1, 2, 3};
  const Topology none = read_topology("/there is no such directory", cpus);
  EXPECT_EQ(none.nodes(), 1);
  EXPECT_EQ(cpus_of(none), cpus);
  for (const char* nonsense : {"", "x", "0-", "-1", "3-1", "99999999999999999999", "0-4000000000", ",,"}) {
    const Sysfs sysfs;
    sysfs.node("node0", nonsense);
    sysfs.node("node1", "2-3,2,0-0");
    std::vector<int> seen = cpus_of(read_topology(sysfs.root(), cpus));
    std::sort(seen.begin(), seen.end());
    EXPECT_EQ(seen, cpus) << nonsense;
  }
}

TEST_F(Numa, MoreNodesThanRunsShareTheLast) {
  const Sysfs sysfs;
  std::vector<int> cpus;
  for (int n = 0; n < kMaxNodes + 5; ++n) {
    sysfs.node("node" + std::to_string(n), std::to_string(n));
    cpus.push_back(n);
  }
  const Topology t = read_topology(sysfs.root(), cpus);
  EXPECT_EQ(t.nodes(), kMaxNodes);
  EXPECT_EQ(t.cores.size(), cpus.size());
  EXPECT_EQ(split(t, 40, 1000).count(), 1000);
}

TEST_F(Numa, WorkIsDealtInProportionToThreads) {
  for (const Topology& t : invented()) {
    for (const int threads : {1, 2, 3, 5, 64, 500}) {
      for (const std::int64_t count : {0, 1, 7, 24, 1000}) {
        const NodeRuns runs = split(t, threads, count);
        ASSERT_EQ(runs.nodes, t.nodes());
        ASSERT_EQ(runs.first(0), 0);
        ASSERT_EQ(runs.count(), count);
        int all = 0;
        for (int n = 0; n < runs.nodes; ++n) {
          const int here = threads_of_node(t, threads, n);
          all += here;
          ASSERT_LE(runs.first(n), runs.end(n));
          ASSERT_LE(std::abs(runs.count(n) * threads - count * here), threads) << "more than one piece off";
          for (std::int64_t i = runs.first(n); i < runs.end(n); ++i) ASSERT_EQ(runs.node_of(i), n);
        }
        ASSERT_EQ(all, threads);
      }
    }
  }
}

TEST_F(Numa, EveryPieceIsCutOnceWideOnesFirst) {
  for (const int threads : {1, 2, 3, 16, 64})
    for (const std::int64_t widest : {1, 2, 8, 24, 448})
      for (const std::int64_t pieces : {0, 1, 2, 5, 31, 32, 33, 192, 1201, 3072, 100000}) {
        const GuidedCut cut(pieces, threads, widest);
        const std::int64_t tasks = cut.tasks();
        std::int64_t at = 0, before = widest;
        for (std::int64_t task = 0; task < tasks; ++task) {
          const auto [begin, end] = cut.range(task);
          ASSERT_EQ(begin, at);
          ASSERT_GT(end, begin);
          ASSERT_LE(end - begin, before);
          // No task is more than a thread's share of what was left.
          if (end - begin > 1) {
            ASSERT_LE((end - begin) * threads, pieces - begin);
          }
          before = end - begin;
          at = end;
        }
        ASSERT_EQ(at, pieces) << threads << " threads, widest " << widest;
        if (tasks > 0) {
          ASSERT_EQ(before, 1) << "the last tasks are narrow";
        }
      }
}

TEST_F(Numa, EveryTaskRunsOnceOnAnyMachine) {
  for (const Topology& t : invented()) {
    set_topology(&t);
    for (const int threads : {1, 2, 3, 7, 64}) {
      set_num_threads(threads);
      for (const std::int64_t count : {1, 2, 10, 500}) {
        std::vector<std::atomic<int>> seen(static_cast<std::size_t>(count));
        parallel_for(split(t, threads, count), [&](std::int64_t i) { seen[static_cast<std::size_t>(i)].fetch_add(1); });
        for (const auto& s : seen) ASSERT_EQ(s.load(), 1);
      }
    }
  }
}

std::vector<int> allowed_here() {
  cpu_set_t set;
  CPU_ZERO(&set);
  EXPECT_EQ(sched_getaffinity(0, sizeof(set), &set), 0);
  std::vector<int> cpus;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
    if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
  return cpus;
}

// The first `threads` tasks wait for each other, so each is some thread's first; a worker's node is the one whose
// cores it may run on.
TEST_F(Numa, WorkersBeginAtHome) {
  const std::vector<int> all = allowed_here();
  if (all.size() < 2) GTEST_SKIP() << "one core has one node";
  const Topology t = invent({{all[0]}, {all[1]}});
  set_topology(&t);
  const int threads = 5;
  set_num_threads(threads);
  NodeRuns runs(200);
  runs.nodes = 2;
  runs.begin = {0, 100, 200};
  const std::thread::id caller = std::this_thread::get_id();
  for (int round = 0; round < 20; ++round) {
    std::atomic<int> arrived{0}, workers{0}, away{0};
    parallel_for(runs, [&](std::int64_t task) {
      if (arrived.load() >= threads) return;
      if (std::this_thread::get_id() != caller) {
        workers.fetch_add(1);
        away.fetch_add(allowed_here() != std::vector<int>{all[static_cast<std::size_t>(runs.node_of(task))]});
      }
      arrived.fetch_add(1);
      while (arrived.load() < threads) std::this_thread::yield();
    });
    EXPECT_EQ(workers.load(), threads - 1);
    EXPECT_EQ(away.load(), 0);
  }
}

TEST_F(Numa, BitsDoNotDependOnTheMachine) {
  for (const Scheme scheme : {Scheme::kBF16, Scheme::kInt8Channel, Scheme::kInt4W4A16, Scheme::kMxfp4W4A16}) {
    const LayerConfig config = [&] {
      harness::Case c;
      c.variant = harness::default_variant(scheme);
      c.shape = {"nodes", 5, 320, 224, 2};  // several tiles, so that every node has some
      c.tokens = 40;
      return harness::layer_config(c);
    }();
    const harness::Fixture here(config);
    const harness::Batch few = here.batch(3), many = here.batch(40);
    const harness::HostTensor one = here.run(few), all = here.run(many);
    for (const Topology& t : invented()) {
      set_topology(&t);
      for (const int threads : {2, 5}) {
        set_num_threads(threads);
        const harness::Fixture there(config);  // packed on this machine ...
        EXPECT_TRUE(harness::same_bits(there.run(few), one)) << name(scheme);
        set_num_threads(3);  // ... and run with other threads ...
        EXPECT_TRUE(harness::same_bits(there.run(many), all)) << name(scheme);
        set_topology(nullptr);  // ... and on another machine
        EXPECT_TRUE(harness::same_bits(there.run(many), all)) << name(scheme);
        if (scheme == Scheme::kBF16) {
          harness::HostTensor fc1(DType::kBF16, {1, 2 * 224, 320}), fc2(DType::kBF16, {1, 320, 224});
          there.layer.unpack_expert(4, fc1.view(), fc2.view());
          const Tensor given = there.weights.weights.fc1.weight;
          EXPECT_EQ(0, std::memcmp(fc1.bytes().data(), given.as<char>() + 4 * given.strides[0] * 2,
                                   fc1.bytes().size()));
        }
        set_topology(&t);
      }
    }
    set_topology(nullptr);
  }
}

// Which cpus each worker of a job may use; every thread takes one task.
std::vector<std::vector<int>> workers_cpus(int threads) {
  std::vector<std::vector<int>> cpus;
  std::mutex mutex;
  std::atomic<int> arrived{0};
  const std::thread::id caller = std::this_thread::get_id();
  parallel_for(threads, [&](std::int64_t) {
    if (std::this_thread::get_id() != caller) {
      const std::lock_guard lock(mutex);
      cpus.push_back(allowed_here());
    }
    arrived.fetch_add(1);
    while (arrived.load() < threads) std::this_thread::yield();
  });
  return cpus;
}

TEST_F(Numa, WorkersArePinnedOnRequestOnly) {
  const std::vector<int> all = allowed_here();
  set_num_threads(3);
  for (const auto& cpus : workers_cpus(3)) EXPECT_EQ(cpus, all);
  set_pinning(Pinning::kCores);
  for (const auto& cpus : workers_cpus(3)) {
    ASSERT_EQ(cpus.size(), 1u);
    EXPECT_TRUE(std::count(all.begin(), all.end(), cpus[0]));
  }
  EXPECT_EQ(allowed_here(), all) << "the caller is left alone";
  set_pinning(Pinning::kNone);
  for (const auto& cpus : workers_cpus(3)) EXPECT_EQ(cpus, all);
}

TEST_F(Numa, WorkersStayWithinTheirNode) {
  const std::vector<int> all = allowed_here();
  if (all.size() < 2) GTEST_SKIP() << "one core has one node";
  const Topology t = invent({{all[0]}, {all[1]}});
  set_topology(&t);
  set_num_threads(3);
  for (const auto& cpus : workers_cpus(3)) {
    ASSERT_EQ(cpus.size(), 1u);
    EXPECT_TRUE(cpus[0] == all[0] || cpus[0] == all[1]);
  }
  set_topology(nullptr);
  for (const auto& cpus : workers_cpus(3)) EXPECT_EQ(cpus, all) << "and are let go again";
}

// A system that gives no pages of 2 MiB: the same layer, the same bits.
TEST_F(Numa, LargePagesAreAWishOnly) {
  harness::Case c;
  c.variant = harness::default_variant(Scheme::kBF16);
  c.shape = {"pages", 8, 512, 384, 2};  // 6 and 3 MiB of weights
  c.tokens = 9;
  const LayerConfig config = harness::layer_config(c);
  const harness::Fixture with(config);
  const harness::Batch batch = with.batch(9);
  const harness::HostTensor expected = with.run(batch);
  if (prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) != 0) GTEST_SKIP() << "this kernel cannot turn large pages off";
  const harness::Fixture without(config);
  const harness::HostTensor got = without.run(batch);
  prctl(PR_SET_THP_DISABLE, 0, 0, 0, 0);
  EXPECT_TRUE(harness::same_bits(got, expected));
}

// A whole layer with far more threads than cores, called from several threads at once.
TEST_F(Numa, SixtyFourThreadsRunALayer) {
  harness::Case c;
  c.variant = harness::default_variant(Scheme::kInt4W4A16);
  c.shape = {"crowd", 6, 256, 320, 3};
  c.tokens = 50;
  const harness::Fixture fixture(harness::layer_config(c));
  const harness::Batch batch = fixture.batch(50, harness::Load::kZipf);
  set_num_threads(1);
  const harness::HostTensor expected = fixture.run(batch);
  set_num_threads(64);
  std::atomic<int> wrong{0};
  std::vector<std::thread> callers;
  for (int i = 0; i < 4; ++i)
    callers.emplace_back([&] {
      for (int round = 0; round < 10; ++round) wrong += !harness::same_bits(fixture.run(batch), expected);
    });
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(wrong.load(), 0);
}

}  // namespace
}  // namespace moesaic
