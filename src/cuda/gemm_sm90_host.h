// SPDX-License-Identifier: Apache-2.0
// What the host sides of the SM90 families share: how a stage becomes Params. In gemm_sm90.cu.
#pragma once

#include "cuda/gemm.h"
#include "cuda/gemm_sm90.h"

namespace moesaic::cuda::sm90 {

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

template <int kRank>
struct Extent {
  cuuint64_t size[kRank];
  cuuint64_t bytes[kRank - 1];  // strides but the innermost
  cuuint32_t box[kRank];
};
template <int kRank>
void encode(CUtensorMap& map, const void* data, Element element, const Extent<kRank>& extent,
            const char* what, CUtensorMapSwizzle swizzle = CU_TENSOR_MAP_SWIZZLE_128B);
// Of p.experts experts, gate and up brought together as p says. Packed weights: k in bytes, kE4M3.
void weight_map(Params& p, const Tensor& w, Element element, std::int64_t n, std::int64_t k,
                int chunk_k, int box_rows, CUtensorMapSwizzle swizzle = CU_TENSOR_MAP_SWIZZLE_128B);

// Rows of a rank-2 or rank-3 tensor, in units of `unit` elements.
RowLayout row_layout(const Tensor& t, std::int64_t unit);
bool multiples(const Tensor& t, std::int64_t of);  // all strides but the last
bool aligned(const void* data, std::size_t bytes);
void set_output(Params& p, const Tensor& c);       // after p.columns
void set_side(Params& p, const GemmStage& stage);  // bias, alpha, activation, row weights

}  // namespace moesaic::cuda::sm90
