// SPDX-License-Identifier: Apache-2.0
// Rows of C in any type and strides, behind any activation: by way of fp32 in shared memory.
#pragma once

#include "cuda/sm90/epilogue_base.h"

namespace moesaic::cuda::sm90 {

template <typename S>
class StagedEpilogue : public EpilogueBase<S> {
 public:
  using Base = EpilogueBase<S>;
  using Base::Base;

 protected:
  using Base::buffer;
  using Base::column;
  using Base::factors;
  using Base::inverse_scale;
  using Base::kBlocks;
  using Base::kTokens;
  using Base::lane_;
  using Base::limit;
  using Base::p_;
  using Base::quantizes;
  using Base::row_terms;
  using Base::rows;
  using Base::scaled;
  using Base::sync;
  using Base::thread_;
  using Base::warp_;
  using typename Base::Quad;

  // 16 tokens at a time, so that the code behind it is a short loop.
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

 private:
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
};

}  // namespace moesaic::cuda::sm90
