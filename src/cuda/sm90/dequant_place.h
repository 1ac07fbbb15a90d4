// SPDX-License-Identifier: Apache-2.0
// Where a thread of the weight-only product stands: its rows of weights, what their zero points and
// scales are, and how a part is scaled onto the sums.
#pragma once

#include "cuda/sm90/dequant_loader.h"
#include "cuda/sm90/multiplier.h"
#include "cuda/sm90/ptx_wgmma_rs.h"

namespace moesaic::cuda::sm90 {

template <typename S>
class DequantPlace : protected MultiplierBase<S, DequantParams> {
 public:
  using Base = MultiplierBase<S, DequantParams>;
  using Base::Base;
  using Weight = typename S::Weight;
  using Sums = float[S::kBlocks][S::kTokens / 2];
  using H = Half<S::kElement>;

 protected:
  using Base::p_;
  using Base::shared_;

  static constexpr int kBlockBytes = 64 * S::kRowBytes;
  // Long groups: loops of uniform descriptors. (Short ones were not measured with them.)
  static constexpr bool kUniform = S::kSteps == 8;

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
        const std::uint32_t n = existing_row(p_, task.weight_task, row() + i / 2 * 64 + i % 2 * 8);
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
          group * S::kWeightRows + row + block * 64;
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
  // The lower half of the descriptor of a stage's tokens. The upper half is the same for all, and
  // the lower does not overflow: 64-bit sums would cost registers. The stage comes from lane 0, so
  // that ptxas sees that all lanes have the same and keeps in uniform registers what follows from
  // it, or else two moves stand in front of every product.
  __device__ std::uint32_t token_descriptor(int stage) const {
    if constexpr (kUniform) stage = __shfl_sync(~0u, stage, 0);
    return static_cast<std::uint32_t>(
        ptx::operand_descriptor(ptx::shared_address(shared_.tokens(stage))));
  }
  __device__ static constexpr std::uint64_t descriptor(std::uint32_t low) {
    return (ptx::operand_descriptor(0) & 0xffffffff00000000ull) | low;
  }
  template <int N>
  __device__ static void clear(Sums& sums) {
#pragma unroll
    for (int b = 0; b < S::kBlocks; ++b) {
#pragma unroll
      for (int i = 0; i < N / 2; ++i) sums[b][i] = 0.0f;
    }
  }

  // Of stage i of a task, which scale_slot_ has entered: where the scale of this thread's first row
  // of a block lies.
  __device__ const float* scales_of(const Place& place, int i, int group, int block) const {
    return shared_.scales(scale_slot_.index) + (place.row + block * 64) * S::kScalePitch + group +
           i % S::kScaleStages;
  }
  // Those of this thread's two rows of a block: `from` is the first one's.
  __device__ static void load_scales(float (&scale)[2], const float* from) {
    scale[0] = from[0] * Weight::template kUnit<S::kElement>;
    scale[1] = from[8 * S::kScalePitch] * Weight::template kUnit<S::kElement>;
  }
  template <int N, int kSums>
  __device__ static void promote(float (&sum)[kSums], const float (&part)[N / 2],
                                 const float (&scale)[2]) {
#pragma unroll
    for (int n = 0; n < N / 2; ++n) sum[n] = fmaf(part[n], scale[n % 4 / 2], sum[n]);
  }
  __device__ std::uint32_t k_group(int stage, int block) const {
    return Weight::kZeros ? group_of(p_, stage * kStageBlocks<S> + block) : 0;
  }

  std::uint32_t zero_bits_ = 0;
  ScaleSlot<S> scale_slot_;
};

}  // namespace moesaic::cuda::sm90
