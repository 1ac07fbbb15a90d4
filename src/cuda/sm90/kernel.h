// SPDX-License-Identifier: Apache-2.0
// The grouped product on SM90a: persistent CTAs of one loading warpgroup (warp 0: weights by TMA;
// warps 1 and 2, of some kernels 3: tokens, gathered by cp.async or by TMA) and one or two
// multiplying warpgroups. A ring of stages runs through all tasks of a CTA and never drains between
// them.
//
// Every sum is one chain of fp32 accumulations in ascending K, in chunks of 128 bytes, whatever the
// shape of the tile: all tactics give the same bits. e4m3 is promoted to fp32 after every chunk
// (128 of K), since wgmma keeps few bits of such sums.
#pragma once

#include "cuda/launch.h"
#include "cuda/overlap.h"
#include "cuda/sm90/multiplier.h"
#include "cuda/sm90/upright.h"
#include "cuda/sm90/upright_epilogue.h"
#include "cuda/sm90/weight_loader.h"

namespace moesaic::cuda::sm90 {

// --- the multiplying warpgroups
template <typename S>
class Multiplier : private MultiplierBase<S, Params> {
 public:
  using Base = MultiplierBase<S, Params>;
  using Base::Base;
  using Sums = float[S::kBlocks][S::kTokens / 2];

  __device__ __forceinline__ void run() {
    if constexpr (S::kBringsTerms)
      Epilogue<S>::place_terms(p_, shared_.epilogue(0), static_cast<int>(threadIdx.x) - 128);
    wait_for_earlier_kernels();
    for (int ring = 0;; ring = ring == S::kRing - 1 ? 0 : ring + 1) {
      ptx::barrier_wait(shared_.full(cursor_.stage), cursor_.round);
      Task task = load_task(ring);
      if (task.expert == kEndOfTasks) return;
      if (task.expert < 0) {
        skip(ring, task);
        continue;
      }
      for (int r = 0;; task = load_task_of_run(ring, r)) {
        if constexpr (!S::kBringsTerms) {
          epilogue(ring, task).begin(task);
        } else if (p_.quantizer.kind == Quantizes::kStatic || p_.terms == Terms::kOne) {
          ptx::barrier_wait(shared_.full(cursor_.stage), cursor_.round);
          epilogue(ring, task).spread_terms();
        }
        Sums sums;
        if constexpr (S::kHasUpright) {
          if (runs_upright(p_, task.rows)) {
            multiply_upright(task.rows, sums);
            const Task again = load_task_of_run(ring, r);
            const int mine = warpgroup();
            UprightEpilogue<S>(p_, shared_.epilogue(mine), table(ring), mine, again.term_place)
                .finish(again, sums);
            if (++r == again.run) break;
            continue;
          }
        }
        multiply_rows<S::kTokens>(task.rows, sums);
        // The task is still there: its place is needed only when a stage of the next task is free
        // again. Read twice, since registers are what the main loop is short of.
        const Task again = load_task_of_run(ring, r);
        write_out(ring, again, sums);
        if (!S::kHasRuns || ++r == again.run) break;
      }
    }
  }

 private:
  using Base::cursor_;
  using Base::epilogue;
  using Base::load_task;
  using Base::load_task_of_run;
  using Base::p_;
  using Base::release;
  using Base::shared_;
  using Base::skip;
  using Base::warpgroup;

  // Found behind a product, so that nothing which follows from it is kept across the main loop.
  __device__ const unsigned char* table(int ring) const {
    ptx::opaque(ring);
    return shared_.table(ring);
  }
  __device__ __forceinline__ void write_out(int ring, const Task& task, Sums& sums) {
    const int mine = warpgroup();
    if constexpr (S::kHasGroups) {
      GroupsEpilogue<S>(p_, shared_.epilogue(mine), table(ring), mine, task.term_place)
          .finish(task, sums);
    } else if constexpr (S::kDirect) {
      DirectEpilogue<S>(p_, shared_.epilogue(mine), table(ring), mine, task.term_place)
          .finish(task, sums);
    } else {
      epilogue(ring, task).finish(task, sums);
    }
  }

