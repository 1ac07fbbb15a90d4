// SPDX-License-Identifier: Apache-2.0
// Random weights and batches for tests, `verify` and `bench`, and the tensors that hold them: dense
// on the host, or on any device between guard bands. Everything follows from a seed, in any order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <string_view>
#include <vector>

#include "moesaic/moesaic.h"

namespace moesaic::harness {

// --- random numbers ------------------------------------------------------------------------------
// SplitMix64: one multiply-xorshift chain per draw, and any two seeds give unrelated streams.
class Rng {
 public:
  explicit Rng(std::uint64_t seed) : state_(seed) {}
  std::uint64_t bits();
  double uniform();                        // [0, 1)
  float normal();                          // mean 0, variance 1 (sum of uniforms, |x| < 3.5)
  std::int64_t below(std::int64_t limit);  // [0, limit)

 private:
  std::uint64_t state_;
};
std::uint64_t mix(std::uint64_t a, std::uint64_t b);  // a seed made of two

// --- host tensors --------------------------------------------------------------------------------
// Owns a dense row-major tensor in host memory.
class HostTensor {
 public:
  HostTensor() = default;
  HostTensor(DType dtype, std::vector<std::int64_t> shape);  // zeros
  bool defined() const { return !shape_.empty(); }
  DType dtype() const { return dtype_; }
  const std::vector<std::int64_t>& shape() const { return shape_; }
  std::int64_t numel() const;
  Tensor view() const;  // undefined when this is
  template <typename T>
  T* as() {
    return reinterpret_cast<T*>(bytes_.data());
  }
  template <typename T>
  const T* as() const {
    return reinterpret_cast<const T*>(bytes_.data());
  }
  std::vector<std::byte>& bytes() { return bytes_; }
  const std::vector<std::byte>& bytes() const { return bytes_; }

 private:
  DType dtype_ = DType::kF32;
  std::vector<std::int64_t> shape_;
  std::vector<std::byte> bytes_;
};

// Element at a byte address as a number, whatever the float or integer dtype (kU8 as an integer).
double load_element(const void* data, DType dtype, std::int64_t index);
// Rounds to nearest even (integers: to nearest).
void store_element(void* data, DType dtype, std::int64_t index, double value);
// ||a - b|| / ||b||, for tensors of any float dtypes.
double distance(const HostTensor& a, const HostTensor& b);
// Element of a view in any strides.
double element(const Tensor& host, std::initializer_list<std::int64_t> index);

// --- device tensors ------------------------------------------------------------------------------
// Whether rows lie densely or `kRowGap` elements apart. A gap is guard, too.
enum class Placement : std::uint8_t { kDense, kStrided };

// Owns a tensor in a device's memory between guard bands. The whole block starts out as kPoison
// bytes, which are NaN in every float dtype and out of range as ids, so that what is read before it
// is written, or written outside, shows.
class DeviceTensor {
 public:
  static constexpr std::size_t kGuardBytes = 256;
  static constexpr std::int64_t kRowGap = 32;  // elements: a multiple of every alignment asked for
  static constexpr std::byte kPoison{0xff};

  DeviceTensor() = default;
  DeviceTensor(Device device, DType dtype, std::vector<std::int64_t> shape,
               Placement placement = Placement::kDense);
  static DeviceTensor from(const Tensor& host, Device device,
                           Placement placement = Placement::kDense);  // undefined gives undefined
  static DeviceTensor from(const HostTensor& host, Device device,
                           Placement placement = Placement::kDense) {
    return from(host.view(), device, placement);
  }
  ~DeviceTensor();
  DeviceTensor(DeviceTensor&& other) noexcept;
  DeviceTensor& operator=(DeviceTensor&& other) noexcept;

  Tensor view() const { return view_; }
  HostTensor to_host() const;  // dense; waits for the device
  void assign(const Tensor& host);
  bool guards_intact() const;  // before, behind and between the rows
  void poison();               // elements and guards

