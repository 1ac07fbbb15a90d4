// SPDX-License-Identifier: Apache-2.0
// What every way from fp32 accumulators to rows of C has in common: a task's table, the terms of
// its weight rows, where they lie in shared memory, and the order scale, bias, activation, row
// weight, cast.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/sm90/ptx.h"
#include "cuda/sm90/quantize.h"
#include "cuda/sm90/schedule.h"

namespace moesaic::cuda::sm90 {

// The thread's number. Warps that are short of registers read it again wherever they need it; the
// others keep what follows from it, which is a fifth of what a short task consists of.
template <bool kKept>
__device__ __forceinline__ int thread_index() {
  return kKept ? static_cast<int>(threadIdx.x) : ptx::thread_index();
}

__device__ __forceinline__ float load_small(const void* data, OutType type, std::int64_t index) {
  if (type == OutType::kBF16)
    return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[index]);
  if (type == OutType::kF16) return __half2float(static_cast<const __half*>(data)[index]);
  return static_cast<const float*>(data)[index];
}

__device__ __forceinline__ std::uint32_t pack16(OutType type, float low, float high) {
  if (type == OutType::kBF16) {
    const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const std::uint32_t*>(&v);
  }
  const __half2 v = __floats2half2_rn(low, high);
  return *reinterpret_cast<const std::uint32_t*>(&v);
}

__device__ __forceinline__ void store_element(const Params& p, std::int64_t at, float v) {
  if (p.c_type == OutType::kF32)
    static_cast<float*>(p.c)[at] = v;
  else if (p.c_type == OutType::kBF16)
    static_cast<__nv_bfloat16*>(p.c)[at] = __float2bfloat16_rn(v);
  else
    static_cast<__half*>(p.c)[at] = __float2half_rn(v);
}

// Slot of a position. Without a list every row is live, and only positions count.
__device__ __forceinline__ std::int32_t slot_of(const Params& p, std::int64_t position) {
  return p.rows.row_slot ? __ldcg(p.rows.row_slot + position) : 0;
}
// False for padding of a sorted list (slot_count or above) and for hostile values.
__device__ __forceinline__ bool is_live(const Params& p, std::int32_t slot) {
  return slot >= 0 && (slot < p.rows.slot_count || p.rows.row_slot == nullptr);
}
__device__ __forceinline__ std::int64_t row_of(const Params& p, RowOf rule, std::int64_t position,
                                               std::int64_t slot) {
  if (rule == RowOf::kPosition) return position;
  return rule == RowOf::kSlot ? slot : slot / p.top_k;
}

// The weight row behind row i of task weight_task's matrix, as the tensor map arranges them.
template <typename S>
__device__ __forceinline__ std::int64_t weight_row(const Params& p, int weight_task, int i) {
  const std::int64_t first = static_cast<std::int64_t>(weight_task) * p.task_weight_rows;
  if (S::kDirect && p.direct != Direct::kNo) {  // see sm90/direct.h
    const int unit = i / 128 * 4 + i / 16 % 4, block = i / 64 % 2, half = i / 8 % 2, s = i % 8;
    if (!p.gated || p.interleaved) return first + unit * 32 + s * 4 + block * 2 + half;
    return first / 2 + unit * 16 + s * 2 + block + half * p.columns;
  }
  if (!p.gated) return first + i;
  const std::int64_t output = (first + i) / 16 * 8 + i % 8;
  const int half = i / 8 % 2;
  return p.interleaved ? 2 * output + half : output + half * p.columns;
}

// A task's table: its tokens' rows of C (kNoRow: not stored), and their factors, in front of the
// bias and behind everything.
template <typename S, typename Byte>
__device__ __forceinline__ auto token_rows(Byte* table) {
  using T = std::conditional_t<std::is_const_v<Byte>, const std::uint32_t, std::uint32_t>;
  return reinterpret_cast<T*>(table);
}
template <typename S, typename Byte>
__device__ __forceinline__ auto token_factors(Byte* table) {
  using T = std::conditional_t<std::is_const_v<Byte>, const float2, float2>;
  return reinterpret_cast<T*>(table + S::kTokens * 4);
}

template <typename S>
class EpilogueBase {
 public:
  static constexpr int kTokens = S::kTokens, kBlocks = S::kBlocks;

