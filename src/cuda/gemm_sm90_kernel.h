// SPDX-License-Identifier: Apache-2.0
// The grouped product on SM90a: persistent CTAs of one loading warpgroup (warp 0: weights by TMA;
// warps 1 to 3: tokens, gathered by cp.async or by TMA) and one or two multiplying warpgroups. A ring of
// stages runs through all tasks of a CTA and never drains between them.
//
// Every sum is one chain of fp32 accumulations in ascending K, in chunks of 128 bytes, whatever the
// shape of the tile: all tactics give the same bits. e4m3 is promoted to fp32 after every chunk (128 of
// K), since wgmma keeps few bits of such sums.
#pragma once

#include "cuda/gemm_sm90_epilogue.h"
#include "cuda/launch.h"

namespace moesaic::cuda::sm90 {

inline constexpr int kLoaders = 96;  // threads that gather tokens

template <typename S>
struct SharedMemory {
  unsigned char* base;  // aligned to 1024

  __device__ unsigned char* weights(int stage) const { return base + stage * S::kStageBytes; }
  __device__ unsigned char* tokens(int stage) const {
    return weights(stage) + S::kChunks * S::kWeightBytes;
  }
  __device__ float* scales(int stage) const {
    return reinterpret_cast<float*>(base + S::kStages * S::kStageBytes + stage * S::kScaleBytes);
  }
  __device__ unsigned char* epilogue(int warpgroup) const {
    return base + S::kStages * (S::kStageBytes + S::kScaleBytes) + warpgroup * S::kEpilogueBytes;
  }
  // Tasks on their way from warp 0 to the consumers. Every task fills at least one stage, so a ring of
  // one more than the stages cannot be overtaken.
  __device__ Task* tasks() const { return reinterpret_cast<Task*>(epilogue(S::kWarpgroups)); }
  __device__ std::uint32_t full(int stage) const {
    return ptx::shared_address(tasks() + S::kStages + 1) + stage * 8;
  }
  __device__ std::uint32_t empty(int stage) const { return full(S::kStages + stage); }
  __device__ std::uint32_t* gathered() const {
    return reinterpret_cast<std::uint32_t*>(reinterpret_cast<unsigned char*>(tasks() + S::kStages + 1) +
                                            2 * S::kStages * 8);
  }
};

// A position in the ring of stages and the parity of its round.
template <int kStages>
struct Cursor {
  int stage = 0;
  std::uint32_t round = 0;
  __device__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      round ^= 1;
    }
  }
};

template <typename S>
__device__ int stages_of(const Params& p, const Task& task) {
  return task.expert < 0 ? 1 : (p.k_chunks + S::kChunks - 1) / S::kChunks;
}

// --- warp 0 ---------------------------------------------------------------------------------------
template <typename S>
__device__ void load_weights(const Params& p, const SharedMemory<S>& shared) {
  if (!p.settled) ptx::wait_for_earlier_kernels();
  Schedule schedule(p, S::kTokens);
  Cursor<S::kStages> cursor;
  int ring = 0;
  for (;;) {
    const Task task = schedule.next();
    if (threadIdx.x == 0) {
      const int stages = stages_of<S>(p, task);
      const std::int64_t row = static_cast<std::int64_t>(task.row_task) * p.task_rows;
      const int y = p.gated ? 0 : static_cast<int>(row);
      const int u = p.gated ? static_cast<int>(row / 16) : 0;
      for (int i = 0; i < stages; ++i) {
        ptx::barrier_wait(shared.empty(cursor.stage), cursor.round ^ 1);
        if (i == 0) shared.tasks()[ring] = task;
        const std::uint32_t full = shared.full(cursor.stage);
        if (task.expert < 0) {
          ptx::barrier_arrive(full);
        } else {
          // A last chunk behind the end of K arrives as zeros, too: so the multiplying loop needs no
          // condition (one inside it makes ptxas serialize the whole batch).
          ptx::barrier_arrive_expect(full, static_cast<std::uint32_t>(S::kChunks * p.task_rows * 128));
#pragma unroll
          for (int c = 0; c < S::kChunks; ++c) {
            ptx::tma_load_5d(ptx::shared_address(shared.weights(cursor.stage)) + c * S::kWeightBytes,
                             &p.weights, full, (i * S::kChunks + c) * S::kChunkK, y, 0, u, task.expert);
          }
        }
        cursor.advance();
      }
    }
    __syncwarp();
    if (++ring == S::kStages + 1) ring = 0;
    if (task.expert == kEndOfTasks) return;
  }
}

