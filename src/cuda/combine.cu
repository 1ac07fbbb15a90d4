// SPDX-License-Identifier: Apache-2.0
// Expert outputs to tokens: a gather and a sum in slot order, fp32, one rounding. Deterministic
// because nothing but the token decides the order. Adding into the output from GEMM2 with atomics
// lost: as fast at best, and the bits vary from run to run.
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "cuda/device.h"
#include "cuda/element.h"
#include "cuda/overlap.h"
#include "cuda/stages.h"

namespace moesaic::cuda {
namespace {

struct CombineParams {
  const void* rows = nullptr;
  std::int64_t row_count = 0, row_stride = 0;
  const std::int32_t* slot_row = nullptr;
  const std::int32_t* topk_ids = nullptr;
  unsigned first_expert = 0, experts = 0x80000000u;  // of other ids there is no row
  const float* weights = nullptr;
  bool settled = false;  // the three lists above are older than the kernel in front
  int top_k = 1;
  float scale = 1.0f;
  const void* shared = nullptr;
  DType shared_dtype = DType::kF32;
  std::int64_t shared_stride = 0;
  const float* shared_weight = nullptr;
  Accumulate accumulate = Accumulate::kOverwrite;
  void* output = nullptr;
  std::int64_t output_stride = 0, columns = 0;
  unsigned blocks_per_token = 1;
};

// Two roundings, as on the CPU: both backends sum the same rows to the same bits. The fused form
// would save nothing, the memory is what is waited for.
__device__ __forceinline__ float add_product(float sum, float a, float b) {
  return __fadd_rn(sum, __fmul_rn(a, b));
}

template <int kVec>
__device__ __forceinline__ void load_any(const void* data, DType dtype, std::int64_t at,
                                         float (&v)[kVec]) {
#pragma unroll
  for (int i = 0; i < kVec; ++i) v[i] = load_float(data, dtype, at + i);
}

// Where the rows of kAtOnce slots from j on lie, and their weights. 32 bits name a row: lists have
// no more, and without a list a call has no more slots (see run_combine).
template <int kAtOnce>
struct SlotRows {
  std::int32_t row[kAtOnce];
  float weight[kAtOnce];
  __device__ __forceinline__ SlotRows(const CombineParams& p, std::int64_t first_slot, int j) {
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      row[i] = -1;
      weight[i] = 1.0f;
      if (j + i >= p.top_k) continue;
      const std::int64_t slot = first_slot + j + i;
      row[i] = p.slot_row != nullptr ? __ldcg(p.slot_row + slot) : static_cast<std::int32_t>(slot);
      if (p.topk_ids != nullptr &&
          static_cast<unsigned>(__ldcg(p.topk_ids + slot)) - p.first_expert >= p.experts)
        row[i] = -1;
      if (row[i] >= p.row_count) row[i] = -1;
      if (p.weights != nullptr) weight[i] = __ldcg(p.weights + slot);
    }
  }
};

// A row's columns while they wait to be added: in whole words, for elements of 16 bits are
// taken apart as they arrive, into twice the registers: 128, and 1.2 to 1.3 times as long.
template <typename Row, int kVec>
struct Waiting {
  using Elements = Pack<Row, kVec>;
  using Word = std::conditional_t<sizeof(Elements) % 16 == 0, uint4, Elements>;
  Word word[sizeof(Elements) / sizeof(Word)];
  __device__ __forceinline__ void load(const Row* at) {
#pragma unroll
    for (unsigned i = 0; i < sizeof(Elements) / sizeof(Word); ++i)
      word[i] = reinterpret_cast<const Word*>(at)[i];
  }
  __device__ __forceinline__ Elements elements() const {
    Elements all;
    memcpy(&all, word, sizeof(all));
    return all;
  }
};

// A thread sums kVec neighbouring columns of one token. kAtOnce rows are requested before the first
// is added: at T = 1 the whole top_k is one trip to memory.
template <typename Row, typename Out, int kVec>
__global__ void __launch_bounds__(256, sizeof(Row) == 4 ? 2 : 4) combine_rows(CombineParams p) {
  if (!p.settled) begin_kernel();
  constexpr int kAtOnce = 8;
  const std::int64_t token = blockIdx.x / p.blocks_per_token;
  const std::int64_t column =
      (static_cast<std::int64_t>(blockIdx.x % p.blocks_per_token) * blockDim.x + threadIdx.x) *
      kVec;
  const std::int64_t first_slot = token * p.top_k;
  SlotRows<kAtOnce> slots(p, first_slot, 0);
  if (p.settled) begin_kernel();
  if (column >= p.columns) return;
  float sum[kVec] = {};
  for (int j = 0;;) {
    Waiting<Row, kVec> raw[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if (slots.row[i] >= 0)
        raw[i].load(static_cast<const Row*>(p.rows) + slots.row[i] * p.row_stride + column);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (slots.row[i] < 0) continue;
      const Pack<Row, kVec> row = raw[i].elements();
#pragma unroll
      for (int e = 0; e < kVec; ++e)
        sum[e] = add_product(sum[e], slots.weight[i], to_float(row.element[e]));
    }
    j += kAtOnce;
    if (j >= p.top_k) break;
    slots = SlotRows<kAtOnce>(p, first_slot, j);
  }
#pragma unroll
  for (int e = 0; e < kVec; ++e) sum[e] *= p.scale;
  if (p.shared != nullptr) {
    float shared[kVec];
    load_any<kVec>(p.shared, p.shared_dtype, token * p.shared_stride + column, shared);
    const float weight = p.shared_weight != nullptr ? p.shared_weight[token] : 1.0f;
#pragma unroll
    for (int e = 0; e < kVec; ++e) sum[e] = add_product(sum[e], weight, shared[e]);
  }
  Out* out = static_cast<Out*>(p.output) + token * p.output_stride + column;
  if (p.accumulate == Accumulate::kAdd) {
    const Pack<Out, kVec> old = load_pack<kVec>(out);
#pragma unroll
    for (int e = 0; e < kVec; ++e) sum[e] += to_float(old.element[e]);
  }
  store_pack<kVec>(out, sum);
}

}  // namespace

