// SPDX-License-Identifier: Apache-2.0
// Rows to where a product wants them, and to 8 bit. Work is handed out by tile and row, so that it
// follows the live rows and not the capacity; nothing is read or written behind an expert's last
// row.
#include <algorithm>
#include <type_traits>

#include "cuda/device.h"
#include "cuda/element.h"
#include "cuda/move_rows.h"
#include "cuda/overlap.h"
#include "cuda/quantize_groups.h"
#include "cuda/quantize_rows.h"
#include "cuda/quantize_slices.h"
#include "cuda/stages.h"

namespace moesaic::cuda {
namespace {

constexpr int kBlocksPerSm = 8;
constexpr int kMaxPartials = 1024;

// --- one scale per row, or one that is known -----------------------------------------------------
// The largest of an expert's tiles, found around one of them: tiles of an expert are neighbours.
__device__ __forceinline__ unsigned expert_max(const QuantizeParams& p, std::int64_t tile) {
  const int lane = threadIdx.x % 32;
  const int expert = p.tiles[tile].expert;
  const std::int64_t tiles = min(static_cast<std::int64_t>(*p.num_tiles), p.max_tiles);
  unsigned top = 0;
  for (int direction = -1; direction <= 1; direction += 2) {
    for (std::int64_t first = tile;; first += 32 * direction) {
      const std::int64_t at = first + lane * direction;
      const bool same = at >= 0 && at < tiles && p.tiles[at].expert == expert;
      if (same) top = max(top, __float_as_uint(p.partial[at]));
      if (__ballot_sync(kAllLanes, same) != kAllLanes) break;
    }
  }
  return __reduce_max_sync(kAllLanes, top);
}

// A settled list says where the first row lies before the kernel in front has ended.
template <typename In, int kVec, typename Beside>
__global__ void __launch_bounds__(kThreads, 1)
    quantize_rows(QuantizeParams p, int row_threads, Beside beside) {
  bool waited = !p.settled;
  begin_between(!waited);
  const unsigned blocks = own_blocks<Beside>();
  if (blockIdx.x >= blocks) return beside.run();
  const int rows = kThreads / row_threads, lane = threadIdx.x % row_threads;
  const bool first_block = blockIdx.x == 0;
  float given = 0.0f;
  if (p.granularity == ActScale::kTensorDynamic && !p.per_expert) {
    unsigned top = 0;
    for (int i = threadIdx.x; i < p.partials; i += kThreads)
      top = max(top, __float_as_uint(p.partial[i]));
    given = scale_of(p.output_dtype, block_max(top));
    if (first_block && threadIdx.x == 0 && p.scale != nullptr) p.scale[0] = given;
  }
  const std::int64_t items = item_count(p);
  const std::int64_t stride = static_cast<std::int64_t>(blocks) * rows;
  // All threads of a row (a warp, or the block) run the same turns: reductions may synchronize.
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * rows + threadIdx.x / row_threads;
       i < items * p.parts; i += stride) {
    QuantizeRow row;
    const unsigned part = p.parts == 1 ? 0 : static_cast<unsigned>(i) % p.parts;
    const bool live = find_row(p, p.parts == 1 ? i : static_cast<unsigned>(i) / p.parts, &row);
    if (!waited) {
      wait_for_earlier_kernels();
      waited = true;
    }
    if (!live) continue;
    float scale = given;
    if (p.granularity == ActScale::kToken) {
      unsigned top = 0;
      for_row<In, kVec>(p, row, lane, row_threads, [&](std::int64_t, float(&v)[kVec]) {
#pragma unroll
        for (int e = 0; e < kVec; ++e) top = max(top, magnitude(v[e]));
      });
      top = row_threads == 32 ? __reduce_max_sync(kAllLanes, top) : block_max(top);
      scale = scale_of(p.output_dtype, top);
      if (lane == 0 && p.scale != nullptr)
        for_positions(
            p, row, [&](std::int64_t position) { p.scale[position * p.scale_row_stride] = scale; });
    } else if (p.granularity == ActScale::kTensorStatic) {
      scale = p.static_scale[p.static_scales > 1 ? row.expert * p.static_stride : 0];
    } else if (p.per_expert) {
      scale = scale_of(p.output_dtype, expert_max(p, row.tile));
    }
    if (p.granularity != ActScale::kToken && p.per_expert && lane == 0 && p.scale != nullptr)
      p.scale[row.expert] = scale;  // every row of the expert writes the same
    const float inverse = inverse_of(scale);
    const int first = static_cast<int>(part) * row_threads + lane;
    const int threads = static_cast<int>(p.parts) * row_threads;
    for_row<In, kVec>(p, row, first, threads, [&](std::int64_t column, float(&v)[kVec]) {
      store_quantized<kVec>(p, row, column, v, scale, inverse);
    });
  }
  if (!waited) wait_for_earlier_kernels();  // every grid waits: see overlap.h
  // Only now: what the scales are written over, the kernel in front may still have read.
  if (p.granularity == ActScale::kTensorStatic && first_block && p.scale != nullptr)
    for (std::int64_t i = threadIdx.x; i < p.static_scales; i += kThreads)
      p.scale[i] = p.static_scale[i * p.static_stride];
}

// First pass of a dynamic scale: the largest finite magnitude, per block or (per_expert) per tile.
// NaN and infinities stay out, or one token would spoil all others.
template <typename In, int kVec>
__global__ void __launch_bounds__(kThreads, 1) tensor_absmax(QuantizeParams p) {
  begin_kernel();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const auto row_max = [&](std::int64_t item) {
    unsigned top = 0;
    QuantizeRow row;
    if (find_row(p, item, &row))
      for_row<In, kVec>(p, row, lane, 32, [&](std::int64_t, float(&v)[kVec]) {
#pragma unroll
        for (int e = 0; e < kVec; ++e) top = max(top, finite_magnitude(v[e]));
      });
    return top;
  };
  if (p.per_expert) {
    const std::int64_t tiles = item_count(p) / p.tile_rows;
    for (std::int64_t t = blockIdx.x; t < tiles; t += gridDim.x) {
      unsigned top = 0;
      for (std::int64_t r = warp; r < p.tile_rows; r += kWarps)
        top = max(top, row_max(t * p.tile_rows + r));
      top = block_max(top);
      if (threadIdx.x == 0) p.partial[t] = __uint_as_float(top);
    }
    return;
  }
  unsigned top = 0;
  const std::int64_t items = item_count(p);
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kWarps + warp; i < items;
       i += static_cast<std::int64_t>(gridDim.x) * kWarps)
    top = max(top, row_max(i));
  top = block_max(top);
  if (threadIdx.x == 0) p.partial[blockIdx.x] = __uint_as_float(top);
}

