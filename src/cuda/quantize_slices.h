// SPDX-License-Identifier: Apache-2.0
// The quantizer of many rows that nothing has to be looked up for: 16-bit values, no factors, rows
// that lie where their positions say, scales of groups of 128 or known before. Here it is
// instructions that the time goes to, not bytes: a lane has 16 elements, so that a group's scale is
// made by 8 lanes instead of 16, and what is the same for several rows is found out once for them.
#pragma once

#include "cuda/overlap.h"
#include "cuda/quantize_rows.h"

namespace moesaic::cuda {

inline constexpr int kSliceGroup = 128, kSliceVec = 16, kSliceLanes = kSliceGroup / kSliceVec;
inline constexpr int kSliceBlocksPerSm = 4;

// A warp's work at a time: a few rows of one tile (or of the input), cut into groups.
struct Slices {
  unsigned rows = 1;               // of a slice
  unsigned groups = 1;             // of a row
  unsigned groups_reciprocal = 0;  // 2^32 / groups, rounded up
  int input_stride = 0, output_stride = 0;
  std::int64_t most = 0;  // slices
};

// `warps`: what the machine holds at a time. `live`: rows that there are, at most.
inline Slices slices_of(const QuantizeParams& p, std::int64_t live, std::int64_t warps) {
  // So many groups that no warp's second turn is for a few of them only; fewer where rows are few.
  constexpr std::int64_t kGroups = 16;
  const std::int64_t groups = (p.columns + kSliceGroup - 1) / kSliceGroup;
  std::int64_t rows = 1;
  while (rows * groups < kGroups && live >= 2 * rows * warps) rows *= 2;
  const std::int64_t of_tile = (p.tile_rows + rows - 1) / rows;
  return {.rows = static_cast<unsigned>(rows),
          .groups = static_cast<unsigned>(groups),
          .groups_reciprocal = static_cast<unsigned>((0xffffffffLL + groups) / groups),
          .input_stride = static_cast<int>(p.input_stride),
          .output_stride = static_cast<int>(p.output_stride),
          .most = p.tiles != nullptr ? p.max_tiles * of_tile : (p.input_rows + rows - 1) / rows};
}
// Whether rows are such as these: read and written 16 bytes at a time, strides in 32 bits.
inline bool sliceable(const QuantizeParams& p) {
  constexpr std::int64_t kMost = 0x7fffffff;
  const auto by_sixteen = [](const void* data) {
    return reinterpret_cast<std::uintptr_t>(data) % 16 == 0;
  };
  // (Slots say which rows enter a dynamic scale; where rows lie, they do not say.)
  const bool in_place = p.row_slot == nullptr ||
                        (p.granularity == ActScale::kTensorDynamic && p.source == RowOf::kPosition);
  return in_place && p.row_weights == nullptr && p.prequant == nullptr &&
         p.columns % kSliceVec == 0 && p.columns <= kSliceGroup * 0xffff &&
         p.input_stride % 8 == 0 && p.output_stride % kSliceVec == 0 && by_sixteen(p.input) &&
         by_sixteen(p.output) && std::abs(p.input_stride) <= kMost &&
         std::abs(p.output_stride) <= kMost;
}

// Sixteen values of 16 bits as they came.
template <typename In>
struct Sixteen {
  static_assert(sizeof(In) == 2);
  uint4 half[2] = {};
  __device__ __forceinline__ void load(const In* at) {
    const auto* const from = reinterpret_cast<const uint4*>(at);
    half[0] = from[0];
    half[1] = from[1];
  }
  // The largest magnitude's bits, as a float.
  __device__ __forceinline__ unsigned largest() const {
    const unsigned top = max(largest_of_eight(half[0]), largest_of_eight(half[1]));
    const auto bits = static_cast<unsigned short>(top);
    return __float_as_uint(to_float(*reinterpret_cast<const In*>(&bits)));
  }
  __device__ __forceinline__ unsigned largest_finite() const {
    const unsigned all = largest();
    if (all < 0x7f800000u) return all;
    unsigned top = 0;
#pragma unroll 1
    for (int i = 0; i < kSliceVec / 2; ++i)
      top = max(top, max(finite_magnitude(pair(i).x), finite_magnitude(pair(i).y)));
    return top;
  }
  // Values 2 i and 2 i + 1.
  __device__ __forceinline__ float2 pair(int i) const {
    const unsigned word = reinterpret_cast<const unsigned*>(half)[i];
    if constexpr (std::is_same_v<In, __nv_bfloat16>)
      return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
    else
      return __half22float2(*reinterpret_cast<const __half2*>(&word));
  }
};

// inverse_of, for a scale that scale_of made: neither that nor its inverse is ever subnormal, so
// the reciprocal and its remainder are a division. (Infinities and NaN have no remainder.)
__device__ __forceinline__ float inverse_of_made(float scale) {
  const float near = __fdividef(1.0f, scale);
  const float exact = fmaf(near, fmaf(-scale, near, 1.0f), near);
  return magnitude(scale) < 0x7f800000u ? exact : near;
}

template <typename Out, typename In>
__device__ __forceinline__ uint4 to_eight_bit(const Sixteen<In>& raw, Int8Rounding rounding,
                                              float scale, float inverse) {
  unsigned words[4] = {};
#pragma unroll
  for (int i = 0; i < kSliceVec / 2; ++i) {
    const float2 v = raw.pair(i);
    unsigned two;
    if constexpr (std::is_same_v<Out, __nv_fp8_e4m3>) {
      two = __nv_cvt_float2_to_fp8x2({v.x * inverse, v.y * inverse}, __NV_SATFINITE, __NV_E4M3);
    } else {
      const bool down = rounding == Int8Rounding::kTruncate;
      const auto first = down ? to_i8_truncated(v.x, scale) : to_i8(v.x * inverse);
      const auto second = down ? to_i8_truncated(v.y, scale) : to_i8(v.y * inverse);
      two = static_cast<std::uint8_t>(first) | static_cast<std::uint8_t>(second) << 8;
    }
    words[i / 2] |= two << i % 2 * 16;
  }
  return {words[0], words[1], words[2], words[3]};
}

// For e4m3 or int8.
template <typename Out>
__device__ __forceinline__ float scale_for(unsigned absmax) {
  return scale_of(std::is_same_v<Out, __nv_fp8_e4m3> ? DType::kF8E4M3 : DType::kI8, absmax);
}

// The rows of slice `s`: none, where it lies behind a tile's last. The first slices of all tiles
// come first, so that those which have rows are spread evenly over the warps.
struct SliceRows {
  std::int64_t first = 0;
  int rows = 0, expert = 0;
};
__device__ __forceinline__ SliceRows slice_rows(const QuantizeParams& p, const Slices& slices,
                                                unsigned tiles, unsigned s) {
  if (p.tiles == nullptr) {
    const std::int64_t first = static_cast<std::int64_t>(s) * slices.rows;
    const std::int64_t left = p.input_rows - first;
    return {.first = first, .rows = static_cast<int>(min(left, std::int64_t{slices.rows}))};
  }
  const unsigned turn = s / tiles;
  const Tile tile = load_tile(p.tiles + (s - turn * tiles));
  const std::int64_t first = tile.first + turn * slices.rows;
  const std::int64_t end = min(tile.first + tile.rows, min(p.positions, p.input_rows));
  const std::int64_t rows = min(end - first, std::int64_t{slices.rows});
  return {.first = first,
          .rows = tile.expert < 0 || rows < 0 ? 0 : static_cast<int>(rows),
          .expert = tile.expert};
}

// Calls f(rows) for the slices that are this warp's, after ready(). Where the list is settled, the
// first of them are looked up before the kernel in front has ended; where the next ones lie is
// asked for before the rows of these.
template <typename Ready, typename F>
__device__ __forceinline__ void for_slices(const QuantizeParams& p, const Slices& slices,
                                           Ready&& ready, F&& f) {
  begin_between(p.settled);
  const unsigned stride = gridDim.x * kWarps;
  unsigned s = blockIdx.x * kWarps + threadIdx.x / 32;
  auto count = static_cast<unsigned>(slices.most);
  unsigned tiles = 1;
  if (p.tiles != nullptr) {
    tiles = static_cast<unsigned>(min(std::int64_t{__ldcg(p.num_tiles)}, p.max_tiles));
    count = tiles * ((static_cast<unsigned>(p.tile_rows) + slices.rows - 1) / slices.rows);
  }
  SliceRows next;
  if (s < count) next = slice_rows(p, slices, tiles, s);
  if (p.settled) wait_for_earlier_kernels();
  ready();
  for (; s < count; s += stride) {
    const SliceRows rows = next;
    next = {};
    if (s + stride < count) next = slice_rows(p, slices, tiles, s + stride);
    f(rows);
  }
}

// The groups of a slice, by 8 lanes each: f(row, group, column, inside, values) for kAtOnce times
// what a warp takes at a time, requested together. All lanes call f.
template <typename In, typename F>
__device__ __forceinline__ void for_groups_of(const QuantizeParams& p, const Slices& slices,
                                              const SliceRows& mine, F&& f) {
  constexpr int kAtOnce = 2, kGroupsOfWarp = 32 / kSliceLanes;
  const int lane = threadIdx.x % 32, column_of_lane = lane % kSliceLanes * kSliceVec;
  const In* const input = static_cast<const In*>(p.input) + mine.first * slices.input_stride;
  const int items = mine.rows * static_cast<int>(slices.groups);
#pragma unroll 1
  for (int first = 0; first < items; first += kAtOnce * kGroupsOfWarp) {
    Sixteen<In> raw[kAtOnce];
    int row[kAtOnce], group[kAtOnce];
    bool inside[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int item = first + lane / kSliceLanes + i * kGroupsOfWarp;
      row[i] =
          slices.groups == 1
              ? item
              : static_cast<int>(__umulhi(static_cast<unsigned>(item), slices.groups_reciprocal));
      group[i] = item - row[i] * static_cast<int>(slices.groups);
      const int column = group[i] * kSliceGroup + column_of_lane;
      inside[i] = item < items && column < p.columns;
      if (inside[i])
        raw[i].load(input + static_cast<std::int64_t>(row[i]) * slices.input_stride + column);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) f(row[i], group[i], inside[i], raw[i]);
  }
}

// kScale: kGroup, or per tensor.
template <typename In, typename Out, ActScale kScale>
__global__ void __launch_bounds__(kThreads, kSliceBlocksPerSm)
    quantize_slices(QuantizeParams p, Slices slices) {
  const int column_of_lane = threadIdx.x % kSliceLanes * kSliceVec;
  float given = 0.0f, given_inverse = 0.0f;
  const auto find_maximum = [&] {
    if constexpr (kScale == ActScale::kTensorDynamic) {
      unsigned top = 0;
      for (int i = threadIdx.x; i < p.partials; i += kThreads)
        top = max(top, __float_as_uint(p.partial[i]));
      given = scale_for<Out>(block_max(top));
      given_inverse = inverse_of_made(given);
      if (blockIdx.x == 0 && threadIdx.x == 0 && p.scale != nullptr) p.scale[0] = given;
    }
  };
  for_slices(p, slices, find_maximum, [&](const SliceRows& mine) {
    if (mine.rows == 0) return;  // a filtered tile has no expert, and so no scale
    if constexpr (kScale == ActScale::kTensorStatic) {
      given = p.static_scale[p.static_scales > 1 ? mine.expert * p.static_stride : 0];
      given_inverse = inverse_of(given);
    }
    for_groups_of<In>(
        p, slices, mine, [&](int row, int group, bool inside, const Sixteen<In>& values) {
          const QuantizeRow at{.position = mine.first + row, .source = mine.first + row};
          float scale = given, inverse = given_inverse;
          if constexpr (kScale == ActScale::kGroup) {
            unsigned top = values.largest();
#pragma unroll
            for (int offset = kSliceLanes / 2; offset > 0; offset /= 2)
              top = max(top, __shfl_xor_sync(kAllLanes, top, offset));
            scale = scale_for<Out>(top);
            inverse = inverse_of_made(scale);
          }
          if (!inside) return;
          const uint4 eight_bit = to_eight_bit<Out>(values, p.int8_rounding, scale, inverse);
          for_positions(p, at, [&](std::int64_t position) {
            const std::int64_t column = group * kSliceGroup + column_of_lane;
            *reinterpret_cast<uint4*>(static_cast<char*>(p.output) +
                                      position * slices.output_stride + column) = eight_bit;
            if (kScale == ActScale::kGroup && column_of_lane == 0 && p.scale != nullptr)
              p.scale[position * p.scale_row_stride + group] = scale;
          });
        });
    if constexpr (kScale == ActScale::kTensorStatic)
      if (p.per_expert && threadIdx.x % 32 == 0 && p.scale != nullptr)
        p.scale[mine.expert] = given;  // every slice of the expert writes the same
  });
  if constexpr (kScale == ActScale::kTensorStatic)
    if (blockIdx.x == 0 && p.scale != nullptr)
      for (std::int64_t i = threadIdx.x; i < p.static_scales; i += kThreads)
        p.scale[i] = p.static_scale[i * p.static_stride];
}

// First pass of a dynamic scale per tensor: the largest finite magnitude of each block's rows.
template <typename In>
__global__ void __launch_bounds__(kThreads, kSliceBlocksPerSm)
    slices_absmax(QuantizeParams p, Slices slices) {
  unsigned top = 0;
  for_slices(
      p, slices, [] {},
      [&](const SliceRows& mine) {
        for_groups_of<In>(p, slices, mine,
                          [&](int row, int, bool inside, const Sixteen<In>& values) {
                            if (!inside) return;
                            if (p.row_slot != nullptr) {
                              const std::int64_t slot = __ldcg(p.row_slot + mine.first + row);
                              if (slot < 0 || slot >= p.slot_count) return;
                            }
                            top = max(top, values.largest_finite());
                          });
      });
  top = block_max(top);
  if (threadIdx.x == 0) p.partial[blockIdx.x] = __uint_as_float(top);
}

// A scale per row: a warp has a row, 2048 columns of it in registers between their scale and their
// elements; of longer ones the rest is read twice.
template <typename In, typename Out>
__global__ void __launch_bounds__(kThreads,
                                  std::is_same_v<Out, std::int8_t> ? 3 : kSliceBlocksPerSm)
    quantize_token_slices(QuantizeParams p, Slices slices) {
  constexpr int kKept = 4, kTurn = 32 * kSliceVec;
  const int lane = threadIdx.x % 32, columns = static_cast<int>(p.columns);
  for_slices(
      p, slices, [] {},
      [&](const SliceRows& mine) {
#pragma unroll 1
        for (int r = 0; r < mine.rows; ++r) {
          const QuantizeRow at{.position = mine.first + r, .source = mine.first + r};
          const In* const row = static_cast<const In*>(p.input) + at.source * slices.input_stride;
          Sixteen<In> raw[kKept];
          unsigned top = 0;
#pragma unroll
          for (int k = 0; k < kKept; ++k) {
            const int column = k * kTurn + lane * kSliceVec;
            if (column < columns) raw[k].load(row + column);
          }
#pragma unroll
          for (int k = 0; k < kKept; ++k)
            if (k * kTurn < columns) top = max(top, raw[k].largest());
#pragma unroll 2
          for (int column = kKept * kTurn + lane * kSliceVec; column < columns; column += kTurn) {
            Sixteen<In> more;
            more.load(row + column);
            top = max(top, more.largest());
          }
          const float scale = scale_for<Out>(__reduce_max_sync(kAllLanes, top));
          const float inverse = inverse_of_made(scale);
          const auto store = [&](int column, const Sixteen<In>& values) {
            const uint4 eight_bit = to_eight_bit<Out>(values, p.int8_rounding, scale, inverse);
            for_positions(p, at, [&](std::int64_t position) {
              *reinterpret_cast<uint4*>(static_cast<char*>(p.output) +
                                        position * slices.output_stride + column) = eight_bit;
              if (column == 0 && p.scale != nullptr) p.scale[position * p.scale_row_stride] = scale;
            });
          };
#pragma unroll
          for (int k = 0; k < kKept; ++k) {
            const int column = k * kTurn + lane * kSliceVec;
            if (column < columns) store(column, raw[k]);
          }
#pragma unroll 1
          for (int column = kKept * kTurn + lane * kSliceVec; column < columns; column += kTurn) {
            Sixteen<In> more;
            more.load(row + column);
            store(column, more);
          }
        }
      });
}

}  // namespace moesaic::cuda
