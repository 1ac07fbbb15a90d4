// SPDX-License-Identifier: Apache-2.0
#include "cpu/numa.h"

#include <linux/mempolicy.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <charconv>
#include <climits>
#include <filesystem>
#include <fstream>
#include <map>
#include <thread>

namespace moesaic {
namespace {

// "0-3,8,10-11". What is not of that form ends the list.
std::vector<int> parse_cpu_list(const std::string& text) {
  constexpr int kMost = 1 << 16;
  std::vector<int> cpus;
  const char *at = text.data(), *end = at + text.size();
  while (at < end) {
    int first = 0, last = 0;
    std::from_chars_result r = std::from_chars(at, end, first);
    if (r.ec != std::errc() || first < 0 || first > kMost) break;
    last = first;
    if (r.ptr < end && *r.ptr == '-') r = std::from_chars(r.ptr + 1, end, last);
    if (r.ec != std::errc() || last > kMost) break;
    for (int cpu = first; cpu <= last; ++cpu) cpus.push_back(cpu);
    if (r.ptr == end || *r.ptr != ',') break;
    at = r.ptr + 1;
  }
  return cpus;
}

// "node12" -> 12, else -1.
int node_number(const std::string& name) {
  int number = -1;
  if (!name.starts_with("node")) return -1;
  const char *at = name.data() + 4, *end = name.data() + name.size();
  const auto [stop, error] = std::from_chars(at, end, number);
  return error == std::errc() && stop == end ? number : -1;
}

std::map<int, std::vector<int>> listed_nodes(const std::string& root) {
  std::map<int, std::vector<int>> nodes;
  std::error_code none;
  for (auto entry = std::filesystem::directory_iterator(root, none);
       !none && entry != std::filesystem::directory_iterator(); entry.increment(none)) {
    const int number = node_number(entry->path().filename().string());
    std::string list;
    std::ifstream file(entry->path() / "cpulist");
    if (number >= 0 && std::getline(file, list)) nodes[number] = parse_cpu_list(list);
  }
  return nodes;
}

std::vector<int> allowed_cpus() {
  cpu_set_t set;
  CPU_ZERO(&set);
  std::vector<int> cpus;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) {
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
      if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
  } else {  // more cpus than the set has room for
    for (unsigned cpu = 0; cpu < std::thread::hardware_concurrency(); ++cpu)
      cpus.push_back(static_cast<int>(cpu));
  }
  if (cpus.empty()) cpus.push_back(0);
  return cpus;
}

std::atomic<const Topology*> replacement{nullptr};

}  // namespace

int Topology::node_of_cpu(int cpu) const {
  for (const Core& core : cores)
    if (core.cpu == cpu) return core.node;
  return 0;
}

Topology read_topology(const std::string& root, const std::vector<int>& cpus) {
  Topology t;
  std::map<int, std::vector<int>> mine;  // by the system's number
  std::vector<int> rest = cpus;
  for (const auto& [number, list] : listed_nodes(root))
    for (const int cpu : list)
      if (const auto found = std::find(rest.begin(), rest.end(), cpu); found != rest.end()) {
        mine[number].push_back(cpu);
        rest.erase(found);
      }
  std::vector<int>& first = mine.empty() ? mine[0] : mine.begin()->second;
  first.insert(first.end(), rest.begin(), rest.end());

  std::vector<std::vector<int>> nodes;
  for (auto& [number, list] : mine) {
    if (static_cast<int>(nodes.size()) < kMaxNodes) {
      t.node_ids.push_back(number);
      nodes.emplace_back();
    }
    nodes.back().insert(nodes.back().end(), list.begin(), list.end());
  }
  for (std::size_t i = 0; t.cores.size() < cpus.size(); ++i)
    for (std::size_t n = 0; n < nodes.size(); ++n)
      if (i < nodes[n].size()) t.cores.push_back({.cpu = nodes[n][i], .node = static_cast<int>(n)});
  return t;
}

const Topology& topology() {
  static const Topology machine = read_topology("/sys/devices/system/node", allowed_cpus());
  const Topology* invented = replacement.load(std::memory_order_acquire);
  return invented != nullptr ? *invented : machine;
}
void set_topology(const Topology* invented) {
  replacement.store(invented, std::memory_order_release);
}

int threads_of_node(const Topology& topology, int threads, int node) {
  if (topology.nodes() == 1) return threads;
  int count = 0;
  for (int i = 0; i < threads; ++i) count += topology.core_of_thread(i).node == node ? 1 : 0;
  return count;
}

NodeRuns split(const Topology& topology, int threads, std::int64_t count) {
  NodeRuns runs(count);
  runs.nodes = topology.nodes();
  std::int64_t before = 0;
  for (int node = 0; node < runs.nodes; ++node) {
    before += threads_of_node(topology, threads, node);
    runs.begin[static_cast<std::size_t>(node) + 1] = count * before / threads;
  }
  return runs;
}

void place_memory(const Topology& topology, int node, void* data, std::size_t bytes) {
  constexpr int kBits = sizeof(unsigned long) * CHAR_BIT;
  const int id = topology.node_ids[static_cast<std::size_t>(node)];
  if (topology.nodes() == 1 || id >= 16 * kBits) return;
  std::array<unsigned long, 16> mask{};
  mask[static_cast<std::size_t>(id / kBits)] = 1ul << (id % kBits);
  // Preferred, not bound: a node that is full must not make loading fail. The result is not looked at for the same
  // reason.
  (void)syscall(SYS_mbind, data, bytes, MPOL_PREFERRED, mask.data(), mask.size() * kBits, 0u);
}

}  // namespace moesaic
