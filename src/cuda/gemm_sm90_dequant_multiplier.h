// SPDX-License-Identifier: Apache-2.0
// The multiplying warpgroups of the weight-only product: they widen their weights themselves, in
// registers, and scale sums over 128 (or 32) of K. Three loops, by what a task leaves of registers.
// (A fourth, of warps that never meet: gemm_sm90_dequant_warps.h.)
#pragma once

#include "cuda/gemm_sm90_consumer.h"
#include "cuda/gemm_sm90_dequant_loader.h"
#include "cuda/overlap.h"
#include "cuda/ptx_wgmma_rs_sm90.h"

namespace moesaic::cuda::sm90 {

template <typename S>
class DequantMultiplier : protected Consumer<S, DequantParams> {
 public:
  using Base = Consumer<S, DequantParams>;
  using Base::Base;
  using Weight = typename S::Weight;
  using Sums = float[S::kBlocks][S::kTokens / 2];
  using H = Half<S::kElement>;

  __device__ void run() {
    wait_for_earlier_kernels();
    for (int ring = 0;; ring = ring == S::kRing - 1 ? 0 : ring + 1) {
      ptx::barrier_wait(shared_.full(cursor_.stage), cursor_.round);
      const Task task = load_task(ring);
      if (task.expert == kEndOfTasks) return;
      if (task.expert < 0) {
        skip(ring, task);
        continue;
      }
      epilogue(ring, task).begin(task);
      find_zeros(task);
      Sums sums;
      multiply_rows<S::kTokens>(task.rows, sums);
      const Task again = load_task(ring);  // registers are what the main loop is short of
      epilogue(ring, again).finish(again, sums);
    }
  }

 protected:
  using Base::cursor_;
  using Base::epilogue;
  using Base::load_task;
  using Base::load_task_of_run;
  using Base::p_;
  using Base::release;
  using Base::shared_;
  using Base::skip;
  using Base::warpgroup;

  static constexpr int kBlockBytes = 64 * S::kRowBytes;

  template <int N>
  __device__ void multiply_rows(int rows, Sums& sums) {
    if constexpr (S::kWarpwise) {
      if constexpr (N > 8) {
        if (rows <= N - 8) return multiply_rows<N - 8>(rows, sums);
      }
      multiply_warpwise<N>(sums);
    } else {
      if constexpr (N > 16) {
        if (rows <= N - 16) return multiply_rows<N - 16>(rows, sums);
      }
      if constexpr (S::kTokens <= 64)
        multiply_batches<N>(sums);
      else
        multiply<N>(sums);
    }
  }

  // Of block 0, the first of this thread's two rows: its index in the task.
  __device__ static std::uint32_t row() {
    const auto thread = static_cast<std::uint32_t>(ptx::thread_index());
    return (thread / 128 - 1) * S::kBlocks * 64 + thread / 32 % 4 * 16 + thread % 32 / 4;
  }

  // Bit offsets of the zero points of this thread's rows inside their words, a byte each.
  __device__ void find_zeros(const Task& task) {
    if constexpr (Weight::kZeros) {
      zero_bits_ = 0;
#pragma unroll
      for (int i = 0; i < 2 * S::kBlocks; ++i) {
        const std::uint32_t n = existing_row(p_, task.row_task, row() + i / 2 * 64 + i % 2 * 8);
        const std::uint32_t bits =
            zero_offset(p_, task.expert, n) % 4 * 8 + (p_.zero_nibbles & n) * 4;
        zero_bits_ |= bits << (8 * i);
      }
    }
  }
  // -zero * 2^-kShift of both rows of a block, twice each.
  __device__ void load_zeros(std::uint32_t (&zero)[2], int stage, std::uint32_t row, int group,
                             int block, std::uint32_t k_group) const {
    if constexpr (Weight::kZeros) {
      const auto* const words =
          reinterpret_cast<const std::uint32_t*>(shared_.scales(stage) + S::kScales) +
          group * S::kRows + row + block * 64;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const std::uint32_t bits =
            (zero_bits_ >> (8 * (2 * block + h))) + k_group * p_.zero_group * 8;
        const std::uint32_t z = (words[h * 8] >> (bits % 32)) & (p_.zero_nibbles ? 0xfu : 0xffu);
        zero[h] = ptx::fma_pair<S::kElement>(z * 0x10001u, H::kMinus, 0);
      }
    }
  }