// --- the host's side -----------------------------------------------------------------------------
QuantizeParams make_params(const QuantizeStage& s) {
  QuantizeParams p{.input = s.input.data,
                   .input_rows = s.input.shape[0],
                   .input_stride = s.input.strides[0],
                   .columns = s.input.shape[1],
                   .input_scale = s.input_scale,
                   .top_k = s.top_k,
                   .source = s.source,
                   .row_weights = s.row_weights,
                   .round_to = s.round_to,
                   .output = s.output.data,
                   .output_dtype = s.output.dtype,
                   .output_stride = s.output.strides[0],
                   .granularity = s.granularity,
                   .int8_rounding = s.int8_rounding,
                   .group = s.group > 0 ? s.group : s.input.shape[1],
                   .scale = s.scale,
                   .scale_row_stride = s.scale_row_stride,
                   .partial = static_cast<float*>(s.scratch),
                   .per_expert = s.per_expert_absmax && s.rows != nullptr};
  bool by_slot = false;
  if (s.rows == nullptr && s.slot_row != nullptr) {
    p.slot_row = s.slot_row;
    p.positions = s.output.shape[0];
  }
  // Row weights, which are looked up with the row, are not promised to be as old as the list.
  // A dynamic scale per tensor gains nothing by looking rows up early: its maxima come first.
  p.settled = s.list_age == ListAge::kSettled && s.row_weights == nullptr &&
              s.granularity != ActScale::kTensorDynamic;
  if (s.rows != nullptr) {
    // Rows that lie where their positions say, and have no factor, need no slot. A caller's padding
    // is then quantized with the rest, and nobody reads it; but it must not enter a scale that
    // others share.
    by_slot = s.source != RowOf::kPosition || s.row_weights != nullptr ||
              s.granularity == ActScale::kTensorDynamic;
    p.tiles = s.rows->tiles;
    p.num_tiles = s.rows->num_tiles;
    p.row_slot = by_slot ? s.rows->row_slot : nullptr;
    p.tile_rows = s.rows->tile_rows;
    p.max_tiles = s.rows->max_tiles;
    p.positions = s.rows->positions;
    p.slot_count = s.rows->slot_count;
  }
  if (s.prequant.defined()) {
    p.prequant = s.prequant.data;
    p.prequant_dtype = s.prequant.dtype;
    const bool one = s.prequant.rank == 1 || s.prequant.shape[0] == 1;
    p.prequant_expert_stride = one ? 0 : s.prequant.strides[0];
    p.prequant_stride = s.prequant.strides[s.prequant.rank - 1];
  }
  if (s.static_scale.defined()) {
    p.static_scale = s.static_scale.as<float>();
    p.static_scales = s.static_scale.shape[0];
    p.static_stride = s.static_scale.strides[0];
  }
  p.groups = s.granularity == ActScale::kGroup ? ceil_div(p.columns, p.group) : 1;
  return p;
}

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};
template <typename F>
void for_eight_bit_type(DType dtype, F&& f) {
  if (dtype == DType::kF8E4M3) return f(__nv_fp8_e4m3{});
  f(std::int8_t{});
}
template <int kA, int kB, typename F>
void pick(bool first, F&& f) {
  if (first) return f(Constant<kA>{});
  f(Constant<kB>{});
}

}  // namespace