// --- warps 1 to 3 ---------------------------------------------------------------------------------
// Rows are gathered in 16-byte pieces: eight threads to a row, twelve rows at a time. Rows behind the
// tile's last are not loaded: what lies there spoils only columns that nobody stores.
template <typename S>
__device__ void load_tokens(const Params& p, const SharedMemory<S>& shared) {
  ptx::wait_for_earlier_kernels();
  // Only behind our own wait: so a kernel that has started may rely on everything that was written two
  // kernels before it. See Params::settled.
  ptx::let_next_kernel_start();
  constexpr int kPasses = (S::kTokens + 11) / 12;
  constexpr int kScalePasses = (S::kTokens + kLoaders - 1) / kLoaders;
  constexpr std::uint32_t kNone = 0xffffffffu;
  const int thread = static_cast<int>(threadIdx.x) - 32;
  const int lane = thread % 32, piece = thread % 8, lead = thread / 8;
  const bool gather = p.token_load == TokenLoad::kGather;
  const bool scales = S::kPromotes && p.block_scaled;
  // Where rows begin, in units of 16 bytes from p.a. Each warp keeps those of the rows that it loads
  // itself; in registers they would not fit beside the rest.
  std::uint32_t* const rows = shared.gathered();
  Schedule schedule(p, S::kTokens);
  Cursor<S::kStages> cursor;
  for (;;) {
    const Task task = schedule.next();
    const int stages = stages_of<S>(p, task);
    const float* scale[kScalePasses];
    if (gather && task.expert >= 0) {
      for (int i = lane; i < kPasses * 4; i += 32) {
        const int token = i / 4 * 12 + thread / 32 * 4 + i % 4;
        std::uint32_t row = kNone;
        if (token < task.rows) {
          const std::int64_t position = task.first + token, slot = slot_of(p, position);
          if (slot >= 0) row = static_cast<std::uint32_t>(p.a_rows(row_of(p, p.a_row, position, slot)));
        }
        rows[token] = row;
      }
      __syncwarp();
    }
    const int passes = task.expert >= 0 ? (task.rows + 11) / 12 : 0;
    if (scales) {
#pragma unroll
      for (int i = 0; i < kScalePasses; ++i) {
        const int token = i * kLoaders + thread;
        scale[i] = nullptr;
        if (token < task.rows && task.expert >= 0) {
          const std::int64_t position = task.first + token, slot = slot_of(p, position);
          if (slot >= 0) {
            scale[i] = p.a_scale + row_of(p, p.a_row, position, slot) * p.a_scale_row +
                       task.expert * p.a_scale_expert;
          }
        }
      }
    }
    for (int i = 0; i < stages; ++i) {
      ptx::barrier_wait(shared.empty(cursor.stage), cursor.round ^ 1);
      const std::uint32_t full = shared.full(cursor.stage);
      const std::uint32_t to = ptx::shared_address(shared.tokens(cursor.stage));
      if (gather) {
#pragma unroll
        for (int c = 0; c < S::kChunks; ++c) {
          const std::int64_t at = static_cast<std::int64_t>(i * S::kChunks + c) * 128 + piece * 16;
          const bool inside = at < p.k_bytes;  // behind the end of K: zeros
          const char* const from = p.a + (inside ? at : 0);
          // Twelve rows further the swizzle flips bit 2 of the piece.
          const std::uint32_t even = to + c * S::kTokenBytes + lead * 128 + ((piece ^ (lead & 7)) << 4);
          const std::uint32_t odd = to + c * S::kTokenBytes + lead * 128 + ((piece ^ (lead & 7) ^ 4) << 4);
#pragma unroll 4
          for (int j = 0; j < passes; ++j) {
            const std::uint32_t row = rows[j * 12 + lead];
            if (row != kNone) {
              ptx::copy_async_16((j % 2 ? odd : even) + j * (12 * 128),
                                 from + static_cast<std::uint64_t>(row) * 16, inside ? 16 : 0);
            }
          }
        }
      }
      if (scales) {
        const std::uint32_t at = ptx::shared_address(shared.scales(cursor.stage));
#pragma unroll
        for (int c = 0; c < S::kChunks; ++c) {
          const int chunk = i * S::kChunks + c;
          const int group = chunk < p.k_chunks ? chunk : p.k_chunks - 1;
#pragma unroll
          for (int j = 0; j < kScalePasses; ++j) {
            if (scale[j] != nullptr) {
              ptx::copy_async_4(at + (c * S::kTokens + j * kLoaders + thread) * 4,
                                scale[j] + group * p.a_scale_group);
            }
          }
        }
      }
      if (gather || scales) ptx::copy_async_arrive(full);
      if (!gather && thread == 0) {
        if (task.expert < 0) {
          ptx::barrier_arrive(full);
        } else {
          // Boxes of 64 tokens: rows of the next expert may come along, and nobody stores their sums.
          constexpr int kBox = S::kTokens < 64 ? S::kTokens : 64;
          const int boxes = (task.rows + kBox - 1) / kBox;
          ptx::barrier_arrive_expect(full, static_cast<std::uint32_t>(S::kChunks * boxes * kBox * 128));
#pragma unroll
          for (int c = 0; c < S::kChunks; ++c) {
            for (int b = 0; b < boxes; ++b) {
              ptx::tma_load_2d(to + c * S::kTokenBytes + b * kBox * 128, &p.tokens, full,
                               (i * S::kChunks + c) * S::kChunkK, static_cast<int>(task.first) + b * kBox);
            }
          }
        }
      }
      cursor.advance();
    }
    __syncwarp();
    if (task.expert == kEndOfTasks) return;
  }
}

