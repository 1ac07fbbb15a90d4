// SPDX-License-Identifier: Apache-2.0
// THE contract between the layer and a backend: memory, packing, and one method per stage, in the
// order of the data. A backend is chosen once per device; which kernel runs inside a stage is its own
// business. Callers have checked every argument: backends trust shapes, dtypes and alignment, and
// only values inside tensors may be hostile.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "moesaic/activation.h"
#include "moesaic/gemm.h"
#include "moesaic/layer.h"
#include "moesaic/routing.h"
#include "moesaic/runtime.h"
#include "moesaic/stages.h"
#include "row_map.h"
#include "scheme.h"

namespace moesaic {

// --- weights ------------------------------------------------------------------------------------
// The small tensors beside a product's weights, on the device, dense; undefined when absent. In a
// packed layer they are f32; a caller's own (plain) may be f16 or bf16, too. Row order as the caller's.
struct SideTensors {
  Tensor bias;         // [E, N]
  Tensor input_scale;  // [1] or [E]
  Tensor prequant;     // [K] or [E, K]
  Tensor alpha;        // [E]
  ActivationWeights activation;  // [E] each; fc1 only
};

// Of a weight that stays where the caller has it: what a vector load and a tensor map ask for.
inline constexpr std::size_t kInPlaceAlignment = 16;

// A backend's own arrangement of one product's weights, scales and zero points.
class PackedWeights {
 public:
  virtual ~PackedWeights() = default;
  // `one` has leading extent 1, host or this device's memory. May be called for different experts
  // from different threads.
  virtual void load(std::int64_t local_expert, const GemmWeights& one) = 0;
  // The weight of one expert as it came, into [1, N, K] on this device. Throws kUnsupported by name where
  // the arrangement has no way back.
  virtual void unpack(std::int64_t local_expert, const Tensor& weight) const = 0;
  virtual std::size_t bytes() const = 0;
};

// What a product reads: packed, or the caller's views. Only operand loaders look inside.
// GemmWeights that reach a backend (here and in PackedWeights::load) are normalized by weights.h:
// weight rank 3; scale rank 3 [E, grid_n, grid_k] and zero_point rank 3 [E, N or N/2, grid_k], with
// stride 0 where one value serves a whole dimension.
struct WeightOperand {
  WeightSpec spec;
  const PackedWeights* packed = nullptr;  // else `plain`
  GemmWeights plain;
  SideTensors side;
};

// --- stage arguments ----------------------------------------------------------------------------
// Whether a stage may read its list (align: the ids; all others: what align or tiles wrote) before the stage in front
// of it has ended: CUDA's launches overlap (cuda/overlap.h, rules 2 and 3), the CPU's do not. kSettled: the list was
// complete before that stage began. Behind GEMM1 every stage of a layer has it so: align came before GEMM1. (A product's
// counter is of the same age, and is written before that wait, too: nothing in front of it knows this word.)
enum class ListAge : std::uint8_t { kNew, kSettled };

// The scale of activation row r (of tile expert e), K group g: data[r*row + g*group + e*expert].
struct ActScaleView {
  const float* data = nullptr;  // null: activations carry no scale
  std::int64_t row_stride = 0, group_stride = 0, expert_stride = 0;
};

struct RouteStage {
  RoutingSpec spec;
  Tensor logits;                // [T, E], given or computed
  Tensor hidden_states;         // when computing: [T, H] and
  RouterWeights router;
  Tensor logits_scratch;        // f32 [T, E]
  Tensor topk_ids;              // out i32 [T, k]
  Tensor topk_weights;          // out f32 [T, k]
};

// From ids to positions.
struct AlignStage {
  Tensor topk_ids;              // [T, k] i32 or i64
  ListAge ids_age = ListAge::kNew;
  std::int64_t experts = 0;     // global
  ExpertRange local;            // count resolved
  Tensor expert_map;            // optional i32 [experts]
  std::int64_t capacity = 0;    // batched: rows per expert; 0: compact
  std::int64_t block_rows = 0;  // padded sorted lists (level 3); 0: compact
  RowMap rows;                  // out; tiles null: none are written, the other outputs that are given
                                // are. row_slot may be null when batched. T = 0 needs no scratch
  std::int32_t* block_experts = nullptr;  // out, block_rows only: [positions / block_rows]
  std::int32_t* num_padded = nullptr;     // out, block_rows only
  std::int32_t* next_task = nullptr;      // out [2]: zeros, for both products' GemmStage; may be null
  std::int32_t* slot_row = nullptr;           // out [T * k]: position or -1; may be null
  std::int32_t* tokens_per_expert = nullptr;  // out [E_local] (batched: clipped to capacity); may be null
  std::int32_t* dropped = nullptr;            // out [1]; may be null
  void* scratch = nullptr;                    // align_scratch_bytes
};

// From a caller's lists to tiles: exactly one of the two formats.
struct TileStage {
  SortedRows sorted;
  BatchedRows batched;
  std::int64_t capacity = 0;     // batched: rows per expert; counts beyond are clipped
  std::int64_t experts = 0;      // local; block experts outside become filtered
  RowMap rows;                   // out: tiles and num_tiles; row_slot is the caller's list
};

// Moves rows to where a product wants them, and quantizes: dst = Q(src * row_weight * prequant).
struct QuantizeStage {
  Tensor input;                  // [R, K] float; e4m3 / i8 when only moved (scale moves along)
  ActScaleView input_scale;      // of 8-bit input
  const RowMap* rows = nullptr;  // null: rows 0..R-1 of input, all live. Else only live positions
  // rows null: row t goes to the positions slot_row[t * top_k + j] >= 0 instead of row t of output. Asked only of
  // a backend that says so (scatters_rows, input_rows); of 8-bit input with scales by row or group.
  const std::int32_t* slot_row = nullptr;
  ListAge list_age = ListAge::kNew;      // of rows; null: of the ids that the product behind this reads
  RowOf source = RowOf::kPosition;       // row of `input` for a position
  std::int64_t top_k = 1;
  const float* row_weights = nullptr;    // by slot; WeightOn::kInput
  Tensor prequant;                       // [K] or [E, K]
  DType round_to = DType::kBF16;         // the product with row_weights / prequant is rounded to this
                                         // 16-bit dtype before it is quantized or stored
  ActScale granularity = ActScale::kDefault;  // kDefault: no quantization
  std::int64_t group = 0;
  Int8Rounding int8_rounding = Int8Rounding::kNearest;
  Tensor static_scale;                   // [1] or [E] f32
  bool per_expert_absmax = false;        // batched format: per-tensor scales are per expert (dynamic:
                                         // its absmax; static or moved scalar: repeated)
  Tensor output;                         // [positions or R, K]
  float* scale = nullptr;                // out: kTensor*: [1] (per_expert_absmax: [E]); kToken: [rows];
  std::int64_t scale_row_stride = 0;     // kGroup: [rows, groups], row stride in floats
  void* scratch = nullptr;               // quantize_scratch_bytes
};

// How GEMM1 writes 8-bit rows, where the backend can: its values are rounded to `round_to` and quantized from there, to
// the bits that a quantize stage behind a 16-bit C gives.
struct GemmQuantizer {
  ActScale granularity = ActScale::kDefault;  // kDefault: C is not quantized
  DType round_to = DType::kBF16;
  Tensor static_scale;               // kTensorStatic: [1] or [E] f32
  float* scale = nullptr;            // out, kGroup: [positions, groups], row stride in floats
  std::int64_t scale_row_stride = 0;
};
// Who quantizes the rows between the products for GEMM2: a stage of its own; GEMM1 with some tactics or tiles; GEMM1 with any.
enum class QuantizedBy : std::uint8_t { kStage, kEither, kGemm1 };

// The grouped product, with gather before and everything element-wise behind.
struct GemmStage {
  RowMap rows;
  UnlistedRows unlisted;             // in place of rows.tiles
  ListAge list_age = ListAge::kNew;  // of rows, or unlisted
  Tensor a;                      // [*, K] of spec.act_dtype; unit inner stride
  ActScaleView a_scale;
  RowOf a_row = RowOf::kPosition;
  std::int64_t top_k = 1;
  const WeightOperand* b = nullptr;
  const ActivationSpec* activation = nullptr;  // fc1: applied in fp32 on the finished sums; C is [*, N or N/2]
  const float* row_weights = nullptr;          // by slot, behind the bias
  Tensor c;                      // [*, N] f32, f16, bf16 in any strides; 8 bit with a quantizer
  GemmQuantizer quantizer;
  RowOf c_row = RowOf::kPosition;
  std::int32_t* next_task = nullptr;  // in and out [1], or null: align's zero. A product of more tasks than fit the
                                      // device at once may count here who takes the next, so it is spent: one product
                                      // for each zero
  int tactic = -1;
  void* scratch = nullptr;       // gemm_scratch_bytes
};

struct ActivateStage {
  ActivationSpec spec;
  ActivationWeights parameters;
  Tensor input, row_expert, output;
};

// y[t] (+)= scale * sum_j w[t,j] * rows[slot_row[t,j]] + shared_weight[t] * shared[t], fp32, j ascending.
struct CombineStage {
  Tensor rows;                   // [R, H] f32, f16, bf16
  ListAge list_age = ListAge::kNew;  // of slot_row, topk_ids, weights
  const std::int32_t* slot_row = nullptr;  // [T * k], -1: nothing; null: row = slot
  const std::int32_t* topk_ids = nullptr;  // optional: negative ids are skipped
  ExpertRange local;                       // with a count: ids outside are skipped, too
  const float* weights = nullptr;          // [T * k]; null: 1
  std::int64_t top_k = 1;
  float scale = 1.0f;
  Tensor shared;                 // optional [T, H]
  const float* shared_weight = nullptr;    // optional [T]
  Accumulate accumulate = Accumulate::kOverwrite;
  Tensor output;                 // [T, H]
};

class Backend {
 public:
  virtual ~Backend() = default;
  virtual DeviceInfo info() const = 0;
  // Everything the backend itself must refuse; the common checks have passed.
  virtual Support supports(const LayerConfig& config, Format format) const = 0;

