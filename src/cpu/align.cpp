// SPDX-License-Identifier: Apache-2.0
// Expert ids to positions: a counting sort, stable because every part of the slots knows where its
// own run inside each expert begins. (The original counts with atomics: its order varies.)
#include "cpu/align.h"

#include <algorithm>

#include "cpu/ranges.h"

namespace moesaic {
namespace {

// Parts of the slots that are counted apart: a function of the count alone, like the scratch.
constexpr std::int64_t kSlotsPerPart = 8192, kMaxParts = 16;
std::int64_t parts_of(std::int64_t slots) {
  return std::clamp<std::int64_t>(slots / kSlotsPerPart, 1, kMaxParts);
}

class Aligner {
 public:
  explicit Aligner(const AlignStage& stage)
      : stage_(stage),
        slots_(stage.topk_ids.numel()),
        padded_(stage.block_rows > 0),
        // No room at all can only be a batched buffer of no rows: everything is dropped.
        batched_(stage.capacity > 0 || (!padded_ && slots_ > 0 && stage.rows.positions == 0)),
        bins_(padded_ ? stage.experts : stage.local.count),
        parts_(parts_of(slots_)),
        next_(static_cast<std::int64_t*>(stage.scratch)) {}

  void run() const {
    if (slots_ > 0) count();
    lay_out();
    if (slots_ > 0 && (stage_.slot_row != nullptr || stage_.rows.row_slot != nullptr)) scatter();
  }

 private:
  // --- which bin ---------------------------------------------------------------------------------
  // Padded lists keep every expert of the model apart, in the order of the global ids, as the
  // original does; elsewhere only local experts have rows.
  std::int64_t local_of(std::int64_t id) const {
    const Tensor& map = stage_.expert_map;
    const std::int64_t local =
        map.defined() ? map.as<const std::int32_t>()[id * map.strides[0]] : id - stage_.local.first;
    return local >= 0 && local < stage_.local.count ? local : -1;
  }
  std::int64_t bin_of(std::int64_t id) const {
    if (id < 0 || id >= stage_.experts) return -1;
    return padded_ ? id : local_of(id);
  }

  // Calls body(slot, bin) for the slots of a part, in order; bin -1: contributes nothing.
  template <typename Body>
  void for_each_slot(std::int64_t part, const Body& body) const {
    const std::int64_t begin = slots_ * part / parts_, end = slots_ * (part + 1) / parts_;
    const Tensor& ids = stage_.topk_ids;
    const auto walk = [&](const auto* data) {
      if (ids.is_contiguous()) {
        for (std::int64_t s = begin; s < end; ++s) body(s, bin_of(data[s]));
      } else {
        const std::int64_t k = ids.shape[1];
        for (std::int64_t s = begin; s < end; ++s)
          body(s, bin_of(data[s / k * ids.strides[0] + s % k * ids.strides[1]]));
      }
    };
    if (ids.dtype == DType::kI64)
      walk(ids.as<const std::int64_t>());
    else
      walk(ids.as<const std::int32_t>());
  }

  template <typename Body>
  void for_each_part(const Body& body) const {
    if (parts_ == 1) return body(0);
    parallel_for(parts_, body);
  }

  // --- how many ----------------------------------------------------------------------------------
  // next_[part][bin]: first the part's count, then the position of its next slot.
  std::int64_t* next(std::int64_t part) const { return next_ + part * bins_; }

  void count() const {
    for_each_part([this](std::int64_t part) {
      std::int64_t* counts = next(part);
      std::fill_n(counts, bins_, 0);
      for_each_slot(part, [&](std::int64_t, std::int64_t bin) {
        if (bin >= 0) ++counts[bin];
      });
    });
  }

