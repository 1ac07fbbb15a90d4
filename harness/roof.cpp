// SPDX-License-Identifier: Apache-2.0
// CPU probes. The loops keep every operand in registers and enough independent chains to cover the
// latency (4 cycles, two units: 8; we use 12), so nothing but the instruction's own rate is left.
#include "harness/roof.h"

#include <fmt/format.h>

#include <algorithm>
#include <barrier>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "backend.h"

namespace moesaic::harness {
namespace {

constexpr std::size_t kReadPerThread = std::size_t{256} << 20;  // beyond any last-level cache

using Clock = std::chrono::steady_clock;
double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// Runs body(i) on n threads that start together, `repeats` times; the best time of a repeat. The
// best, not the median: a ceiling is what the machine can do.
double best_seconds(int threads, int repeats, const std::function<void(int)>& body) {
  std::barrier start(threads), stop(threads);
  double best = 1e30;
  const auto work = [&](int i) {
    for (int r = 0; r < repeats; ++r) {
      start.arrive_and_wait();
      const auto begin = Clock::now();
      body(i);
      stop.arrive_and_wait();
      if (i == 0) best = std::min(best, seconds_since(begin));
    }
  };
  std::vector<std::thread> pool;
  for (int i = 1; i < threads; ++i) pool.emplace_back(work, i);
  work(0);
  for (std::thread& t : pool) t.join();
  return best;
}

#if defined(__x86_64__)
constexpr int kChains = 12;
constexpr std::int64_t kSteps = 400'000;

// One step is kChains independent instructions on registers 0-11 with operands 12 and 13. Assembly,
// because compilers keep an array of accumulators on the stack when each must stay opaque (seen
// with GCC 12: half the rate), and because it needs no target flags.
#define MOESAIC_ROOF_LOOP(function, instruction, reg)                                             \
  void function() {                                                                               \
    std::int64_t steps = kSteps;                                                                  \
    asm volatile(                                                                                 \
        ".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13\n vxorps %%ymm\\n, %%ymm\\n, %%ymm\\n\n.endr\n"   \
        "1:\n.irp n,0,1,2,3,4,5,6,7,8,9,10,11\n " instruction " %%" reg "12, %%" reg "13, %%" reg \
        "\\n\n.endr\n"                                                                            \
        "dec %0\n jnz 1b\n vzeroupper\n"                                                          \
        : "+r"(steps)::"cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7",      \
          "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13");                                    \
  }
MOESAIC_ROOF_LOOP(fma512, "vfmadd231ps", "zmm")
MOESAIC_ROOF_LOOP(fma256, "vfmadd231ps", "ymm")
MOESAIC_ROOF_LOOP(bf16_512, "vdpbf16ps", "zmm")
MOESAIC_ROOF_LOOP(int8_512, "vpdpbusd", "zmm")
#undef MOESAIC_ROOF_LOOP

// Six sums, operands 6 and 7. Only where the level amx runs: it has asked the system for tiles.
#define MOESAIC_ROOF_TILES(function, instruction)                             \
  void function() {                                                           \
    alignas(64) std::uint8_t config[64] = {1};                                \
    for (int t = 0; t < 8; ++t) config[16 + 2 * t] = 64, config[48 + t] = 16; \
    std::int64_t steps = kTileSteps;                                          \
    asm volatile(                                                             \
        "ldtilecfg %1\n.irp n,0,1,2,3,4,5,6,7\n tilezero %%tmm\\n\n.endr\n"   \
        "1:\n.irp n,0,1,2,3,4,5\n " instruction                               \
        " %%tmm6, %%tmm7, %%tmm\\n\n.endr\n"                                  \
        "dec %0\n jnz 1b\n tilerelease\n"                                     \
        : "+r"(steps)                                                         \
        : "m"(config)                                                         \
        : "cc");                                                              \
  }
constexpr std::int64_t kTileSteps = 40'000;
MOESAIC_ROOF_TILES(bf16_tiles, "tdpbf16ps")
MOESAIC_ROOF_TILES(int8_tiles, "tdpbsud")
#undef MOESAIC_ROOF_TILES

// Four streams of full cache lines per thread keep more misses in flight than one.
__attribute__((target("avx512f"))) void read512(const std::byte* data, std::size_t bytes) {
  const std::size_t quarter = bytes / 4 / 256 * 256;
  __m512i a{}, b{}, c{}, d{};
  for (std::size_t i = 0; i < quarter; i += 64) {
    a = _mm512_or_si512(a, _mm512_load_si512(data + i));
    b = _mm512_or_si512(b, _mm512_load_si512(data + quarter + i));
    c = _mm512_or_si512(c, _mm512_load_si512(data + 2 * quarter + i));
    d = _mm512_or_si512(d, _mm512_load_si512(data + 3 * quarter + i));
  }
  a = _mm512_or_si512(_mm512_or_si512(a, b), _mm512_or_si512(c, d));
  asm volatile("" : "+v"(a));
}
__attribute__((target("avx2"))) void read256(const std::byte* data, std::size_t bytes) {
  const std::size_t quarter = bytes / 4 / 256 * 256;
  const auto line = [&](std::size_t offset) {
    return reinterpret_cast<const __m256i*>(data + offset);
  };
  __m256i a{}, b{}, c{}, d{};
  for (std::size_t i = 0; i < quarter; i += 32) {
    a = _mm256_or_si256(a, _mm256_load_si256(line(i)));
    b = _mm256_or_si256(b, _mm256_load_si256(line(quarter + i)));
    c = _mm256_or_si256(c, _mm256_load_si256(line(2 * quarter + i)));
    d = _mm256_or_si256(d, _mm256_load_si256(line(3 * quarter + i)));
  }
  a = _mm256_or_si256(_mm256_or_si256(a, b), _mm256_or_si256(c, d));
  asm volatile("" : "+x"(a));
}
#endif

void read_plain(const std::byte* data, std::size_t bytes) {
  std::uint64_t acc[4] = {};
  const auto* words = reinterpret_cast<const std::uint64_t*>(data);
  for (std::size_t i = 0; i + 4 <= bytes / 8; i += 4)
    for (int s = 0; s < 4; ++s) acc[s] |= words[i + s];
  volatile std::uint64_t sink = acc[0] | acc[1] | acc[2] | acc[3];
  (void)sink;
}

// A scalar FMA loop for machines without the vector instructions above.
void fma_plain() {
  float acc[8] = {};
  for (int s = 0; s < 2'000'000; ++s)
    for (float& x : acc) {
      x = x * 0.999f + 0.5f;
      asm volatile("" : "+m"(x));
    }
}

double loop_rate(int threads, double operations, const std::function<void()>& loop) {
  return threads * operations / best_seconds(threads, 3, [&](int) { loop(); }) * 1e-9;
}

}  // namespace

void ReadProbe::Free::operator()(std::byte* p) const { std::free(p); }

ReadProbe::ReadProbe(int threads) : threads_(threads) {
  const std::size_t bytes = kReadPerThread * static_cast<std::size_t>(threads);
  data_.reset(static_cast<std::byte*>(std::aligned_alloc(std::size_t{2} << 20, bytes)));
  if (!data_) return;
#if defined(__linux__)
  madvise(data_.get(), bytes, MADV_HUGEPAGE);  // 4 KiB pages cost up to 14% of the rate
#endif
  best_seconds(threads, 1, [&](int i) {  // pages are placed by the thread that first touches them
    std::memset(data_.get() + kReadPerThread * static_cast<std::size_t>(i), i + 1, kReadPerThread);
  });
}

double ReadProbe::gbytes_s() {
  if (!data_) return 0;
  const double best = best_seconds(threads_, 4, [&](int i) {
    const std::byte* part = data_.get() + kReadPerThread * static_cast<std::size_t>(i);
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f")) return read512(part, kReadPerThread);
    if (__builtin_cpu_supports("avx2")) return read256(part, kReadPerThread);
#endif
    read_plain(part, kReadPerThread);
  });
  return static_cast<double>(kReadPerThread) * threads_ / best * 1e-9;
}

Roof probe_cpu_products(int threads) {
  Roof roof;
#if defined(__x86_64__)
  const double steps = static_cast<double>(kChains) * kSteps;
  if (__builtin_cpu_supports("avx512f"))
    roof.fma_gflops = loop_rate(threads, steps * 32, fma512);
  else if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    roof.fma_gflops = loop_rate(threads, steps * 16, fma256);
  if (__builtin_cpu_supports("avx512bf16"))
    roof.bf16_gflops = loop_rate(threads, steps * 64, bf16_512);
  if (__builtin_cpu_supports("avx512vnni"))
    roof.int8_gops = loop_rate(threads, steps * 128, int8_512);
  if (cpu_backend()->info().kernels == "amx") {
    roof.bf16_gflops = loop_rate(threads, 6.0 * kTileSteps * 16 * 16 * 64, bf16_tiles);
    roof.int8_gops = loop_rate(threads, 6.0 * kTileSteps * 16 * 16 * 128, int8_tiles);
    roof.note = "bf16 and int8: AMX tiles";
  }
#endif
  if (roof.fma_gflops == 0) roof.fma_gflops = loop_rate(threads, 2.0 * 8 * 2e6, fma_plain);
  return roof;
}

double product_rate(const Roof& roof, Scheme scheme, DeviceType type) {
  const SchemeTraits& t = traits(scheme);
  const bool act8 =
      t.act == ActFormat::kI8 || (t.act == ActFormat::kE4M3 && type == DeviceType::kCuda);
  if (act8 && roof.int8_gops > 0) return roof.int8_gops;
  if (type == DeviceType::kCpu && (scheme == Scheme::kF32 || scheme == Scheme::kF16))
    return roof.fma_gflops;
  return roof.bf16_gflops > 0 ? roof.bf16_gflops : roof.fma_gflops;
}

std::optional<Roof> reference_cpu(int threads) {
#if defined(__x86_64__)
  std::ifstream cpuinfo("/proc/cpuinfo");
  std::string line, vendor, family;
  while (std::getline(cpuinfo, line) && !line.empty()) {
    if (line.starts_with("vendor_id")) vendor = line.substr(line.find(':') + 2);
    if (line.starts_with("cpu family")) family = line.substr(line.find(':') + 2);
  }
  if (vendor == "AuthenticAMD" && family == "25" && __builtin_cpu_supports("avx512bf16") &&
      threads <= 2)
    return Roof{.read_gbytes_s = threads == 1 ? 29.0 : 36.0,
                .fma_gflops = 117.0 * threads,
                .bf16_gflops = 234.0 * threads,
                .int8_gops = 469.0 * threads,
                .note = "Zen 4 virtual machine, slow memory state"};
#endif
  (void)threads;
  return std::nullopt;
}

std::optional<Roof> reference_gpu(std::string_view device_name) {
  if (device_name != "NVIDIA H100 80GB HBM3") return std::nullopt;
  // The low end of what short bursts reach; a hot card does less, and then the run does not count.
  return Roof{.read_gbytes_s = 3140,
              .fma_gflops = 0,
              .bf16_gflops = 755e3,
              .int8_gops = 1470e3,
              .note = "H100 80GB HBM3, bursts of 20 products"};
}

namespace {
std::string low(std::string_view what, double got, double want) {
  return got >= 0.9 * want ? std::string{}
                           : fmt::format("{} probe {:.0f} is under 90% of {:.0f}", what, got, want);
}
}  // namespace

std::string low_read(double gbytes_s, const std::optional<Roof>& reference) {
  return reference ? low("memory read (GB/s)", gbytes_s, reference->read_gbytes_s) : std::string{};
}

std::string low_product(const Roof& probe, const std::optional<Roof>& reference, DeviceType type) {
  if (!reference) return {};
  const bool cpu = type == DeviceType::kCpu;
  for (const std::string& complaint :
       {low("fp32 FMA (GFLOP/s)", probe.fma_gflops, reference->fma_gflops),
        low(cpu ? "vdpbf16ps (GFLOP/s)" : "bf16 product (GFLOP/s)", probe.bf16_gflops,
            reference->bf16_gflops),
        low(cpu ? "vpdpbusd (GOP/s)" : "fp8 product (GOP/s)", probe.int8_gops,
            reference->int8_gops)})
    if (!complaint.empty()) return complaint;
  return {};
}

}  // namespace moesaic::harness
