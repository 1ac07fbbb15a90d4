// SPDX-License-Identifier: Apache-2.0
// The multiplying warps of the weight-only product for few tokens, by mma.sync. They never meet: a
// warp reads its own weight rows, writes its own columns of C, and is held up by nothing but the
// ring of stages.
#pragma once

#include "cuda/sm90/dequant_multiplier.h"

namespace moesaic::cuda::sm90 {

// What Epilogue::store_matrix does, a warp by itself: 16 weight rows of each block.
template <typename S>
class WarpEpilogue : public Epilogue<S> {
 public:
  using Base = Epilogue<S>;
  using Base::Base;

  // Whether this can write C; if not, Epilogue does.
  __device__ static bool can(const Params& p) {
    return p.store == StorePath::kMatrix && (!p.activates || is_gated(p.activation.kind));
  }

  __device__ void begin(const Task& task) {
    if (!has_terms() || this->lane_ >= 16) return;
#pragma unroll
    for (int b = 0; b < S::kBlocks; ++b) {
      const int at = b * 64 + this->warp_ * 16 + this->lane_;
      float2 row{p_.alpha ? p_.alpha[task.expert] : 1.0f, 0.0f};
      const std::int64_t n =
          weight_row<S>(p_, task.weight_task, this->warpgroup_ * S::kBlocks * 64 + at);
      if (p_.bias.data && n < (p_.gated ? 2 * p_.columns : p_.columns)) {
        row.y = load_small(p_.bias.data, p_.bias.type,
                           task.expert * p_.bias.expert_stride + n * p_.bias.stride);
      }
      this->row_terms()[at] = row;
    }
  }

  template <int N>
  __device__ void finish(const Task& task, const float (&sum)[S::kBlocks][S::kTokens / 2]) {
    __syncwarp();  // the terms are there, and what was staged for the task before has been read
    if (!p_.activates) {
      store<N, Activation::kIdentity>(task, sum, {});
    } else if (p_.activation.kind == Activation::kSwiglu) {
      store<N, Activation::kSwiglu>(task, sum, {});
    } else {
      store<N, Activation::kSwigluOai>(task, sum, p_.activation.terms(task.expert));
    }
  }

 private:
  using Base::p_;
  __device__ bool has_terms() const { return p_.alpha != nullptr || p_.bias.data != nullptr; }
  __device__ float2 terms(int b, int row) const {
    return has_terms() ? this->row_terms()[b * 64 + this->warp_ * 16 + row] : float2{1.0f, 0.0f};
  }

  template <int N, Activation kKind>
  __device__ void store(const Task& task, const float (&sum)[S::kBlocks][S::kTokens / 2],
                        const ActivationTerms& activation) {
    constexpr bool kGated = is_gated(kKind);
    constexpr int kUnits = kGated ? 1 : 2;  // of 8 columns, in a block's 16 rows
    constexpr int kRoom = 2 * S::kBufferBytes / 4;
    static_assert(S::kBlocks * 2 * S::kTokens * 16 <= kRoom && kRoom % 16 == 0);
    // Units, and in each the 16 bytes of every token: neither way do banks collide.
    unsigned char* const staged = this->shared_ + this->warp_ * kRoom;
    const int lane = this->lane_;
    const std::uint32_t mine =
        ptx::shared_address(staged) + (lane / 8 % kUnits * N + lane % 8) * 16;
    const bool swap = p_.up_first;
#pragma unroll
    for (int b = 0; b < S::kBlocks; ++b) {
      const float2 low = terms(b, lane / 4), high = terms(b, lane / 4 + 8);
#pragma unroll
      for (int octet = 0; octet < N / 8; ++octet) {
        const auto x = this->scaled(sum[b], octet, low, high);
        const std::uint32_t at = mine + (b * kUnits * N + octet * 8) * 16;
        if constexpr (kGated) {
          const float even =
              activate<kKind>(swap ? x.v[2] : x.v[0], swap ? x.v[0] : x.v[2], activation);
          const float odd =
              activate<kKind>(swap ? x.v[3] : x.v[1], swap ? x.v[1] : x.v[3], activation);
          ptx::store_matrix_transposed(at, pack16(p_.c_type, even * x.post[0], odd * x.post[1]));
        } else {
          ptx::store_matrix_x2_transposed(
              at, pack16(p_.c_type, x.v[0] * x.post[0], x.v[1] * x.post[1]),
              pack16(p_.c_type, x.v[2] * x.post[0], x.v[3] * x.post[1]));
        }
      }
    }
    __syncwarp();
    const std::int64_t end = this->limit(task);
    const std::int64_t first = this->column(task, 0) + this->warp_ * 8 * kUnits;
    constexpr int kPieces = S::kBlocks * kUnits * N;
#pragma unroll
    for (int i = 0; i < kPieces; i += 32) {
      const int piece = i + lane, token = piece % N, unit = piece / N;
      if (piece >= kPieces) break;
      const std::uint32_t row = this->rows()[token];
      const std::int64_t column = first + unit / kUnits * (kGated ? 32 : 64) + unit % kUnits * 8;
      if (row != kNoRow && column < end) {
        // The host has made sure that one 32-bit stride is all there is.
        const std::uint64_t offset =
            std::uint64_t{row} * static_cast<std::uint32_t>(p_.c_rows.stride);
        const uint4 v = *reinterpret_cast<const uint4*>(staged + piece * 16);
        *reinterpret_cast<uint4*>(static_cast<char*>(p_.c) + 2 * (offset + column)) = v;
      }
    }
  }
};

template <typename S>
class DequantWarps : private DequantMultiplier<S> {
 public:
  using Base = DequantMultiplier<S>;
  using Base::Base;
  using typename Base::Place;
  using typename Base::Sums;
  using typename Base::Weight;

