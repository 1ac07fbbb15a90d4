// SPDX-License-Identifier: Apache-2.0
// How the stages split their work, and how they reach a row of a strided tensor.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/stage_kernels.h"
#include "cpu/thread_pool.h"
#include "moesaic/types.h"

namespace moesaic {

// Below this many elements a second thread costs more than it saves.
inline constexpr std::int64_t kTaskElements = 32768;
inline constexpr std::int64_t kMaxTasks = 256;

// Calls body(begin, end) on contiguous parts of [0, count), each of about kTaskElements elements or
// more; one part runs in place. The split depends on the sizes alone, never on the threads.
template <typename Body>
void parallel_ranges(std::int64_t count, std::int64_t elements_per_item, std::int64_t max_tasks,
                     Body&& body) {
  if (count <= 0) return;
  const std::int64_t items =
      std::max<std::int64_t>(1, kTaskElements / std::max<std::int64_t>(1, elements_per_item));
  const std::int64_t tasks = std::min({count, (count + items - 1) / items, max_tasks});
  if (tasks <= 1) return body(std::int64_t{0}, count);
  parallel_for(tasks,
               [&](std::int64_t task) { body(count * task / tasks, count * (task + 1) / tasks); });
}

template <typename Body>
void parallel_ranges(std::int64_t count, std::int64_t elements_per_item, Body&& body) {
  parallel_ranges(count, elements_per_item, kMaxTasks, body);
}

// Rows of a tensor, its leading dimensions flattened: any strides, rank 1 to 3.
class RowView {
 public:
  explicit RowView(const Tensor& t)
      : data_(static_cast<char*>(t.data)),
        dtype_(t.dtype),
        size_(static_cast<std::int64_t>(size_of(t.dtype))) {
    if (t.rank == 0) return;
    width_ = t.shape[t.rank - 1];
    inner_ = t.strides[t.rank - 1];
    rows_ = 1;
    for (int i = 0; i + 1 < t.rank; ++i) rows_ *= t.shape[i];
    if (t.rank >= 2) stride_ = t.strides[t.rank - 2];
    if (t.rank >= 3 && t.strides[t.rank - 3] != t.shape[t.rank - 2] * stride_) {
      per_outer_ = t.shape[t.rank - 2];
      outer_ = t.strides[t.rank - 3];
    }
  }
  DType dtype() const { return dtype_; }
  std::int64_t rows() const { return rows_; }
  std::int64_t width() const { return width_; }
  bool dense_rows() const { return inner_ == 1 || width_ <= 1; }
  char* row(std::int64_t r) const { return at(r, 0); }
  char* at(std::int64_t r, std::int64_t column) const {
    std::int64_t offset =
        per_outer_ == 0 ? r * stride_ : r / per_outer_ * outer_ + r % per_outer_ * stride_;
    offset += column * inner_;
    return data_ + offset * size_;
  }
  // dst[0..n) = row r's columns [column, column + n) as f32.
  void read(const StageKernels& kernels, std::int64_t r, std::int64_t column, std::int64_t n,
            float* dst) const {
    if (dense_rows()) return kernels.widen(dtype_, at(r, column), n, dst);
    for (std::int64_t i = 0; i < n; ++i) kernels.widen(dtype_, at(r, column + i), 1, dst + i);
  }
  // The same columns, rounded to nearest even.
  void write(const StageKernels& kernels, std::int64_t r, std::int64_t column, std::int64_t n,
             const float* src) const {
    if (dense_rows()) return kernels.narrow(dtype_, src, n, at(r, column));
    for (std::int64_t i = 0; i < n; ++i) kernels.narrow(dtype_, src + i, 1, at(r, column + i));
  }

 private:
  char* data_ = nullptr;
  DType dtype_ = DType::kF32;
  std::int64_t size_ = 4, rows_ = 0, width_ = 0, stride_ = 0, inner_ = 1;
  std::int64_t per_outer_ = 0, outer_ = 0;  // rank 3 whose two leading dimensions do not flatten
};

// Floats of a row that a stage holds on its stack at a time.
inline constexpr std::int64_t kPiece = 4096;

}  // namespace moesaic