// --- the multiplying warpgroups -------------------------------------------------------------------
template <typename S>
class Multiplier {
 public:
  using Sums = float[S::kBlocks][S::kTokens / 2];

  __device__ Multiplier(const Params& p, const SharedMemory<S>& shared, int warpgroup)
      : p_(p), shared_(shared), warpgroup_(warpgroup) {}

  __device__ void run() {
    ptx::wait_for_earlier_kernels();
    Epilogue<S> epilogue(p_, shared_.epilogue(warpgroup_), warpgroup_);
    for (int ring = 0;; ring = ring == S::kStages ? 0 : ring + 1) {
      ptx::barrier_wait(shared_.full(cursor_.stage), cursor_.round);
      const Task task = shared_.tasks()[ring];
      if (task.expert == kEndOfTasks) return;
      if (task.expert < 0) {
        release(cursor_.stage);
        cursor_.advance();
        epilogue.zeros(task);
        continue;
      }
      epilogue.begin(task);
      Sums sums;
      multiply_rows<S::kTokens>(task, sums);
      epilogue.finish(task, sums);
    }
  }

 private:
  // Fewer tokens than the tile has room for need a smaller instruction only.
  template <int N>
  __device__ void multiply_rows(const Task& task, Sums& sums) {
    constexpr int kSmaller = N == 256 ? 192 : N == 192 ? 128 : N == 128 ? 64 : N / 2;
    constexpr bool kHasSmaller = S::kTokens == 256 ? N > 64 : S::kTokens == 16 ? N > 8 : N > 16;
    if constexpr (kHasSmaller) {
      if (task.rows <= kSmaller) return multiply_rows<kSmaller>(task, sums);
    }
    if constexpr (S::kPromotes) {
      multiply_promoted<N>(task, sums);
    } else {
      multiply<N>(sums);
    }
  }