  // `table`: of this task's tokens, kTableBytes, written by the loading warps.
  __device__ EpilogueBase(const Params& p, unsigned char* shared, const unsigned char* table,
                          int warpgroup, int term_place)
      : p_(p),
        shared_(shared),
        table_(table),
        warpgroup_(warpgroup),
        term_place_(term_place),
        thread_(thread_index<S::kKeepsThread>() % 128),
        lane_(thread_ % 32),
        warp_(thread_ / 32) {}

  // Before the main loop, which hides the latency: what comes from memory goes to shared memory by
  // itself. (A load whose value a thread stores there holds up the warp's first product, and with
  // it both warpgroups'.) Tasks, also those of a run, alternate between two places, so nobody can
  // still read what is overwritten.
  __device__ void begin(const Task& task) {
    if (thread_ < kBlocks * 64) {
      if constexpr (kTermsAhead)
        fetch_row_terms(
            p_, task.expert, task.weight_task,
            [this] { return warpgroup_ * kBlocks * 64 + thread_; }, row_terms() + thread_);
      else
        row_terms()[thread_] = row_terms_of(task);
    }
    if constexpr (S::kPromotes && !kOnlyBlockScales) {
      if (p_.quantizer.kind == Quantizes::kStatic && thread_ == 127) {
        ptx::copy_async_4(ptx::shared_address(inverse_scale()),
                          p_.quantizer.given + task.expert * p_.quantizer.expert_stride);
      }
    }
    if constexpr (kOneTokenScale) {
      if (has_one_token_scale() && thread_ == 125)
        ptx::copy_async_4(ptx::shared_address(token_scale()),
                          p_.a_scale + task.expert * p_.a_scale_expert);
    }
    if constexpr (S::kDirect) {
      if (p_.activates && has_terms(p_.activation.kind) && thread_ == 126) {
        const ActivationTerms t = p_.activation.terms(task.expert);
        *activation_terms() = {t.z.of[0], t.beta, t.gate_limit, t.silu_limit};
      }
    }
  }

  // S::kBringsTerms: by a loading warp's thread, to place `term_place`, for row i of a task. Where
  // there are none to bring, all places hold what a row then has (place_terms).
  __device__ static float* one_term_at(unsigned char* shared, int term_place) {
    return inverse_scale_at(shared, (S::kTermPlaces + 3) / 4 * 4 + term_place);
  }
  __device__ static void bring(const Params& p, unsigned char* shared, int expert, int weight_task,
                               int i, int term_place) {
    if (p.terms == Terms::kOne) {
      if (i == 32)
        ptx::copy_async_4(ptx::shared_address(one_term_at(shared, term_place)),
                          p.weight_scale + expert * p.scale_expert);
    } else if (p.terms == Terms::kRows) {
      fetch_row_terms(
          p, expert, weight_task, [i] { return i; }, row_terms_at(shared, term_place) + i);
    }
    if (p.quantizer.kind == Quantizes::kStatic && i == 0)
      ptx::copy_async_4(ptx::shared_address(inverse_scale_at(shared, term_place)),
                        p.quantizer.given + expert * p.quantizer.expert_stride);
  }
  // Once a task's first stage is there: behind its sums it would be waited for.
  __device__ void spread_terms() const {
    if (p_.terms == Terms::kOne && thread_ < S::kWeightRows)
      row_terms()[thread_] = {*one_term_at(shared_, term_place_), 0.0f};
    invert_scale();
  }
  __device__ void invert_scale() const {
    if (p_.quantizer.kind == Quantizes::kStatic && thread_ == 127)
      *inverse_scale() = inverse_of(*inverse_scale());
  }
  __device__ static void place_terms(const Params& p, unsigned char* shared, int i) {
    if (p.terms != Terms::kNone || i >= S::kWeightRows) return;
    for (int term_place = 0; term_place < S::kTermPlaces; ++term_place)
      row_terms_at(shared, term_place)[i] = {1.0f, 0.0f};
  }

  // The first thing behind the main loop: the terms are there for all, and nobody reads the
  // previous task's buffers any more.
  __device__ __forceinline__ void meet_terms() const {
    if constexpr (kTermsAhead) {
      ptx::copy_async_wait();
      if constexpr (S::kPromotes && !kOnlyBlockScales) invert_scale();
    }
    sync();
  }

