// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "check.h"
#include "cuda/device.h"
#include "cuda/element.h"
#include "cuda/overlap.h"
#include "cuda/rearrange.h"
#include "cuda/weights.h"
#include "numeric.h"

namespace moesaic::cuda {
namespace {

// Vector loads of a last row may reach past it, inside the allocation.
constexpr std::size_t kSlackBytes = 256;

class DeviceMemory {
 public:
  DeviceMemory() = default;
  explicit DeviceMemory(std::size_t bytes) : bytes_(bytes) {
    check_cuda(cudaMalloc(&data_, bytes + kSlackBytes), "cudaMalloc (weights)");
  }
  DeviceMemory(DeviceMemory&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  DeviceMemory& operator=(DeviceMemory&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~DeviceMemory() {
    if (data_ != nullptr) (void)cudaFree(data_);
  }
  char* data() const { return static_cast<char*>(data_); }
  std::size_t bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  std::size_t bytes_ = 0;
};

// A [1, rows, columns] view that is to become dense.
struct Source {
  const char* data = nullptr;
  std::int64_t rows = 0, columns = 0, row_stride = 0, column_stride = 0;  // elements
};
Source source_of(const Tensor& t) {
  return {.data = static_cast<const char*>(t.data),
          .rows = t.shape[1],
          .columns = t.shape[2],
          .row_stride = t.strides[1],
          .column_stride = t.strides[2]};
}

// Reads along the fast dimension of the source or writes along that of the copy: a transposed
// checkpoint is read once at load, so the plain loop will do.
template <typename Element>
__global__ void copy_strided(Source source, Element* dense) {
  begin_kernel();
  const std::int64_t count = source.rows * source.columns;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += static_cast<std::int64_t>(gridDim.x) * blockDim.x) {
    const std::int64_t row = i / source.columns, column = i % source.columns;
    dense[i] = reinterpret_cast<const Element*>(
        source.data)[row * source.row_stride + column * source.column_stride];
  }
}

__global__ void convert_strided(Source source, DType dtype, float* dense) {
  begin_kernel();
  const std::int64_t count = source.rows * source.columns;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += static_cast<std::int64_t>(gridDim.x) * blockDim.x) {
    const std::int64_t row = i / source.columns, column = i % source.columns;
    dense[i] =
        load_float(source.data, dtype, row * source.row_stride + column * source.column_stride);
  }
}

enum class Way : std::uint8_t { kRearrange, kRestore };

// `count` pieces of 16 bytes, from one place to another or in place.
__global__ void rearrange_pieces(Way way, const uint4* from, uint4* to, std::int64_t count) {
  begin_kernel();
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += static_cast<std::int64_t>(gridDim.x) * blockDim.x) {
    const uint4 piece = from[i];
    const std::uint32_t in[4] = {piece.x, piece.y, piece.z, piece.w};
    std::uint32_t out[4];
    if (way == Way::kRearrange)
      rearrange(in, out);
    else
      restore(in, out);
    to[i] = {out[0], out[1], out[2], out[3]};
  }
}

void to_device(void* to, const std::vector<char>& from) {
  check_cuda(cudaMemcpyAsync(to, from.data(), from.size(), cudaMemcpyHostToDevice, nullptr),
             "cudaMemcpy");
  check_cuda(cudaStreamSynchronize(nullptr), "cudaMemcpy");  // `from` is about to go away
}

class Loader {
 public:
  explicit Loader(const DeviceTraits& device) : device_(device) {}

  // Bytes as they are.
  void copy(const Tensor& from, void* to) const {
    const Source source = source_of(from);
    const std::size_t element = size_of(from.dtype);
    const std::size_t row_bytes = static_cast<std::size_t>(source.columns) * element;
    if (source.column_stride == 1 && (source.row_stride >= source.columns || source.rows == 1)) {
      const std::size_t pitch =
          source.rows == 1 ? row_bytes : static_cast<std::size_t>(source.row_stride) * element;
      check_cuda(
          cudaMemcpy2DAsync(to, row_bytes, source.data, pitch, row_bytes,
                            static_cast<std::size_t>(source.rows), cudaMemcpyDefault, nullptr),
          "cudaMemcpy2D (weights)");
    } else if (from.device.type == DeviceType::kCpu) {
      std::vector<char> dense(row_bytes * static_cast<std::size_t>(source.rows));
      char* out = dense.data();
      for (std::int64_t r = 0; r < source.rows; ++r)
        for (std::int64_t c = 0; c < source.columns; ++c, out += element)
          std::memcpy(out,
                      source.data + static_cast<std::size_t>(r * source.row_stride +
                                                             c * source.column_stride) *
                                        element,
                      element);
      to_device(to, dense);
    } else if (element == 1) {
      run(copy_strided<std::uint8_t>, source, static_cast<std::uint8_t*>(to));
    } else if (element == 2) {
      run(copy_strided<std::uint16_t>, source, static_cast<std::uint16_t*>(to));
    } else {
      run(copy_strided<std::uint32_t>, source, static_cast<std::uint32_t*>(to));
    }
  }