  // What the loops below know of this thread throughout a task.
  struct Place {
    bool gathered;  // tokens came by cp.async, which wgmma does not see by itself
    int stages, lane;
    Unpacking unpacking;
    std::uint32_t middle;  // the zero point, as load_zeros has it, where all have the same
    std::uint32_t row;     // of block 0, the first of this thread's two: see row()
    std::uint32_t offset;  // where the lane reads in the weights of a stage
  };
  __device__ Place place() const {
    Place at;
    at.gathered = p_.token_load == TokenLoad::kGather;
    at.stages = (p_.k_chunks + S::kChunks - 1) / S::kChunks;
    at.lane = ptx::thread_index() % 32;
    at.unpacking = Weight::unpacking(at.lane % 4, p_.flip);
    at.middle = ptx::fma_pair<S::kElement>(Weight::kMiddle * 0x10001u, H::kMinus, 0);
    at.row = row();
    at.offset = (at.row - at.lane / 4) * S::kRowBytes +
                Weight::template lane_offset<S::kRowBytes>(at.lane / 4, at.lane % 4);
    return at;
  }
  __device__ void wait_for_stage(const Place& place, const Cursor<S::kStages>& at) const {
    ptx::barrier_wait(shared_.full(at.stage), at.round);
    if (place.gathered) ptx::fence_async_proxy();
  }
  template <int N>
  __device__ static void clear(Sums& sums) {
#pragma unroll
    for (int b = 0; b < S::kBlocks; ++b) {
#pragma unroll
      for (int i = 0; i < N / 2; ++i) sums[b][i] = 0.0f;
    }
  }

  template <int N>
  __device__ void multiply(Sums& sums) {
    clear<N>(sums);
    const Place place = this->place();
    const int stages = place.stages;
    std::uint32_t zero[2] = {place.middle, place.middle};
    // 16 of K at a time. The fragment of the next is made while the tensor cores work on this,
    // across blocks, groups and stages; ptxas keeps the two apart.
    RawWeights raw;
    std::uint32_t a[2][4];
    const auto begin_part = [&](int stage, int block, std::uint32_t index, int group) {
      Weight::template load<S::kRowBytes>(
          raw, ptx::shared_address(shared_.weights(stage)) + place.offset + block * kBlockBytes,
          group * (S::kSteps / 2));
      load_zeros(zero, stage, place.row, group, block, k_group(index, group * (S::kSteps / 2)));
      Weight::template fragment<S::kElement>(a[0], raw, 0, place.unpacking, zero);
    };
    wait_for_stage(place, cursor_);
    begin_part(cursor_.stage, 0, 0, 0);
    for (int i = 0; i < stages; ++i) {
      const int stage = cursor_.stage;
      scale_slot_.enter(i, stage);
#pragma unroll 1  // the short groups: unrolled, they need more registers than there are
      for (int group = 0; group < S::kGroups; ++group) {
        const int first = group * (S::kSteps / 2);  // in 32s of K
        const std::uint64_t tokens =
            ptx::operand_descriptor(ptx::shared_address(shared_.tokens(stage)));
        float part[N / 2];
#pragma unroll
        for (int block = 0; block < S::kBlocks; ++block) {
          const std::uint32_t weights =
              ptx::shared_address(shared_.weights(stage)) + place.offset + block * kBlockBytes;
#pragma unroll
          for (int k = 0; k < S::kSteps; ++k) {
            const int q = first + k / 2;
            ptx::wgmma_fence();
            ptx::wgmma<S::kElement, N>(
                part, a[k % 2], tokens + q / 2 * (S::kTokenBytes / 16) + q % 2 * 4 + k % 2 * 2,
                k > 0);
            ptx::wgmma_commit();
            if (k + 1 < S::kSteps) {
              if (k % 2 == 1) Weight::template load<S::kRowBytes>(raw, weights, q + 1);
              if (k > 0) ptx::wgmma_wait<1>();  // the other fragment is free
              Weight::template fragment<S::kElement>(a[(k + 1) % 2], raw, (k + 1) % 2,
                                                     place.unpacking, zero);
            } else if (block + 1 < S::kBlocks) {
              ptx::wgmma_wait<1>();
              begin_part(stage, block + 1, i, group);
            } else if (group + 1 < S::kGroups) {
              ptx::wgmma_wait<1>();
              begin_part(stage, 0, i, group + 1);
            } else if (i + 1 < stages) {
              ptx::wgmma_wait<1>();
              Cursor<S::kStages> following = cursor_;
              following.advance();
              wait_for_stage(place, following);
              begin_part(following.stage, 0, i + 1, 0);
            }
          }
          ptx::wgmma_wait<0>();
          promote<N>(sums[block], part, scales_of(place, i, group, block));
        }
      }
      release(stage);
      cursor_.advance();
    }
  }

