// SPDX-License-Identifier: Apache-2.0
// The activation as a stage of its own, for callers of the pieces: the layer applies it inside
// GEMM1. The same functions as there, so the same bits.
#include <algorithm>

#include "cuda/activation_math.h"
#include "cuda/device.h"
#include "cuda/element.h"
#include "cuda/overlap.h"
#include "cuda/stages.h"

namespace moesaic::cuda {
namespace {

constexpr int kThreads = 256;

struct ActivateParams {
  ActivationView activation;
  const void* input = nullptr;
  DType input_dtype = DType::kF32, output_dtype = DType::kF32;
  std::int64_t input_stride = 0, output_stride = 0, rows = 0, columns = 0;
  std::int64_t gate = 0, up = 0, step = 1;  // first gate and up column; distance of neighbours
  const std::int32_t* row_expert = nullptr;
  std::int64_t experts = 0;  // of the parameter tensors; 0: scalars only
  void* output = nullptr;
};

// Eight outputs a thread. Inputs are read one by one through the cache: halves and interleaved
// pairs of any alignment are the same code, and a warp's reads still cover whole lines.
__global__ void __launch_bounds__(kThreads) activate_rows(ActivateParams p, std::int64_t pieces) {
  begin_kernel();
  constexpr int kEach = 8;
  const std::int64_t work = p.rows * pieces;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < work;
       i += static_cast<std::int64_t>(gridDim.x) * kThreads) {
    const std::int64_t row = i / pieces, column = i % pieces * kEach;
    std::int64_t expert = p.row_expert != nullptr ? p.row_expert[row] : 0;
    const bool zero = expert < 0 || (p.experts > 0 && expert >= p.experts);
    if (zero || p.experts == 0) expert = 0;
    const ActivationTerms terms = p.activation.terms(expert);
    float out[kEach] = {};
    if (!zero) {
      with_activation(p.activation.kind, [&](auto kind) {
#pragma unroll
        for (int e = 0; e < kEach; ++e) {
          if (column + e >= p.columns) break;
          const std::int64_t at = row * p.input_stride + (column + e) * p.step;
          const float gate = load_float(p.input, p.input_dtype, at + p.gate);
          const float up = is_gated(decltype(kind)::value)
                               ? load_float(p.input, p.input_dtype, at + p.up)
                               : 0.0f;
          out[e] = activate<decltype(kind)::value>(gate, up, terms);
        }
      });
    }
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      if (column + e >= p.columns) break;
      const float one[1] = {out[e]};
      store_float<1>(p.output, p.output_dtype, row * p.output_stride + column + e, one);
    }
  }
}

}  // namespace

void run_activate(const ActivateStage& s, const DeviceTraits& device, cudaStream_t stream) {
  ActivateParams p{.activation = activation_view(s.spec, s.parameters),
                   .input = s.input.data,
                   .input_dtype = s.input.dtype,
                   .output_dtype = s.output.dtype,
                   .input_stride = s.input.strides[0],
                   .output_stride = s.output.strides[0],
                   .rows = s.output.shape[0],
                   .columns = s.output.shape[1],
                   .output = s.output.data};
  if (p.rows == 0 || p.columns == 0) return;
  if (is_gated(s.spec.kind)) {
    const bool interleaved = s.spec.layout == GateLayout::kInterleaved;
    const std::int64_t second = interleaved ? 1 : p.columns;
    p.step = interleaved ? 2 : 1;
    p.gate = s.spec.order == GateOrder::kGateFirst ? 0 : second;
    p.up = second - p.gate;
  }
  if (s.row_expert.defined()) p.row_expert = s.row_expert.as<std::int32_t>();
  for (const Tensor* t : {&s.parameters.alpha, &s.parameters.beta, &s.parameters.limit})
    if (t->defined()) p.experts = t->shape[0];
  const std::int64_t pieces = ceil_div(p.columns, 8);
  launch("activate", activate_rows,
         {.grid = strided_grid(ceil_div(p.rows * pieces, kThreads), device, 16),
          .block = dim3(kThreads),
          .dependency = overlap(device)},
         stream, p, pieces);
}

}  // namespace moesaic::cuda