  // Dense 4-bit weights of one expert.
  void rearrange(Way way, const void* from, void* to, std::int64_t bytes) const {
    const std::int64_t pieces = bytes / 16;
    launch("weights: rearrange", rearrange_pieces,
           {.grid = strided_grid(ceil_div(pieces, 256), device_, 8), .block = dim3(256)}, nullptr,
           way, static_cast<const uint4*>(from), static_cast<uint4*>(to), pieces);
  }

  // Scales of any float dtype as f32.
  void convert(const Tensor& from, float* to) const {
    if (from.dtype == DType::kF32) return copy(from, to);
    const Source source = source_of(from);
    if (from.device.type != DeviceType::kCpu) return run(convert_strided, source, from.dtype, to);
    std::vector<char> dense(static_cast<std::size_t>(source.rows * source.columns) * sizeof(float));
    char* out = dense.data();
    for (std::int64_t r = 0; r < source.rows; ++r) {
      for (std::int64_t c = 0; c < source.columns; ++c, out += sizeof(float)) {
        const std::uint16_t half = reinterpret_cast<const std::uint16_t*>(
            source.data)[r * source.row_stride + c * source.column_stride];
        const float value = from.dtype == DType::kBF16 ? bf16_to_float(half) : f16_to_float(half);
        std::memcpy(out, &value, sizeof value);
      }
    }
    to_device(to, dense);
  }

 private:
  template <typename Kernel, typename... Args>
  void run(Kernel kernel, const Source& source, Args... args) const {
    launch("weights: copy", kernel,
           {.grid = strided_grid(ceil_div(source.rows * source.columns, 256), device_, 8),
            .block = dim3(256)},
           nullptr, source, args...);
  }
  DeviceTraits device_;
};

class DenseWeights final : public CudaWeights {
 public:
  DenseWeights(const WeightSpec& spec, const DeviceTraits& device, Arrangement arrangement)
      : CudaWeights(arrangement), spec_(spec), device_(device) {
    check_arrangement();
    const DeviceGuard guard(device.index);
    view_.weight = take(weight_memory_, weight_dtype(spec.format), spec.n,
                        is_four_bit(spec.format) ? spec.k / 2 : spec.k);
    if (spec.scale.has_scale) take_scale();
    if (spec.zero_points) take_zero_point();
  }

  DenseWeights(const WeightSpec& spec, const DeviceTraits& device, Arrangement arrangement,
               const GemmWeights& all)
      : CudaWeights(arrangement), spec_(spec), device_(device) {
    check_arrangement();
    const DeviceGuard guard(device.index);
    if (spec.scale.has_scale && !keep(all.scale, scale_dtype(), &view_.scale)) {
      take_scale();
      for (std::int64_t e = 0; e < spec.experts; ++e) load_scale(e, all.scale.slice(e, 1));
    }
    if (spec.zero_points && !keep(all.zero_point, DType::kU8, &view_.zero_point)) {
      take_zero_point();
      for (std::int64_t e = 0; e < spec.experts; ++e) load_zero(e, all.zero_point.slice(e, 1));
    }
    view_.weight =
        dense(all.weight.data, all.weight.dtype, all.weight.shape[1], all.weight.shape[2]);
    if (arrangement == Arrangement::kRearranged)  // last: what throws above has written nothing
      Loader(device).rearrange(Way::kRearrange, view_.weight.data, view_.weight.data,
                               spec.experts * expert_bytes());
    check_cuda(cudaStreamSynchronize(nullptr), "weights: keep");
  }

  void unpack(std::int64_t local_expert, const Tensor& weight) const override {
    if (weight.strides[2] != 1)
      unsupported("unpack_expert: fc1 and fc2 need a unit inner stride on CUDA");
    const DeviceGuard guard(device_.index);
    const Tensor dense = view_.weight.slice(local_expert, 1);
    const void* from = dense.data;
    DeviceMemory plain;
    if (arrangement() == Arrangement::kRearranged) {
      void* to = weight.data;
      if (!takes_pieces(weight)) {
        plain = DeviceMemory(static_cast<std::size_t>(expert_bytes()));
        to = plain.data();
      }
      Loader(device_).rearrange(Way::kRestore, dense.data, to, expert_bytes());
      from = to;
    }
    if (from != weight.data) copy_rows(from, weight);
    check_cuda(cudaStreamSynchronize(nullptr), "unpack");
  }