  __device__ void release(int stage) {
    if (threadIdx.x % 32 == 0) ptx::barrier_arrive(shared_.empty(stage));
  }
  __device__ std::uint64_t weights(int stage, int chunk, int block) const {
    return ptx::operand_descriptor(ptx::shared_address(shared_.weights(stage)) + chunk * S::kWeightBytes +
                                   (warpgroup_ * S::kBlocks + block) * 8192);
  }
  __device__ std::uint64_t tokens(int stage, int chunk) const {
    return ptx::operand_descriptor(ptx::shared_address(shared_.tokens(stage)) + chunk * S::kTokenBytes);
  }

  template <int N>
  __device__ void multiply(Sums& sums) {
    const bool gathered = p_.token_load == TokenLoad::kGather;
    const int stages = (p_.k_chunks + S::kChunks - 1) / S::kChunks;
    int last = 0;
    for (int i = 0; i < stages; ++i) {
      ptx::barrier_wait(shared_.full(cursor_.stage), cursor_.round);
      if (gathered) ptx::fence_async_proxy();
      ptx::wgmma_fence();
#pragma unroll
      for (int c = 0; c < S::kChunks; ++c) {
#pragma unroll
        for (int b = 0; b < S::kBlocks; ++b) {
          const std::uint64_t a = weights(cursor_.stage, c, b), t = tokens(cursor_.stage, c);
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            ptx::wgmma<S::kElement, N>(sums[b], a + 2 * k, t + 2 * k, c + k == 0 ? i : 1);
          }
        }
      }
      ptx::wgmma_commit();
      ptx::wgmma_wait<1>();
      if (i > 0) release(last);  // one behind, so that the tensor cores always have work queued
      last = cursor_.stage;
      cursor_.advance();
    }
    ptx::wgmma_wait<0>();
    release(last);
  }

  template <int N>
  __device__ void multiply_promoted(const Task& task, Sums& sums) {
#pragma unroll
    for (int b = 0; b < S::kBlocks; ++b) {
#pragma unroll
      for (int i = 0; i < N / 2; ++i) sums[b][i] = 0.0f;
    }
    const bool gathered = p_.token_load == TokenLoad::kGather;
    const int stages = (p_.k_chunks + S::kChunks - 1) / S::kChunks;
    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    // This thread's two weight rows (of block 0: with two blocks the host has made sure that both lie
    // in the same cells) and where their scales begin.
    const float* scale[2] = {nullptr, nullptr};
    float next[2] = {1.0f, 1.0f};
    if (p_.block_scaled) {
      const int row = warpgroup_ * S::kBlocks * 64 + threadIdx.x % 128 / 32 * 16 + g;
      const std::int64_t rows = p_.gated ? 2 * p_.columns : p_.columns;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        std::int64_t n = weight_row(p_, task.row_task, row + 8 * r);
        if (n >= rows) n = rows - 1;
        scale[r] = p_.weight_scale + task.expert * p_.scale_expert + n / p_.scale_group * p_.scale_row;
        next[r] = __ldg(scale[r]);
      }
    }
    for (int i = 0; i < stages; ++i) {
      ptx::barrier_wait(shared_.full(cursor_.stage), cursor_.round);
      if (gathered) ptx::fence_async_proxy();
#pragma unroll
      for (int c = 0; c < S::kChunks; ++c) {
        const float mine[2] = {next[0], next[1]};
        const int following = i * S::kChunks + c + 1;
        if (p_.block_scaled && following < p_.k_chunks) {
          next[0] = __ldg(scale[0] + following * p_.scale_k);
          next[1] = __ldg(scale[1] + following * p_.scale_k);
        }
        const float* const token_scale = shared_.scales(cursor_.stage) + c * S::kTokens + 2 * q;
#pragma unroll
        for (int b = 0; b < S::kBlocks; ++b) {
          float part[N / 2];
          const std::uint64_t a = weights(cursor_.stage, c, b), t = tokens(cursor_.stage, c);
          ptx::wgmma_fence();
#pragma unroll
          for (int k = 0; k < 4; ++k) ptx::wgmma<S::kElement, N>(part, a + 2 * k, t + 2 * k, k > 0);
          ptx::wgmma_commit();
          ptx::wgmma_wait<0>();
          if (p_.block_scaled) {
#pragma unroll
            for (int j = 0; j < N / 8; ++j) {
              const float2 s = *reinterpret_cast<const float2*>(token_scale + 8 * j);
              sums[b][4 * j] = fmaf(part[4 * j], s.x * mine[0], sums[b][4 * j]);
              sums[b][4 * j + 1] = fmaf(part[4 * j + 1], s.y * mine[0], sums[b][4 * j + 1]);
              sums[b][4 * j + 2] = fmaf(part[4 * j + 2], s.x * mine[1], sums[b][4 * j + 2]);
              sums[b][4 * j + 3] = fmaf(part[4 * j + 3], s.y * mine[1], sums[b][4 * j + 3]);
            }
          } else {
#pragma unroll
            for (int j = 0; j < N / 2; ++j) sums[b][j] += part[j];
          }
        }
      }
      release(cursor_.stage);
      cursor_.advance();
    }
  }

  const Params& p_;
  const SharedMemory<S>& shared_;
  int warpgroup_;
  Cursor<S::kStages> cursor_;
};