  __device__ void run() {
    wait_for_earlier_kernels();
    const Place place = this->place();
    for (int ring = 0;; ring = ring == S::kRing - 1 ? 0 : ring + 1) {
      ptx::barrier_wait(shared_.full(cursor_.stage), cursor_.round);
      Task task = load_task(ring);
      if (task.expert == kEndOfTasks) return;
      if (task.expert < 0) {
        skip(ring, task);
        continue;
      }
      for (int r = 0;; task = load_task_of_run(ring, r)) {
        if (alone_)
          own(ring, task).begin(task);
        else
          epilogue(ring, task).begin(task);
        this->find_zeros(task);
        Sums sums;
        const bool done =
            task.rows <= 8 ? work<8>(ring, task, place, sums) : work<16>(ring, task, place, sums);
        if (!done) epilogue(ring, task).finish(task, sums);
        if (!S::kHasRuns || ++r == task.run) break;
        ptx::barrier_wait(shared_.full(cursor_.stage), cursor_.round);
      }
    }
  }

 private:
  using Base::cursor_;
  using Base::epilogue;
  using Base::kBlockBytes;
  using Base::load_task;
  using Base::load_task_of_run;
  using Base::p_;
  using Base::release;
  using Base::shared_;
  using Base::skip;
  using Base::warpgroup;

  __device__ WarpEpilogue<S> own(int ring, const Task& task) const {
    const int mine = warpgroup();
    return {p_, shared_.epilogue(mine), shared_.table(ring), mine, task.term_place};
  }

  // Whether C is written, too.
  template <int N>
  __device__ bool work(int ring, const Task& task, const Place& place, Sums& sums) {
    multiply<N>(place, sums);
    if (alone_) own(ring, task).template finish<N>(task, sums);
    return alone_;
  }

