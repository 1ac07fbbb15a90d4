// SPDX-License-Identifier: Apache-2.0
// Time on a CUDA device: replays of one graph that holds several calls, each with its own routing
// and weights; and the device's ceilings: a streaming read, and bursts of 20 products of 8192^3 by
// cuBLASLt, which is looked up at run time (the library itself never uses it).
#include <cuda_runtime.h>
#include <dlfcn.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <string>
#include <thread>
#include <vector>

#include "harness/stopwatch.h"

namespace moesaic::harness {
namespace {

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess)
    throw Error(ErrorCode::kDevice, std::string(what) + ": " + cudaGetErrorString(status));
}

// Owns device memory; empty when it could not be had.
class Buffer {
 public:
  explicit Buffer(std::size_t bytes) {
    if (cudaMalloc(&data_, bytes) != cudaSuccess) {
      cudaGetLastError();
      data_ = nullptr;
    }
  }
  ~Buffer() { cudaFree(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  void* get() const { return data_; }

 private:
  void* data_ = nullptr;
};

// Random bits whose exponents lie near zero in bf16 and, byte by byte, in e4m3: real data, because
// a tensor core that multiplies zeros draws less power and runs faster.
__global__ void fill_random(std::uint32_t* words, std::size_t count, std::uint32_t keep,
                            std::uint32_t set) {
  const std::size_t step = std::size_t{gridDim.x} * blockDim.x;
  for (std::size_t i = std::size_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += step) {
    std::uint32_t x = static_cast<std::uint32_t>(i) * 2654435761u;
    x ^= x >> 15, x *= 2246822519u, x ^= x >> 13, x *= 3266489917u, x ^= x >> 16;
    words[i] = (x & keep) | set;
  }
}

// The SM's clock against the device's: one thread counts cycles for 100 us.
__global__ void count_cycles(std::uint64_t* cycles_and_ns) {
  const auto ns = [] {
    std::uint64_t t;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
    return t;
  };
  const std::uint64_t begin_ns = ns();
  const long long begin = clock64();
  std::uint64_t now = begin_ns;
  while (now - begin_ns < 100'000) now = ns();
  cycles_and_ns[0] = static_cast<std::uint64_t>(clock64() - begin);
  cycles_and_ns[1] = now - begin_ns;
}

// Eight independent 16-byte loads per thread and step; the result is used only if it never is.
__global__ void __launch_bounds__(512) read_all(const uint4* data, std::size_t count, uint4* never) {
  constexpr int kLoads = 8;
  const std::size_t chunk = std::size_t{512} * kLoads;
  uint4 sum{};
  for (std::size_t base = blockIdx.x * chunk; base + chunk <= count; base += gridDim.x * chunk) {
    uint4 v[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) v[i] = __ldcs(data + base + i * 512 + threadIdx.x);
#pragma unroll
    for (int i = 0; i < kLoads; ++i)
      sum.x |= v[i].x, sum.y |= v[i].y, sum.z |= v[i].z, sum.w |= v[i].w;
  }
  if ((sum.x & sum.y & sum.z & sum.w) == 0x12345678u && never) *never = sum;
}

// The part of cuBLASLt's C interface that one product needs. Its header is not needed to build this;
// the values are its ABI, unchanged since cuBLAS 11.
class CublasLt {
 public:
  CublasLt() {
    for (const char* name : {"libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"})
      if (!library_) library_ = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (!library_) return;
    ok_ = load(create_, "cublasLtCreate") && load(desc_create_, "cublasLtMatmulDescCreate") &&
          load(desc_set_, "cublasLtMatmulDescSetAttribute") &&
          load(layout_create_, "cublasLtMatrixLayoutCreate") &&
          load(preference_create_, "cublasLtMatmulPreferenceCreate") &&
          load(preference_set_, "cublasLtMatmulPreferenceSetAttribute") &&
          load(heuristic_, "cublasLtMatmulAlgoGetHeuristic") && load(matmul_, "cublasLtMatmul") &&
          create_(&handle_) == 0;
  }

  // GFLOP/s of bursts of 20 products of 8192^3 with bf16 output; 0: not to be had.
  double rate(int type, std::size_t element, std::uint32_t keep, std::uint32_t set) {
    if (!ok_) return 0;
    constexpr std::int64_t n = 8192;
    constexpr std::size_t workspace_bytes = std::size_t{32} << 20;
    Buffer a(n * n * element), b(n * n * element), c(n * n * 2), workspace(workspace_bytes);
    if (!a.get() || !b.get() || !c.get() || !workspace.get()) return 0;
    for (const Buffer* buffer : {&a, &b})
      fill_random<<<1024, 256>>>(static_cast<std::uint32_t*>(buffer->get()), n * n * element / 4,
                                 keep, set);
    void *desc = nullptr, *in = nullptr, *out = nullptr, *preference = nullptr;
    const int transpose = 1;
    struct {
      std::uint64_t algo[8];
      std::size_t workspace;
      int state;
      float waves;
      int reserved[4];
    } found{};
    int count = 0;
    if (desc_create_(&desc, kCompute32F, kF32) || desc_set_(desc, kTransA, &transpose, sizeof transpose) ||
        layout_create_(&in, type, n, n, n) || layout_create_(&out, kBF16, n, n, n) ||
        preference_create_(&preference) ||
        preference_set_(preference, kWorkspaceBytes, &workspace_bytes, sizeof workspace_bytes) ||
        heuristic_(handle_, desc, in, in, out, out, preference, 1, &found, &count) || count == 0)
      return 0;
    const float one = 1, zero = 0;
    const auto burst = [&](int products) {
      int failed = 0;
      for (int i = 0; i < products; ++i)
        failed |= matmul_(handle_, desc, &one, a.get(), in, b.get(), in, &zero, c.get(), out, c.get(),
                          out, &found, workspace.get(), workspace_bytes, nullptr);
      return failed == 0;
    };
    cudaEvent_t begin, end;
    check(cudaEventCreate(&begin), "cudaEventCreate");
    check(cudaEventCreate(&end), "cudaEventCreate");
    double best = 0;
    for (int repeat = 0; repeat < 2; ++repeat) {
      // A burst is what a card does that is not yet at its power limit.
      std::this_thread::sleep_for(std::chrono::milliseconds(30));
      if (!burst(2)) break;
      cudaEventRecord(begin);
      burst(20);
      cudaEventRecord(end);
      if (cudaEventSynchronize(end) != cudaSuccess) break;
      float ms = 0;
      cudaEventElapsedTime(&ms, begin, end);
      best = std::max(best, 20.0 * 2.0 * n * n * n / ms * 1e-6);
    }
    cudaEventDestroy(begin);
    cudaEventDestroy(end);
    return best;
  }
  double bf16() { return rate(kBF16, 2, 0x80ff80ffu, 0x3f003f00u); }
  double e4m3() { return rate(kE4M3, 1, 0x8f8f8f8fu, 0x30303030u); }

 private:
  static constexpr int kF32 = 0, kBF16 = 14, kE4M3 = 28;  // cudaDataType_t
  static constexpr int kCompute32F = 68, kTransA = 3, kWorkspaceBytes = 1;
  template <typename F>
  bool load(F& function, const char* name) {
    function = reinterpret_cast<F>(dlsym(library_, name));
    return function != nullptr;
  }
  void* library_ = nullptr;
  void* handle_ = nullptr;
  bool ok_ = false;
  int (*create_)(void**) = nullptr;
  int (*desc_create_)(void**, int, int) = nullptr;
  int (*desc_set_)(void*, int, const void*, std::size_t) = nullptr;
  int (*layout_create_)(void**, int, std::uint64_t, std::uint64_t, std::int64_t) = nullptr;
  int (*preference_create_)(void**) = nullptr;
  int (*preference_set_)(void*, int, const void*, std::size_t) = nullptr;
  int (*heuristic_)(void*, void*, void*, void*, void*, void*, void*, int, void*, int*) = nullptr;
  int (*matmul_)(void*, void*, const void*, const void*, void*, const void*, void*, const void*,
                 const void*, void*, void*, void*, const void*, void*, std::size_t,
                 cudaStream_t) = nullptr;
};

class CudaStopwatch final : public Stopwatch {
 public:
  explicit CudaStopwatch(int index) {
    const auto start = std::chrono::steady_clock::now();
    check(cudaSetDevice(index), "cudaSetDevice");
    check(cudaFree(nullptr), "the device's context");
    context_ms_ =
        std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
    check(cudaGetDeviceProperties(&properties_, index), "cudaGetDeviceProperties");
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate");
    check(cudaEventCreate(&begin_), "cudaEventCreate");
    check(cudaEventCreate(&end_), "cudaEventCreate");
  }
  ~CudaStopwatch() override {
    cudaEventDestroy(begin_);
    cudaEventDestroy(end_);
    cudaStreamDestroy(stream_);
  }

  Roof products() override {
    // What was measured behind the last bench of a list is what the next one would find before it.
    static Roof last;
    static std::chrono::steady_clock::time_point taken;
    const auto age = std::chrono::steady_clock::now() - taken;
    if (last.bf16_gflops > 0 && age < std::chrono::milliseconds(100)) return last;
    last = probe_products();
    taken = std::chrono::steady_clock::now();
    return last;
  }

  double read_gbytes_s() override {
    const std::size_t bytes = std::size_t{1} << 30;
    if (!reads_) {
      reads_ = std::make_unique<Buffer>(bytes);
      if (reads_->get())
        fill_random<<<1024, 256, 0, stream_>>>(static_cast<std::uint32_t*>(reads_->get()), bytes / 4,
                                               ~0u, 0);
    }
    if (!reads_->get()) return 0;
    double best = 1e30;
    const int blocks = properties_.multiProcessorCount * 4;
    for (int repeat = 0; repeat < 5; ++repeat)
      best = std::min(best, elapsed_ms([&] {
                        for (int i = 0; i < 4; ++i)
                          read_all<<<blocks, 512, 0, stream_>>>(
                              static_cast<const uint4*>(reads_->get()), bytes / 16, nullptr);
                      }) / 4);
    return static_cast<double>(bytes) / best * 1e-6;
  }

  std::size_t cache_bytes() override { return static_cast<std::size_t>(properties_.l2CacheSize); }
  // Ten, but not much more than 20 ms.
  int calls_wanted(double ms) const override {
    return static_cast<int>(std::clamp(20.0 / std::max(ms, 1e-3), 2.0, 10.0));
  }
  double context_ms() const override { return context_ms_; }

  // Median over bursts that stay below the number of launches at which the driver makes the host wait.
  double host_us(const std::function<void(Stream)>& call) override {
    constexpr int kBursts = 9, kCalls = 20;
    std::vector<double> us;
    for (int burst = 0; burst < kBursts; ++burst) {
      check(cudaStreamSynchronize(stream_), "a burst of calls");
      const auto start = std::chrono::steady_clock::now();
      for (int i = 0; i < kCalls; ++i) call({.handle = stream_});
      us.push_back(
          std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start)
              .count() /
          kCalls);
    }
    check(cudaStreamSynchronize(stream_), "a burst of calls");
    std::nth_element(us.begin(), us.begin() + kBursts / 2, us.end());
    return us[kBursts / 2];
  }

  double clock_mhz() override { return clock_mhz_; }

  std::vector<double> sample_ms(std::span<const std::function<void(Stream)>> calls,
                                const Budget& budget) override {
    clock_mhz_ = 0;
    calls[0]({.handle = stream_});  // kernels are loaded outside the graph
    check(cudaStreamSynchronize(stream_), "the first forward");
    if (budget.worth_ms > 0) {
      const double once = elapsed_ms([&] { calls[0]({.handle = stream_}); });
      if (once > budget.worth_ms + kLaunchesMs) return {once};
    }
    cudaGraph_t graph;
    cudaGraphExec_t replay;
    check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
    for (const auto& call : calls) call({.handle = stream_});
    check(cudaStreamEndCapture(stream_, &graph), "cudaStreamEndCapture");
    check(cudaGraphInstantiate(&replay, graph, 0), "cudaGraphInstantiate");
    const auto launch = [&] { check(cudaGraphLaunch(replay, stream_), "cudaGraphLaunch"); };
    std::vector<double> samples;
    for (int warm = 0; warm < 3; ++warm) elapsed_ms(launch);
    const auto start = std::chrono::steady_clock::now();
    while (static_cast<int>(samples.size()) < budget.max_runs) {
      samples.push_back(elapsed_ms(launch) / static_cast<double>(calls.size()));
      const double seconds =
          std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
      if (seconds > budget.seconds && static_cast<int>(samples.size()) >= budget.min_runs) break;
    }
    // The clock under load: right behind one more replay.
    const Buffer counts(2 * sizeof(std::uint64_t));
    if (counts.get()) {
      std::uint64_t host[2] = {};
      launch();
      count_cycles<<<1, 1, 0, stream_>>>(static_cast<std::uint64_t*>(counts.get()));
      check(cudaMemcpyAsync(host, counts.get(), sizeof host, cudaMemcpyDeviceToHost, stream_),
            "cudaMemcpyAsync");
      check(cudaStreamSynchronize(stream_), "the clock");
      clock_mhz_ = host[1] > 0 ? 1e3 * static_cast<double>(host[0]) / static_cast<double>(host[1]) : 0;
    }
    cudaGraphExecDestroy(replay);
    cudaGraphDestroy(graph);
    return samples;
  }

 private:
  Roof probe_products() {
    Roof roof{.note = {}};
    static CublasLt cublas;  // opened once: its start takes as long as all other probes together
    roof.bf16_gflops = cublas.bf16();
    roof.int8_gops = cublas.e4m3();
    if (roof.bf16_gflops == 0) roof.bf16_gflops = 755e3;
    if (roof.int8_gops == 0) roof.int8_gops = 1470e3;
    if (roof.bf16_gflops == 755e3 || roof.int8_gops == 1470e3)
      roof.note = "product rates are an H100's from the record: cuBLASLt was not found or failed";
    return roof;
  }

  static constexpr double kLaunchesMs = 0.05;  // of one call outside a graph
  template <typename F>
  double elapsed_ms(const F& work) {
    check(cudaEventRecord(begin_, stream_), "cudaEventRecord");
    work();
    check(cudaEventRecord(end_, stream_), "cudaEventRecord");
    check(cudaEventSynchronize(end_), "a timed run");
    float ms = 0;
    check(cudaEventElapsedTime(&ms, begin_, end_), "cudaEventElapsedTime");
    return ms;
  }

  cudaDeviceProp properties_{};
  cudaStream_t stream_ = nullptr;
  cudaEvent_t begin_ = nullptr, end_ = nullptr;
  std::unique_ptr<Buffer> reads_;
  double context_ms_ = 0, clock_mhz_ = 0;
};

}  // namespace

std::unique_ptr<Stopwatch> make_cuda_stopwatch(int index) {
  return std::make_unique<CudaStopwatch>(index);
}

}  // namespace moesaic::harness