  void load(std::int64_t local_expert, const GemmWeights& one) override {
    const DeviceGuard guard(device_.index);
    const Loader loader(device_);
    void* const weight = view_.weight.slice(local_expert, 1).data;
    loader.copy(one.weight, weight);
    if (arrangement() == Arrangement::kRearranged)
      loader.rearrange(Way::kRearrange, weight, weight, expert_bytes());
    if (spec_.scale.has_scale) load_scale(local_expert, one.scale);
    if (spec_.zero_points) load_zero(local_expert, one.zero_point);
    // The caller's tensors may go away, and forward may run on any stream.
    check_cuda(cudaStreamSynchronize(nullptr), "weights: load");
  }

  std::size_t bytes() const override {
    return weight_memory_.bytes() + scale_memory_.bytes() + zero_memory_.bytes();
  }

 private:
  std::int64_t expert_bytes() const {
    return view_.weight.shape[1] * view_.weight.shape[2] *
           static_cast<std::int64_t>(size_of(view_.weight.dtype));
  }
  // Whether a kernel here may write an expert there in pieces: nothing else is held meanwhile.
  bool takes_pieces(const Tensor& weight) const {
    return weight.device == view_.weight.device && weight.strides[1] == weight.shape[2] &&
           reinterpret_cast<std::uintptr_t>(weight.data) % 16 == 0;
  }
  // Of one expert, from dense memory.
  void copy_rows(const void* dense, const Tensor& to) const {
    const std::size_t element = size_of(view_.weight.dtype);
    const std::size_t width = static_cast<std::size_t>(view_.weight.shape[2]) * element;
    check_cuda(
        cudaMemcpy2DAsync(to.data, static_cast<std::size_t>(to.strides[1]) * element, dense, width,
                          width, static_cast<std::size_t>(to.shape[1]), cudaMemcpyDefault, nullptr),
        "cudaMemcpy2D (unpack)");
  }
  void check_arrangement() const {
    if (arrangement() == Arrangement::kRearranged &&
        (spec_.format != WeightFormat::kU4 || spec_.k % 32 != 0))
      unsupported("weight: only 4-bit integers in rows of a multiple of 32 can be rearranged");
  }
  DType scale_dtype() const { return spec_.e8m0_scales ? DType::kE8M0 : DType::kF32; }
  void take_scale() {
    view_.scale = take(scale_memory_, scale_dtype(), spec_.scale.grid_n, spec_.scale.grid_k);
  }
  void take_zero_point() {
    view_.zero_point =
        take(zero_memory_, DType::kU8, spec_.format == WeightFormat::kU4 ? spec_.n / 2 : spec_.n,
             spec_.scale.grid_k);
  }
  void load_scale(std::int64_t local_expert, const Tensor& one) const {
    void* const scale = view_.scale.slice(local_expert, 1).data;
    if (spec_.e8m0_scales)
      Loader(device_).copy(one, scale);
    else
      Loader(device_).convert(one, static_cast<float*>(scale));
  }
  void load_zero(std::int64_t local_expert, const Tensor& one) const {
    Loader(device_).copy(one, view_.zero_point.slice(local_expert, 1).data);
  }
  // Whether `given` can be read where it lies as what load would make of it; then `view` is it.
  bool keep(const Tensor& given, DType dtype, Tensor* view) const {
    const bool same = size_of(given.dtype) == size_of(dtype);  // e8m0 comes as u8, too
    if (!same || given.device.type != DeviceType::kCuda || !given.is_contiguous() ||
        reinterpret_cast<std::uintptr_t>(given.data) % kInPlaceAlignment != 0)
      return false;
    *view = dense(given.data, dtype, given.shape[1], given.shape[2]);
    return true;
  }
  Tensor dense(void* data, DType dtype, std::int64_t rows, std::int64_t columns) const {
    return Tensor::contiguous(data, dtype, {spec_.experts, rows, columns},
                              {DeviceType::kCuda, device_.index});
  }
  Tensor take(DeviceMemory& memory, DType dtype, std::int64_t rows, std::int64_t columns) {
    memory =
        DeviceMemory(static_cast<std::size_t>(spec_.experts * rows * columns) * size_of(dtype));
    return dense(memory.data(), dtype, rows, columns);
  }

  WeightSpec spec_;
  DeviceTraits device_;
  DeviceMemory weight_memory_, scale_memory_, zero_memory_;
};

}  // namespace

std::unique_ptr<CudaWeights> make_cuda_weights(const WeightSpec& spec, const DeviceTraits& device,
                                               Arrangement arrangement) {
  return std::make_unique<DenseWeights>(spec, device, arrangement);
}
std::unique_ptr<CudaWeights> keep_cuda_weights(const WeightSpec& spec, const DeviceTraits& device,
                                               Arrangement arrangement, const GemmWeights& all) {
  return std::make_unique<DenseWeights>(spec, device, arrangement, all);
}

}  // namespace moesaic::cuda