  // Fewer tokens than the tile has room for need a smaller instruction only. The main loops:
  //   multiply           f16, bf16
  //   multiply_queued    e4m3, two CTAs an SM (Narrow)
  //   multiply_promoted  e4m3, other kernels for scales along K (and those without, in them)
  //   multiply_flat      e4m3, WidestFlat: never scales along K
  //   multiply_upright   e4m3, tiles that fill blocks of 64 rows (runs_upright)
  template <int N>
  __device__ void multiply_rows(int rows, Sums& sums) {
    constexpr int kStep = S::kPair == 2 ? 8 : 16;
    constexpr int kSmaller = N > 64 ? N - kStep : N / 2;
    if constexpr (kSmaller >= (S::kTokens > 16 ? 16 : 8)) {
      if (rows <= kSmaller) return multiply_rows<kSmaller>(rows, sums);
    }
    if constexpr (S::kPromotes && S::kPerSm == 2) {
      multiply_queued<N>(sums);
    } else if constexpr (S::kHasBlockScales) {
      multiply_promoted<N>(sums);
    } else if constexpr (S::kPromotes) {
      multiply_flat<N>(sums);
    } else {
      multiply<N>(sums);
    }
  }

  // What all lanes have, asked of lane 0: so ptxas sees that they have the same, and makes the
  // descriptors that follow from it in uniform registers. In others they take up to 22, are moved
  // from there in front of each instruction, and 18 sums were spilled in the loop of multiply_flat.
  __device__ static int uniform(int v) { return __shfl_sync(~0u, v, 0); }
  // `mine`: of this warpgroup's weight rows in a stage.
  __device__ std::uint64_t weights(int stage, int chunk, int block, int mine) const {
    return ptx::operand_descriptor(ptx::shared_address(shared_.weights(stage)) +
                                   chunk * S::kWeightBytes + mine + block * 8192);
  }
  __device__ std::uint64_t tokens(int stage, int chunk) const {
    return ptx::operand_descriptor(ptx::shared_address(shared_.tokens(stage)) +
                                   chunk * S::kTokenBytes);
  }

