// SPDX-License-Identifier: Apache-2.0
// Level 1: the layer. y[t] = sum_j w[t,j] * FC2_e(act(FC1_e(x[t]))), e = id[t,j].
// Seed 003 (FlashInfer's cutlass_fused_moe) is the model of what it must be able to do.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "moesaic/activation.h"
#include "moesaic/gemm.h"
#include "moesaic/quant.h"
#include "moesaic/routing.h"
#include "moesaic/types.h"

namespace moesaic {

// Where the routing weight multiplies: the expert's output (usual) or its input (Llama-4).
enum class WeightOn : std::uint8_t { kOutput, kInput };

// Where a layer's weights lie: in memory of its own, packed for the device; or where the caller has
// them, so that they are never held twice (see Layer::load).
enum class WeightStorage : std::uint8_t { kCopied, kInPlace };

// What a layer is. Everything a Layer allocates or plans follows from this alone.
struct LayerConfig {
  std::int64_t experts = 0;       // of the whole model
  std::int64_t hidden = 0;        // H
  std::int64_t intermediate = 0;  // I, one of gate / up
  std::int64_t top_k = 0;
  std::int64_t max_tokens = 0;    // the largest T of any forward
  ExpertRange local{};            // experts held here; default: all
  QuantSpec quant{};
  ActivationSpec activation{};
  RoutingSpec routing{};
  WeightOn weight_on = WeightOn::kOutput;
  DType input_dtype = DType::kBF16;   // f32 (scheme f32 only), f16, bf16; or fp8_e4m3 / i8 with
                                      // hidden_scale, for schemes with such activations
  DType output_dtype = DType::kBF16;  // f32, f16, bf16. 16-bit intermediates use the input's dtype
                                      // when that is 16-bit, else the output's when that is, else bf16
  std::int64_t shared_experts = 0;    // always-on experts added to every token, scheme as above;
  std::int64_t shared_intermediate = 0;  // their (joint) width; 0: shared_experts * intermediate
  std::size_t workspace_cap = 0;      // bytes; above it forward runs in token chunks with the same
                                      // bits (not for ActScale::kTensorDynamic). One that max_tokens
                                      // cannot keep, one at a time, is refused. 0: no cap
  WeightStorage weight_storage = WeightStorage::kCopied;  // kInPlace: on CUDA
};

// fc1: N = intermediate, or 2 * intermediate when gated; K = hidden. fc2: N = hidden, K = intermediate.
struct LayerWeights {
  GemmWeights fc1, fc2;
  ActivationWeights activation;
};

struct ForwardArgs {
  Tensor hidden_states;  // [T, H]
  Tensor hidden_scale;   // f32, with 8-bit hidden_states: [1] | [T, 1] | [T, ceil(H / block_k)]
  // Routing: ids and weights, or logits, or neither (the router attached with set_router).
  Tensor topk_ids;       // [T, k] i32 or i64, global ids. Outside [0, experts) or not local: nothing
  Tensor topk_weights;   // [T, k] f32
  Tensor router_logits;  // [T, E] f32, f16 or bf16
  Tensor output;         // [T, H]. May alias hidden_states only if it is exactly the same view
  Accumulate accumulate = Accumulate::kOverwrite;  // kAdd: output += y
  Tensor tokens_per_expert;  // optional out i32 [E_local]
  Workspace workspace{};     // at least workspace_bytes(T)
  Stream stream{};
};

// One way of running a product on this layer's device. Every tactic of a layer gives the same bits.
struct Tactic {
  int id = 0;
  std::string description;
};
struct TacticPair {
  int gemm1 = -1;  // -1: the policy's choice. An index out of range falls to the policy, too
  int gemm2 = -1;
};

// Immutable once loaded: forward may be called from many threads (and on many streams) at once with
// one workspace each.
class MOESAIC_API Layer {
 public:
  // Checks the configuration (throws kInvalidArgument), refuses by name what the device cannot do
  // (kUnsupported). Allocates packed storage (kOutOfMemory), unless weights stay in place.
  explicit Layer(const LayerConfig& config, Device device = {});
  ~Layer();
  Layer(Layer&&) noexcept;
  Layer& operator=(Layer&&) noexcept;

  const LayerConfig& config() const;
  Device device() const;

  // Attach weights, or put others in their place: what these leave out (a bias, say) is gone. They
  // are copied and packed; the caller's tensors, host or device memory, may go away afterwards.
  // Throws kInvalidArgument for tensors that do not fit, which changes nothing; after kOutOfMemory
  // and kDevice the layer may not be ready any more. Not while a forward runs.
  // WeightStorage::kInPlace: fc1.weight and fc2.weight must be dense, on the layer's device and
  // 16-byte aligned. Keep them alive and unwritten until the layer is destroyed. On SM90 the layer
  // may permute uint4 weights where they lie and never undoes it; unpack_expert gives the caller's
  // order. Scales (f32, e8m0) and zero points are kept, too, and only read, if they are dense and
  // aligned, else copied; all other tensors are copied. load may be called once.
  void load(const LayerWeights& weights);  // every local expert, leading extent E_local
  // One expert (leading extent 1): nothing larger than one expert is ever held twice. Not in place.
  // The layer is ready when all experts came, and with the same tensors: forward says what differs.
  void load_expert(std::int64_t local_expert, const LayerWeights& weights);
  // The way back, bit for bit: fc1 and fc2 are the caller's [1, N, K], any strides. For callers that
  // drop their copy after load. Refused on the CPU for weights of four bits, on CUDA for an inner
  // stride other than 1.
  void unpack_expert(std::int64_t local_expert, const Tensor& fc1, const Tensor& fc2) const;
  // Leading extent 1, intermediate = shared_intermediate. `gate` (optional, [H] or [1, H], float):
  // the shared output is multiplied by sigmoid(x . gate), as in Qwen2-MoE.
  void load_shared(const LayerWeights& weights, const Tensor& gate = {});
  // Copied, too. Throws kInvalidArgument for shapes and dtypes, kUnsupported for a selection bias
  // with sparsemixer. Not while a forward runs. A router or gate that is replaced is freed: capture
  // CUDA graphs of forward again after set_router and load_shared.
  void set_router(const RouterWeights& router);
  bool ready() const;                // every local expert, and the shared ones, have weights
  std::size_t weight_bytes() const;  // packed, on the device; not what lies in place

  // Bytes: a pure function of the configuration and T (0 <= T <= max_tokens), never above
  // workspace_cap, and never less for more tokens.
  std::size_t workspace_bytes(std::int64_t tokens) const;

  // Allocates nothing, synchronizes nothing, reads nothing back. Throws kNotReady (experts or a
  // needed router are missing), kInvalidArgument and kUnsupported before any output is touched;
  // kDevice when a launch fails, after which outputs are undefined. Values never raise: ids outside
  // contribute nothing, NaN and Inf stay in their token's row.
  void forward(const ForwardArgs& args) const;

  // The ways each product can run here, as FlashInfer's runner lists them, and which to take. Not
  // while a forward runs.
  std::vector<Tactic> tactics_gemm1() const;
  std::vector<Tactic> tactics_gemm2() const;
  void set_tactics(TacticPair pair);

  struct Impl;
  const Impl& impl() const { return *impl_; }  // for the stages

 private:
  std::unique_ptr<Impl> impl_;
};

}  // namespace moesaic
