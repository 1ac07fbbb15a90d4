// SPDX-License-Identifier: Apache-2.0
// The multiplying warpgroups of the weight-only product: they widen their weights themselves, in
// registers, and scale sums over 128 (or 32) of K. Four loops, by what a task leaves of registers.
// (A fifth, of warps that never meet: sm90/dequant_warps.h.)
#pragma once

#include "cuda/overlap.h"
#include "cuda/sm90/dequant_place.h"

namespace moesaic::cuda::sm90 {

template <typename S>
class DequantMultiplier : protected DequantPlace<S> {
 public:
  using Base = DequantPlace<S>;
  using Base::Base;
  using typename Base::Sums;
  using typename Base::Weight;

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
  using Base::descriptor;
  using Base::epilogue;
  using Base::find_zeros;
  using Base::k_group;
  using Base::kBlockBytes;
  using Base::kUniform;
  using Base::load_scales;
  using Base::load_task;
  using Base::load_task_of_run;
  using Base::load_zeros;
  using Base::p_;
  using Base::release;
  using Base::scale_slot_;
  using Base::scales_of;
  using Base::shared_;
  using Base::skip;
  using Base::token_descriptor;
  using Base::wait_for_stage;
  using Base::warpgroup;
  using typename Base::Place;

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
      else if constexpr (kUniform)
        multiply_pairs<N>(sums);
      else
        multiply<N>(sums);
    }
  }

  template <int N>
  __device__ void multiply(Sums& sums) {
    this->template clear<N>(sums);
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
          float scale[2];
          load_scales(scale, scales_of(place, i, group, block));
          this->template promote<N>(sums[block], part, scale);
        }
      }
      release(stage);
      cursor_.advance();
    }
  }

  // The same for long groups, whose uniform descriptors leave registers for two steps a batch:
  // words are read a batch ahead, the scales of a part at its beginning. (Two batches ahead, 124
  // bytes spilled: 1% slower at 96 tokens, 3% at 64 and 80.)
  template <int N>
  __device__ void multiply_pairs(Sums& sums) {
    this->template clear<N>(sums);
    const Place place = this->place();
    const int stages = place.stages;
    std::uint32_t zero[2] = {place.middle, place.middle};
    constexpr int kBatches = S::kSteps / 2, kAll = kBatches * S::kBlocks;
    static_assert(S::kGroups == 1);
    RawWeights raw;
    std::uint32_t a[2][2][4];
    const auto read = [&](int stage, int j) {
      Weight::template load<S::kRowBytes>(
          raw,
          ptx::shared_address(shared_.weights(stage)) + place.offset + j / kBatches * kBlockBytes,
          j % kBatches);
    };
    const auto make = [&](std::uint32_t (&out)[2][4], int stage, int i, int j) {
      if (j % kBatches == 0) load_zeros(zero, stage, place.row, 0, j / kBatches, k_group(i, 0));
#pragma unroll
      for (int k = 0; k < 2; ++k)
        Weight::template fragment<S::kElement>(out[k], raw, k, place.unpacking, zero);
    };
    wait_for_stage(place, cursor_);
    read(cursor_.stage, 0);
    make(a[0], cursor_.stage, 0, 0);
    read(cursor_.stage, 1);
    for (int i = 0; i < stages; ++i) {
      const int stage = cursor_.stage;
      scale_slot_.enter(i, stage);
      const std::uint32_t tokens = token_descriptor(stage);
      Cursor<S::kStages> following = cursor_;
      following.advance();
      float part[N / 2], scale[2];
#pragma unroll
      for (int j = 0; j < kAll; ++j) {
        const int block = j / kBatches, c = j % kBatches;
        ptx::wgmma_fence();
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const int step = 2 * c + k;
          ptx::wgmma<S::kElement, N>(
              part, a[j % 2][k],
              descriptor(tokens + step / 4 * (S::kTokenBytes / 16) + step % 4 * 2), step > 0);
        }
        ptx::wgmma_commit();
        if (c == 0)
          load_scales(scale, scales_of(place, i, 0, block));
        else
          ptx::wgmma_wait<1>();  // the other fragments' place is free
        // Behind the end of the task words are read and fragments are made that nobody uses.
        if (j + 1 < kAll)
          make(a[(j + 1) % 2], stage, i, j + 1);
        else
          make(a[(j + 1) % 2], following.stage, i + 1, 0);
        if (j + 2 < kAll) {
          read(stage, j + 2);
        } else {
          if (j + 2 == kAll && i + 1 < stages) wait_for_stage(place, following);
          read(following.stage, j + 2 - kAll);
        }
        if (c + 1 == kBatches) {
          ptx::wgmma_wait<0>();
          this->template promote<N>(sums[block], part, scale);
        }
      }
      release(stage);
      cursor_.advance();
    }
  }

  // Few tokens leave registers for several steps at once.
  template <int N>
  __device__ void multiply_batches(Sums& sums) {
    this->template clear<N>(sums);
    const Place place = this->place();
    const int stages = place.stages;
    std::uint32_t zero[2] = {place.middle, place.middle};
    // A batch of a few steps of 16 of K at a time. While the tensor cores work on a batch, the
    // fragments of the next are made and words of one behind it are read, across blocks, groups and
    // stages; ptxas keeps the two sets of fragments apart. It also begins to make them in front of
    // the products, which would wait there for words that were asked for a moment before: so those
    // are read two batches ahead, where groups are long. The second block's
    // products start before the first one's part is promoted. With kLate the first part is promoted
    // beside the last batch and the second beside the first batch of the next group: ptxas would
    // give the next fragments the place of that part, and make them behind its promotion, with no
    // product under way. (At 64 tokens there are not enough registers for it.)
    constexpr int kTogether = S::kSteps < 4 ? S::kSteps : 4;
    constexpr int kBatches = S::kSteps / kTogether, kAll = kBatches * S::kBlocks;
    static_assert(S::kBlocks == 2);
    constexpr bool kLate = kUniform && N < 64;
    constexpr int kAhead = kUniform ? 2 : 1;  // batches whose words are in registers
    RawWeights raw[kAhead][kTogether / 2];
    std::uint32_t a[2][kTogether][4];
    float part[2][N / 2], scale[2][2];
    if constexpr (kLate) {
      scale[1][0] = scale[1][1] = 0.0f;
#pragma unroll
      for (int n = 0; n < N / 2; ++n) part[1][n] = 0.0f;
    }
    // Batch j of a group: words, then fragments.
    const auto read = [&](int stage, int group, int j) {
#pragma unroll
      for (int r = 0; r < kTogether / 2; ++r) {
        Weight::template load<S::kRowBytes>(
            raw[j % kAhead][r],
            ptx::shared_address(shared_.weights(stage)) + place.offset + j / kBatches * kBlockBytes,
            (group * S::kSteps + j % kBatches * kTogether) / 2 + r);
      }
    };
    const auto make = [&](std::uint32_t (&out)[kTogether][4], int stage, int i, int group, int j) {
      if (j % kBatches == 0) {
        load_zeros(zero, stage, place.row, group, j / kBatches,
                   k_group(i, group * (S::kSteps / 2)));
      }
#pragma unroll
      for (int k = 0; k < kTogether; ++k) {
        Weight::template fragment<S::kElement>(out[k], raw[j % kAhead][k / 2], k % 2,
                                               place.unpacking, zero);
      }
    };
    wait_for_stage(place, cursor_);
    read(cursor_.stage, 0, 0);
    if (kAhead == 2) read(cursor_.stage, 0, 1);
    make(a[0], cursor_.stage, 0, 0, 0);
    read(cursor_.stage, 0, kAhead);
    for (int i = 0; i < stages; ++i) {
      const int stage = cursor_.stage;
      scale_slot_.enter(i, stage);
#pragma unroll 1  // the short groups: unrolled, they need more registers than there are
      for (int group = 0; group < S::kGroups; ++group) {
        const std::uint32_t tokens = token_descriptor(stage);
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
            ptx::wgmma<S::kElement, N>(
                part[block], a[j % 2][k],
                descriptor(tokens + step / 4 * (S::kTokenBytes / 16) + step % 4 * 2), c + k > 0);
          }
          ptx::wgmma_commit();
          if (kUniform && j == 0) {
            if constexpr (kLate) this->template promote<N>(sums[1], part[1], scale[1]);
            load_scales(scale[0], scales_of(place, i, group, 0));
            load_scales(scale[1], scales_of(place, i, group, 1));
          }
          ptx::wgmma_wait<1>();  // the batch before this one: its fragments' place is free
          if (!kUniform && j == kBatches) {
            load_scales(scale[0], scales_of(place, i, group, 0));
            this->template promote<N>(sums[0], part[0], scale[0]);
          }
          // Behind the end of the task words are read and fragments are made that nobody uses.
          if (j + 1 < kAll) {
            make(a[(j + 1) % 2], stage, i, group, j + 1);
          } else {
            make(a[(j + 1) % 2], following.stage, next_i, next_group, 0);
          }
          if (j + 1 + kAhead < kAll) {
            read(stage, group, j + 1 + kAhead);
          } else {
            if (j + 1 + kAhead == kAll && last && i + 1 < stages) wait_for_stage(place, following);
            read(following.stage, next_group, j + 1 + kAhead - kAll);
          }
          if (j + 1 == kAll) {
            if constexpr (kUniform) this->template promote<N>(sums[0], part[0], scale[0]);
            ptx::wgmma_wait<0>();
            if constexpr (!kUniform) load_scales(scale[1], scales_of(place, i, group, 1));
            if constexpr (!kLate) this->template promote<N>(sums[1], part[1], scale[1]);
          }
        }
      }
      release(stage);
      cursor_.advance();
    }
    if constexpr (kLate) this->template promote<N>(sums[1], part[1], scale[1]);
  }

  // Two groups at a time, for the products of one wait for each other. Where stages have several.
  template <int N>
  __device__ void multiply_warpwise(Sums& sums) {
    constexpr int kTogether = S::kGroups < 2 ? 1 : 2;
    this->template clear<N>(sums);
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
          float factor[2];
          load_scales(factor, scale + group + t);
          this->template promote<N>(sums[0], part[t], factor);
        }
      }
      release(stage);
      cursor_.advance();
    }
  }
};

}  // namespace moesaic::cuda::sm90