  // Memory. `copy` takes host or device pointers on either side; ordered on `stream`, host-blocking
  // when the host's side is pageable.
  virtual void* allocate(std::size_t bytes) const = 0;
  virtual void deallocate(void* data) const noexcept = 0;
  virtual void copy(void* dst, const void* src, std::size_t bytes, Stream stream) const = 0;

  virtual std::unique_ptr<PackedWeights> make_packed(const WeightSpec& spec) const = 0;
  // WeightStorage::kInPlace: all experts' weights, dense on this device, are read where they lie,
  // and may be rearranged there. Asked only of a backend whose `supports` takes it.
  virtual std::unique_ptr<PackedWeights> keep_in_place(const WeightSpec&,
                                                       const GemmWeights& /*all*/) const {
    return nullptr;
  }

  // Pure functions of their arguments: what the plan is made from.
  // 16-bit slot outputs, or f32: one choice per scheme, whatever T and format.
  virtual DType slot_dtype(const WeightSpec& fc2) const = 0;
  virtual std::int64_t tile_rows(const WeightSpec& fc1, std::int64_t slots) const = 0;
  // Where GEMM1 of the standard format wants float inputs: kToken as they are, gathered by the product; kPosition
  // laid out by position, where reading consecutive rows gains more than writing them costs. Never kPosition of fewer
  // slots where more of them give kToken: a chunk's buffers serve a shorter chunk, too.
  virtual RowOf input_rows(const WeightSpec&, std::int64_t /*slots*/) const { return RowOf::kToken; }
  // Whether prepare of the batched format reads each row once and writes it to all positions of its slots
  // (QuantizeStage::slot_row), rows of such scales (kDefault: 16 bit, only moved). A backend whose input_rows is ever
  // kPosition takes slot_row.
  virtual bool scatters_rows(ActScale, std::int64_t /*slots*/) const { return false; }
  // Whether GEMM1 writes its rows as GEMM2 reads them, in 8 bit (GemmStage::quantizer): the quantize stage between them
  // is then left out. Not asked where a factor per channel lies between them. kEither: gemm1_quantizes says it of a
  // GEMM1 that is about to run, with its quantizer; that follows from specs, tactic, tile_rows and the weights' strides alone, too.
  virtual QuantizedBy intermediate_quantized_by(const WeightSpec& /*fc1*/, const WeightSpec& /*fc2*/,
                                          const ActivationSpec&) const {
    return QuantizedBy::kStage;
  }
  virtual bool gemm1_quantizes(const GemmStage&) const { return false; }
  // Whether a product of these weights makes the tiles of such rows itself: align or tiles are then left out. Not asked
  // where a tactic is forced. `all_quantized`: a quantize stage between two products then takes all positions, those of
  // no slot as well.
  virtual bool makes_tiles(const WeightSpec&, const RowMap&, const UnlistedRows&, bool /*all_quantized*/) const {
    return false;
  }
  virtual std::size_t align_scratch_bytes(std::int64_t slots, std::int64_t experts) const = 0;
  virtual std::size_t quantize_scratch_bytes(std::int64_t rows, std::int64_t experts) const = 0;
  virtual std::size_t gemm_scratch_bytes(const WeightSpec& spec, std::int64_t positions) const = 0;
  virtual std::vector<Tactic> tactics(const WeightSpec& spec) const = 0;

