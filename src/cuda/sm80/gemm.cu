// SPDX-License-Identifier: Apache-2.0
// The SM80 family on the host: which operand serves a scheme, which tile a shape gets, and the
// translation of a stage into the kernel's argument.
#include <algorithm>
#include <cmath>
#include <string>

#include "check.h"
#include "cuda/gemm.h"
#include "cuda/sm80/gemm.h"
#include "cuda/weights.h"
#include "divide.h"

namespace moesaic::cuda {
namespace {

// --- scheme -> compiled kernels ------------------------------------------------------------------
// Empty when the family has no operand for it.
std::span<const Sm80Kernel> kernels_of(const WeightSpec& spec) {
  const bool bf16 = spec.act_dtype == DType::kBF16;
  switch (spec.format) {
    case WeightFormat::kF32:
      return sm80_f32();
    case WeightFormat::kF16:
      return sm80_f16();
    case WeightFormat::kBF16:
      return sm80_bf16();
    case WeightFormat::kE4M3:
      if (spec.act == ActFormat::kE4M3) return sm80_e4m3_e4m3();
      return bf16 ? sm80_e4m3_bf16() : sm80_e4m3_f16();
    case WeightFormat::kI8:
      if (spec.act == ActFormat::kI8) return sm80_i8_i8();
      return bf16 ? sm80_i8_bf16() : sm80_i8_f16();
    case WeightFormat::kU8:
      return bf16 ? sm80_i8_bf16() : sm80_i8_f16();
    case WeightFormat::kU4:
      if (spec.act != ActFormat::k16) return {};  // w4a8
      return bf16 ? sm80_u4_bf16() : sm80_u4_f16();
    case WeightFormat::kE2M1:
      return bf16 ? sm80_e2m1_bf16() : sm80_e2m1_f16();
  }
  return {};
}

bool grouped(const WeightSpec& spec) { return spec.scale.has_scale && spec.scale.grid_k > 1; }

// Why a product cannot be done; empty when it can.
std::string obstacle(const WeightSpec& spec) {
  if (kernels_of(spec).empty()) {
    return "this scheme has no CUDA kernel; use a 16-bit-activation scheme or the CPU backend";
  }
  if (spec.k % 8 != 0) {
    return "K = " + std::to_string(spec.k) +
           " is not a multiple of 8; pad the weights' K with zeros";
  }
  if (grouped(spec) && spec.scale.group_k % 32 != 0) {
    return "scale groups of " + std::to_string(spec.scale.group_k) +
           " along K are not multiples of 32; use groups of 32, 64 or 128";
  }
  if (spec.act_scale == ActScale::kGroup) {
    if (spec.act_group % 32 != 0 && spec.act_group < spec.k)
      return "activation groups must be multiples of 32; use 128";
    if (grouped(spec) && spec.act_group != spec.scale.group_k) {
      return "activation groups and weight groups differ along K; use the same block_k";
    }
  }
  return {};
}

bool supports(const WeightSpec& spec) { return obstacle(spec).empty(); }

// The kernels of small tiles do (sm80/walk.h): every operand has them for eight tokens.
constexpr std::int64_t kSmallTokens = 8;
bool makes_tiles(const WeightSpec&, const RowMap& rows, const DeviceTraits&) {
  return rows.tile_rows <= kSmallTokens;
}

// --- policy --------------------------------------------------------------------------------------
// Rows per tile from the mean of live rows per active expert. Tiles a little above the mean: at
// decode rows are free (bytes are the bound) and a second tile would read the weights again, from
// L2.
std::int64_t tile_rows(const WeightSpec& fc1, std::int64_t slots, const DeviceTraits&) {
  const std::int64_t active = std::max<std::int64_t>(1, std::min(slots, fc1.experts));
  const std::int64_t mean = (slots + active - 1) / active;
  std::int64_t rows = mean <= 3 ? 8 : mean <= 10 ? 16 : mean <= 22 ? 32 : mean <= 80 ? 64 : 128;
  const auto list = kernels_of(fc1);
  if (!list.empty()) rows = std::min<std::int64_t>(rows, list.back().tokens);
  return rows;
}

std::vector<Tactic> tactics(const WeightSpec& spec, const DeviceTraits& device) {
  std::vector<Tactic> out;
  const auto list = kernels_of(spec);
  for (std::size_t i = 0; i < list.size(); ++i) {
    const Sm80Kernel& kernel = list[i];
    if (kernel.shared_bytes > device.shared_per_block) continue;
    out.push_back({static_cast<int>(i), "sm80 " + std::to_string(kernel.tokens) + "x" +
                                            std::to_string(kernel.rows) + "x" +
                                            std::to_string(kernel.depth) + " stages " +
                                            std::to_string(kernel.stages)});
  }
  return out;
}

// The experts that evenly loaded slots are likely to meet: each token goes to top_k of them.
double active_experts(std::int64_t slots, std::int64_t top_k, std::int64_t experts) {
  const auto all = static_cast<double>(experts), share = static_cast<double>(top_k) / all;
  const double tokens = static_cast<double>(slots) / static_cast<double>(top_k);
  return share < 1 ? all * (1 - std::pow(1 - share, tokens)) : all;
}

// CTAs that an SM holds: its memory is 1 KiB more than a CTA may have, and each costs 1 KiB more
// than it asks for.
std::int64_t resident(const Sm80Kernel& kernel, const DeviceTraits& device) {
  const auto room =
      static_cast<std::int64_t>((device.shared_per_block + 1024) / (kernel.shared_bytes + 1024));
  return std::min<std::int64_t>(kernel.ctas_per_sm, room);
}

// The tile that fits the rows of a Tile. Of several, in decode, the one whose last wave leaves the
// least of the machine idle (qwen3-30b-a3b at T = 4 in int4: 350 tiles of 128 weight rows are one
// wave, 22 us, 700 of 64 one and a third, 25; mixtral at T = 1 448 and 896: 74 and 61). Else, or
// of equals, the widest that still gives every SM two CTAs' work.
const Sm80Kernel& choose(std::span<const Sm80Kernel> list, const GemmStage& stage,
                         const DeviceTraits& device) {
  const WeightSpec& spec = stage.b->spec;
  const RowMap& rows = stage.rows;
  const auto fits = [&](const Sm80Kernel& k) { return k.shared_bytes <= device.shared_per_block; };
  std::int64_t tokens = 0;
  for (const Sm80Kernel& k : list) {
    if (fits(k) && tokens < rows.tile_rows) tokens = std::max<std::int64_t>(tokens, k.tokens);
  }
  const std::int64_t top_k = std::max<std::int64_t>(stage.top_k, 1);
  const double likely = std::min<double>(static_cast<double>(rows.max_tiles),
                                         active_experts(rows.slot_count, top_k, spec.experts));
  const Sm80Kernel* best = nullptr;
  double best_cost = 0;
  for (const Sm80Kernel& k : list) {
    if (!fits(k) || k.tokens != tokens) continue;
    const std::int64_t columns = ceil_div(spec.n, k.rows);
    const std::int64_t work = rows.max_tiles * ceil_div(rows.tile_rows, k.tokens) * columns;
    const auto at_once = static_cast<double>(resident(k, device) * device.sm_count);
    const double cost =
        tokens > kSmallTokens
            ? 0
            : std::ceil(likely * static_cast<double>(columns) / at_once) * at_once * k.rows;
    const bool wider = k.rows > (best ? best->rows : 0) && work >= 2 * device.sm_count;
    if (best == nullptr || cost < best_cost || (cost == best_cost && wider)) {
      best = &k;
      best_cost = cost;
    }
  }
  if (best == nullptr) unsupported("this GPU has too little shared memory for the SM80 kernels");
  return *best;
}

// --- stage -> kernel argument --------------------------------------------------------------------
bool divides(std::uint64_t unit, std::initializer_list<std::uint64_t> values) {
  return std::all_of(values.begin(), values.end(), [&](std::uint64_t v) { return v % unit == 0; });
}
std::uint64_t address(const void* p) { return reinterpret_cast<std::uintptr_t>(p); }

// Units of 16 bytes where everything allows it, else of 4.
int copy_shift(const char* argument, std::initializer_list<std::uint64_t> values) {
  if (divides(16, values)) return 4;
  if (divides(4, values)) return 2;
  unsupported(
      std::string(argument) +
      ": data and strides must be multiples of 4 bytes on cuda; copy it into a dense tensor");
}

// Strides of a rank 2 or rank 3 view whose last dimension is the columns; of what is there once
// none.
RowStrides row_strides(const Tensor& t) {
  const auto stride = [&](int i) { return t.shape[i] > 1 ? t.strides[i] : 0; };
  if (t.rank == 2) return {.inner = stride(0)};
  return {.outer = stride(0),
          .inner = stride(1),
          .inner_rows = static_cast<std::uint32_t>(std::max<std::int64_t>(t.shape[1], 1))};
}

std::int64_t bits_of(WeightFormat format) {
  switch (format) {
    case WeightFormat::kF32:
      return 32;
    case WeightFormat::kF16:
    case WeightFormat::kBF16:
      return 16;
    case WeightFormat::kE4M3:
    case WeightFormat::kI8:
    case WeightFormat::kU8:
      return 8;
    case WeightFormat::kU4:
    case WeightFormat::kE2M1:
      return 4;
  }
  return 8;
}

void set_rows(Sm80Params& p, const GemmStage& stage) {
  p.tiles = stage.rows.tiles;
  p.num_tiles = stage.rows.num_tiles;
  p.row_slot = stage.unlisted.ids != nullptr ? nullptr : stage.rows.row_slot;  // position = slot
  p.unlisted = stage.unlisted;
  p.tile_rows = static_cast<std::int32_t>(stage.rows.tile_rows);
  p.settled = stage.list_age == ListAge::kSettled;
  p.max_tiles = static_cast<std::int32_t>(stage.rows.max_tiles);
  p.slot_count = static_cast<std::uint32_t>(stage.rows.slot_count);
  p.top_k = static_cast<std::uint32_t>(std::max<std::int64_t>(stage.top_k, 1));
}

int shift_of_rows(const Tensor& a) {
  const auto size = static_cast<std::int64_t>(size_of(a.dtype));
  const RowStrides rows = row_strides(a);
  return copy_shift("a", {address(a.data), static_cast<std::uint64_t>(rows.outer * size),
                          static_cast<std::uint64_t>(rows.inner * size)});
}
void check_rows(const Tensor& a) { shift_of_rows(a); }

void set_activations(Sm80Params& p, const GemmStage& stage) {
  const Tensor& a = stage.a;
  const std::int64_t size = static_cast<std::int64_t>(size_of(a.dtype));
  RowStrides rows = row_strides(a);
  p.a = a.as<const char>();
  p.a_shift = shift_of_rows(a);
  rows.outer = rows.outer * size >> p.a_shift;
  rows.inner = rows.inner * size >> p.a_shift;
  const std::int64_t last = a.rank == 3
                                ? (a.shape[0] - 1) * rows.outer + (a.shape[1] - 1) * rows.inner
                                : (a.shape[0] - 1) * rows.inner;
  if (last >= 0xffffffffLL) {
    unsupported(
        "a: the mma.sync kernels find rows within 2^32 times the alignment of their first elements "
        "(16 bytes at best); split the tokens over several calls");
  }
  p.a_rows = rows;
  p.a_row = stage.a_row;
  p.a_scale = stage.a_scale.data;
  p.a_scale_row = stage.a_scale.row_stride;
  p.a_scale_group = stage.a_scale.group_stride;
  p.a_scale_expert = stage.a_scale.expert_stride;
}

void set_weights(Sm80Params& p, const GemmStage& stage) {
  const WeightSpec& spec = stage.b->spec;
  const GemmWeights& weights = weights_of(*stage.b);
  const Tensor& w = weights.weight;
  if (arrangement_of(*stage.b) != Arrangement::kPlain) {
    unsupported(
        "weight: packed 4-bit weights in the order of the SM90 kernels; the mma.sync kernels read "
        "the plain one");
  }
  const std::int64_t bits = bits_of(spec.format);
  const std::int64_t stored = bits == 4 ? 1 : bits / 8;  // bytes of a stored element
  if (w.strides[2] != 1 && w.shape[2] > 1) {
    unsupported("weight: K must be contiguous on cuda; load it into a layer, which packs it");
  }
  p.experts = static_cast<std::int32_t>(spec.experts);
  p.k = static_cast<std::int32_t>(spec.k);
  p.w = w.as<const char>();
  p.w_expert = spec.experts > 1 ? w.strides[0] * stored : 0;
  p.w_shift = copy_shift("weight", {address(w.data), static_cast<std::uint64_t>(p.w_expert),
                                    static_cast<std::uint64_t>(w.strides[1] * stored)});
  p.w_row = w.strides[1] * stored >> p.w_shift;

  const bool gated = stage.activation && is_gated(stage.activation->kind);
  p.n_out = static_cast<std::int32_t>(gated ? spec.n / 2 : spec.n);
  if (gated) {
    const bool interleaved = stage.activation->layout == GateLayout::kInterleaved;
    const int up = stage.activation->order == GateOrder::kGateFirst ? 1 : 0;
    p.gated = 1;
    p.row_multiple = interleaved ? 2 : 1;
    p.row_offset[up] = interleaved ? 1 : p.n_out;
  }
}

// e, then rows, then K groups, of a tensor of rank 1 (E), 2 (E, N) or 3 (E, N, G).
struct GridStrides {
  std::int64_t expert = 0, row = 0, group = 0;
  explicit GridStrides(const Tensor& t)
      : expert(t.strides[0]),
        row(t.rank > 1 ? t.strides[1] : 0),
        group(t.rank > 2 ? t.strides[2] : 0) {}
};

void set_scales(Sm80Params& p, const GemmStage& stage) {
  const WeightSpec& spec = stage.b->spec;
  const GemmWeights& weights = weights_of(*stage.b);
  const std::int64_t groups_k = spec.scale.has_scale ? spec.scale.grid_k : 1;
  p.implicit_zero = static_cast<std::uint32_t>(spec.implicit_zero());
  if (spec.format == WeightFormat::kI8) {
    p.byte_flip = 0x80808080u;  // stored q + 128 after the flip
    p.implicit_zero = 128;
  }
  const std::int64_t whole = (spec.k + 255) / 256 * 8;  // whole stages: the kernel's simple path
  if (groups_k > 1) p.group_blocks = static_cast<std::int32_t>(spec.scale.group_k / 32);
  if (weights.scale.defined() && !spec.e8m0_scales) {
    const GridStrides strides(weights.scale);
    p.scale = weights.scale.as<const float>();
    p.scale_expert = strides.expert;
    p.scale_row = spec.scale.grid_n > 1 ? strides.row : 0;
    p.scale_group = groups_k > 1 ? strides.group : 0;
    p.scale_rows = static_cast<std::int32_t>(std::max<std::int64_t>(spec.scale.group_n, 1));
  }
  const Tensor& zero = spec.e8m0_scales ? weights.scale : weights.zero_point;
  if (zero.defined() && (spec.zero_points || spec.e8m0_scales)) {
    const GridStrides strides(zero);
    p.zero = zero.as<const std::uint8_t>();
    std::int64_t span = 1;
    for (int i = 0; i < zero.rank; ++i) span += (zero.shape[i] - 1) * zero.strides[i];
    p.zero_end = p.zero + span;
    p.zero_whole = address(p.zero_end) % 4 == 0;
    p.zero_expert = strides.expert;
    p.zero_row = strides.row;
    p.zero_group = groups_k > 1 ? strides.group : 0;
    p.zero_nibbles = spec.format == WeightFormat::kU4;
    if (p.group_blocks == 0) p.group_blocks = static_cast<std::int32_t>(whole);
  }
  if (stage.a_scale.data && stage.a_scale.group_stride != 0 && spec.act_group < spec.k) {
    p.a_scale_grouped = 1;
    if (p.group_blocks == 0) p.group_blocks = static_cast<std::int32_t>(spec.act_group / 32);
  }
}

void set_epilogue(Sm80Params& p, const GemmStage& stage) {
  const SideTensors& side = stage.b->side;
  if (side.alpha.defined()) {
    p.alpha = side.alpha.as<const float>();
    p.alpha_stride = side.alpha.strides[0];
  }
  if (side.bias.defined()) {
    p.bias = side.bias.data;
    p.bias_dtype = side.bias.dtype;
    p.bias_expert = side.bias.strides[0];
    p.bias_row = side.bias.strides[1];
  }
  if (stage.activation) {
    p.has_activation = 1;
    p.activation = activation_view(*stage.activation, side.activation);
  }
  // Scales in the main loop are read without asking whether there are any.
  if (p.group_blocks != 0 && p.scale == nullptr && !stage.b->spec.e8m0_scales) {
    unsupported("weight scales: grouped activation scales or zero points need weight scales, too");
  }
  p.row_weights = stage.row_weights;
  const Tensor& c = stage.c;
  p.c = c.data;
  p.c_dtype = c.dtype;
  p.c_row = stage.c_row;
  p.c_rows = row_strides(c);
  p.c_column = c.strides[c.rank - 1];
  p.c_vector = 1;
  if (p.c_column == 1) {
    const std::uint64_t size = size_of(c.dtype);
    for (const std::uint64_t width : {2, 4, 8}) {
      const std::uint64_t bytes = std::min<std::uint64_t>(width * size, 16);  // one store
      if (divides(bytes, {address(c.data), p.c_rows.outer * size, p.c_rows.inner * size})) {
        p.c_vector = static_cast<std::int32_t>(width);
      } else {
        break;
      }
    }
  }
}

void run(const GemmStage& stage, const DeviceTraits& device, cudaStream_t stream) {
  const WeightSpec& spec = stage.b->spec;
  if (const std::string why = obstacle(spec); !why.empty()) unsupported(why);
  if (stage.rows.max_tiles == 0 || spec.n == 0) return;
  if (!is_float(stage.c.dtype))
    unsupported("c: 8-bit output is not fused on SM80; quantize afterwards");
  if (stage.row_weights && stage.rows.row_slot == nullptr) {
    unsupported("row_weights: the batched format has no slots to index them by; weigh in finalize");
  }
  Sm80Params p;
  set_rows(p, stage);
  set_activations(p, stage);
  set_weights(p, stage);
  p.aligned = p.a_shift == 4 && p.w_shift == 4;
  set_scales(p, stage);
  set_epilogue(p, stage);

  const auto list = kernels_of(spec);
  const bool forced = stage.tactic >= 0 && stage.tactic < static_cast<int>(list.size()) &&
                      list[stage.tactic].shared_bytes <= device.shared_per_block;
  const Sm80Kernel& kernel = forced ? list[stage.tactic] : choose(list, stage, device);
  const std::int64_t columns = kernel.rows / (p.gated ? 2 : 1);
  p.parts = static_cast<std::int32_t>((stage.rows.tile_rows + kernel.tokens - 1) / kernel.tokens);
  p.column_tiles = static_cast<std::int32_t>((p.n_out + columns - 1) / columns);
  const std::int64_t work = stage.rows.max_tiles * p.parts * p.column_tiles;
  if (work > 0x7fffffff || stage.rows.positions > 0x7fffffff) {
    unsupported("rows: more than 2^31 tiles or positions; run in token chunks (workspace_cap)");
  }
  const std::int64_t ctas = std::min(work, resident(kernel, device) * device.sm_count);
  launch("gemm (sm80)", kernel.kernel,
         {.grid = dim3(static_cast<unsigned>(ctas)),
          .block = dim3(static_cast<unsigned>(kernel.threads)),
          .shared_bytes = kernel.shared_bytes,
          .dependency = device.compute_capability >= 90 ? Dependency::kOverlap : Dependency::kFull},
         stream, p);
}

}  // namespace

const GemmFamily& family_sm80() {
  static constexpr GemmFamily kFamily{.supports = supports,
                                      .tile_rows = tile_rows,
                                      .tactics = tactics,
                                      .check_rows = check_rows,
                                      .run = run,
                                      .makes_tiles = makes_tiles};
  return kFamily;
}

}  // namespace moesaic::cuda
