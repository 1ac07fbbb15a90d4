// SPDX-License-Identifier: Apache-2.0
#include "harness/stopwatch.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>

#include "check.h"
#include "moesaic/runtime.h"

namespace moesaic::harness {
namespace {

class CpuStopwatch final : public Stopwatch {
 public:
  explicit CpuStopwatch(int threads) : threads_(threads), reads_(threads) {}
  Roof products() override { return probe_cpu_products(threads_); }
  double read_gbytes_s() override { return reads_.gbytes_s(); }
  std::size_t cache_bytes() override {
    const long bytes = sysconf(_SC_LEVEL3_CACHE_SIZE);
    return bytes > 0 ? static_cast<std::size_t>(bytes) : std::size_t{32} << 20;
  }
  std::vector<double> sample_ms(std::span<const std::function<void(Stream)>> calls,
                                const Budget& budget) override {
    using Clock = std::chrono::steady_clock;
    std::vector<double> samples;
    std::size_t next = 0;
    double total = 0;
    for (int warm = 0; warm < 2; ++warm) calls[next++ % calls.size()]({});
    while (static_cast<int>(samples.size()) < budget.max_runs &&
           (total < budget.seconds || static_cast<int>(samples.size()) < budget.min_runs)) {
      const auto& call = calls[next++ % calls.size()];
      const auto begin = Clock::now();
      call({});
      const double seconds = std::chrono::duration<double>(Clock::now() - begin).count();
      total += seconds;
      samples.push_back(seconds * 1e3);
    }
    return samples;
  }
  int calls_wanted(double) const override { return 16; }

 private:
  int threads_;
  ReadProbe reads_;
};

}  // namespace

std::unique_ptr<Stopwatch> make_cpu_stopwatch(int threads) {
  return std::make_unique<CpuStopwatch>(threads);
}

std::unique_ptr<Stopwatch> make_stopwatch(Device device) {
  if (device.type == DeviceType::kCpu) return make_cpu_stopwatch(num_threads());
#ifdef MOESAIC_HAS_CUDA
  return make_cuda_stopwatch(device.index);
#else
  unsupported("this build has no CUDA; build it with `make cuda`");
#endif
}

}  // namespace moesaic::harness
