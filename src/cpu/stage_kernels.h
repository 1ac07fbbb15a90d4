// SPDX-License-Identifier: Apache-2.0
// The row primitives under the stages, one table per ISA level. All levels give the same bits.
#pragma once

#include <cstdint>
#include <string_view>

#include "moesaic/quant.h"
#include "moesaic/types.h"

namespace moesaic {

// One product z[t, e] = x[t] . w[e] of the router: a block of tokens times a block of experts.
struct DotBlock {
  const void* x = nullptr;  // [tokens, width] of x_dtype, row stride x_stride elements
  DType x_dtype = DType::kF32;
  std::int64_t tokens = 0, x_stride = 0;
  const void* w = nullptr;  // [experts, width] of w_dtype, row stride w_stride elements
  DType w_dtype = DType::kF32;
  std::int64_t experts = 0, w_stride = 0;
  std::int64_t width = 0;
  float* z = nullptr;  // [tokens, experts], row stride z_stride
  std::int64_t z_stride = 0;
};

// sum[i] = sum[i] + weights[0] * rows[0][i] + weights[1] * rows[1][i] ...: f32, f16 or bf16.
struct RowSum {
  DType dtype = DType::kF32;
  const void* const* rows = nullptr;
  const float* weights = nullptr;
  std::int64_t count = 0, n = 0;
  float* sum = nullptr;
  const void* const* next = nullptr;  // rows that will be summed next, which are fetched meanwhile
  std::int64_t next_count = 0;
};

struct StageKernels {
  // dst[i] = float(src[i]); f32, f16, bf16 or e4m3.
  void (*widen)(DType from, const void* src, std::int64_t n, float* dst);
  // dst[i] = src[i] rounded to nearest even; f32, f16 or bf16.
  void (*narrow)(DType to, const float* src, std::int64_t n, void* dst);
  // x[i] = round_to(x[i] * weight * factor[i]); no factor: null.
  void (*premultiply)(DType round_to, float weight, const float* factor, std::int64_t n, float* x);
  float (*absmax)(const float* x, std::int64_t n);         // NaN when one is in x
  float (*finite_absmax)(const float* x, std::int64_t n);  // over the finite elements; 0 if none
  void (*to_e4m3)(const float* x, float inverse_scale, std::int64_t n, std::uint8_t* out);
  void (*to_i8)(const float* x, float inverse_scale, std::int64_t n, std::int8_t* out);
  void (*to_i8_truncate)(const float* x, float scale, std::int64_t n, std::int8_t* out);
  void (*accumulate)(const RowSum& rows);
  void (*multiply)(float factor, std::int64_t n, float* x);  // x[i] *= factor
  void (*dots)(const DotBlock& block);
  float (*exponentials)(const float* z, float subtract, std::int64_t n, float* p);  // returns sum
  void (*sigmoids)(const float* z, std::int64_t n, float* p);
  void (*sqrt_softplus)(const float* z, std::int64_t n, float* p);
};

// The table for a level of moesaic::available_kernels(DeviceType::kCpu): the widest vectors that
// the level includes. An unknown name gets the scalar table.
const StageKernels& stage_kernels_for(std::string_view level);
// The table for the level in force.
const StageKernels& stage_kernels();

// One definition per src/cpu/isa/stages_<level>.cpp.
extern const StageKernels kStagesScalar;
extern const StageKernels kStagesAvx2;
extern const StageKernels kStagesAvx512;

}  // namespace moesaic