// --- the kernel -----------------------------------------------------------------------------------
template <typename S>
__global__ void __launch_bounds__(S::kThreads, 1) gemm_kernel(const __grid_constant__ Params p) {
  extern __shared__ unsigned char raw[];
  const SharedMemory<S> shared{raw + (1024 - ptx::shared_address(raw) % 1024) % 1024};
  if (threadIdx.x == 0) {
    ptx::tensor_map_prefetch(&p.weights);
    const bool gather = p.token_load == TokenLoad::kGather;
    const bool scales = S::kPromotes && p.block_scaled;
    const int arrivals = 1 + (gather || scales ? kLoaders : 0) + (gather ? 0 : 1);
    if (!gather) ptx::tensor_map_prefetch(&p.tokens);
    for (int i = 0; i < S::kStages; ++i) {
      ptx::barrier_init(shared.full(i), static_cast<std::uint32_t>(arrivals));
      ptx::barrier_init(shared.empty(i), 4 * S::kWarpgroups);
    }
    ptx::barrier_init_fence();
  }
  __syncthreads();
  // Registers: 64 Ki in all. With one consumer everybody already has what he needs.
  constexpr int kForMultiplying = 224, kForLoading = 56;
  if (threadIdx.x < 128) {
    if constexpr (S::kWarpgroups == 2) ptx::give_registers<kForLoading>();
    if (threadIdx.x < 32) {
      load_weights<S>(p, shared);
    } else {
      load_tokens<S>(p, shared);
    }
  } else {
    if constexpr (S::kWarpgroups == 2) ptx::take_registers<kForMultiplying>();
    Multiplier<S>(p, shared, static_cast<int>(threadIdx.x) / 128 - 1).run();
  }
}

template <typename S>
void launch_gemm(const Params& params, int grid, cudaStream_t stream) {
  launch("grouped product (SM90)", gemm_kernel<S>,
         {.grid = dim3(static_cast<unsigned>(grid)),
          .block = dim3(S::kThreads),
          .shared_bytes = S::kSharedBytes,
          .dependency = Dependency::kOverlap},
         stream, params);
}

}  // namespace moesaic::cuda::sm90
