// SPDX-License-Identifier: Apache-2.0
// One table of kernels per ISA level: src/cpu/isa/gemm_<level>.cpp fills it, cpuid chooses one.
#pragma once

#include <cstdint>
#include <string_view>

#include "cpu/pack.h"

namespace moesaic {

struct Strip;
// What a thread will most likely take behind a strip: asked shortly before its end, when that can be told.
class StripForecast {
 public:
  // False: nothing. `positions`: room for kStripRows.
  virtual bool next(Strip* strip, std::int64_t* positions) const = 0;

 protected:
  ~StripForecast() = default;
};

// Rows of one expert against a strip of its tiles: the unit a thread takes.
struct Strip {
  std::int64_t expert = 0;
  std::int64_t first_tile = 0, tiles = 0;  // of columns
  const std::int64_t* positions = nullptr; // [rows] live rows
  std::int64_t rows = 0;                   // <= kStripRows
  const StripForecast* forecast = nullptr; // none: nothing is fetched for what follows
};
inline constexpr std::int64_t kStripRows = 48;

// What all strips of a call share.
struct GemmCall {
  const GemmStage* stage = nullptr;
  const WeightSpec* spec = nullptr;
  const PackLayout* layout = nullptr;
  const PackedCpu* packed = nullptr;  // null: the stage's plain views
};

struct CpuKernels {
  std::string_view name;
  void (*strip)(const GemmCall& call, const Strip& strip);
};

extern const CpuKernels kCpuScalar;
#if defined(__x86_64__)
extern const CpuKernels kCpuAvx2, kCpuAvxVnni, kCpuAvx512, kCpuAvx512Vnni, kCpuAvx512Bf16, kCpuAmx;
bool request_amx();  // whether the system lets this process use tiles
#elif defined(__aarch64__)
extern const CpuKernels kCpuNeon, kCpuNeonBf16;
#endif

// The best level of this machine, or the one that set_cpu_kernels or MOESAIC_CPU_ISA names.
const CpuKernels& cpu_kernels();

// (Static: inline functions shared with translation units of higher ISA levels must not be merged.)
// Row `row` of a stage's tensor, whose leading dimensions count as one.
static inline std::byte* row_of(const Tensor& tensor, std::int64_t row, std::int64_t element_bytes) {
  const std::int64_t at = tensor.rank == 3 ? row / tensor.shape[1] * tensor.strides[0] +
                                                 row % tensor.shape[1] * tensor.strides[1]
                                           : row * tensor.strides[0];
  return static_cast<std::byte*>(tensor.data) + at * element_bytes;
}
static inline std::int64_t row_index(const RowMap& rows, RowOf of, std::int64_t top_k,
                              std::int64_t position) {
  if (of == RowOf::kPosition) return position;
  const std::int64_t slot = rows.row_slot[position];
  return of == RowOf::kSlot ? slot : slot / top_k;
}

}  // namespace moesaic