  // 32 of K at a time, of as many groups and blocks as make at least two chains of products: the
  // products of one wait for each other. What the next 32 need is read as soon as registers are
  // free; and a stage goes back when its last words are in registers, not when they are multiplied.
  template <int N>
  __device__ void multiply(const Place& place, Sums& sums) {
    constexpr int kTogether = S::kBlocks * N < 16 && S::kGroups % 2 == 0 ? 2 : 1;
    constexpr int kThirtyTwos = S::kSteps / 2;  // of a group
    this->template clear<N>(sums);
    const int stages = place.stages, lane = place.lane;
    const std::uint32_t token = lane % 8 * 128 + ((lane / 8 ^ lane % 8) << 4);
    RawWeights raw[kTogether][S::kBlocks];
    std::uint32_t b[kTogether][N / 8][4];
    const auto read_weights = [&](int stage, int group, int q) {
      const std::uint32_t at = ptx::shared_address(shared_.weights(stage)) + place.offset;
#pragma unroll
      for (int t = 0; t < kTogether; ++t) {
#pragma unroll
        for (int block = 0; block < S::kBlocks; ++block) {
          Weight::template load<S::kRowBytes>(raw[t][block], at + block * kBlockBytes,
                                              (group + t) * kThirtyTwos + q);
        }
      }
    };
    const auto read_tokens = [&](int stage, int group, int q) {
      const std::uint32_t at = ptx::shared_address(shared_.tokens(stage)) + token;
#pragma unroll
      for (int t = 0; t < kTogether; ++t) {
        const int k = (group + t) * kThirtyTwos + q;
#pragma unroll
        for (int n = 0; n < N / 8; ++n) {
          ptx::load_matrices(b[t][n], ((at ^ (k % 2 << 6)) + k / 2 * S::kTokenBytes) + n * 1024);
        }
      }
    };
    read_weights(cursor_.stage, 0, 0);
    read_tokens(cursor_.stage, 0, 0);
    for (int i = 0; i < stages; ++i) {
#pragma unroll
      for (int group = 0; group < S::kGroups; group += kTogether) {
        const int stage = cursor_.stage;
        float part[kTogether][S::kBlocks][N / 2] = {};
        float scale[kTogether][S::kBlocks][2];
        std::uint32_t zero[kTogether][S::kBlocks][2];
#pragma unroll
        for (int t = 0; t < kTogether; ++t) {
#pragma unroll
          for (int block = 0; block < S::kBlocks; ++block) {
            const float* const from =
                shared_.scales(stage) + (place.row + block * 64) * S::kGroups + group + t;
            scale[t][block][0] = from[0], scale[t][block][1] = from[8 * S::kGroups];
            zero[t][block][0] = zero[t][block][1] = place.middle;
            this->load_zeros(zero[t][block], stage, place.row, group + t, block,
                             this->k_group(i, (group + t) * kThirtyTwos));
          }
        }
        std::uint32_t a[kTogether][S::kBlocks][2][4];
        const auto widen = [&] {
#pragma unroll
          for (int t = 0; t < kTogether; ++t) {
#pragma unroll
            for (int block = 0; block < S::kBlocks; ++block) {
#pragma unroll
              for (int s = 0; s < 2; ++s) {
                Weight::template fragment<S::kElement>(a[t][block][s], raw[t][block], s,
                                                       place.unpacking, zero[t][block]);
              }
            }
          }
        };
        const auto product = [&] {
#pragma unroll
          for (int s = 0; s < 2; ++s) {
#pragma unroll
            for (int t = 0; t < kTogether; ++t) {
#pragma unroll
              for (int n = 0; n < N / 8; ++n) {
#pragma unroll
                for (int block = 0; block < S::kBlocks; ++block) {
                  ptx::mma_16x8<S::kElement>(&part[t][block][4 * n], a[t][block][s], b[t][n][2 * s],
                                             b[t][n][2 * s + 1]);
                }
              }
            }
          }
        };
#pragma unroll
        for (int q = 0; q < kThirtyTwos - 1; ++q) {
          widen();
          read_weights(stage, group, q + 1);
          product();
          read_tokens(stage, group, q + 1);
        }
        widen();
        if (group + kTogether < S::kGroups) {
          read_weights(stage, group + kTogether, 0);
          product();
          read_tokens(stage, group + kTogether, 0);
        } else {
          release(stage);
          cursor_.advance();
          product();
          if (i + 1 < stages) {
            ptx::barrier_wait(shared_.full(cursor_.stage), cursor_.round);
            read_weights(cursor_.stage, 0, 0);
            read_tokens(cursor_.stage, 0, 0);
          }
        }
#pragma unroll
        for (int t = 0; t < kTogether; ++t) {
#pragma unroll
          for (int block = 0; block < S::kBlocks; ++block)
            scale_up<N>(sums[block], part[t][block], scale[t][block]);
        }
      }
    }
  }

  template <int N>
  __device__ static void scale_up(float (&sum)[S::kTokens / 2], const float (&part)[N / 2],
                                  const float (&scale)[2]) {
    const float low = scale[0] * Weight::template kUnit<S::kElement>;
    const float high = scale[1] * Weight::template kUnit<S::kElement>;
#pragma unroll
    for (int n = 0; n < N / 2; ++n) sum[n] = fmaf(part[n], n % 4 < 2 ? low : high, sum[n]);
  }

  const bool alone_ = WarpEpilogue<S>::can(p_);
};

}  // namespace moesaic::cuda::sm90
