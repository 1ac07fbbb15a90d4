// SPDX-License-Identifier: Apache-2.0
// A layer's packed weights: their memory, dealt out to the nodes, and how it is filled.
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <string>

#include "check.h"
#include "cpu/cut.h"
#include "cpu/kernels.h"
#include "cpu/near_scales.h"
#include "cpu/pack.h"
#include "cpu/thread_pool.h"
#include "moesaic/runtime.h"

namespace moesaic {
namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;

}  // namespace

PackedCpu::PackedCpu(const WeightSpec& spec)
    : spec_(spec), layout_(pack_layout(spec)), kernels_(&cpu_kernels()) {
  const Topology& machine = topology();
  nodes_ = split(machine, num_threads(), layout_.tiles);
  const auto wanted =
      static_cast<std::size_t>(checked_mul(spec.experts, layout_.expert_bytes, "packed weights"));
  // Large pages: with 4 KiB ones the TLB costs 4 to 14% at decode. Without them nothing fails.
  const std::size_t alignment = wanted >= kHugePage ? kHugePage : 64;
  std::array<std::size_t, kMaxNodes> sizes{};
  bytes_ = 0;
  for (int n = 0; n < nodes_.nodes; ++n) {
    const auto i = static_cast<std::size_t>(n);
    const auto size = static_cast<std::size_t>(spec.experts * nodes_.count(n) * layout_.tile_bytes);
    sizes[i] = (size + alignment - 1) / alignment * alignment;
    regions_[i] = static_cast<std::int64_t>(bytes_);
    bytes_ += sizes[i];
  }
  void* data = std::aligned_alloc(alignment, std::max(bytes_, alignment));
  if (data == nullptr)
    throw Error(ErrorCode::kOutOfMemory,
                "packed weights: cannot allocate " + std::to_string(bytes_) + " bytes");
  data_.reset(static_cast<std::byte*>(data));
  if (layout_.scale == ScaleKind::kE8M0)
    near_.resize(static_cast<std::size_t>(spec.experts * layout_.tiles));
  if (alignment != kHugePage) return;
  madvise(data, bytes_, MADV_HUGEPAGE);
  for (int n = 0; n < nodes_.nodes; ++n) {
    const auto i = static_cast<std::size_t>(n);
    place_memory(machine, n, data_.get() + regions_[i], sizes[i]);
  }
}

void PackedCpu::Free::operator()(std::byte* data) const { std::free(data); }

std::byte* PackedCpu::place_of(std::int64_t expert, std::int64_t tile) const {
  const int node = nodes_.node_of(tile);
  const std::int64_t at = expert * nodes_.count(node) + tile - nodes_.first(node);
  return data_.get() + regions_[static_cast<std::size_t>(node)] + at * layout_.tile_bytes;
}

const std::byte* PackedCpu::tile(std::int64_t expert, std::int64_t tile) const {
  return place_of(expert, tile);
}

bool PackedCpu::scales_are_near(std::int64_t expert, std::int64_t tile) const {
  return near_[static_cast<std::size_t>(expert * layout_.tiles + tile)] != 0;
}

void PackedCpu::load(std::int64_t local_expert, const GemmWeights& one) {
  // In runs of tiles: threads that take them in turn touch the same new page of 2 MiB at once, and the system then
  // clears two for one. (Touching all pages first lost a third: what was cleared had left the cache.)
  const NodeCut cut(nodes_, 1);
  parallel_for(cut.tasks(), [&](std::int64_t task) {
    cut.for_each_part(task, [&](std::int64_t, std::int64_t first, std::int64_t count) {
      for (std::int64_t t = first; t < first + count; ++t) load_tile(local_expert, t, one);
    });
  });
}

void PackedCpu::load_tile(std::int64_t local_expert, std::int64_t tile, const GemmWeights& one) {
  std::byte* base = place_of(local_expert, tile);
  ColumnSpread spread;
  for (std::int64_t segment = 0; segment < layout_.segments; ++segment) {
    const PackPart part{.expert = 0, .tile = tile, .segment = segment, .first_step = 0,
                        .steps = layout_.steps(segment)};
    std::byte* to = base + segment * layout_.segment_bytes;
    pack_header(spec_, layout_, one, part, to);
    pack_steps(spec_, layout_, one, part, to + layout_.header_bytes);
    if (!near_.empty()) spread.add(to);
  }
  if (!near_.empty())
    near_[static_cast<std::size_t>(local_expert * layout_.tiles + tile)] = spread.near() ? 1 : 0;
}

}  // namespace moesaic