  // Few tokens leave registers for several steps at once.
  template <int N>
  __device__ void multiply_batches(Sums& sums) {
    clear<N>(sums);
    const Place place = this->place();
    const int stages = place.stages;
    std::uint32_t zero[2] = {place.middle, place.middle};
    // A batch of a few steps of 16 of K at a time. While the tensor cores work on a batch, the
    // fragments of the next are made and the words of the one behind it are read, across blocks,
    // groups and stages; ptxas keeps the two sets of fragments apart. The second block's
    // products start before the first one's part is promoted.
    constexpr int kTogether = S::kSteps < 4 ? S::kSteps : 4;
    constexpr int kBatches = S::kSteps / kTogether, kAll = kBatches * S::kBlocks;
    static_assert(S::kBlocks == 2);
    RawWeights raw[kTogether / 2];
    std::uint32_t a[2][kTogether][4];
    float part[2][N / 2];
    // Batch j of a group: words, then fragments.
    const auto read = [&](int stage, int group, int j) {
#pragma unroll
      for (int r = 0; r < kTogether / 2; ++r) {
        Weight::template load<S::kRowBytes>(
            raw[r],
            ptx::shared_address(shared_.weights(stage)) + place.offset + j / kBatches * kBlockBytes,
            (group * S::kSteps + j % kBatches * kTogether) / 2 + r);
      }
    };
    const auto make = [&](std::uint32_t(&out)[kTogether][4], int stage, int i, int group, int j) {
      if (j % kBatches == 0) {
        load_zeros(zero, stage, place.row, group, j / kBatches,
                   k_group(i, group * (S::kSteps / 2)));
      }
#pragma unroll
      for (int k = 0; k < kTogether; ++k) {
        Weight::template fragment<S::kElement>(out[k], raw[k / 2], k % 2, place.unpacking, zero);
      }
    };
    wait_for_stage(place, cursor_);
    read(cursor_.stage, 0, 0);
    make(a[0], cursor_.stage, 0, 0, 0);
    read(cursor_.stage, 0, 1);
    for (int i = 0; i < stages; ++i) {
      const int stage = cursor_.stage;
      scale_slot_.enter(i, stage);
#pragma unroll 1  // the short groups: unrolled, they need more registers than there are
      for (int group = 0; group < S::kGroups; ++group) {
        // The descriptor's upper half is the same for all, and the lower does not overflow: 64-bit
        // sums would cost registers.
        const auto tokens = static_cast<std::uint32_t>(
            ptx::operand_descriptor(ptx::shared_address(shared_.tokens(stage))));
        Cursor<S::kStages> following = cursor_;
        const bool last = group + 1 == S::kGroups;  // behind it comes the next stage
        if (last) following.advance();
        const int next_i = last ? i + 1 : i, next_group = last ? 0 : group + 1;
#pragma unroll
        for (int j = 0; j < kAll; ++j) {
          const int block = j / kBatches, c = j % kBatches;
          ptx::wgmma_fence();
#pragma unroll
          for (int k = 0; k < kTogether; ++k) {
            const int step = group * S::kSteps + c * kTogether + k;
            const std::uint32_t low = tokens + step / 4 * (S::kTokenBytes / 16) + step % 4 * 2;
            ptx::wgmma<S::kElement, N>(part[block], a[j % 2][k],
                                       (ptx::operand_descriptor(0) & 0xffffffff00000000ull) | low,
                                       c + k > 0);
          }
          ptx::wgmma_commit();
          ptx::wgmma_wait<1>();  // the batch before this one: its fragments' place is free
          if (j == kBatches) promote<N>(sums[0], part[0], scales_of(place, i, group, 0));
          // Behind the end of the task words are read and fragments are made that nobody uses.
          if (j + 1 < kAll) {
            make(a[(j + 1) % 2], stage, i, group, j + 1);
          } else {
            make(a[(j + 1) % 2], following.stage, next_i, next_group, 0);
          }
          if (j + 2 < kAll) {
            read(stage, group, j + 2);
          } else {
            if (j + 2 == kAll && last && i + 1 < stages) wait_for_stage(place, following);
            read(following.stage, next_group, j + 2 - kAll);
          }
          if (j + 1 == kAll) {
            ptx::wgmma_wait<0>();
            promote<N>(sums[1], part[1], scales_of(place, i, group, 1));
          }
        }
      }
      release(stage);
      cursor_.advance();
    }
  }

