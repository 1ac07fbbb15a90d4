// SPDX-License-Identifier: Apache-2.0
// Which cores lie at which memory, and how work is dealt to them. A node's threads take the column tiles whose
// weights lie in the node's memory, and help the others when they are done: reading through another socket's
// memory halves a decoder's speed. On a machine of one node all of this is one run of tasks.
// Nothing here can change a result: it decides who computes a tile, and where the tile lies.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace moesaic {

// Nodes beyond these share the last one's run.
inline constexpr int kMaxNodes = 16;

struct Topology {
  struct Core {
    int cpu = 0;
    int node = 0;  // index into node_ids
  };
  // In the order in which threads take them: the nodes in turn, so that any number of threads reaches all memory.
  std::vector<Core> cores;
  std::vector<int> node_ids;  // the system's numbers

  int nodes() const { return static_cast<int>(node_ids.size()); }
  const Core& core_of_thread(int thread) const {
    return cores[static_cast<std::size_t>(thread) % cores.size()];
  }
  int node_of_cpu(int cpu) const;  // 0 for one that is not listed
};

// From `root`/node*/cpulist, of the given cpus only; cpus that no file lists, and all of them where there is no such
// directory, lie at the first node.
Topology read_topology(const std::string& root, const std::vector<int>& cpus);

// The machine's, of the cpus this process may run on, read once; or what a test has put in its place, which has to
// outlive every call (null: the machine's again).
const Topology& topology();
void set_topology(const Topology* invented);

// [0, count) in contiguous runs, one for each node, empty where a node has nothing.
struct NodeRuns {
  int nodes = 1;
  std::array<std::int64_t, kMaxNodes + 1> begin{};  // run n: [begin[n], begin[n + 1])

  NodeRuns() = default;
  explicit NodeRuns(std::int64_t count) { begin[1] = count; }
  std::int64_t count() const { return begin[static_cast<std::size_t>(nodes)]; }
  std::int64_t count(int node) const { return end(node) - first(node); }
  std::int64_t first(int node) const { return begin[static_cast<std::size_t>(node)]; }
  std::int64_t end(int node) const { return begin[static_cast<std::size_t>(node) + 1]; }
  int node_of(std::int64_t i) const {
    int node = 0;
    while (i >= end(node)) ++node;
    return node;
  }
};
// In proportion to the node's threads. A pure function.
NodeRuns split(const Topology& topology, int threads, std::int64_t count);
// How many of `threads` are the node's.
int threads_of_node(const Topology& topology, int threads, int node);

// Asks for the pages of [data, data + bytes) to lie at a node, before anything has touched them. Where the system does
// not let us, they lie where the thread that packs runs, which is a thread of the node.
void place_memory(const Topology& topology, int node, void* data, std::size_t bytes);

}  // namespace moesaic
