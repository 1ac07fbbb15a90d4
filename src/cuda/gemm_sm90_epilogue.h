// SPDX-License-Identifier: Apache-2.0
// From fp32 accumulators to rows of C: scale, bias, activation, row weight, cast, in this order,
// and the transposition (an accumulator has weight rows across lanes, C has them along a row).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/gemm_sm90_quantize.h"
#include "cuda/gemm_sm90_schedule.h"
#include "cuda/ptx_sm90.h"

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
// Not so: padding of a sorted list, or a hostile value.
__device__ __forceinline__ bool is_live(const Params& p, std::int32_t slot) {
  return slot >= 0 && (slot < p.rows.slot_count || p.rows.row_slot == nullptr);
}
__device__ __forceinline__ std::int64_t row_of(const Params& p, RowOf rule, std::int64_t position,
                                               std::int64_t slot) {
  if (rule == RowOf::kPosition) return position;
  return rule == RowOf::kSlot ? slot : slot / p.top_k;
}

// The weight row behind row i of task row_task's matrix, as the tensor map arranges them.
__device__ __forceinline__ std::int64_t weight_row(const Params& p, int row_task, int i) {
  const std::int64_t first = static_cast<std::int64_t>(row_task) * p.task_rows;
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
class Epilogue {
 public:
  static constexpr int kTokens = S::kTokens, kBlocks = S::kBlocks;

  // `table`: of this task's tokens, kTableBytes, written by the loading warps.
  __device__ Epilogue(const Params& p, unsigned char* shared, const unsigned char* table,
                      int warpgroup, int flip)
      : p_(p),
        shared_(shared),
        table_(table),
        warpgroup_(warpgroup),
        flip_(flip),
        thread_(thread_index<S::kKeepsThread>() % 128),
        lane_(thread_ % 32),
        warp_(thread_ / 32) {}

  // Before the main loop, which hides the latency. Tasks, also those of a run, alternate between
  // two places, so nobody can still read what is overwritten.
  __device__ void begin(const Task& task) {
    if (thread_ < kBlocks * 64) row_terms()[thread_] = row_terms_of(task);
    if (S::kPromotes && p_.quantizer.kind == Quantizes::kStatic && thread_ == 127)
      *inverse_scale() = inverse_of(p_.quantizer.given[task.expert * p_.quantizer.expert_stride]);
  }

  // Factor and bias of this thread's weight row.
  __device__ float2 row_terms_of(const Task& task) const {
    float2 row{p_.alpha ? p_.alpha[task.expert] : 1.0f, 0.0f};
    const bool scaled = p_.weight_scale != nullptr && !p_.block_scaled;
    if (!scaled && p_.bias.data == nullptr) return row;
    const std::int64_t n = weight_row(p_, task.row_task, warpgroup_ * kBlocks * 64 + thread_);
    if (n >= (p_.gated ? 2 * p_.columns : p_.columns)) return row;
    if (scaled) {
      row.x *= p_.weight_scale[task.expert * p_.scale_expert + n / p_.scale_group * p_.scale_row];
    }
    if (p_.bias.data) {
      row.y = load_small(p_.bias.data, p_.bias.type,
                         task.expert * p_.bias.expert_stride + n * p_.bias.stride);
    }
    return row;
  }

  __device__ void finish(const Task& task, float (&sum)[kBlocks][kTokens / 2]) {
    sync();  // the rows' terms are there, and nobody reads the previous task's buffers any more
    const bool fused = p_.activates;
    if (p_.store == StorePath::kMatrix && !fused) {
      store_matrix<Activation::kIdentity>(task, sum, {});
    } else if (p_.store == StorePath::kMatrix && p_.activation.kind == Activation::kSwiglu) {
      store_matrix<Activation::kSwiglu>(task, sum, {});
    } else if (p_.store == StorePath::kMatrix && p_.activation.kind == Activation::kSwigluOai) {
      store_matrix<Activation::kSwigluOai>(task, sum, p_.activation.terms(task.expert));
    } else {
      store_staged(task, sum);
    }
  }

  // A filtered tile: rows of zeros. (Not of quantized rows: no product reads those.)
  __device__ void zeros(const Task& task) {
    if (quantizes()) return;
    const int width = (p_.gated ? p_.task_rows / 2 : p_.task_rows) / S::kWarpgroups;
    const std::int64_t first =
        (static_cast<std::int64_t>(task.row_task) * S::kWarpgroups + warpgroup_) * width;
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
  // --- shared memory of this warpgroup ---
  __device__ unsigned char* buffer(int i) const { return shared_ + i * S::kBufferBytes; }
  __device__ float2* row_terms() const {
    return reinterpret_cast<float2*>(shared_ + 2 * S::kBufferBytes) + flip_ * kBlocks * 64;
  }
  __device__ bool quantizes() const { return S::kPromotes && p_.quantizer.kind != Quantizes::kNo; }
  __device__ float* inverse_scale() const {  // kStatic: of this task's expert
    return reinterpret_cast<float*>(shared_ + 2 * S::kBufferBytes + 2 * kBlocks * 64 * 8) + flip_;
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
    const std::int64_t row =
        static_cast<std::int64_t>(task.row_task) * p_.task_rows + (warpgroup_ * kBlocks + b) * 64;
    return p_.gated ? row / 2 : row;
  }
  __device__ std::int64_t limit(const Task& task) const {
    const std::int64_t rows = static_cast<std::int64_t>(task.row_task + 1) * p_.task_rows;
    const std::int64_t end = p_.gated ? rows / 2 : rows;
    return end < p_.columns ? end : p_.columns;
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

  // 16-bit C whose rows are contiguous and aligned. Everything happens in registers, two tokens are
  // packed and transposed by stmatrix; then 64 or 128 bytes of each token leave in 16-byte stores.
  template <Activation kKind>
  __device__ void store_matrix(const Task& task, float (&sum)[kBlocks][kTokens / 2],
                               const ActivationTerms& terms) {
    constexpr bool kGated = is_gated(kKind);
    constexpr int kChunk = kTokens < 32 ? kTokens : S::kEpilogueTokens;
    // Blocks that leave together: gated, two of them are 128 bytes of a token.
    constexpr int kTogether = kGated ? kBlocks : 1;
    static_assert(kTogether * (kGated ? 64 : 128) < S::kPitch);
    constexpr int kUnits = kGated ? 4 * kTogether : 8;  // of 16 bytes, per token
    const std::int64_t end = limit(task);
    const int g = lane_ / 4;
    const bool swap = p_.up_first;
    // Lane l stores row l % 8 of matrix l / 8; matrices: token octets (and, ungated, rows + 8).
    const int octet = kGated ? lane_ / 8 % 2 : lane_ / 16;
    const int unit = kGated ? warp_ : warp_ * 2 + lane_ / 8 % 2;
    const std::uint32_t mine = (octet * 8 + lane_ % 8) * S::kPitch + unit * 16;
    // Buffers alternate over the chunks that really come, so that no chunk is written where the one
    // before it may still be read: only one sync lies between them.
    const int chunks = (task.rows + kChunk - 1) / kChunk;
    // Scaled, activated and packed, transposed by stmatrix.
    const auto stage = [&](int first_block, int chunk, unsigned char* out) {
#pragma unroll
      for (int b = first_block; b < first_block + kTogether; ++b) {
        const float2 low = row_terms()[b * 64 + warp_ * 16 + g];
        const float2 high = row_terms()[b * 64 + warp_ * 16 + g + 8];
        const std::uint32_t at = ptx::shared_address(out) + mine + (b - first_block) * 64;
#pragma unroll
        for (int pair = 0; pair < kChunk / 16; ++pair) {
          std::uint32_t packed[4];
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const Quad x = scaled(sum[b], chunk * (kChunk / 8) + pair * 2 + half, low, high);
            if constexpr (kGated) {
              const float even =
                  activate<kKind>(swap ? x.v[2] : x.v[0], swap ? x.v[0] : x.v[2], terms);
              const float odd =
                  activate<kKind>(swap ? x.v[3] : x.v[1], swap ? x.v[1] : x.v[3], terms);
              packed[half] = pack16(p_.c_type, even * x.post[0], odd * x.post[1]);
            } else {
              packed[2 * half] = pack16(p_.c_type, x.v[0] * x.post[0], x.v[1] * x.post[1]);
              packed[2 * half + 1] = pack16(p_.c_type, x.v[2] * x.post[0], x.v[3] * x.post[1]);
            }
          }
          const std::uint32_t dst = at + pair * 16 * S::kPitch;
          if constexpr (kGated) {
            ptx::store_matrix_x2_transposed(dst, packed[0], packed[1]);
          } else {
            ptx::store_matrix_x4_transposed(dst, packed[0], packed[1], packed[2], packed[3]);
          }
        }
      }
    };
    // What a thread stores of a chunk.
    constexpr int kAll = kChunk * kUnits, kMine = (kAll + 127) / 128;
    const auto is_mine = [&](int i) { return kAll % 128 == 0 || thread_ + i * 128 < kAll; };
#pragma unroll
    for (int first_block = 0; first_block < kBlocks; first_block += kTogether) {
      const std::int64_t first = column(task, first_block);
      const int before = first_block / kTogether * chunks;
      stage(first_block, 0, buffer(before & 1));
      if constexpr (kTokens == kChunk) {  // nothing to hide behind: fewer registers
        sync();
#pragma unroll
        for (int i = thread_; i < kAll; i += 128) {
          const std::uint32_t row = rows()[i / kUnits];
          const std::int64_t n = first + i % kUnits * 8;
          if (row != kNoRow && n < end)
            store_eight(row, n,
                        *reinterpret_cast<const uint4*>(buffer(before & 1) +
                                                        i / kUnits * S::kPitch + i % kUnits * 16));
        }
      } else {
#pragma unroll
        for (int chunk = 0; chunk < kTokens / kChunk; ++chunk) {
          if (chunk * kChunk < task.rows) {
            unsigned char* const out = buffer((before + chunk) & 1);
            const bool more = (chunk + 1) * kChunk < kTokens && (chunk + 1) * kChunk < task.rows;
            std::uint32_t row[kMine];
#pragma unroll
            for (int i = 0; i < kMine; ++i) {
              const int token = (thread_ + i * 128) / kUnits;
              row[i] = is_mine(i) ? rows()[chunk * kChunk + token] : kNoRow;
            }
            sync();
            if constexpr (S::kHasGroups && kGated) {
              if (p_.quantizer.kind == Quantizes::kGroup) {
                static_assert(kChunk == 32 && kTogether == kBlocks);
                store_groups<S, 2, 16>(p_, staged_groups(task, {.rows = out + warp_ * 4 * S::kPitch,
                                                                .token = chunk * 32 + warp_ * 4}));
                if (more) stage(first_block, chunk + 1, buffer((before + chunk + 1) & 1));
                continue;
              }
            }
            // Read, and on its way to memory when the next chunk is staged: nothing waits for it.
            uint4 v[kMine];
#pragma unroll
            for (int i = 0; i < kMine; ++i) {
              const int at = thread_ + i * 128;
              if (is_mine(i))
                v[i] = *reinterpret_cast<const uint4*>(out + at / kUnits * S::kPitch +
                                                       at % kUnits * 16);
            }
            if (more) stage(first_block, chunk + 1, buffer((before + chunk + 1) & 1));
#pragma unroll
            for (int i = 0; i < kMine; ++i) {
              const std::int64_t n = first + (thread_ + i * 128) % kUnits * 8;
              if (row[i] != kNoRow && n < end) store_eight(row[i], n, v[i]);
            }
          }
        }
      }
    }
  }

  // What this warp has staged of gated rows, from `token` on. `more`: 1 where a second part of the
  // task follows at once in the same place.
  struct Staged {
    unsigned char* rows;
    int token, more = 0;
  };
  __device__ StagedGroups staged_groups(const Task& task, const Staged& staged) const {
    return {.rows = staged.rows,
            .other = warpgroup_ == 0 ? S::kEpilogueBytes : -S::kEpilogueBytes,
            .slot = flip_ * 2 + staged.more,
            .c_row = rows() + staged.token,
            .first = column(task, 0),
            .end = limit(task),
            .group = task.row_task};
  }

  // Eight neighbouring values of a row of C whose rows are contiguous and aligned.
  __device__ void store_eight(std::uint32_t row, std::int64_t n, const uint4& v) const {
    // The host has made sure that one 32-bit stride is all there is.
    const std::uint64_t at = std::uint64_t{row} * static_cast<std::uint32_t>(p_.c_rows.stride) + n;
    if (quantizes()) {
      *reinterpret_cast<uint2*>(static_cast<char*>(p_.c) + at) =
          to_e4m3(p_.c_type, v, *inverse_scale());
    } else {
      *reinterpret_cast<uint4*>(static_cast<char*>(p_.c) + 2 * at) = v;
    }
  }

  // Everything else: fp32 through shared memory, 16 tokens at a time, so that the code behind it is
  // a short loop that takes any activation, output type and stride.
  __device__ void store_staged(const Task& task, float (&sum)[kBlocks][kTokens / 2]) {
    constexpr int kPitch = 68;  // floats per token: lanes of a warp write to 32 different banks
    static_assert(16 * kPitch * 4 <= 2 * S::kBufferBytes);
    const int g = lane_ / 4, q = lane_ % 4;
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      const float2 low = row_terms()[b * 64 + warp_ * 16 + g];
      const float2 high = row_terms()[b * 64 + warp_ * 16 + g + 8];
      for (int chunk = 0; chunk * 16 < task.rows; ++chunk) {
        float* const out = reinterpret_cast<float*>(buffer(0));  // both: each use ends with a sync
        // Registers have no index: only their store is unrolled, not what comes behind it.
#pragma unroll
        for (int c = 0; c < kTokens / 16; ++c) {
          if (c == chunk) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              const Quad x = scaled(sum[b], c * 2 + half, low, high);
              float* const at = out + (half * 8 + 2 * q) * kPitch + warp_ * 16 + g;
              at[0] = x.v[0];
              at[kPitch] = x.v[1];
              at[8] = x.v[2];
              at[kPitch + 8] = x.v[3];
            }
          }
        }
        sync();
        write_out(task, out, kPitch, chunk * 16, column(task, b));
        sync();
      }
    }
  }

  // 16 tokens x 64 rows (32 columns when gated) of finished sums, four columns at a time.
  __device__ void write_out(const Task& task, const float* in, int pitch, int first_token,
                            std::int64_t first) {
    const int quads = p_.gated ? 8 : 16;  // per token
    const std::int64_t end = limit(task);
    const auto terms = p_.activates ? p_.activation.terms(task.expert) : ActivationTerms{};
    for (int i = thread_; i < 16 * quads; i += 128) {
      const int token = i / quads, quad = i % quads;
      const std::uint32_t row = rows()[first_token + token];
      const std::int64_t n = first + quad * 4;
      if (row == kNoRow || n >= end) continue;
      const std::int64_t offset = p_.c_rows(row);
      // Gated: 8 rows of gate, 8 of up, and so on (up_first: the other way round).
      const float* const x =
          in + token * pitch + (p_.gated ? quad / 2 * 16 + quad % 2 * 4 : quad * 4);
      const float4 one = *reinterpret_cast<const float4*>(x);
      const float4 two = p_.gated ? *reinterpret_cast<const float4*>(x + 8) : one;
      const float4 gate = p_.up_first ? two : one, up = p_.up_first ? one : two;
      float v[4] = {gate.x, gate.y, gate.z, gate.w};
      if (p_.activates) {
        with_activation(p_.activation.kind, [&](auto kind) {
          v[0] = activate<decltype(kind)::value>(gate.x, up.x, terms);
          v[1] = activate<decltype(kind)::value>(gate.y, up.y, terms);
          v[2] = activate<decltype(kind)::value>(gate.z, up.z, terms);
          v[3] = activate<decltype(kind)::value>(gate.w, up.w, terms);
        });
      }
      const float post = factors()[first_token + token].y;
#pragma unroll
      for (float& e : v) e *= post;
      if (p_.store == StorePath::kScalar) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (n + e < end) store_one(offset + (n + e) * p_.c_column, v[e]);
        }
      } else if (p_.c_type == OutType::kF32) {
        *reinterpret_cast<float4*>(static_cast<float*>(p_.c) + offset + n) = {v[0], v[1], v[2],
                                                                              v[3]};
      } else {
        const uint2 four{pack16(p_.c_type, v[0], v[1]), pack16(p_.c_type, v[2], v[3])};
        if (quantizes()) {
          *reinterpret_cast<std::uint32_t*>(static_cast<char*>(p_.c) + offset + n) =
              to_e4m3(p_.c_type, four, *inverse_scale());
        } else {
          *reinterpret_cast<uint2*>(static_cast<char*>(p_.c) + 2 * (offset + n)) = four;
        }
      }
    }
  }
  __device__ void store_one(std::int64_t at, float v) const {
    if (quantizes()) {
      static_cast<std::uint8_t*>(p_.c)[at] = static_cast<std::uint8_t>(
          to_e4m3(p_.c_type, pack16(p_.c_type, v, 0.0f), *inverse_scale()));
    } else {
      store_element(p_, at, v);
    }
  }

  const Params& p_;
  unsigned char* shared_;
  const unsigned char* table_;
  int warpgroup_, flip_, thread_, lane_, warp_;
};

}  // namespace moesaic::cuda::sm90