  // Two groups at a time, for the products of one wait for each other. Where stages have several.
  template <int N>
  __device__ void multiply_warpwise(Sums& sums) {
    constexpr int kTogether = S::kGroups < 2 ? 1 : 2;
    clear<N>(sums);
    const Place place = this->place();
    const int stages = place.stages, lane = place.lane;
    const std::uint32_t token = lane % 8 * 128 + ((lane / 8 ^ lane % 8) << 4);
    for (int i = 0; i < stages; ++i) {
      const int stage = cursor_.stage;
      ptx::barrier_wait(shared_.full(stage), cursor_.round);
      const std::uint32_t weights = ptx::shared_address(shared_.weights(stage)) + place.offset;
      const std::uint32_t tokens = ptx::shared_address(shared_.tokens(stage)) + token;
      const float* const scale = shared_.scales(stage) + place.row * S::kGroups;
#pragma unroll
      for (int group = 0; group < S::kGroups; group += kTogether) {
        float part[kTogether][N / 2] = {};
        std::uint32_t zero[kTogether][2];
#pragma unroll
        for (int t = 0; t < kTogether; ++t) {
          zero[t][0] = zero[t][1] = place.middle;
          load_zeros(zero[t], stage, place.row, group + t, 0,
                     k_group(i, (group + t) * (S::kSteps / 2)));
        }
#pragma unroll
        for (int q = 0; q < S::kSteps / 2; ++q) {
          RawWeights raw[kTogether];
          std::uint32_t b[kTogether][N / 8][4];
#pragma unroll
          for (int t = 0; t < kTogether; ++t) {
            const int block = (group + t) * (S::kSteps / 2) + q;
            Weight::template load<S::kRowBytes>(raw[t], weights, block);
#pragma unroll
            for (int n = 0; n < N / 8; ++n) {
              ptx::load_matrices(
                  b[t][n], ((tokens ^ (block % 2 << 6)) + block / 2 * S::kTokenBytes) + n * 1024);
            }
          }
#pragma unroll
          for (int s = 0; s < 2; ++s) {
#pragma unroll
            for (int t = 0; t < kTogether; ++t) {
              std::uint32_t a[4];
              Weight::template fragment<S::kElement>(a, raw[t], s, place.unpacking, zero[t]);
#pragma unroll
              for (int n = 0; n < N / 8; ++n) {
                ptx::mma_16x8<S::kElement>(&part[t][4 * n], a, b[t][n][2 * s], b[t][n][2 * s + 1]);
              }
            }
          }
        }
#pragma unroll
        for (int t = 0; t < kTogether; ++t) {
          promote<N>(sums[0], part[t], scale + group + t);
        }
      }
      release(stage);
      cursor_.advance();
    }
  }

  // Of stage i of a task, which scale_slot_ has entered: where the scale of this thread's first row
  // of a block lies.
  __device__ const float* scales_of(const Place& place, int i, int group, int block) const {
    return shared_.scales(scale_slot_.index) + (place.row + block * 64) * S::kScalePitch + group +
           i % S::kScaleStages;
  }
  // scale: of this thread's first row; its second one is 8 further.
  template <int N, int kSums>
  __device__ static void promote(float (&sum)[kSums], const float (&part)[N / 2],
                                 const float* scale) {
    const float low = scale[0] * Weight::template kUnit<S::kElement>;
    const float high = scale[8 * S::kScalePitch] * Weight::template kUnit<S::kElement>;
#pragma unroll
    for (int n = 0; n < N / 8; ++n) {
      sum[4 * n] = fmaf(part[4 * n], low, sum[4 * n]);
      sum[4 * n + 1] = fmaf(part[4 * n + 1], low, sum[4 * n + 1]);
      sum[4 * n + 2] = fmaf(part[4 * n + 2], high, sum[4 * n + 2]);
      sum[4 * n + 3] = fmaf(part[4 * n + 3], high, sum[4 * n + 3]);
    }
  }
  __device__ std::uint32_t k_group(int stage, int block) const {
    return Weight::kZeros ? group_of(p_, stage * kStageBlocks<S> + block) : 0;
  }

  std::uint32_t zero_bits_ = 0;
  ScaleSlot<S> scale_slot_;
};

}  // namespace moesaic::cuda::sm90
