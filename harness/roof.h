// SPDX-License-Identifier: Apache-2.0
// The ceilings a timing is held against, measured in the same process: the rate at which weights
// can be read from memory, and the rate of the instruction that a product is made of.
#pragma once

#include <cstddef>
#include <memory>
#include <optional>
#include <string>

#include "moesaic/types.h"
#include "scheme.h"

namespace moesaic::harness {

// All rates are sums over the threads / the whole device. 0: this machine has no such instruction.
struct Roof {
  double read_gbytes_s = 0;  // streaming reads from memory
  double fma_gflops = 0;     // fp32 FMA on the CPU; the 16-bit tensor product on CUDA
  double bf16_gflops = 0;    // vdpbf16ps (level amx: tdpbf16ps); the 16-bit tensor product on CUDA
  double int8_gops = 0;      // vpdpbusd (level amx: tdpbsud); the fp8 / int8 tensor product on CUDA
  std::string note;          // e.g. that a rate was not measured but taken from a table
};

// Register-only loops on `threads` threads, about 0.1 s. read_gbytes_s stays 0: see ReadProbe.
Roof probe_cpu_products(int threads);

// Reads a buffer beyond any cache. The buffer is kept, so that probing again is quick: memory
// drifts within minutes, so each timing gets a probe before and after.
class ReadProbe {
 public:
  explicit ReadProbe(int threads);
  double gbytes_s();  // 0 when the buffer could not be had

 private:
  struct Free {
    void operator()(std::byte* p) const;
  };
  int threads_;
  std::unique_ptr<std::byte, Free> data_;
};

// The rate that bounds `scheme`'s products: int8 activations vpdpbusd; f32 and f16 FMA; everything
// else vdpbf16ps where the machine has it, FMA where not.
double product_rate(const Roof& roof, Scheme scheme, DeviceType type);

// What a healthy machine of this kind reaches, when it is one whose ceilings are on record: a Zen 4
// virtual machine in its slow memory state; an H100. A probe under 90% of it says that the machine
// was busy with other work.
std::optional<Roof> reference_cpu(int threads);
std::optional<Roof> reference_gpu(std::string_view device_name);
// Empty when the probe is good or no reference is on record; otherwise what is wrong.
std::string low_read(double gbytes_s, const std::optional<Roof>& reference);
std::string low_product(const Roof& probe, const std::optional<Roof>& reference, DeviceType type);

}  // namespace moesaic::harness
