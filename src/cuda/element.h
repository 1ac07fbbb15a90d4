// SPDX-License-Identifier: Apache-2.0
// Device side: what a stored element means, eight at a time or one, and the reductions that the
// stage kernels share. numeric.h says the same things on the host: the bits agree.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "moesaic/types.h"

namespace moesaic::cuda {

inline constexpr unsigned kAllLanes = 0xffffffffu;

// --- one element ---------------------------------------------------------------------------------
__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(std::int8_t v) { return static_cast<float>(v); }
__device__ __forceinline__ float to_float(__nv_fp8_e4m3 v) {
  return __half2float(__half(__nv_cvt_fp8_to_halfraw(v.__x, __NV_E4M3)));
}

template <typename T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}
// Saturates; NaN stays NaN, as a positive one whatever its sign was.
template <>
__device__ __forceinline__ __nv_fp8_e4m3 from_float<__nv_fp8_e4m3>(float v) {
  __nv_fp8_e4m3 out;
  out.__x = __nv_cvt_float_to_fp8(v, __NV_SATFINITE, __NV_E4M3);
  return out;
}

__device__ __forceinline__ float round_to(DType dtype, float v) {
  if (dtype == DType::kBF16) return to_float(from_float<__nv_bfloat16>(v));
  if (dtype == DType::kF16) return to_float(from_float<__half>(v));
  return v;
}

// Small tensors of any float dtype, one element at a time.
__device__ __forceinline__ float load_float(const void* data, DType dtype, std::int64_t index) {
  if (dtype == DType::kBF16) return to_float(static_cast<const __nv_bfloat16*>(data)[index]);
  if (dtype == DType::kF16) return to_float(static_cast<const __half*>(data)[index]);
  return static_cast<const float*>(data)[index];
}

// --- kVec elements (8 or 1), in whole 16-byte pieces where that is what eight of them fill -------
template <typename T, int kVec>
struct alignas(sizeof(T) * kVec < 16 ? sizeof(T) * kVec : 16) Pack {
  T element[kVec];
};
template <int kVec, typename T>
__device__ __forceinline__ Pack<T, kVec> load_pack(const T* at) {
  return *reinterpret_cast<const Pack<T, kVec>*>(at);
}
template <int kVec, typename T>
__device__ __forceinline__ void store_pack(T* at, const float (&value)[kVec]) {
  Pack<T, kVec> pack;
  if constexpr (std::is_same_v<T, __nv_fp8_e4m3> && kVec % 2 == 0) {  // one instruction makes two
#pragma unroll
    for (int i = 0; i < kVec; i += 2) {
      const __nv_fp8x2_storage_t two =
          __nv_cvt_float2_to_fp8x2(make_float2(value[i], value[i + 1]), __NV_SATFINITE, __NV_E4M3);
      pack.element[i].__x = static_cast<__nv_fp8_storage_t>(two & 0xff);
      pack.element[i + 1].__x = static_cast<__nv_fp8_storage_t>(two >> 8);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kVec; ++i) pack.element[i] = from_float<T>(value[i]);
  }
  *reinterpret_cast<Pack<T, kVec>*>(at) = pack;
}
template <int kVec>
__device__ __forceinline__ void store_float(void* data, DType dtype, std::int64_t index,
                                            const float (&value)[kVec]) {
  if (dtype == DType::kBF16)
    return store_pack<kVec>(static_cast<__nv_bfloat16*>(data) + index, value);
  if (dtype == DType::kF16) return store_pack<kVec>(static_cast<__half*>(data) + index, value);
  store_pack<kVec>(static_cast<float*>(data) + index, value);
}

// Whether rows of `stride` elements of `bytes` each may be read eight at a time.
inline bool eight_wide(const void* data, std::int64_t columns, std::int64_t stride,
                       std::size_t bytes) {
  const std::size_t align = bytes * 8 < 16 ? bytes * 8 : 16;
  return columns % 8 == 0 && stride % 8 == 0 && reinterpret_cast<std::uintptr_t>(data) % align == 0;
}

// --- a warp --------------------------------------------------------------------------------------
// The tree is fixed, so a sum has the same bits whatever else runs.
template <int kWidth = 32>
__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int offset = kWidth / 2; offset > 0; offset /= 2) v += __shfl_xor_sync(kAllLanes, v, offset);
  return v;
}
__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2)
    v = fmaxf(v, __shfl_xor_sync(kAllLanes, v, offset));
  return v;
}

}  // namespace moesaic::cuda