  // --- where -------------------------------------------------------------------------------------
  void lay_out() const {
    if (stage_.tokens_per_expert != nullptr)
      std::fill_n(stage_.tokens_per_expert, stage_.local.count, 0);
    std::int64_t first = 0, dropped = 0, tiles = 0;
    for (std::int64_t bin = 0; bin < bins_; ++bin) {
      if (batched_) first = bin * stage_.capacity;
      std::int64_t end = first;
      for (std::int64_t part = 0; slots_ > 0 && part < parts_; ++part) {
        const std::int64_t here = next(part)[bin];
        next(part)[bin] = end;
        end += here;
      }
      std::int64_t rows = end - first;
      if (batched_ && rows > stage_.capacity) {
        dropped += rows - stage_.capacity;
        rows = stage_.capacity;
      }
      const std::int64_t local = padded_ ? local_of(bin) : bin;
      // Several global experts may map to one local expert: their rows add up.
      if (stage_.tokens_per_expert != nullptr && local >= 0)
        stage_.tokens_per_expert[local] += static_cast<std::int32_t>(rows);
      if (stage_.rows.tiles != nullptr) tiles = add_tiles(tiles, local, first, rows);
      first += rows;
      if (padded_) first = end_blocks(local, first - rows, rows);
    }
    if (stage_.rows.num_tiles != nullptr) *stage_.rows.num_tiles = static_cast<std::int32_t>(tiles);
    if (stage_.next_task != nullptr) stage_.next_task[0] = stage_.next_task[1] = 0;
    if (stage_.dropped != nullptr) *stage_.dropped = static_cast<std::int32_t>(dropped);
    if (padded_) finish_lists(first);
  }

  std::int64_t add_tiles(std::int64_t tiles, std::int64_t local, std::int64_t first,
                         std::int64_t rows) const {
    const RowMap& map = stage_.rows;
    for (std::int64_t done = 0; done < rows && tiles < map.max_tiles; done += map.tile_rows)
      map.tiles[tiles++] = {.expert = static_cast<std::int32_t>(local),
                            .rows = static_cast<std::int32_t>(std::min(map.tile_rows, rows - done)),
                            .first = first + done};
    return tiles;
  }

  // Pads an expert's run to whole blocks and returns where the next one begins.
  std::int64_t end_blocks(std::int64_t local, std::int64_t first, std::int64_t rows) const {
    const std::int64_t block = stage_.block_rows;
    const std::int64_t end =
        std::min((first + rows + block - 1) / block * block, stage_.rows.positions);
    const auto pad = static_cast<std::int32_t>(slots_);
    for (std::int64_t p = first + rows; p < end; ++p) stage_.rows.row_slot[p] = pad;
    for (std::int64_t b = first / block; b * block < end; ++b)
      stage_.block_experts[b] = static_cast<std::int32_t>(local);
    return end;
  }

  // The rest of the lists is padding, too, so that the same ids give the same bytes.
  void finish_lists(std::int64_t used) const {
    *stage_.num_padded = static_cast<std::int32_t>(used);
    const std::int64_t positions = stage_.rows.positions, block = stage_.block_rows;
    std::fill(stage_.rows.row_slot + used, stage_.rows.row_slot + positions,
              static_cast<std::int32_t>(slots_));
    for (std::int64_t b = (used + block - 1) / block; b * block < positions; ++b)
      stage_.block_experts[b] = -1;
  }

  void scatter() const {
    for_each_part([this](std::int64_t part) {
      std::int64_t* next_row = next(part);
      for_each_slot(part, [&](std::int64_t slot, std::int64_t bin) {
        std::int64_t row = bin < 0 ? -1 : next_row[bin]++;
        if (batched_ && row >= (bin + 1) * stage_.capacity) row = -1;  // dropped
        if (row >= stage_.rows.positions) row = -1;
        if (stage_.slot_row != nullptr) stage_.slot_row[slot] = static_cast<std::int32_t>(row);
        if (row >= 0 && stage_.rows.row_slot != nullptr)
          stage_.rows.row_slot[row] = static_cast<std::int32_t>(slot);
      });
    });
  }

  const AlignStage& stage_;
  std::int64_t slots_;
  bool padded_, batched_;
  std::int64_t bins_, parts_;
  std::int64_t* next_;  // scratch [parts, bins]
};

}  // namespace

std::size_t align_scratch_bytes_cpu(std::int64_t slots, std::int64_t experts) {
  return static_cast<std::size_t>(parts_of(slots) * experts) * sizeof(std::int64_t);
}

void align_cpu(const AlignStage& stage) { Aligner(stage).run(); }

}  // namespace moesaic
