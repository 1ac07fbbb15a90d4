// SPDX-License-Identifier: Apache-2.0
// The rate of mma.sync when nothing but registers is touched: the ceiling of the SM80 kernels,
// which bench/promises.py holds them against. One line per type: its name, TFLOPS (TOPS).
//
//   nvcc -O3 -std=c++17 -arch=sm_80 bench/mma_peak.cu -o build/mma_peak
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <vector>

namespace {

constexpr int kChains = 8, kRounds = 1 << 12, kThreads = 512;

struct Bf16 {
  static constexpr const char* kName = "bf16";
  static constexpr int kK = 16;
  static __device__ void mma(float (&d)[4], const std::uint32_t (&a)[4],
                             const std::uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
};
struct Tf32 {
  static constexpr const char* kName = "tf32";
  static constexpr int kK = 8;
  static __device__ void mma(float (&d)[4], const std::uint32_t (&a)[4],
                             const std::uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
};

// Independent chains, random operands: multiplying zeros draws less power and runs faster.
template <typename T>
__global__ void __launch_bounds__(kThreads, 1) products(float* out) {
  std::uint32_t a[4], b[2], seed = threadIdx.x * 2654435761u + blockIdx.x;
  const auto next = [&] {
    seed ^= seed << 13, seed ^= seed >> 17, seed ^= seed << 5;
    return (seed & 0x80ff80ffu) | 0x3f003f00u;
  };
  for (std::uint32_t& x : a) x = next();
  for (std::uint32_t& x : b) x = next();
  float d[kChains][4] = {};
  for (int round = 0; round < kRounds; ++round)
#pragma unroll
    for (int c = 0; c < kChains; ++c) T::mma(d[c], a, b);
  float sum = 0;
  for (const auto& chain : d)
    for (const float x : chain) sum += x;
  out[blockIdx.x * kThreads + threadIdx.x] = sum;
}

template <typename T>
bool print_rate(float* out, int blocks) {
  cudaEvent_t begin, end;
  cudaEventCreate(&begin);
  cudaEventCreate(&end);
  std::vector<float> times;
  for (int i = 0; i < 12; ++i) {
    cudaEventRecord(begin);
    products<T><<<blocks, kThreads>>>(out);
    cudaEventRecord(end);
    if (cudaEventSynchronize(end) != cudaSuccess) return false;
    float ms = 0;
    cudaEventElapsedTime(&ms, begin, end);
    if (i >= 2) times.push_back(ms);
  }
  std::sort(times.begin(), times.end());
  const double operations = 2.0 * 16 * 8 * T::kK * kChains * kRounds * (kThreads / 32) * blocks;
  std::printf("%s %.1f\n", T::kName, operations / times[times.size() / 2] * 1e-9);
  return true;
}

}  // namespace

int main() {
  cudaDeviceProp device;
  float* out = nullptr;
  if (cudaGetDeviceProperties(&device, 0) != cudaSuccess) return 1;
  const int blocks = device.multiProcessorCount;
  if (cudaMalloc(&out, sizeof(float) * kThreads * blocks) != cudaSuccess) return 1;
  return print_rate<Bf16>(out, blocks) && print_rate<Tf32>(out, blocks) ? 0 : 1;
}