  template <int N>
  __device__ void multiply(Sums& sums) {
    const bool gathered = p_.token_load == TokenLoad::kGather;
    const int stages = (p_.k_chunks + S::kChunks - 1) / S::kChunks;
    const int mine = warpgroup() * S::kBlocks * 8192;
    int last = 0;
    for (int i = 0; i < stages; ++i) {
      ptx::barrier_wait(shared_.full(cursor_.stage), cursor_.round);
      if (gathered) ptx::fence_async_proxy();
      ptx::wgmma_fence();
#pragma unroll
      for (int c = 0; c < S::kChunks; ++c) {
#pragma unroll
        for (int b = 0; b < S::kBlocks; ++b) {
          const std::uint64_t a = weights(cursor_.stage, c, b, mine), t = tokens(cursor_.stage, c);
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
  __device__ void multiply_promoted(Sums& sums) {
#pragma unroll
    for (int b = 0; b < S::kBlocks; ++b) {
#pragma unroll
      for (int i = 0; i < N / 2; ++i) sums[b][i] = 0.0f;
    }
    const bool gathered = p_.token_load == TokenLoad::kGather;
    const int stages = (p_.k_chunks + S::kChunks - 1) / S::kChunks;
    const int thread = thread_index<S::kKeepsThread>() % 128,
              mine = warpgroup() * S::kBlocks * 8192;
    for (int i = 0; i < stages; ++i) {
      ptx::barrier_wait(shared_.full(cursor_.stage), cursor_.round);
      if (gathered) ptx::fence_async_proxy();
#pragma unroll
      for (int c = 0; c < S::kChunks; ++c) {
        const float* const scales = shared_.scales(cursor_.stage) + c * S::kScales;
        const float* const token_scale = scales + 2 * (thread % 4);
        const float* const row_scale = scales + S::kTokens + mine / 1024 + thread / 32 * 2;
#pragma unroll
        for (int b = 0; b < S::kBlocks; ++b) {
          float part[N / 2];
          const std::uint64_t a = weights(cursor_.stage, c, b, mine), t = tokens(cursor_.stage, c);
          ptx::wgmma_fence();
#pragma unroll
          for (int k = 0; k < 4; ++k) ptx::wgmma<S::kElement, N>(part, a + 2 * k, t + 2 * k, k > 0);
          ptx::wgmma_commit();
          ptx::wgmma_wait<0>();
          promote<N>(sums[b], part, token_scale, row_scale + b * 8);
        }
      }
      release(cursor_.stage);
      cursor_.advance();
    }
  }

  // The same where sums are few: both chunks of a stage are queued before the first is waited for.
  template <int N>
  __device__ void multiply_queued(Sums& sums) {
    static_assert(S::kChunks == 2 && S::kBlocks == 1);
#pragma unroll
    for (int i = 0; i < N / 2; ++i) sums[0][i] = 0.0f;
    const bool gathered = p_.token_load == TokenLoad::kGather;
    const int stages = (p_.k_chunks + 1) / 2, mine = warpgroup() * 8192;
    const int thread = thread_index<S::kKeepsThread>() % 128;
    for (int i = 0; i < stages; ++i) {
      ptx::barrier_wait(shared_.full(cursor_.stage), cursor_.round);
      if (gathered) ptx::fence_async_proxy();
      float part[2][N / 2];
      ptx::wgmma_fence();
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const std::uint64_t a = weights(cursor_.stage, c, 0, mine), t = tokens(cursor_.stage, c);
#pragma unroll
        for (int k = 0; k < 4; ++k)
          ptx::wgmma<S::kElement, N>(part[c], a + 2 * k, t + 2 * k, k > 0);
        ptx::wgmma_commit();
      }
      const float* const scales = shared_.scales(cursor_.stage);
      const float* const token_scale = scales + 2 * (thread % 4);
      const float* const row_scale = scales + S::kTokens + mine / 1024 + thread / 32 * 2;
      ptx::wgmma_wait<1>();
      promote<N>(sums[0], part[0], token_scale, row_scale);
      ptx::wgmma_wait<0>();
      promote<N>(sums[0], part[1], token_scale + S::kScales, row_scale + S::kScales);
      release(cursor_.stage);
      cursor_.advance();
    }
  }

  // The stages of a task where sums are promoted and a second batch has no registers: what has to
  // be done between two stages is done while the tensor cores still work on the first one's last
  // batch (look_ahead), or in front of its promotion (leave). Behind the promotion it stood between
  // two batches: a third of the time of a stage.
  struct Stages {
    int left;            // not yet left
    bool there = false;  // the bytes of the one at the cursor were seen
  };
  __device__ __forceinline__ bool gathered() const { return p_.token_load == TokenLoad::kGather; }
  __device__ __forceinline__ int enter(const Stages& s) const {
    const int stage = uniform(cursor_.stage);
    if (!s.there) {
      ptx::barrier_wait(shared_.full(stage), cursor_.round);
      if (gathered()) ptx::fence_async_proxy();
    }
    return stage;
  }
  __device__ __forceinline__ void look_ahead(Stages& s) {
    cursor_.advance();
    s.there = s.left > 1 && ptx::barrier_passed(shared_.full(cursor_.stage), cursor_.round);
    if (s.there && gathered()) ptx::fence_async_proxy();
  }
  __device__ __forceinline__ void leave(Stages& s, int stage) {
    release(stage);
    --s.left;
  }

  // Promoted without scales along K. What a batch makes lies beside all sums, and of more than 128
  // tokens only half of it fits.
  template <int N>
  __device__ void multiply_flat(Sums& sums) {
    static_assert(S::kChunks == 1);
    constexpr int kPart = N <= 128 ? N : (N / 2 + 7) / 8 * 8;
#pragma unroll
    for (int b = 0; b < S::kBlocks; ++b) {
#pragma unroll
      for (int i = 0; i < N / 2; ++i) sums[b][i] = 0.0f;
    }
    const int mine = uniform(warpgroup()) * S::kBlocks * 8192;
    for (Stages s{p_.k_chunks}; s.left > 0;) {
      const int stage = enter(s);
#pragma unroll
      for (int b = 0; b < S::kBlocks; ++b) {
        const bool last = b == S::kBlocks - 1;
        const std::uint64_t a = weights(stage, 0, b, mine), t = tokens(stage, 0);
        multiply_part<kPart>(&sums[b][0], a, t, s, last && N == kPart ? stage : kNotYet);
        if constexpr (N > kPart) {
          multiply_part<N - kPart>(&sums[b][kPart / 2], a, t + kPart * 128 / 16, s,
                                   last ? stage : kNotYet);
        }
      }
    }
  }
  // `left`: the stage of which this is the last batch.
  static constexpr int kNotYet = -1;
  template <int N>
  __device__ __forceinline__ void multiply_part(float* sum, std::uint64_t a, std::uint64_t t,
                                                Stages& s, int left) {
    float part[N / 2];
    issue<N>(part, a, t);
    if (left != kNotYet) look_ahead(s);
    ptx::wgmma_wait<0>();
    if (left != kNotYet) leave(s, left);
#pragma unroll
    for (int j = 0; j < N / 2; ++j) sum[j] += part[j];
  }

  // A batch: 128 bytes of K.
  template <int N>
  __device__ __forceinline__ static void issue(float (&part)[N / 2], std::uint64_t a,
                                               std::uint64_t b) {
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; ++k) ptx::wgmma<S::kElement, N>(part, a + 2 * k, b + 2 * k, k > 0);
    ptx::wgmma_commit();
  }

  template <int N>
  __device__ __forceinline__ void promote(float (&sum)[S::kTokens / 2], const float (&part)[N / 2],
                                          const float* token_scale, const float* row_scale) {
    if (p_.block_scaled) {
      const float2 now = *reinterpret_cast<const float2*>(row_scale);
#pragma unroll
      for (int j = 0; j < N / 8; ++j) {
        const float2 s = *reinterpret_cast<const float2*>(token_scale + 8 * j);
        sum[4 * j] = fmaf(part[4 * j], s.x * now.x, sum[4 * j]);
        sum[4 * j + 1] = fmaf(part[4 * j + 1], s.y * now.x, sum[4 * j + 1]);
        sum[4 * j + 2] = fmaf(part[4 * j + 2], s.x * now.y, sum[4 * j + 2]);
        sum[4 * j + 3] = fmaf(part[4 * j + 3], s.y * now.y, sum[4 * j + 3]);
      }
    } else {
#pragma unroll
      for (int j = 0; j < N / 2; ++j) sum[j] += part[j];
    }
  }

  __device__ void multiply_upright(int rows, Sums& sums) {
#pragma unroll
    for (int b = 0; b < 2; ++b) {
#pragma unroll
      for (int i = 0; i < 64; ++i) sums[b][i] = 0.0f;
    }
    const int mine = uniform(warpgroup()), token = upright_token(ptx::thread_index() % 128);
    static_assert(!S::kHasUpright || S::kStages % 2 == 0);
    for (Stages s{p_.k_chunks}; s.left > 0;) {
      const int stage = enter(s);
      const std::uint64_t t = tokens(stage, 0), w = weights(stage, 0, 0, mine * 16384);
      const float* const scales = shared_.scales(stage);
      multiply_stage(s, {stage, t, w, scales + token, scales + S::kTokens + mine * 16}, rows, sums);
      // Behind a stage with an even number lies the next one: all that has to be found out is
      // there.
      if (stage % 2 != 0 || s.left == 0) continue;
      if (!s.there) {
        ptx::barrier_wait(shared_.full(stage + 1), cursor_.round);
        if (gathered()) ptx::fence_async_proxy();
      }
      constexpr int kNext = S::kStageBytes / 16, kNextScales = S::kScaleBytes / 4;
      multiply_stage(s,
                     {stage + 1, t + kNext, w + kNext, scales + token + kNextScales,
                      scales + S::kTokens + mine * 16 + kNextScales},
                     rows, sums);
    }
  }
  struct UprightStage {
    int stage;
    std::uint64_t tokens, weights;
    const float *scale, *cells;  // of the first token, and of the first weight rows
  };
  __device__ __forceinline__ void multiply_stage(Stages& s, const UprightStage& at, int rows,
                                                 Sums& sums) {
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      if (b * 64 >= rows) break;
      const bool last = b == 1 || rows <= 64;
      float part[64];
      issue<128>(part, at.tokens + b * (8192 / 16), at.weights);
      const UprightScales factors = upright_scales(p_, at.scale + b * 64, at.cells);
      if (last) look_ahead(s);
      ptx::wgmma_wait<0>();
      if (last) leave(s, at.stage);
      promote_upright(p_, sums[b], part, factors);
    }
  }
};

// --- the kernel
template <typename S>
__global__ void __cluster_dims__(S::kPair, 1, 1) __launch_bounds__(S::kThreads, S::kPerSm)
    gemm_kernel(const __grid_constant__ Params p) {
  const SharedMemory<S> shared;
  if (threadIdx.x == 0) {
    ptx::tensor_map_prefetch(&p.weights);
    const bool gather = p.token_load == TokenLoad::kGather;
    const bool quads = S::kHasUpright && p.scale_quads && !gather;
    const bool scales = S::kHasBlockScales && p.block_scaled && !quads;
    const int arrivals =
        1 + S::kLoaderWarps + (gather || scales ? kLoaders<S> : 0);  // of loading warps, and copies
    if (!gather) ptx::tensor_map_prefetch(&p.tokens);
    for (int i = 0; i < S::kStages; ++i) {
      ptx::barrier_init(shared.full(i), static_cast<std::uint32_t>(arrivals));
      ptx::barrier_init(shared.empty(i), 4 * S::kWarpgroups * S::kPair);
    }
    ptx::barrier_init_fence();
  }
  clear_dealt<S>(shared);
  if constexpr (S::kPair == 2)
    ptx::cluster_sync();
  else
    __syncthreads();
  // Registers: 64 Ki in all. With one multiplying warpgroup everybody already has what he needs.
  constexpr int kForMultiplying = 216, kForLoading = 72;
  if (threadIdx.x < 128) {
    if constexpr (S::kWarpgroups == 2) ptx::give_registers<kForLoading>();
    if (threadIdx.x < 32) {
      load_weights<S>(p, shared);
    } else if (threadIdx.x < 32 + kLoaders<S>) {
      TokenLoader<S>(p, shared).run();
    }
  } else {
    if constexpr (S::kWarpgroups == 2) ptx::take_registers<kForMultiplying>();
    Multiplier<S>(p, shared).run();
  }
  if constexpr (S::kPair == 2) ptx::cluster_sync();  // the other may still write here
}

template <typename S>
void launch_gemm(const Params& params, int grid, cudaStream_t stream) {
  launch("grouped product (SM90)", gemm_kernel<S>,
         {.grid = dim3(static_cast<unsigned>(grid)),
          .block = dim3(S::kThreads),
          .shared_bytes = shared_size<S>(params),
          .most_shared_bytes = S::kPerSm == 2 ? kSpreadBytes : 0,
          .dependency = Dependency::kOverlap},
         stream, params);
}

}  // namespace moesaic::cuda::sm90
