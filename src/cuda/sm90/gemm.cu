// SPDX-License-Identifier: Apache-2.0
// Host side of the SM90a family: which schemes it takes, which kernel runs a stage.
#include <algorithm>
#include <string>

#include "check.h"
#include "cuda/gemm.h"
#include "cuda/sm90/gemm.h"
#include "cuda/sm90/host.h"
#include "cuda/weights.h"

namespace moesaic::cuda {
namespace {

using namespace sm90;

// --- the closed list of kernels
enum class Kernel : int { kNarrow, kMiddle, kWide, kWidest, kNarrowHalf, kNarrowRuns, kMiddleRuns };
constexpr int kKernels = 7;

struct KernelTraits {
  TaskShape task;
  void (*launch)(const Params&, int, cudaStream_t);
  bool (*leaves_directly)(Activation);
};

template <typename S>
KernelTraits traits_of(int rows = S::kWeightRows) {
  return {
      .task = task_shape<S>(rows), .launch = launch_gemm<S>, .leaves_directly = leaves_directly<S>};
}

template <Element E>
KernelTraits traits_of(Kernel kernel) {
  switch (kernel) {
    case Kernel::kNarrow:
    case Kernel::kNarrowRuns:
      return traits_of<Narrow<E>>();
    case Kernel::kNarrowHalf:
      return traits_of<Narrow<E>>(32);
    case Kernel::kMiddle:
    case Kernel::kMiddleRuns:
      return traits_of<Middle<E>>();
    case Kernel::kWide:
      return traits_of<Wide<E>>();
    case Kernel::kWidest:
      return traits_of<Widest<E>>();
  }
  return {};
}

KernelTraits traits_of(Element element, Kernel kernel) {
  switch (element) {
    case Element::kF16:
      return traits_of<Element::kF16>(kernel);
    case Element::kBF16:
      return traits_of<Element::kBF16>(kernel);
    case Element::kE4M3:
      return traits_of<Element::kE4M3>(kernel);
  }
  return {};
}

Element element_of(WeightFormat format) {
  return format == WeightFormat::kE4M3  ? Element::kE4M3
         : format == WeightFormat::kF16 ? Element::kF16
                                        : Element::kBF16;
}

// Of pairs (whose loading warps have five times the rows to look up, and whose tasks' epilogues
// take as long as 1 KiB of K) so many that they have this much of K.
constexpr std::int64_t kPairRunK = 1 << 10;
std::int64_t run_of(const WeightSpec& spec, const TaskShape& task) {
  const std::int64_t bytes = spec.k * (spec.format == WeightFormat::kE4M3 ? 1 : 2);
  if (task.pair == 2) return std::min(ceil_div(kPairRunK, bytes), kLongestRun);
  return run_of(bytes, task);
}

bool block_scaled(const WeightSpec& spec) {
  return spec.format == WeightFormat::kE4M3 && spec.act_scale == ActScale::kGroup;
}

KernelTraits traits_of(const WeightSpec& spec, Kernel kernel) {
  const bool flat = spec.format == WeightFormat::kE4M3 && !block_scaled(spec);
  if (flat && kernel == Kernel::kWidest) return traits_of<WidestFlat>();
  KernelTraits traits = traits_of(element_of(spec.format), kernel);
  if (kernel == Kernel::kNarrowRuns || kernel == Kernel::kMiddleRuns) {
    traits.task.run = static_cast<int>(std::max<std::int64_t>(run_of(spec, traits.task), 2));
  }
  return traits;
}

bool supports(const WeightSpec& spec) {
  // 16-byte pieces are the unit of every load.
  const std::int64_t bytes = spec.format == WeightFormat::kE4M3 ? 1 : 2;
  if (spec.k <= 0 || spec.n <= 0 || spec.k * bytes % 16 != 0) return false;
  if (spec.gated && spec.n % 16 != 0) return false;  // gate and up are interleaved eight by eight
  if (spec.format == WeightFormat::kBF16)
    return spec.act == ActFormat::k16 && spec.act_dtype == DType::kBF16;
  if (spec.format == WeightFormat::kF16)
    return spec.act == ActFormat::k16 && spec.act_dtype == DType::kF16;
  if (spec.format != WeightFormat::kE4M3 || spec.act != ActFormat::kE4M3) return false;
  // Scales that change along K must change where the sums are promoted.
  const bool along_k = spec.scale.grid_k > 1;
  if (block_scaled(spec)) {
    const bool eights =
        spec.scale.group_n % 8 == 0 || spec.scale.group_n >= spec.n;  // rows of one cell
    return eights && spec.act_group == 128 && (!along_k || spec.scale.group_k == 128);
  }
  return !along_k;
}

// --- policy
// The smallest tile that holds nearly every expert's rows: about two standard deviations above the
// mean of uniform routing. A tile with fewer rows runs a smaller instruction, so too large costs
// little; too small reads weights once more through L2. Forced heights moved three of the bounds:
// in e4m3 a little, as larger tiles also promote more sums; and in 16 bit Widest begins later where
// K is short, because its pairs' epilogues, half full, cost more than weights that are read twice:
// at a mean of 118 and K = 2048 Wide took 0.91, 0.91 and 1.03 of the time, with K = 5120 1.08.
std::int64_t tile_rows(const WeightSpec& fc1, std::int64_t slots, const DeviceTraits&) {
  const std::int64_t mean = slots / (fc1.experts > 0 ? fc1.experts : 1);
  const bool e4m3 = fc1.format == WeightFormat::kE4M3;
  if (mean <= (e4m3 ? 10 : 9)) return 16;
  if (mean <= (e4m3 ? 54 : 50)) return 64;
  if (mean <= (!e4m3 && fc1.k <= 2048 ? 118 : 108)) return 128;
  return traits_of(fc1, Kernel::kWidest).task.tokens;
}

bool forced(const GemmStage& stage) { return stage.tactic >= 0 && stage.tactic < kKernels; }

Kernel kernel_for(const GemmStage& stage, const DeviceTraits& device) {
  if (forced(stage)) return static_cast<Kernel>(stage.tactic);
  const std::int64_t rows = stage.rows.tile_rows;
  if (rows <= 16) {
    // Too few tasks to occupy the machine: halve them. The idle half of the instruction costs
    // nothing where memory is the bound.
    const std::int64_t tasks = stage.rows.max_tiles * ceil_div(stage.b->spec.n, 64);
    return tasks * 4 <= device.sm_count * 3 ? Kernel::kNarrowHalf : Kernel::kNarrowRuns;
  }
  if (rows <= 64) return Kernel::kMiddleRuns;
  return rows <= 128 ? Kernel::kWide : Kernel::kWidest;
}

// What a CTA does at a time: runs are as long as a forced tactic says, or so short that every CTA
// still gets some.
KernelTraits choice(const GemmStage& stage, const DeviceTraits& device) {
  constexpr std::int64_t kLeast = 6;  // runs of a CTA
  const WeightSpec& spec = stage.b->spec;
  KernelTraits traits = traits_of(spec, kernel_for(stage, device));
  TaskShape& task = traits.task;
  if ((task.run > 1 || task.pair == 2) && !forced(stage)) {
    const std::int64_t tasks = stage.rows.max_tiles * ceil_div(spec.n, task.weight_rows);
    task.run = fair_run(run_of(spec, task), tasks, kLeast, task, device);
  }
  return traits;
}

// Whether the weight rows can lie in shared memory as sm90/direct.h wants them: in units of 32
// rows (16 of each half) that share their scales, and with gate and up of all experts at one
// distance.
bool lie_directly(const GemmStage& stage) {
  const WeightSpec& spec = stage.b->spec;
  const Tensor& w = weights_of(*stage.b).weight;
  const bool halves = stage.activation != nullptr && is_gated(stage.activation->kind) &&
                      stage.activation->layout != GateLayout::kInterleaved;
  const bool one_distance = w.shape[0] <= 1 || w.strides[0] == spec.n * w.strides[1];
  const bool cells = !block_scaled(spec) || spec.scale.grid_n <= 1 || spec.scale.group_n % 32 == 0;
  return spec.n % 32 == 0 && cells && (!halves || one_distance);
}

// A static scale is known before the first sum: every kernel applies it on the way out. A group of
// 128 is what a pair's CTA makes of a gated row at a time; other kernels make less, and the pairs
// without scales along K do without: a scheme has groups in both products or in none. (Whole rows,
// or all of them, nobody has at once.) Groups leave directly only, behind gated activations.
QuantizedBy intermediate_quantized_by(const WeightSpec& fc1, const WeightSpec& fc2,
                                      const ActivationSpec& activation) {
  if (fc1.format != WeightFormat::kE4M3 || fc2.act != ActFormat::kE4M3) return QuantizedBy::kStage;
  if (fc2.act_scale == ActScale::kTensorStatic) return QuantizedBy::kGemm1;
  return block_scaled(fc1) && block_scaled(fc2) && fc2.act_group == 128 && is_gated(activation.kind)
             ? QuantizedBy::kEither
             : QuantizedBy::kStage;
}
bool gemm1_quantizes(const GemmStage& stage, const DeviceTraits& device) {
  return stage.quantizer.granularity == ActScale::kTensorStatic ||
         (kernel_for(stage, device) == Kernel::kWidest && block_scaled(stage.b->spec) &&
          lie_directly(stage));
}

// The narrow kernel of an element that makes its tiles itself.
void (*launch_unlisted(Element element))(const Params&, int, cudaStream_t) {
  switch (element) {
    case Element::kF16:
      return launch_gemm<NarrowUnlisted<Element::kF16>>;
    case Element::kBF16:
      return launch_gemm<NarrowUnlisted<Element::kBF16>>;
    case Element::kE4M3:
      break;
  }
  return launch_gemm<NarrowUnlisted<Element::kE4M3>>;
}

std::vector<Tactic> tactics(const WeightSpec& spec, const DeviceTraits&) {
  std::vector<Tactic> list;
  for (int i = 0; i < kKernels; ++i) {
    list.push_back({i, "wgmma " + describe(traits_of(spec, static_cast<Kernel>(i)).task)});
  }
  return list;
}

// --- a stage's arguments
void set_scales(Params& p, const GemmStage& stage, const Tensor& scale) {
  const WeightSpec& spec = stage.b->spec;
  if (spec.format != WeightFormat::kE4M3) return;
  p.block_scaled = block_scaled(spec);
  if (scale.defined()) {
    p.weight_scale = scale.as<const float>();
    p.scale_expert = scale.strides[0];
    p.scale_row = scale.rank > 1 && scale.shape[1] > 1 ? scale.strides[1] : 0;
    p.scale_k = scale.rank > 2 && scale.shape[2] > 1 ? scale.strides[2] : 0;
    p.scale_group = std::clamp<std::int64_t>(spec.scale.group_n, 1, spec.n);
  }
  p.a_scale = stage.a_scale.data;
  p.a_scale_row = stage.a_scale.row_stride;
  p.a_scale_group = stage.a_scale.group_stride;
  p.a_scale_expert = stage.a_scale.expert_stride;
  if (p.block_scaled && (p.weight_scale == nullptr || p.a_scale == nullptr)) {
    invalid("scale: block-scaled e4m3 needs the scales of the weights and of the activations");
  }
  if (!p.block_scaled) return;
  // The loading warps count scales with 32 bits.
  const std::int64_t cells = (spec.n - 1) / p.scale_group, groups = p.k_chunks - 1;
  const std::int64_t rows = std::max(stage.rows.positions, stage.rows.slot_count);
  const bool forward = std::min({p.scale_expert, p.scale_row, p.scale_k, p.a_scale_row,
                                 p.a_scale_group, p.a_scale_expert}) >= 0;
  const auto reach = [](std::int64_t count, std::int64_t stride) {
    return static_cast<double>(count) * static_cast<double>(stride);
  };
  constexpr double kMost = 0xfffffff0;
  if (!forward ||
      reach(spec.experts, p.scale_expert) + reach(cells, p.scale_row) + reach(groups, p.scale_k) >
          kMost ||
      reach(rows, p.a_scale_row) + reach(groups, p.a_scale_group) +
              reach(spec.experts, p.a_scale_expert) >
          kMost) {
    unsupported("scale: the wgmma kernels read scales at offsets from 0 to 2^32 elements");
  }
}

Terms terms(const Params& p) {
  const bool scaled = p.weight_scale != nullptr && !p.block_scaled;
  if (p.bias.data != nullptr || p.alpha != nullptr) return Terms::kRows;
  return !scaled ? Terms::kNone : p.scale_row == 0 ? Terms::kOne : Terms::kRows;
}

Direct direct(const Params& p, const GemmStage& stage, const KernelTraits& traits) {
  if (p.block_scaled && p.quantizer.kind == Quantizes::kStatic)
    unsupported("c: block scales quantize in groups, not with one static scale");
  const Activation kind = p.activates ? p.activation.kind : Activation::kIdentity;
  // (A row of C is then a 32-bit number of bytes.)
  const bool fits = p.store == StorePath::kMatrix && p.c_rows.stride <= 0x7fffffffLL;
  if (!fits || !traits.leaves_directly(kind) || !lie_directly(stage)) {
    if (p.quantizer.kind == Quantizes::kGroup)
      unsupported("c: rows are quantized in groups only where they leave directly");
    return Direct::kNo;
  }
  const bool even =
      p.row_weights == nullptr && (p.a_scale == nullptr || p.block_scaled || p.a_scale_row == 0);
  const bool known = p.activates ? is_gated(kind) : p.quantizer.kind == Quantizes::kNo;
  return even && known && !p.up_first && p.c_type == plain_type(element_of(stage.b->spec.format))
             ? Direct::kPlain
             : Direct::kAny;
}

// Whether the sides may be exchanged (sm90/upright.h): rows of C leave directly, and each half
// (gate, up) of 128 weight rows lies in one cell of scales. (Without scales along K nothing is
// gained. Nor does a static quantizer come here: a scheme has one granularity for both products,
// and block scales mean groups.)
bool upright(const Params& p) {
  const bool uniform = p.scale_row == 0 || (p.scale_group % 128 == 0 &&
                                            (!p.gated || p.interleaved || p.columns % 64 == 0));
  return p.block_scaled && p.direct != Direct::kNo && uniform;
}

// Whether the scales of four chunks are 16 aligned bytes.
bool scale_quads(const Params& p) {
  return p.block_scaled && p.a_scale_group == 1 && p.scale_k == 1 && p.k_chunks % 4 == 0 &&
         p.a_scale_row % 4 == 0 && p.a_scale_expert % 4 == 0 && p.scale_row % 4 == 0 &&
         p.scale_expert % 4 == 0 && aligned(p.a_scale, 16) && aligned(p.weight_scale, 16);
}

void run(const GemmStage& stage, const DeviceTraits& device, cudaStream_t stream) {
  if (stage.rows.max_tiles == 0 || stage.rows.positions == 0) return;
  const WeightSpec& spec = stage.b->spec;
  const Element element = element_of(spec.format);
  const KernelTraits traits = choice(stage, device);
  const TaskShape& task = traits.task;
  Params p{};
  set_arguments(p, stage, element, task);
  set_scales(p, stage, weights_of(*stage.b).scale);
  p.terms = terms(p);
  p.direct = direct(p, stage, traits);
  set_weights(p, stage,
              {.element = element,
               .row_k = spec.k,
               .k = element == Element::kE4M3 ? 128 : 64,
               .weight_rows = task.weight_rows / task.pair});
  p.upright = upright(p);
  p.scale_quads = scale_quads(p);
  // A counter answers while a task's stages are asked for: three of Narrow, six of Middle.
  constexpr std::int64_t kLeastDealtBytes = 3 * 256;
  const int grid = grid_size(p, stage, task, device, kLeastDealtBytes);
  const auto launch = stage.unlisted.any() ? launch_unlisted(element) : traits.launch;
  launch(p, grid, stream);
}

bool makes_tiles(const WeightSpec&, const RowMap&, const DeviceTraits&) { return true; }

}  // namespace

const GemmFamily& family_sm90() {
  static constexpr GemmFamily kFamily{.supports = supports,
                                      .tile_rows = tile_rows,
                                      .tactics = tactics,
                                      .check_rows = check_rows,
                                      .run = run,
                                      .intermediate_quantized_by = intermediate_quantized_by,
                                      .gemm1_quantizes = gemm1_quantizes,
                                      .makes_tiles = makes_tiles,
                                      .most_blocks = 1024,  // as far as was measured
                                      .boxes = true};
  return kFamily;
}

}  // namespace moesaic::cuda
