// SPDX-License-Identifier: Apache-2.0
// How a long row of equal pieces of work is cut into tasks for a shared counter: wide ones first,
// narrow ones last. A wide task reads its weights as one stream and converts its rows of A once;
// narrow ones let all threads end together. Equal tasks had to choose: in a small layer's decode
// the beginnings of 64 short streams cost a quarter of the time, and wide ones left a thread
// waiting for the other's last.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/numa.h"
#include "moesaic/runtime.h"

namespace moesaic {

class GuidedCut {
 public:
  struct Range {
    std::int64_t begin = 0, end = 0;
  };
  // `widest`: pieces that a task has at most.
  GuidedCut(std::int64_t pieces, int threads, std::int64_t widest)
      : pieces_(pieces), threads_(threads), widest_(widest) {}

  std::int64_t tasks() const {
    std::int64_t count = 0;
    for (Round r = first(); r.width > 0; r = next(r)) count += tasks_of(r);
    return count;
  }
  Range range(std::int64_t task) const {
    Round r = first();
    for (std::int64_t here = tasks_of(r); task >= here; here = tasks_of(r)) {
      task -= here;
      r = next(r);
    }
    const std::int64_t begin = r.begin + task * r.width;
    return {begin, std::min(begin + r.width, pieces_)};
  }

 private:
  // Tasks of one width follow each other, as many as there are threads, or, at the ends, more: as
  // many as the widest allows, and the rest in single pieces. Together a round takes half of what
  // is left.
  struct Round {
    std::int64_t begin = 0, end = 0, width = 0;  // width 0: nothing left
  };
  Round first() const { return round_at(0); }
  Round next(const Round& r) const { return round_at(r.end); }
  std::int64_t tasks_of(const Round& r) const { return (r.end - r.begin + r.width - 1) / r.width; }
  Round round_at(std::int64_t begin) const {
    const std::int64_t left = pieces_ - begin;
    if (left <= 0) return {begin, begin, 0};
    const std::int64_t share = left / (2 * std::int64_t{threads_});
    if (share <= 1) return {begin, pieces_, 1};
    if (share < widest_) return {begin, begin + share * threads_, share};
    const std::int64_t wide = (left - 2 * threads_ * widest_) / widest_ + threads_;
    return {begin, begin + wide * widest_, widest_};
  }

  std::int64_t pieces_;
  int threads_;
  std::int64_t widest_;
};

// The grid of tiles of rows times 64-column tiles of weights, cut into tasks. Each node takes the
// columns that lie in its memory; within a node all columns of the first tile of rows come first,
// then those of the next.
class NodeCut {
 public:
  // `column_tiles`: which lie at which node.
  NodeCut(const NodeRuns& column_tiles, std::int64_t row_tiles)
      : column_tiles_(column_tiles), row_tiles_(row_tiles) {
    tasks_.nodes = column_tiles.nodes;
    for (int n = 0; n < column_tiles.nodes; ++n)
      tasks_.begin[static_cast<std::size_t>(n) + 1] = tasks_.first(n) + of_node(n).tasks();
  }
  const NodeRuns& tasks() const { return tasks_; }

  // Calls body(row tile, first column tile, number of column tiles).
  template <typename Body>
  void for_each_part(std::int64_t task, const Body& body) const {
    const int node = tasks_.node_of(task);
    const std::int64_t width = column_tiles_.count(node);
    for (auto [at, end] = of_node(node).range(task - tasks_.first(node)); at < end;) {
      const std::int64_t first = at % width, count = std::min(end - at, width - first);
      body(at / width, column_tiles_.first(node) + first, count);
      at += count;
    }
  }

 private:
  GuidedCut of_node(int node) const {
    const std::int64_t width = column_tiles_.count(node);
    const int threads =
        column_tiles_.nodes == 1 ? threads_ : threads_of_node(machine_, threads_, node);
    return {row_tiles_ * width, std::max(threads, 1), width};
  }

  const Topology& machine_ = topology();
  const int threads_ = num_threads();  // once: somebody may change it meanwhile
  const NodeRuns& column_tiles_;
  const std::int64_t row_tiles_;
  NodeRuns tasks_;
};

}  // namespace moesaic
