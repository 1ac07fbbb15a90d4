// SPDX-License-Identifier: Apache-2.0
// Which ISA level runs: asked of the processor once, overridden by name.
#include "cpu/kernels.h"

#include <atomic>
#include <cstdlib>
#include <string>
#include <vector>

#if defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#elif defined(__x86_64__)
#include <cpuid.h>
#endif

#include "check.h"
#include "cpu/gemm.h"
#include "words.h"

namespace moesaic {
namespace {

#if defined(__x86_64__)
// A bit of cpuid's leaf 7: the features that __builtin_cpu_supports knows by name in some compilers
// only (clang 14 has neither AVX-VNNI's nor AMX's).
enum Register : int { kEax, kEdx };
bool feature(unsigned subleaf, Register in, int bit) {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, subleaf, &a, &b, &c, &d)) return false;
  return ((in == kEax ? a : d) >> bit & 1u) != 0;
}
#endif

// Ascending. A level needs everything its translation unit is compiled with.
std::vector<const CpuKernels*> detect() {
  std::vector<const CpuKernels*> levels{&kCpuScalar};
#if defined(__x86_64__)
  __builtin_cpu_init();
  const auto add = [&](bool has, const CpuKernels& kernels) {
    if (has) levels.push_back(&kernels);
    return has;
  };
  // F16C has no name in GCC 12's __builtin_cpu_supports; every AVX2 processor has it.
  bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  has = add(has, kCpuAvx2);
  add(has && feature(1, kEax, 4), kCpuAvxVnni);
  has = has && __builtin_cpu_supports("avx512f") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq");
  has = add(has, kCpuAvx512) && __builtin_cpu_supports("avx512vnni") &&
        __builtin_cpu_supports("avx512vbmi");
  has = add(has, kCpuAvx512Vnni) && __builtin_cpu_supports("avx512bf16");
  has = add(has, kCpuAvx512Bf16) && feature(0, kEdx, 24) && feature(0, kEdx, 22) &&
        feature(0, kEdx, 25);  // tiles, bf16, int8
  add(has && request_amx(), kCpuAmx);
#elif defined(__aarch64__)
  levels.push_back(&kCpuNeon);
  const unsigned long more = getauxval(AT_HWCAP2);
  if ((getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0 && (more & HWCAP2_BF16) != 0 &&
      (more & HWCAP2_I8MM) != 0)
    levels.push_back(&kCpuNeonBf16);
#endif
  return levels;
}
const std::vector<const CpuKernels*>& levels() {
  static const std::vector<const CpuKernels*> instance = detect();
  return instance;
}

const CpuKernels* find(std::string_view source, std::string_view level) {
  if (level.empty()) return levels().back();
  std::string known;
  for (const CpuKernels* kernels : levels()) {
    if (kernels->name == level) return kernels;
    append_word(known, kernels->name);
  }
  unsupported(std::string(source) + ": this machine has no kernels named '" + std::string(level) +
              "'; it has: " + known);
}

std::atomic<const CpuKernels*> chosen{nullptr};

}  // namespace

const CpuKernels& cpu_kernels() {
  if (const CpuKernels* kernels = chosen.load(std::memory_order_acquire)) return *kernels;
  static const CpuKernels* const by_default = [] {
    const char* level = std::getenv("MOESAIC_CPU_ISA");
    return find("MOESAIC_CPU_ISA", level == nullptr ? "" : level);
  }();
  return *by_default;
}

void set_cpu_kernels(std::string_view level) {
  chosen.store(find("set_kernels", level), std::memory_order_release);
}

std::vector<std::string> available_cpu_kernels() {
  std::vector<std::string> names;
  for (const CpuKernels* kernels : levels()) names.emplace_back(kernels->name);
  return names;
}

std::string_view cpu_kernels_name() { return cpu_kernels().name; }

}  // namespace moesaic
