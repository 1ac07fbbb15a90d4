// SPDX-License-Identifier: Apache-2.0
// Host side of the SM90 weight-only family: which schemes it takes, which kernel runs a stage.
#include <algorithm>
#include <string>

#include "check.h"
#include "cuda/gemm.h"
#include "cuda/sm90/dequant.h"
#include "cuda/sm90/host.h"
#include "cuda/weights.h"

namespace moesaic::cuda {
namespace {

using namespace sm90;

// --- the closed list of kernels
enum class Kernel : int { kNarrow, kMiddle, kWide, kNarrowHalf, kTwin, kTwinRuns, kNarrowUnlisted };
constexpr int kKernels = 6;  // tactics: all but NarrowUnlisted

struct KernelTraits {
  TaskShape task;
  int row_bytes;  // of weights in a stage
  int scales;     // of a row that one copy may bring
  void (*launch)(const DequantParams&, int, cudaStream_t);
};

template <typename S>
KernelTraits traits_of(int rows = S::kWeightRows) {
  return {.task = task_shape<S>(rows),
          .row_bytes = S::kRowBytes,
          .scales = S::kScalesAtOnce,
          .launch = launch_dequant<S>};
}

template <typename W, Element E, int kSteps>
KernelTraits traits_of(Kernel kernel) {
  switch (kernel) {
    case Kernel::kNarrow:
      return traits_of<DequantNarrow<W, E, kSteps>>();
    case Kernel::kNarrowHalf:
      return traits_of<DequantNarrow<W, E, kSteps>>(32);
    case Kernel::kMiddle:
      return traits_of<DequantMiddle<W, E, kSteps>>();
    case Kernel::kWide:
      if constexpr (W::kHasAll) return traits_of<DequantWide<W, E, kSteps>>();
      break;
    case Kernel::kTwin:
      if constexpr (W::kHasAll) return traits_of<DequantTwin<W, E, kSteps>>();
      break;
    case Kernel::kTwinRuns:
      if constexpr (kHasRuns<W, kSteps>) return traits_of<DequantTwinRuns<W, E, kSteps>>();
      break;
    case Kernel::kNarrowUnlisted:
      if constexpr (kHasFew<W, kSteps>) return traits_of<DequantNarrowUnlisted<W, E, kSteps>>();
  }
  return {};
}

// What distinguishes the kernels of a scheme.
struct Variant {
  WeightFormat format;
  bool f16, zeros, fine;    // fine: promotion every 32 of K
  Arrangement arrangement;  // of 4-bit weights
};

template <typename W>
KernelTraits traits_of(const Variant& v, Kernel kernel) {
  if (v.f16)
    return v.fine ? traits_of<W, Element::kF16, 2>(kernel) : traits_of<W, Element::kF16, 8>(kernel);
  return v.fine ? traits_of<W, Element::kBF16, 2>(kernel) : traits_of<W, Element::kBF16, 8>(kernel);
}

template <Arrangement kHow>
KernelTraits traits_of_u4(const Variant& v, Kernel kernel) {
  return v.zeros ? traits_of<U4<Zeros::kGiven, kHow>>(v, kernel)
                 : traits_of<U4<Zeros::kMiddle, kHow>>(v, kernel);
}
KernelTraits traits_of(const Variant& v, Kernel kernel) {
  if (v.format == WeightFormat::kE4M3) return traits_of<E4M3>(v, kernel);
  if (v.format == WeightFormat::kU4)
    return v.arrangement == Arrangement::kRearranged
               ? traits_of_u4<Arrangement::kRearranged>(v, kernel)
               : traits_of_u4<Arrangement::kPlain>(v, kernel);
  return v.zeros ? traits_of<I8<Zeros::kGiven>>(v, kernel)
                 : traits_of<I8<Zeros::kMiddle>>(v, kernel);
}

bool along_k(const WeightSpec& spec) { return spec.scale.has_scale && spec.scale.grid_k > 1; }

bool is_fine(const WeightSpec& spec) { return along_k(spec) && spec.scale.group_k % 128 != 0; }

Variant variant_of(const WeightSpec& spec, Arrangement arrangement) {
  return {.format = spec.format,
          .f16 = spec.act_dtype == DType::kF16,
          .zeros = spec.zero_points,
          .fine = is_fine(spec),
          .arrangement = arrangement};
}

std::int64_t row_bytes(const WeightSpec& spec) {
  return spec.format == WeightFormat::kU4 ? spec.k / 2 : spec.k;
}

// What runs in place of a kernel that this variant does not have.
Kernel present(const Variant& v, Kernel kernel) {
  if (v.format == WeightFormat::kU4 && v.arrangement == Arrangement::kPlain) {
    if (kernel == Kernel::kWide) return Kernel::kMiddle;
    return kernel == Kernel::kTwin || kernel == Kernel::kTwinRuns ? Kernel::kNarrow : kernel;
  }
  return kernel == Kernel::kTwinRuns && v.fine ? Kernel::kTwin : kernel;
}

KernelTraits traits_of(const WeightSpec& spec, Kernel kernel, Arrangement arrangement) {
  const Variant variant = variant_of(spec, arrangement);
  kernel = present(variant, kernel);
  KernelTraits traits = traits_of(variant, kernel);
  if (kernel == Kernel::kTwinRuns)
    traits.task.run =
        static_cast<int>(std::max<std::int64_t>(run_of(row_bytes(spec), traits.task), 2));
  return traits;
}

bool supports(const WeightSpec& spec) {
  if (spec.act != ActFormat::k16 || !is_16bit(spec.act_dtype)) return false;
  if (spec.format != WeightFormat::kU4 && spec.format != WeightFormat::kI8 &&
      spec.format != WeightFormat::kU8 && spec.format != WeightFormat::kE4M3)
    return false;
  // 16-byte pieces are the unit of every load of weights and tokens.
  if (spec.k <= 0 || spec.n <= 0 || spec.k % 8 != 0 || row_bytes(spec) % 16 != 0) return false;
  if (spec.gated && spec.n % 16 != 0) return false;  // gate and up are interleaved eight by eight
  if (!spec.scale.has_scale) return false;           // every one of these schemes has some
  // Zero points come with groups of single rows, of unsigned weights.
  const bool grouped = spec.format == WeightFormat::kU4 || spec.format == WeightFormat::kU8;
  if (spec.zero_points && (!grouped || spec.scale.group_n != 1)) return false;
  return !along_k(spec) || spec.scale.group_k % 32 == 0;
}

// --- policy
// As in the SM90 family: the smallest tile that holds nearly every expert's rows. But narrow tiles
// multiply by mma.sync, which costs less beside the widening than a wgmma that is mostly empty: at
// means of 10 to 12, two tiles of 16 for every tenth expert took 0.77 to 0.97 of the time of one of
// 64 (int4; int8 0.93 to 1.02). At 14 that depends on the shape (0.92 to 1.13).
// A plan is made before anybody says whose weights they will be: heights are those of a layer's own
// (log_sm90_dequant.md says what that costs callers' 4-bit ones, which have no Wide).
std::int64_t tile_rows(const WeightSpec& fc1, std::int64_t slots, const DeviceTraits&) {
  const std::int64_t mean = slots / (fc1.experts > 0 ? fc1.experts : 1);
  if (mean <= 12) return 16;
  if (mean <= 50) return 64;
  return traits_of(fc1, Kernel::kWide, Arrangement::kRearranged).task.tokens;
}

bool forced(const GemmStage& stage) { return stage.tactic >= 0 && stage.tactic < kKernels; }

Kernel listed_kernel(const WeightSpec& spec, const RowMap& map, const DeviceTraits& device) {
  const std::int64_t rows = map.tile_rows;
  if (rows > 16) return rows <= 64 ? Kernel::kMiddle : Kernel::kWide;
  const std::int64_t tasks = likely_tiles(map, spec.experts) * ceil_div(spec.n, 128);
  // With K below 512 a task is little beside what comes with it: runs, where tasks are enough.
  if (spec.k < 512) return tasks >= 12 * device.sm_count ? Kernel::kTwinRuns : Kernel::kNarrow;
  // With several tokens a tile the multiplying warps are what is waited for, and Twin has twice as
  // many: up to a fifth is won. But as long as tasks are few, a last wave of half the machine costs
  // more, and of long K (2880 and more) a tenth is lost.
  const bool several = map.slot_count >= 2 * spec.experts;
  const bool twin = several && tasks >= 6 * device.sm_count && spec.k <= 2048;
  return twin ? Kernel::kTwin : Kernel::kNarrow;
}

Kernel kernel_for(const GemmStage& stage, const DeviceTraits& device) {
  if (stage.unlisted.any()) return Kernel::kNarrowUnlisted;
  if (forced(stage)) return static_cast<Kernel>(stage.tactic);
  return listed_kernel(stage.b->spec, stage.rows, device);
}

// Products that would come in runs keep their list: those are worth more. Weights of every
// arrangement have NarrowUnlisted, or none has.
bool makes_tiles(const WeightSpec& spec, const RowMap& rows, const DeviceTraits& device) {
  return traits_of(spec, Kernel::kNarrowUnlisted, Arrangement::kPlain).launch != nullptr &&
         listed_kernel(spec, rows, device) == Kernel::kNarrow;
}

// What a CTA does at a time: runs are as long as a forced tactic says, or so short that every CTA
// still gets some.
KernelTraits choice(const GemmStage& stage, const DeviceTraits& device) {
  constexpr std::int64_t kLeast = 3;  // runs of a CTA
  const WeightSpec& spec = stage.b->spec;
  KernelTraits traits = traits_of(spec, kernel_for(stage, device), arrangement_of(*stage.b));
  TaskShape& task = traits.task;
  if (task.run > 1 && !forced(stage)) {
    const std::int64_t tasks =
        likely_tiles(stage.rows, spec.experts) * ceil_div(spec.n, task.weight_rows);
    task.run = fair_run(run_of(row_bytes(spec), task), tasks, kLeast, task, device);
  }
  return traits;
}

// Those of a layer's own weights.
std::vector<Tactic> tactics(const WeightSpec& spec, const DeviceTraits&) {
  const Variant variant = variant_of(spec, Arrangement::kRearranged);
  std::vector<Tactic> list;
  for (int i = 0; i < kKernels; ++i) {
    const auto kernel = static_cast<Kernel>(i);
    if (present(variant, kernel) != kernel) continue;
    const TaskShape task = traits_of(spec, kernel, Arrangement::kRearranged).task;
    list.push_back({i, "weights widened in registers, " + describe(task)});
  }
  return list;
}

// --- a stage's arguments
// Offset of one step along each dimension of cells [E, N, G], in elements; 0 where there is one.
struct CellStrides {
  std::int64_t expert = 0, row = 0, group = 0, reach = 0;
  explicit CellStrides(const Tensor& t) {
    const auto stride = [&](int i) { return t.rank > i && t.shape[i] > 1 ? t.strides[i] : 0; };
    expert = stride(0), row = stride(1), group = stride(2);
    for (int i = 0; i < t.rank; ++i) reach += (t.shape[i] - 1) * t.strides[i];
  }
};

void set_cells(DequantParams& p, const WeightSpec& spec, const GemmWeights& weights,
               int scales_at_once) {
  if (!weights.scale.defined()) invalid("scale: this scheme's weights need scales");
  const CellStrides scale(weights.scale);
  p.scale = weights.scale.as<const float>();
  p.cell_expert = static_cast<std::uint32_t>(scale.expert);
  p.cell_row = static_cast<std::uint32_t>(scale.row);
  p.cell_group = static_cast<std::uint32_t>(scale.group);
  p.cell_rows = static_cast<std::uint32_t>(std::max<std::int64_t>(spec.scale.group_n, 1));
  p.groups = static_cast<std::uint32_t>(along_k(spec) ? spec.scale.grid_k : 1);
  p.group_blocks =
      static_cast<std::uint32_t>(along_k(spec) ? spec.scale.group_k / 32 : ceil_div(spec.k, 32));
  const std::int64_t promoted = is_fine(spec) ? 32 : 128;
  p.scales_together = along_k(spec) && scale.group == 1 && spec.scale.group_k == promoted &&
                      scale.row % scales_at_once == 0 && scale.expert % scales_at_once == 0 &&
                      aligned(p.scale, 4 * static_cast<std::size_t>(scales_at_once));
  std::int64_t reach = scale.reach;
  if (spec.zero_points) {
    if (!weights.zero_point.defined())
      invalid("zero_point: this scheme's weights need zero points");
    const CellStrides zero(weights.zero_point);
    p.zero = weights.zero_point.as<const std::uint8_t>();
    if (!aligned(p.zero, 4)) {
      unsupported(
          "zero_point: the wgmma kernels read zero points from a tensor that starts at a multiple "
          "of 4 bytes; pass a contiguous copy");
    }
    p.zero_expert = static_cast<std::uint32_t>(zero.expert);
    p.zero_row = static_cast<std::uint32_t>(zero.row);
    p.zero_group = static_cast<std::uint32_t>(zero.group);
    p.zero_bytes = static_cast<std::uint32_t>(zero.reach + 1);
    p.zero_nibbles = spec.format == WeightFormat::kU4;
    reach = std::max(reach, zero.reach + 1);
  }
  if (reach > 0xfffffff0LL || spec.n > 0x3fffffffLL) {
    unsupported("scale: more than 2^32 cells; split the experts over several layers");
  }
}

void run(const GemmStage& stage, const DeviceTraits& device, cudaStream_t stream) {
  if (stage.rows.max_tiles == 0 || stage.rows.positions == 0) return;
  const WeightSpec& spec = stage.b->spec;
  const KernelTraits traits = choice(stage, device);
  DequantParams p{};
  set_arguments(p, stage, Element::kBF16, traits.task);
  set_weights(
      p, stage,
      {.element = Element::kE4M3,
       .row_k = row_bytes(spec),
       .k = traits.row_bytes,
       .weight_rows = traits.task.weight_rows,
       .swizzle = traits.row_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_128B});
  p.flip = spec.format == WeightFormat::kI8 ? 0x80808080u : 0;
  set_cells(p, spec, weights_of(*stage.b), traits.scales);
  const int grid = grid_size(p, stage, traits.task, device);
  traits.launch(p, grid, stream);
}

}  // namespace

const GemmFamily& family_sm90_dequant() {
  static constexpr GemmFamily kFamily{.supports = supports,
                                      .tile_rows = tile_rows,
                                      .tactics = tactics,
                                      .check_rows = check_rows,
                                      .run = run,
                                      .makes_tiles = makes_tiles,
                                      .rearranges_u4 = true,
                                      .boxes = true};
  return kFamily;
}

}  // namespace moesaic::cuda
