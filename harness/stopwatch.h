// SPDX-License-Identifier: Apache-2.0
// How time is taken on a device, and the ceilings it is held against. One implementation per kind
// of device; the bench itself does not know which it has.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "harness/roof.h"
#include "moesaic/types.h"

namespace moesaic::harness {

struct Budget {
  double seconds = 0.5;  // stop when the samples have taken this long ...
  int min_runs = 7;      // ... but not before these many
  int max_runs = 400;
  double worth_ms = 0;  // over 0: a call that takes longer is worth one sample only
};

class Stopwatch {
 public:
  virtual ~Stopwatch() = default;
  virtual Roof products() = 0;            // rates of the product instructions
  virtual double read_gbytes_s() = 0;     // streaming reads, now
  virtual std::size_t cache_bytes() = 0;  // of the last-level cache: what weights must exceed
  // Milliseconds per call. `calls` do the same work on different data, so that no call finds its
  // weights in a cache. CPU: each is timed alone, in turn. CUDA: all are captured in one graph, and
  // a sample is a replay's time divided by the number of calls.
  virtual std::vector<double> sample_ms(std::span<const std::function<void(Stream)>> calls,
                                        const Budget& budget) = 0;
  // How many different calls a sample needs, when one takes about `ms`.
  virtual int calls_wanted(double ms) const = 0;
  // What the host spends on one call that it does not wait for, in microseconds, and how fast the
  // device's clock ran behind the last sample. 0: the question makes no sense here.
  virtual double host_us(const std::function<void(Stream)>&) { return 0; }
  virtual double clock_mhz() { return 0; }
  // How long the device took to become usable, before anything of this library ran on it.
  virtual double context_ms() const { return 0; }
};

std::unique_ptr<Stopwatch> make_cpu_stopwatch(int threads);
// Defined only when built with CUDA.
std::unique_ptr<Stopwatch> make_cuda_stopwatch(int index);
std::unique_ptr<Stopwatch> make_stopwatch(Device device);

}  // namespace moesaic::harness