  // The stages, in the order of the data.
  virtual void route(const RouteStage& stage, Stream stream) const = 0;
  virtual void align(const AlignStage& stage, Stream stream) const = 0;
  virtual void tiles(const TileStage& stage, Stream stream) const = 0;
  virtual void quantize(const QuantizeStage& stage, Stream stream) const = 0;
  // x is quantized and its slots are sorted: neither needs the other. The ids count as settled.
  virtual void quantize_and_align(const QuantizeStage& quantizer, const AlignStage& slots, Stream stream) const {
    quantize(quantizer, stream);
    align(slots, stream);
  }
  virtual void gemm(const GemmStage& stage, Stream stream) const = 0;
  // Throws kUnsupported for rows that a product of these weights cannot read where they lie, as gemm does: asked in
  // front of a call's first stage, so that nothing has been written by then.
  virtual void check_rows(const WeightSpec&, const Tensor& /*a*/) const {}
  virtual void activate(const ActivateStage& stage, Stream stream) const = 0;
  virtual void combine(const CombineStage& stage, Stream stream) const = 0;
};

// The backend of a device, made once. Throws kUnsupported when the library was built without it or
// the machine has no such device.
const Backend& backend(Device device);

// Defined by each backend that is compiled in; null when this machine has no such device. The kernel
// overrides are what runtime.h's set_kernels and available_kernels forward to.
const Backend* cpu_backend();
void set_cpu_kernels(std::string_view level);
std::vector<std::string> available_cpu_kernels();
const Backend* cuda_backend(int index);
std::string cuda_absence();  // why there is none, in the CUDA runtime's words: for messages
// What the CUDA backend would answer on a device of compute capability 9.0, asked of the code alone: for the
// support matrix of a build on a machine without such a device.
Support cuda_support(const LayerConfig& config);
void set_cuda_kernels(std::string_view level);
std::vector<std::string> available_cuda_kernels();

}  // namespace moesaic