void run_combine(const CombineStage& s, const DeviceTraits& device, cudaStream_t stream) {
  const std::int64_t tokens = s.output.shape[0], columns = s.output.shape[1];
  if (tokens == 0 || columns == 0) return;
  CombineParams p{.rows = s.rows.data,
                  .row_count = s.rows.shape[0],
                  .row_stride = s.rows.strides[0],
                  .slot_row = s.slot_row,
                  .topk_ids = s.topk_ids,
                  .weights = s.weights,
                  .settled = s.list_age == ListAge::kSettled,
                  .top_k = static_cast<int>(s.top_k),
                  .scale = s.scale,
                  .shared_weight = s.shared_weight,
                  .accumulate = s.accumulate,
                  .output = s.output.data,
                  .output_stride = s.output.strides[0],
                  .columns = columns};
  if (s.local.count > 0) {
    p.first_expert = static_cast<unsigned>(s.local.first);
    p.experts = static_cast<unsigned>(s.local.count);
  }
  if (s.shared.defined()) {
    p.shared = s.shared.data;
    p.shared_dtype = s.shared.dtype;
    p.shared_stride = s.shared.strides[0];
  }
  const bool wide = s.rows.strides[1] == 1 && s.output.strides[1] == 1 &&
                    eight_wide(p.rows, columns, p.row_stride, size_of(s.rows.dtype)) &&
                    eight_wide(p.output, columns, p.output_stride, size_of(s.output.dtype));
  const std::int64_t threads = ceil_div(columns, wide ? 8 : 1);
  // Few tokens: a token's columns are spread over more multiprocessors, for each has its own way to
  // L2.
  const std::int64_t widest = tokens * ceil_div(threads, 256) < device.sm_count ? 64 : 256;
  p.blocks_per_token = static_cast<unsigned>(ceil_div(threads, widest));
  const std::int64_t block = round_up(ceil_div(threads, p.blocks_per_token), 32);
  // The grid's first dimension takes 2^31 - 1 blocks, and SlotRows numbers slots with 32 bits: what
  // is more is split between calls.
  const std::int64_t most = 0x7fffffff / std::max<std::int64_t>(p.blocks_per_token, p.top_k);
  for (std::int64_t first = 0; first < tokens; first += most) {
    const std::int64_t count = std::min(most, tokens - first);
    CombineParams q = p;
    const std::int64_t slot = first * p.top_k;
    if (p.slot_row != nullptr) q.slot_row += slot;
    if (p.slot_row == nullptr) {
      q.rows = static_cast<const char*>(p.rows) +
               slot * p.row_stride * static_cast<std::int64_t>(size_of(s.rows.dtype));
      q.row_count -= slot;
    }
    if (p.topk_ids != nullptr) q.topk_ids += slot;
    if (p.weights != nullptr) q.weights += slot;
    if (p.shared != nullptr)
      q.shared = static_cast<const char*>(p.shared) +
                 first * p.shared_stride * static_cast<std::int64_t>(size_of(p.shared_dtype));
    if (p.shared_weight != nullptr) q.shared_weight += first;
    q.output = static_cast<char*>(p.output) +
               first * p.output_stride * static_cast<std::int64_t>(size_of(s.output.dtype));
    for_float_type(s.rows.dtype, [&](auto row) {
      for_float_type(s.output.dtype, [&](auto out) {
        using Row = decltype(row);
        using Out = decltype(out);
        launch("combine", wide ? combine_rows<Row, Out, 8> : combine_rows<Row, Out, 1>,
               {.grid = dim3(static_cast<unsigned>(count * p.blocks_per_token)),
                .block = dim3(static_cast<unsigned>(block)),
                .dependency = overlap(device)},
               stream, q);
      });
    });
  }
}

}  // namespace moesaic::cuda
