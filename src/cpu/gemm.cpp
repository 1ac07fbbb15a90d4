// SPDX-License-Identifier: Apache-2.0
// The grouped product: cuts tiles x columns into strips and hands them to the ISA level's kernel.
#include "cpu/gemm.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>

#include "cpu/cut.h"
#include "cpu/kernels.h"
#include "cpu/pack.h"
#include "cpu/thread_pool.h"

namespace moesaic {
namespace {

bool is_live(const RowMap& rows, std::int64_t position) {
  if (position < 0 || position >= rows.positions) return false;
  if (rows.row_slot == nullptr) return true;
  const std::int64_t slot = rows.row_slot[position];
  return slot >= 0 && slot < rows.slot_count;
}

// A filtered tile: its live rows become zero, in the columns of this strip.
void zero_rows(const GemmStage& stage, const Tile& tile, std::int64_t first, std::int64_t count) {
  const Tensor& c = stage.c;
  const auto element = static_cast<std::int64_t>(size_of(c.dtype));
  const std::int64_t stride = c.strides[c.rank - 1] * element;
  const std::int64_t columns = c.shape[c.rank - 1];
  for (std::int64_t i = 0; i < tile.rows; ++i) {
    const std::int64_t position = tile.first + i;
    if (!is_live(stage.rows, position)) continue;
    std::byte* row = row_of(c, row_index(stage.rows, stage.c_row, stage.top_k, position), element);
    for (std::int64_t n = first; n < std::min(first + count, columns); ++n)
      std::memset(row + n * stride, 0, static_cast<std::size_t>(element));
  }
}

// Live rows of a tile from its row `from` on, as many as a strip takes; returns the row behind the
// last one looked at.
std::int64_t live_rows(const RowMap& rows, const Tile& tile, std::int64_t from,
                       std::int64_t* positions, std::int64_t* count) {
  *count = 0;
  for (; from < tile.rows && *count < kStripRows; ++from)
    if (is_live(rows, tile.first + from)) positions[(*count)++] = tile.first + from;
  return from;
}

// By node: how many of its tasks have been begun. They are handed out in ascending order.
using Begun = std::array<std::atomic<std::int64_t>, kMaxNodes>;

// The first task of a node that nobody has begun: what the thread that asks gets next, unless
// another is quicker in the little time that is left. No result depends on it, only what is fetched
// early.
class NextTask final : public StripForecast {
 public:
  NextTask(const RowMap& rows, const NodeCut& cut, const Begun& begun, int node)
      : rows_(rows), cut_(cut), begun_(begun[static_cast<std::size_t>(node)]), node_(node) {}
  bool next(Strip* strip, std::int64_t* positions) const override {
    const std::int64_t task = begun_.load(std::memory_order_relaxed);
    if (task >= cut_.tasks().end(node_)) return false;
    strip->tiles = 0;
    cut_.for_each_part(task, [&](std::int64_t row_tile, std::int64_t first, std::int64_t count) {
      if (strip->tiles > 0) return;  // the first one
      const Tile& tile = rows_.tiles[row_tile];
      *strip = {.expert = tile.expert, .first_tile = first, .tiles = count, .positions = positions};
      live_rows(rows_, tile, 0, positions, &strip->rows);
    });
    return strip->tiles > 0 && strip->rows > 0;
  }

 private:
  const RowMap& rows_;
  const NodeCut& cut_;
  const std::atomic<std::int64_t>& begun_;
  const int node_;
};

}  // namespace

std::unique_ptr<PackedWeights> make_packed_cpu(const WeightSpec& spec) {
  return std::make_unique<PackedCpu>(spec);
}

std::size_t gemm_scratch_bytes_cpu(const WeightSpec&, std::int64_t) { return 0; }

void gemm_cpu(const GemmStage& stage) {
  const WeightSpec& spec = stage.b->spec;
  const auto* packed = static_cast<const PackedCpu*>(stage.b->packed);
  // A plain operand's layout is only a plan here: nothing is packed but parts on the stack.
  const PackLayout layout = packed != nullptr ? packed->layout() : pack_layout(spec);
  const CpuKernels& kernels = packed != nullptr ? packed->kernels() : cpu_kernels();
  const GemmCall call{.stage = &stage, .spec = &spec, .layout = &layout, .packed = packed};
  const std::int64_t row_tiles =
      std::clamp<std::int64_t>(*stage.rows.num_tiles, 0, stage.rows.max_tiles);
  const std::int64_t column_tiles = layout.tiles;
  if (row_tiles == 0 || column_tiles == 0) return;

  const std::int64_t columns = spec.gated ? kTileCols / 2 : kTileCols;
  const auto run_strip = [&](const Tile& tile, std::int64_t first, std::int64_t count,
                             const StripForecast& forecast) {
    Strip strip{.expert = tile.expert, .first_tile = first, .tiles = count};
    if (tile.expert < 0 || tile.expert >= spec.experts)
      return zero_rows(stage, tile, first * columns, count * columns);
    std::int64_t positions[kStripRows];
    strip.positions = positions;
    for (std::int64_t i = 0; i < tile.rows;) {
      i = live_rows(stage.rows, tile, i, positions, &strip.rows);
      if (i == tile.rows) strip.forecast = &forecast;
      if (strip.rows > 0) kernels.strip(call, strip);
    }
  };
  // The bits do not depend on where the work is cut.
  const NodeRuns columns_of_nodes = packed != nullptr ? packed->nodes() : NodeRuns(column_tiles);
  const NodeCut cut(columns_of_nodes, row_tiles);
  Begun begun{};
  parallel_for(cut.tasks(), [&](std::int64_t task) {
    const int node = cut.tasks().node_of(task);
    begun[static_cast<std::size_t>(node)].store(task + 1, std::memory_order_relaxed);
    const NextTask forecast(stage.rows, cut, begun, node);
    cut.for_each_part(task, [&](std::int64_t row_tile, std::int64_t first, std::int64_t count) {
      run_strip(stage.rows.tiles[row_tile], first, count, forecast);
    });
  });
}

}  // namespace moesaic