std::size_t quantize_scratch(std::int64_t rows, std::int64_t experts) {
  // One float per block of the first pass, or per tile: never more of those than rows and experts.
  return static_cast<std::size_t>(std::max<std::int64_t>(kMaxPartials, rows + experts)) *
         sizeof(float);
}

bool run_quantize(const QuantizeStage& stage, const DeviceTraits& device, cudaStream_t stream,
                  const AlignStage* align) {
  QuantizeParams p = make_params(stage);
  const std::int64_t rows = p.tiles != nullptr ? p.max_tiles * p.tile_rows : p.input_rows;
  if (rows == 0 || p.columns == 0) return false;
  const bool wide = eight_wide(p.input, p.columns, p.input_stride, size_of(stage.input.dtype)) &&
                    eight_wide(p.output, p.columns, p.output_stride, size_of(stage.output.dtype));
  const Dependency dependency = overlap(device);
  const auto go = [&](const char* what, auto kernel, dim3 grid, auto... more) {
    launch(what, kernel, {.grid = grid, .block = dim3(kThreads), .dependency = dependency}, stream,
           p, more...);
  };
  const auto grid_of = [&](std::int64_t blocks) {
    return strided_grid(blocks, device, kBlocksPerSm);
  };
  // A block per row while rows are few or very wide; a warp per row when there are plenty.
  const std::int64_t live = std::min(rows, p.tiles != nullptr ? p.positions : rows);
  const bool warp_rows =
      p.columns <= 32 * (wide ? 8 : 1) || (live > device.sm_count * 16 && p.columns <= 8192);
  // Few wide rows whose scale is known are spread over more blocks: a thread's turns lie behind one
  // another, and GEMM1 waits (7168 columns: 2.4 us).
  if (p.granularity == ActScale::kTensorStatic && !warp_rows) {
    const std::int64_t parts = ceil_div(p.columns, kThreads * (wide ? 8 : 1));
    if (rows * parts <= device.sm_count * 2) p.parts = static_cast<unsigned>(parts);
  }
  const std::int64_t row_blocks = warp_rows ? ceil_div(rows, kWarps) : rows * p.parts;

  const int row_threads = warp_rows ? 32 : kThreads;

  // Plain rows, with the scales that a layer's own have: a product's, or plenty. (Few that are wide
  // are better spread over many warps.)
  const bool dynamic = p.granularity == ActScale::kTensorDynamic;
  const bool many = live * ceil_div(p.columns, 256) > device.sm_count * 32;
  const bool by_slices =
      is_16bit(stage.input.dtype) && sliceable(p) && !(dynamic && p.per_expert) &&
      (many || ((p.tiles != nullptr || p.settled) && p.columns <= 2048)) &&
      ((p.granularity == ActScale::kGroup && p.group == kSliceGroup) ||
       p.granularity == ActScale::kTensorStatic || p.granularity == ActScale::kToken || dynamic);

  // Groups in a warp's registers, four pieces of rows at once where there are plenty.
  const bool by_group = p.granularity == ActScale::kGroup;
  const std::int64_t lanes = p.group / 8, pieces = ceil_div(p.columns, 256);
  const bool even = wide && p.group % 8 == 0 && lanes <= 32 && (lanes & (lanes - 1)) == 0;
  const bool plenty = live * pieces > device.sm_count * 64;

  // Only the kernels that few rows take know how to align beside them.
  const bool quantizes = is_float(stage.input.dtype) && p.granularity != ActScale::kDefault;
  AlignFew beside;
  if (align != nullptr) beside.params = align_params(*align);
  const bool aligned = align != nullptr && is_few(beside.params) && quantizes && !by_slices &&
                       (!by_group || (even && !plenty));

  const std::int64_t words = words_of_row(stage, p);
  const auto move = [&](auto in) {
    using In = decltype(in);
    if (words > 0) {
      const std::int64_t pieces = ceil_div(words, kThreads);
      return go("quantize: scatter", scatter_rows,
                strided_grid(p.input_rows * pieces, device, kScatterBlocksPerSm), words, pieces);
    }
    pick<8, 1>(wide, [&](auto vec) {
      go("quantize: move", move_rows<In, decltype(vec)::value>, grid_of(row_blocks), row_threads);
    });
  };
  if (!is_float(stage.input.dtype)) {
    move(std::int8_t{});
    return aligned;
  }
  if (p.granularity == ActScale::kDefault) {
    for_float_type(stage.input.dtype, move);
    return aligned;
  }
  for_float_type(stage.input.dtype, [&](auto in) {
    using In = decltype(in);
    if (by_slices) {
      if constexpr (sizeof(In) == 2) {
        const Slices slices =
            slices_of(p, live, std::int64_t{device.sm_count} * kSliceBlocksPerSm * kWarps);
        const dim3 grid = strided_grid(ceil_div(slices.most, kWarps), device, kSliceBlocksPerSm);
        if (p.granularity == ActScale::kTensorDynamic) {
          p.partials = static_cast<int>(std::min<unsigned>(grid.x, kMaxPartials));
          go("quantize: absmax", slices_absmax<In>, dim3(static_cast<unsigned>(p.partials)),
             slices);
          p.row_slot = nullptr;
        }
        for_eight_bit_type(p.output_dtype, [&](auto out) {
          using Out = decltype(out);
          go("quantize: slices",
             by_group                            ? quantize_slices<In, Out, ActScale::kGroup>
             : p.granularity == ActScale::kToken ? quantize_token_slices<In, Out>
             : p.granularity == ActScale::kTensorDynamic
                 ? quantize_slices<In, Out, ActScale::kTensorDynamic>
                 : quantize_slices<In, Out, ActScale::kTensorStatic>,
             grid, slices);
        });
      }
      return;
    }
    if (by_group) {
      if (!even)
        return go("quantize: groups", quantize_odd_groups<In>,
                  grid_of(ceil_div(rows * p.groups, kWarps)));
      const auto groups = [&](auto kernel, int at_once, auto other) {
        dim3 grid = grid_of(ceil_div(rows * pieces, kWarps * at_once));
        grid.x += decltype(other)::kBlocks;
        go("quantize: groups", kernel, grid, static_cast<int>(lanes), pieces, other);
      };
      if (plenty) return groups(quantize_groups<In, 4, Nothing>, 4, Nothing{});
      if (aligned) return groups(quantize_groups<In, 1, AlignFew>, 1, beside);
      return groups(quantize_groups<In, 1, Nothing>, 1, Nothing{});
    }
    pick<8, 1>(wide, [&](auto vec) {
      constexpr int kVec = decltype(vec)::value;
      if (p.granularity == ActScale::kTensorDynamic) {
        const dim3 grid = p.per_expert ? strided_grid(p.max_tiles, device, kBlocksPerSm)
                                       : strided_grid(ceil_div(rows, kWarps), device, kBlocksPerSm);
        p.partials = static_cast<int>(std::min<unsigned>(grid.x, kMaxPartials));
        launch("quantize: absmax", tensor_absmax<In, kVec>,
               {.grid = dim3(p.per_expert ? grid.x : static_cast<unsigned>(p.partials)),
                .block = dim3(kThreads),
                .dependency = dependency},
               stream, p);
      }
      dim3 grid = grid_of(row_blocks);
      if (aligned) {
        grid.x += AlignFew::kBlocks;
        return go("quantize", quantize_rows<In, kVec, AlignFew>, grid, row_threads, beside);
      }
      go("quantize", quantize_rows<In, kVec, Nothing>, grid, row_threads, Nothing{});
    });
  });
  return aligned;
}

}  // namespace moesaic::cuda
