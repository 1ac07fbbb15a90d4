// SPDX-License-Identifier: Apache-2.0
// The nouns every level shares: errors, dtypes, devices, tensor views, workspaces.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>

#if defined(__GNUC__)
#define MOESAIC_API __attribute__((visibility("default")))
#else
#define MOESAIC_API
#endif

namespace moesaic {

// --- errors --------------------------------------------------------------------------------------
// Every failure the host can see is thrown as an Error before any output is touched, kDevice
// excepted: a launch may fail behind others, and outputs are undefined then. What CUDA reports later
// comes out of a later call. Its text names the argument, what was expected, what came, and a way
// out. Values *inside* tensors never raise.
enum class ErrorCode : int {
  kInvalidArgument = 1,  // a shape, dtype, stride or option is wrong: fix the call
  kUnsupported = 2,      // a valid request outside the support matrix: the text says what to use
  kNotReady = 3,         // e.g. forward before every expert has been loaded
  kIo = 4,               // a file is missing or unreadable
  kCorruptFile = 5,      // a checkpoint's bytes contradict its own header
  kOutOfMemory = 6,
  kDevice = 7,  // a CUDA launch or driver call failed
  kInternal = 8,
};
MOESAIC_API std::string_view name(ErrorCode code);

class MOESAIC_API Error : public std::runtime_error {
 public:
  Error(ErrorCode code, const std::string& message) : std::runtime_error(message), code_(code) {}
  ErrorCode code() const { return code_; }

 private:
  ErrorCode code_;
};

// --- element types -------------------------------------------------------------------------------
// Sub-byte weights travel in kU8, two per byte, packed along K, low nibble first.
enum class DType : std::uint8_t { kF32, kF16, kBF16, kF8E4M3, kE8M0, kI8, kU8, kI32, kI64 };

MOESAIC_API std::string_view name(DType dtype);          // "f32", "f16", "bf16", "fp8_e4m3", ...
MOESAIC_API DType parse_dtype(std::string_view text);    // throws kInvalidArgument
MOESAIC_API std::size_t size_of(DType dtype);            // bytes per element
constexpr bool is_16bit(DType d) { return d == DType::kF16 || d == DType::kBF16; }
constexpr bool is_float(DType d) { return d == DType::kF32 || is_16bit(d); }

// --- devices -------------------------------------------------------------------------------------
enum class DeviceType : std::uint8_t { kCpu, kCuda };
struct Device {
  DeviceType type = DeviceType::kCpu;
  int index = 0;
  friend bool operator==(const Device&, const Device&) = default;
};
MOESAIC_API std::string to_string(Device device);         // "cpu", "cuda:0"
MOESAIC_API Device parse_device(std::string_view text);   // throws kInvalidArgument

// A queue of device work: a cudaStream_t on CUDA (null: the legacy default stream), ignored on the
// CPU, where calls return when the work is done.
struct Stream {
  void* handle = nullptr;
};

// --- tensors -------------------------------------------------------------------------------------
// A non-owning, strided view. Strides count elements. An undefined tensor (rank 0, the default)
// means "not given". An extent may be 0, and then `data` may be null. `data` is aligned to its
// element. Tensors passed as inputs are never written; the elements of one that is written lie in
// places of their own. Inputs and outputs of a call do not overlap, unless it says so.
struct MOESAIC_API Tensor {
  static constexpr int kMaxRank = 4;

  void* data = nullptr;
  DType dtype = DType::kF32;
  Device device{};
  int rank = 0;
  std::array<std::int64_t, kMaxRank> shape{};
  std::array<std::int64_t, kMaxRank> strides{};

  // A dense row-major view of `shape`. Throws kInvalidArgument for a rank outside [1, kMaxRank] and
  // for more elements than 64 bits count.
  static Tensor contiguous(const void* data, DType dtype, std::initializer_list<std::int64_t> shape,
                           Device device = {});
  static Tensor contiguous(const void* data, DType dtype, std::span<const std::int64_t> shape,
                           Device device = {});

  bool defined() const { return rank > 0; }
  std::int64_t numel() const;  // 0 when undefined; throws as contiguous does
  bool is_contiguous() const;  // dense, row-major
  // Views of a part; not checked against the extent.
  Tensor select(std::int64_t index) const;                     // t[index], one rank lower
  Tensor slice(std::int64_t begin, std::int64_t count) const;  // t[begin : begin + count]
  template <typename T>
  T* as() const {
    return static_cast<T*>(data);
  }
};
MOESAIC_API std::string to_string(const Tensor& tensor);  // "bf16[16, 2048] on cpu"

// Scratch memory that a call may use and leaves undefined. On the layer's device, at least
// kWorkspaceAlignment aligned. One call at a time per workspace; on one CUDA stream consecutive
// calls (of different layers, too) may share one.
inline constexpr std::size_t kWorkspaceAlignment = 256;
struct Workspace {
  void* data = nullptr;
  std::size_t bytes = 0;
};

// An owning workspace for callers without an allocator of their own.
class MOESAIC_API WorkspaceBuffer {
 public:
  WorkspaceBuffer() = default;
  WorkspaceBuffer(Device device, std::size_t bytes);  // throws kOutOfMemory, kUnsupported (no such device)
  ~WorkspaceBuffer();
  WorkspaceBuffer(WorkspaceBuffer&& other) noexcept;
  WorkspaceBuffer& operator=(WorkspaceBuffer&& other) noexcept;
  Workspace view() const { return workspace_; }

 private:
  const void* backend_ = nullptr;  // which allocated it, and frees it
  Workspace workspace_{};
};

}  // namespace moesaic