 private:
  std::size_t block_bytes() const;
  Tensor view_{};
  std::vector<std::int64_t> shape_;
  void* block_ = nullptr;
};

// --- weights -------------------------------------------------------------------------------------
enum class Biases : std::uint8_t { kNone, kAll };
// Activation parameters alpha, beta and limit: the scalars of the ActivationSpec, or tensors.
enum class ExpertParameters : std::uint8_t { kScalar, kTensors };
// fp8_tensor's scales: one per expert, or fc1 with one for each half of N.
enum class TensorScales : std::uint8_t { kOne, kTwo };
// Static activation scales: one for all experts, or one each.
enum class StaticScales : std::uint8_t { kShared, kPerExpert };
// AWQ factors and alphas (the 8-tensor mode of seed 003).
enum class Extras : std::uint8_t { kNone, kPrequantAlpha };
// kQuantized: normal weights, quantized, the originals kept beside. kFast: random storage straight
// from a pool of bytes, for timings of shapes that would take minutes to quantize.
enum class Fill : std::uint8_t { kQuantized, kFast };

struct WeightOptions {
  std::uint64_t seed = 1;
  Biases bias = Biases::kNone;
  ExpertParameters parameters = ExpertParameters::kScalar;
  TensorScales tensor_scales = TensorScales::kOne;
  StaticScales static_scales = StaticScales::kShared;
  Extras extras = Extras::kNone;
  Fill fill = Fill::kQuantized;
};

// Views and what they look at, host memory. Moving keeps the views valid; copying is not offered.
struct WeightData {
  WeightData() = default;
  WeightData(WeightData&&) = default;
  WeightData& operator=(WeightData&&) = default;
  LayerWeights weights;                   // [experts asked for, ...]
  HostTensor fc1_original, fc2_original;  // f32 [E, N, K] before quantization (kQuantized only)
  std::deque<HostTensor> storage;
};
// Every local expert of `config`; expert e's numbers depend on (seed, e) alone.
WeightData make_weights(const LayerConfig& config, const WeightOptions& options);
// Local experts [first, first + count): one at a time keeps large layers out of host memory.
WeightData make_experts(const LayerConfig& config, const WeightOptions& options, std::int64_t first,
                        std::int64_t count);
// The shared experts as one expert of their joint width.
WeightData make_shared(const LayerConfig& config, const WeightOptions& options);
struct RouterData {
  RouterWeights weights;
  std::deque<HostTensor> storage;
};
enum class RouterBias : std::uint8_t { kNone, kLogits, kSelection, kBoth };
RouterData make_router(const LayerConfig& config, RouterBias bias, std::uint64_t seed);

// A dense copy of all tensors on a device, for calls that take the caller's own weights.
struct DeviceWeights {
  LayerWeights weights;
  std::deque<DeviceTensor> storage;
};
DeviceWeights to_device(const LayerWeights& host, Device device);

// --- batches -------------------------------------------------------------------------------------
// Which experts the tokens choose.
enum class Load : std::uint8_t {
  kUniform,     // distinct experts, each as likely
  kZipf,        // distinct, expert popularity 1 / rank
  kOne,         // every slot on one expert (duplicates within a token, then)
  kHoles,       // distinct where the shape allows; every other expert gets no token
  kDuplicates,  // an expert may occur several times in one token
  kRemote,      // some ids are -1, beyond the range, or extreme
};
inline constexpr int kNumLoads = 6;
std::string_view name(Load load);
Load parse_load(std::string_view text);  // throws kInvalidArgument

// kNonFinite: one token's row holds a NaN and one an infinity, when there are that many tokens.
enum class Values : std::uint8_t { kFinite, kNonFinite };

struct BatchOptions {
  std::int64_t tokens = 1;
  Fill fill = Fill::kQuantized;  // kFast: rows of activations and of logits repeat after 256
  Load load = Load::kUniform;
  Values values = Values::kFinite;
  DType id_dtype = DType::kI32;
  std::uint64_t seed = 1;
};
struct Batch {
  HostTensor hidden_states;  // [T, H] of config.input_dtype
  HostTensor hidden_scale;   // with 8-bit inputs: [1] | [T, 1] | [T, ceil(H / block_k)]
  HostTensor topk_ids;       // [T, k]
  HostTensor topk_weights;   // [T, k] f32, positive, sums to about 1
  HostTensor router_logits;  // [T, E] f32, whose top k under kRenormalize are distinct by a margin
};
Batch make_batch(const LayerConfig& config, const BatchOptions& options);
// How many local experts have at least one slot, for floors and reports.
std::int64_t active_experts(const LayerConfig& config, const HostTensor& topk_ids);

}  // namespace moesaic::harness