  // Factor and bias of this thread's weight row.
  __device__ float2 row_terms_of(const Task& task) const {
    float2 row{p_.alpha ? p_.alpha[task.expert] : 1.0f, 0.0f};
    const bool scaled = p_.weight_scale != nullptr && !p_.block_scaled;
    if (!scaled && p_.bias.data == nullptr) return row;
    const std::int64_t n = weight_row<S>(p_, task.weight_task, warpgroup_ * kBlocks * 64 + thread_);
    if (n >= (p_.gated ? 2 * p_.columns : p_.columns)) return row;
    if (scaled) row.x *= *scale_of_row(p_, task.expert, n);
    if (p_.bias.data) {
      row.y = load_small(p_.bias.data, p_.bias.type,
                         task.expert * p_.bias.expert_stride + n * p_.bias.stride);
    }
    return row;
  }

  // A filtered tile: rows of zeros. (Not of quantized rows: no product reads those.)
  __device__ void zeros(const Task& task) {
    if (quantizes()) return;
    const int width = (p_.gated ? p_.task_weight_rows / 2 : p_.task_weight_rows) / S::kWarpgroups;
    const std::int64_t first =
        (static_cast<std::int64_t>(task.weight_task) * S::kWarpgroups + warpgroup_) * width;
    for (int token = warp_; token < task.rows; token += 4) {
      const std::int64_t position = task.first + token;
      const std::int32_t slot = slot_of(p_, position);
      if (!is_live(p_, slot)) continue;
      const std::int64_t row = p_.c_rows(row_of(p_, p_.c_row, position, slot));
      for (int i = lane_; i < width && first + i < p_.columns; i += 32) {
        store_element(p_, row + (first + i) * p_.c_column, 0.0f);
      }
    }
  }

 protected:
  // Kernels for few tokens in 16 bit wait for weights, not for these.
  static constexpr bool kTermsAhead = kTokens > 16;
  // Of pairs those that know scales along K know no others (and none of C that is given).
  static constexpr bool kOnlyBlockScales = S::kHasBlockScales && S::kPair == 2;
  // Where all tokens of an expert have one scale, the rows' factors take it in (Direct::kPlain).
  static constexpr bool kOneTokenScale = S::kDirect && S::kPromotes && !S::kHasBlockScales;
  __device__ bool has_one_token_scale() const {
    return p_.direct == Direct::kPlain && p_.a_scale != nullptr;
  }

  // Where the scale of weight row n lies, without block scales.
  __device__ static const float* scale_of_row(const Params& p, int expert, std::int64_t n) {
    const float* const scales = p.weight_scale + expert * p.scale_expert;
    if (p.scale_row == 0) return scales;
    return scales + (p.scale_group == 1 ? n : n / p.scale_group) * p.scale_row;
  }
  // Those of row row() of a task, to shared memory.
  template <typename Row>
  __device__ static void fetch_row_terms(const Params& p, int expert, int weight_task, Row&& row,
                                         float2* to) {
    const bool scaled = !kOnlyBlockScales && p.weight_scale != nullptr && !p.block_scaled;
    const bool biased = p.bias.data != nullptr;
    if (!scaled && !biased) {
      *to = {p.alpha ? p.alpha[expert] : 1.0f, 0.0f};
      return;
    }
    const std::int64_t n = weight_row<S>(p, weight_task, row());
    const bool inside = n < (p.gated ? 2 * p.columns : p.columns);
    // (A factor that is a product, and a bias of 16 bits, are waited for: few have them.)
    if (!inside || !scaled || p.alpha != nullptr) {
      const float alpha = p.alpha ? p.alpha[expert] : 1.0f;
      to->x = inside && scaled ? alpha * *scale_of_row(p, expert, n) : alpha;
    } else {
      ptx::copy_async_4(ptx::shared_address(&to->x), scale_of_row(p, expert, n));
    }
    const std::int64_t at = expert * p.bias.expert_stride + n * p.bias.stride;
    if (!inside || !biased)
      to->y = 0.0f;
    else if (p.bias.type == OutType::kF32)
      ptx::copy_async_4(ptx::shared_address(&to->y), static_cast<const float*>(p.bias.data) + at);
    else
      to->y = load_small(p.bias.data, p.bias.type, at);
  }

