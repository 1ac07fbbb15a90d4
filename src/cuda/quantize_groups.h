// SPDX-License-Identifier: Apache-2.0
// The quantizers with one scale per group of a row: a group stays in a warp's registers between its
// scale and its elements, so that a row is read once.
#pragma once

#include "cuda/overlap.h"
#include "cuda/quantize_rows.h"

namespace moesaic::cuda {

// Groups of 8, 16, ... 256 elements: eight elements a lane, so a group is 1 to 32 neighbouring
// lanes. A piece is 256 elements of a row; kAtOnce pieces, neighbours in a row and then in the next
// rows, are requested together by a warp: one when there are few, so that a single token still
// fills the machine.

template <typename In>
__device__ __forceinline__ unsigned packed_magnitude(const Pack<In, 8>& pack) {
  static_assert(sizeof(In) == 2);
  const auto half =
      static_cast<unsigned short>(largest_of_eight(*reinterpret_cast<const uint4*>(&pack)));
  return __float_as_uint(to_float(*reinterpret_cast<const In*>(&half)));
}

template <typename In, int kAtOnce, typename Beside>
__global__ void __launch_bounds__(kThreads, kAtOnce == 1      ? 4
                                            : sizeof(In) == 2 ? 3
                                                              : 2)
    quantize_groups(QuantizeParams p, int lanes_per_group, std::int64_t pieces, Beside beside) {
  bool waited = !p.settled;
  begin_between(!waited);
  const unsigned blocks = own_blocks<Beside>();
  if (blockIdx.x >= blocks) return beside.run();
  constexpr int kVec = 8, kPiece = 32 * kVec;
  const int lane = threadIdx.x % 32, group_shift = __ffs(lanes_per_group) - 1;
  const std::int64_t items = item_count(p) * pieces;
  const std::int64_t warp = static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  for (std::int64_t first = warp * kAtOnce; first < items;
       first += static_cast<std::int64_t>(blocks) * kWarps * kAtOnce) {
    std::int64_t item = first / pieces, piece = first - item * pieces;
    QuantizeRow row[kAtOnce];
    std::int64_t column[kAtOnce];
    bool live[kAtOnce];
#pragma unroll
    for (int r = 0; r < kAtOnce; ++r) {
      column[r] = piece * kPiece + lane * kVec;
      if (r == 0 || piece == 0) {
        live[r] = first + r < items && find_row(p, item, &row[r]);
      } else {
        live[r] = live[r - 1];
        row[r] = row[r - 1];
      }
      if (++piece == pieces) {
        piece = 0;
        ++item;
      }
    }
    if (!waited) {
      wait_for_earlier_kernels();
      waited = true;
    }
    Pack<In, kVec> raw[kAtOnce];
#pragma unroll
    for (int r = 0; r < kAtOnce; ++r) {
      raw[r] = {};
      if (live[r] && column[r] < p.columns)
        raw[r] = load_pack<kVec>(static_cast<const In*>(p.input) + row[r].source * p.input_stride +
                                 column[r]);
    }
#pragma unroll
    for (int r = 0; r < kAtOnce; ++r) {
      if (!live[r]) continue;
      const bool mine = column[r] < p.columns;
      float v[kVec];
      unpack<kVec>(raw[r], v);
      unsigned top = 0;
      if (sizeof(In) == 2 && p.row_weights == nullptr && p.prequant == nullptr) {
        if constexpr (sizeof(In) == 2) top = packed_magnitude<In>(raw[r]);
      } else {
        if (mine) apply_factors<kVec>(p, row[r], column[r], v);
#pragma unroll
        for (int e = 0; e < kVec; ++e) top = max(top, magnitude(v[e]));
      }
      for (int offset = lanes_per_group / 2; offset > 0; offset /= 2)
        top = max(top, __shfl_xor_sync(kAllLanes, top, offset));
      if (!mine) continue;
      const float scale = scale_of(p.output_dtype, top);
      if (lane % lanes_per_group == 0 && p.scale != nullptr)
        for_positions(p, row[r], [&](std::int64_t position) {
          p.scale[position * p.scale_row_stride + ((column[r] / kVec) >> group_shift)] = scale;
        });
      store_quantized<kVec>(p, row[r], column[r], v, scale, inverse_of(scale));
    }
  }
  if (!waited) wait_for_earlier_kernels();  // every grid waits: see overlap.h
}

// Any other group size or alignment: one warp per group, element by element.
template <typename In>
__global__ void __launch_bounds__(kThreads, 1) quantize_odd_groups(QuantizeParams p) {
  begin_kernel();
  const int lane = threadIdx.x % 32;
  const std::int64_t items = item_count(p) * p.groups;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
       i < items; i += static_cast<std::int64_t>(gridDim.x) * kWarps) {
    QuantizeRow row;
    if (!find_row(p, i / p.groups, &row)) continue;
    const std::int64_t g = i % p.groups, begin = g * p.group, end = min(begin + p.group, p.columns);
    const In* in = static_cast<const In*>(p.input) + row.source * p.input_stride;
    unsigned top = 0;
    float v[1];
    for (std::int64_t c = begin + lane; c < end; c += 32) {
      v[0] = to_float(in[c]);
      apply_factors<1>(p, row, c, v);
      top = max(top, magnitude(v[0]));
    }
    const float scale = scale_of(p.output_dtype, __reduce_max_sync(kAllLanes, top));
    if (lane == 0 && p.scale != nullptr)
      for_positions(p, row, [&](std::int64_t position) {
        p.scale[position * p.scale_row_stride + g] = scale;
      });
    const float inverse = inverse_of(scale);
    for (std::int64_t c = begin + lane; c < end; c += 32) {
      v[0] = to_float(in[c]);
      apply_factors<1>(p, row, c, v);
      store_quantized<1>(p, row, c, v, scale, inverse);
    }
  }
}

}  // namespace moesaic::cuda