  // --- shared memory of this warpgroup ---
  __device__ unsigned char* buffer(int i) const { return shared_ + i * S::kBufferBytes; }
  __device__ static float2* row_terms_at(unsigned char* shared, int term_place) {
    return reinterpret_cast<float2*>(shared + 2 * S::kBufferBytes) + term_place * kBlocks * 64;
  }
  __device__ float2* row_terms() const { return row_terms_at(shared_, term_place_); }
  __device__ bool quantizes() const { return S::kPromotes && p_.quantizer.kind != Quantizes::kNo; }
  // kStatic: of this task's expert; as it was given, until all meet.
  __device__ static float* inverse_scale_at(unsigned char* shared, int term_place) {
    return reinterpret_cast<float*>(row_terms_at(shared, S::kTermPlaces)) + term_place;
  }
  __device__ float* inverse_scale() const { return inverse_scale_at(shared_, term_place_); }
  __device__ float* token_scale() const {  // has_one_token_scale: of this task's expert
    return inverse_scale() + 2;
  }
  __device__ float4* activation_terms() const {  // of this task's expert
    return reinterpret_cast<float4*>(shared_ + S::kEpilogueBytes - 32) + term_place_;
  }
  // Read again wherever they are asked for: kept in registers across a task's sums, they made ptxas
  // keep some of the sums in memory, also in the main loops.
  template <Activation kKind>
  __device__ ActivationTerms terms_now() const {
    if constexpr (!has_terms(kKind)) return {};
    const float4 t = ptx::load_shared_4(ptx::shared_address(activation_terms()));
    ActivationTerms terms{p_.activation.z, t.y, t.z, t.w};
    terms.z.of[0] = t.x;
    return terms;
  }
  // From something in this warpgroup's memory to the same in the other's.
  __device__ std::ptrdiff_t to_other() const {
    return warpgroup_ == 0 ? S::kEpilogueBytes : -S::kEpilogueBytes;
  }
  __device__ const std::uint32_t* rows() const { return token_rows<S>(table_); }
  __device__ const float2* factors() const { return token_factors<S>(table_); }
  __device__ void sync() const {
    if (S::kWarpgroups == 1 || warpgroup_ == 0)
      ptx::warpgroup_sync<1>();
    else
      ptx::warpgroup_sync<2>();
  }

  // First column of C that block b of this warpgroup makes, and the first that is not this task's.
  __device__ std::int64_t column(const Task& task, int b) const {
    const std::int64_t row = static_cast<std::int64_t>(task.weight_task) * p_.task_weight_rows +
                             (warpgroup_ * kBlocks + b) * 64;
    return p_.gated ? row / 2 : row;
  }
  __device__ std::int64_t limit(const Task& task) const {
    const std::int64_t rows = static_cast<std::int64_t>(task.weight_task + 1) * p_.task_weight_rows;
    const std::int64_t end = p_.gated ? rows / 2 : rows;
    return end < p_.columns ? end : p_.columns;
  }

  // Where element n of a row of C lies, whose rows are contiguous and aligned: the host has made
  // sure that one 32-bit stride is all there is.
  __device__ __forceinline__ std::uint64_t element(std::uint32_t row, std::int64_t n) const {
    return std::uint64_t{row} * static_cast<std::uint32_t>(p_.c_rows.stride) + n;
  }

  // Four sums of block b: rows g, g + 8 and tokens 2q, 2q + 1 of group j.
  struct Quad {
    float v[4];
    float post[2];
  };
  __device__ Quad scaled(const float (&sum)[kTokens / 2], int j, float2 low, float2 high) const {
    const int token = 8 * j + 2 * (lane_ % 4);
    const float4 f = *reinterpret_cast<const float4*>(factors() + token);  // of two tokens
    return {
        {fmaf(sum[4 * j], low.x * f.x, low.y), fmaf(sum[4 * j + 1], low.x * f.z, low.y),
         fmaf(sum[4 * j + 2], high.x * f.x, high.y), fmaf(sum[4 * j + 3], high.x * f.z, high.y)},
        {f.y, f.w}};
  }

  const Params& p_;
  unsigned char* shared_;
  const unsigned char* table_;
  int warpgroup_, term_place_, thread_, lane_, warp_;
};

}  // namespace moesaic::cuda::sm90
