// SPDX-License-Identifier: Apache-2.0
// Host side of the SM90a family: which schemes it takes, which kernel runs a stage, tensor maps.
#include <string>

#include "check.h"
#include "cuda/gemm.h"
#include "cuda/gemm_sm90.h"
#include "cuda/gemm_sm90_host.h"

namespace moesaic::cuda {
namespace {

using namespace sm90;

// --- the closed list of kernels
enum class Kernel : int { kNarrow, kMiddle, kWide, kWidest, kNarrowHalf };
constexpr int kKernels = 5;

struct KernelTraits {
  int tokens, rows;  // of a task
  int pair;          // CTAs that run it together
  int per_sm;        // CTAs that fit into an SM
  int box;           // tokens of a TMA load
  void (*launch)(const Params&, int, cudaStream_t);
  const char* text;
};

template <Element E>
KernelTraits traits_of(Kernel kernel) {
  switch (kernel) {
    case Kernel::kNarrow:
      return {16, 64, 1, 2, Narrow<E>::kBox, launch_gemm<Narrow<E>>, "16 tokens x 64 rows"};
    case Kernel::kNarrowHalf:
      return {16, 32, 1, 2, Narrow<E>::kBox, launch_gemm<Narrow<E>>, "16 tokens x 32 rows"};
    case Kernel::kMiddle:
      return {64, 128, 1, 1, Middle<E>::kBox, launch_gemm<Middle<E>>, "64 tokens x 128 rows"};
    case Kernel::kWide:
      return {128, 128, 1, 1, Wide<E>::kBox, launch_gemm<Wide<E>>, "128 tokens x 128 rows"};
    case Kernel::kWidest:
      return {2 * Widest<E>::kTokens,
              256,
              2,
              1,
              Widest<E>::kBox,
              launch_gemm<Widest<E>>,
              E == Element::kE4M3 ? "256 tokens x 256 rows, CTA pairs"
                                  : "288 tokens x 256 rows, CTA pairs"};
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

bool block_scaled(const WeightSpec& spec) {
  return spec.format == WeightFormat::kE4M3 && spec.act_scale == ActScale::kGroup;
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
// The smallest tile that holds nearly every expert's rows: two standard deviations above the mean
// of uniform routing. A tile with fewer rows runs a smaller instruction, so too large costs little;
// too small reads weights once more through L2.
std::int64_t tile_rows(const WeightSpec& fc1, std::int64_t slots, const DeviceTraits&) {
  const std::int64_t mean = slots / (fc1.experts > 0 ? fc1.experts : 1);
  if (mean <= 9) return 16;
  if (mean <= 50) return 64;
  if (mean <= 108) return 128;
  return traits_of(element_of(fc1.format), Kernel::kWidest).tokens;
}

Kernel kernel_for(const GemmStage& stage, std::int64_t columns, bool gated,
                  const DeviceTraits& device) {
  const int forced = stage.tactic;
  if (forced >= 0 && forced < kKernels) return static_cast<Kernel>(forced);
  const std::int64_t rows = stage.rows.tile_rows;
  if (rows <= 16) {
    // Too few tasks to occupy the machine: halve them. The idle half of the instruction costs
    // nothing where memory is the bound.
    const std::int64_t weight_rows = gated ? 2 * columns : columns;
    const std::int64_t tasks = stage.rows.max_tiles * ceil_div(weight_rows, 64);
    return tasks * 4 <= device.sm_count * 3 ? Kernel::kNarrowHalf : Kernel::kNarrow;
  }
  if (rows <= 64) return Kernel::kMiddle;
  return rows <= 128 ? Kernel::kWide : Kernel::kWidest;
}

std::vector<Tactic> tactics(const WeightSpec& spec, const DeviceTraits&) {
  std::vector<Tactic> list;
  const Element element = element_of(spec.format);
  for (int i = 0; i < kKernels; ++i) {
    list.push_back({i, std::string("wgmma ") + traits_of(element, static_cast<Kernel>(i)).text});
  }
  return list;
}

}  // namespace

// --- tensor maps
namespace sm90 {
namespace {

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

EncodeTiled encoder() {
  static const EncodeTiled function = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult result{};
    check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000,
                                                cudaEnableDefault, &result),
               "cuTensorMapEncodeTiled");
    if (result != cudaDriverEntryPointSuccess || entry == nullptr) {
      throw Error(ErrorCode::kDevice,
                  "the driver has no cuTensorMapEncodeTiled; update it to CUDA 12 or newer");
    }
    return reinterpret_cast<EncodeTiled>(entry);
  }();
  return function;
}

}  // namespace

template <int kRank>
void encode(CUtensorMap& map, const void* data, Element element, const Extent<kRank>& extent,
            const char* what, CUtensorMapSwizzle swizzle) {
  cuuint32_t unit[kRank];
  for (cuuint32_t& u : unit) u = 1;
  const CUresult status = encoder()(
      &map,
      element == Element::kE4M3 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_UINT16,
      kRank, const_cast<void*>(data), extent.size, extent.bytes, extent.box, unit,
      CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    throw Error(ErrorCode::kDevice, std::string(what) +
                                        ": cuTensorMapEncodeTiled failed with code " +
                                        std::to_string(static_cast<int>(status)));
  }
}

template void encode<2>(CUtensorMap&, const void*, Element, const Extent<2>&, const char*,
                        CUtensorMapSwizzle);

// Gate and up rows are brought together by the map: 8 rows of gate, 8 of up, and so on, whichever
// way the caller's N lies. So a thread's accumulators hold gate and up of the same column.
void weight_map(Params& p, const Tensor& w, Element element, std::int64_t n, std::int64_t k,
                int chunk_k, int box_rows, CUtensorMapSwizzle swizzle) {
  const std::int64_t bytes = element == Element::kE4M3 ? 1 : 2;
  const auto row = static_cast<cuuint64_t>(w.strides[1] * bytes);
  const auto expert =
      static_cast<cuuint64_t>(w.shape[0] > 1 ? w.strides[0] * bytes : n * w.strides[1] * bytes);
  const auto size_k = static_cast<cuuint64_t>(k), experts = static_cast<cuuint64_t>(p.experts);
  const auto half = static_cast<cuuint64_t>(p.columns);
  const auto box_k = static_cast<cuuint32_t>(chunk_k), rows = static_cast<cuuint32_t>(box_rows);
  Extent<5> extent;
  if (!p.gated) {
    extent = {{size_k, static_cast<cuuint64_t>(n), 1, 1, experts},
              {row, expert, expert, expert},
              {box_k, rows, 1, 1, 1}};
  } else if (p.interleaved) {
    extent = {{size_k, 8, 2, half / 8, experts},
              {2 * row, row, 16 * row, expert},
              {box_k, 8, 2, rows / 16, 1}};
  } else {
    extent = {{size_k, 8, 2, half / 8, experts},
              {row, half * row, 8 * row, expert},
              {box_k, 8, 2, rows / 16, 1}};
  }
  encode(p.weights, w.data, element, extent, "weight", swizzle);
}

// --- a stage's arguments
OutType out_type(DType dtype) {
  return dtype == DType::kBF16  ? OutType::kBF16
         : dtype == DType::kF16 ? OutType::kF16
                                : OutType::kF32;
}

// Rows of a rank-2 or rank-3 tensor, in units of `unit` elements.
RowLayout row_layout(const Tensor& t, std::int64_t unit) {
  if (t.rank <= 2) return {.stride = t.rank == 2 ? t.strides[0] / unit : 0};
  if (t.strides[0] == t.shape[1] * t.strides[1]) return {.stride = t.strides[1] / unit};
  return {.stride = t.strides[1] / unit, .inner = t.shape[1], .outer = t.strides[0] / unit};
}

bool multiples(const Tensor& t, std::int64_t of) {  // all strides but the last
  for (int i = 0; i + 1 < t.rank; ++i) {
    if (t.shape[i] > 1 && t.strides[i] % of != 0) return false;
  }
  return true;
}

bool aligned(const void* data, std::size_t bytes) {
  return reinterpret_cast<std::uintptr_t>(data) % bytes == 0;
}

void set_output(Params& p, const Tensor& c) {
  const int last = c.rank - 1;
  p.c = c.data;
  p.c_type = out_type(c.dtype);
  p.c_rows = row_layout(c, 1);
  p.c_column = c.strides[last];
  const bool dense = c.shape[last] <= 1 || c.strides[last] == 1;
  const bool plain = p.c_rows.inner == 0 && p.c_rows.stride >= 0 && p.c_rows.stride <= 0xffffffffLL;
  if (dense && plain && p.c_type != OutType::kF32 && p.columns % 8 == 0 && multiples(c, 8) &&
      aligned(c.data, 16)) {
    p.store = StorePath::kMatrix;
  } else if (dense && p.columns % 4 == 0 && multiples(c, 4) && aligned(c.data, 16)) {
    p.store = StorePath::kVector;
  } else {
    p.store = StorePath::kScalar;
  }
}

}  // namespace sm90

namespace {

void set_scales(Params& p, const GemmStage& stage, const Tensor& scale) {
  const WeightSpec& spec = stage.b->spec;
  if (spec.format != WeightFormat::kE4M3) return;
  p.block_scaled = block_scaled(spec);
  if (scale.defined()) {
    p.weight_scale = scale.as<const float>();
    p.scale_expert = scale.strides[0];
    p.scale_row = scale.rank > 1 && scale.shape[1] > 1 ? scale.strides[1] : 0;
    p.scale_k = scale.rank > 2 && scale.shape[2] > 1 ? scale.strides[2] : 0;
    p.scale_group = spec.scale.group_n > 0 ? spec.scale.group_n : 1;
  }
  p.a_scale = stage.a_scale.data;
  p.a_scale_row = stage.a_scale.row_stride;
  p.a_scale_group = stage.a_scale.group_stride;
  p.a_scale_expert = stage.a_scale.expert_stride;
  if (p.block_scaled && (p.weight_scale == nullptr || p.a_scale == nullptr)) {
    invalid("scale: block-scaled e4m3 needs the scales of the weights and of the activations");
  }
}

}  // namespace

void sm90::set_side(Params& p, const GemmStage& stage) {
  const SideTensors& side = stage.b->side;
  if (side.bias.defined()) {
    p.bias = {.data = side.bias.data,
              .type = out_type(side.bias.dtype),
              .expert_stride = side.bias.strides[0],
              .stride = side.bias.strides[1]};
  }
  if (side.alpha.defined()) p.alpha = side.alpha.as<const float>();
  p.row_weights = stage.row_weights;
  if (stage.activation == nullptr) return;
  p.activates = true;
  p.activation = activation_view(*stage.activation, side.activation);
  p.up_first = stage.activation->order == GateOrder::kUpFirst;
  p.interleaved = stage.activation->layout == GateLayout::kInterleaved;
}

namespace {

// Whether the sides may be exchanged (gemm_sm90_upright.h): rows of C leave as 16-bit vectors, and
// each half (gate, up) of 128 weight rows lies in one cell of scales. (Without scales along K
// nothing is gained.)
bool upright(const Params& p) {
  const bool known = !p.activates || p.activation.kind == Activation::kSwiglu ||
                     p.activation.kind == Activation::kSwigluOai;
  const bool uniform =
      p.scale_row == 0 ||
      (p.scale_group % 128 == 0 && (!p.gated || p.interleaved || p.columns % 64 == 0));
  return p.block_scaled && p.store == StorePath::kMatrix && known && uniform;
}

// Whether the scales of four chunks are 16 aligned bytes.
bool scale_quads(const Params& p) {
  return p.block_scaled && p.a_scale_group == 1 && p.scale_k == 1 && p.k_chunks % 4 == 0 &&
         p.a_scale_row % 4 == 0 && p.a_scale_expert % 4 == 0 && p.scale_row % 4 == 0 &&
         p.scale_expert % 4 == 0 && aligned(p.a_scale, 16) && aligned(p.weight_scale, 16);
}

void run(const GemmStage& stage, const DeviceTraits& device, cudaStream_t stream) {
  const WeightSpec& spec = stage.b->spec;
  const GemmWeights& weights = weights_of(*stage.b);
  if (stage.rows.max_tiles == 0 || stage.rows.positions == 0) return;
  const Element element = element_of(spec.format);
  const std::int64_t bytes = element == Element::kE4M3 ? 1 : 2, unit = 16 / bytes;
  const Tensor& w = weights.weight;
  if (w.strides[2] != 1 || !multiples(w, unit) || !aligned(w.data, 16)) {
    unsupported(
        "weight: the wgmma kernels read rows of K contiguous elements that start at multiples of "
        "16 bytes; pass a contiguous copy");
  }
  if (!multiples(stage.a, unit) || !aligned(stage.a.data, 16)) {
    unsupported(
        "a: the wgmma kernels read rows that start at multiples of 16 bytes; pass a contiguous "
        "copy");
  }

  if (stage.rows.positions > 0xfffffff0LL || stage.rows.slot_count > 0x7fffffffLL) {
    unsupported(
        "positions: the wgmma kernels number rows with 32 bits; split the tokens over several "
        "calls");
  }

  Params p{};
  p.rows = stage.rows;
  p.experts = static_cast<std::int32_t>(spec.experts);
  p.gated = stage.activation != nullptr && is_gated(stage.activation->kind);
  p.columns = p.gated ? spec.n / 2 : spec.n;
  const Kernel kernel = kernel_for(stage, p.columns, p.gated, device);
  const KernelTraits traits = traits_of(element, kernel);
  p.sub_tiles = static_cast<std::int32_t>(ceil_div(stage.rows.tile_rows, traits.tokens));
  p.even_tiles = p.sub_tiles == 1 && stage.rows.tile_rows % 16 == 0;
  p.task_rows = traits.rows;
  p.row_tasks =
      static_cast<std::int32_t>(ceil_div(p.gated ? 2 * p.columns : p.columns, traits.rows));
  p.settled = stage.list_age == ListAge::kSettled;
  p.a_row = stage.a_row;
  p.c_row = stage.c_row;
  p.top_k = stage.top_k;
  p.a = stage.a.as<const char>();
  p.a_rows = row_layout(stage.a, unit);
  p.k_bytes = spec.k * bytes;
  p.k_chunks = static_cast<std::int32_t>(ceil_div(p.k_bytes, 128));
  set_side(p, stage);
  set_scales(p, stage, weights.scale);
  set_output(p, stage.c);

  p.upright = upright(p);
  p.scale_quads = scale_quads(p);

  const auto chunk_k = static_cast<int>(128 / bytes);
  weight_map(p, w, element, spec.n, spec.k, chunk_k, traits.rows / traits.pair);
  // Consecutive rows come by TMA, but for the narrow tiles: a box would bring rows that nobody
  // wants.
  const std::int64_t a_rows =
      stage.a.rank == 3 ? stage.a.shape[0] * stage.a.shape[1] : stage.a.shape[0];
  p.token_load = stage.a_row == RowOf::kPosition && p.a_rows.inner == 0 && traits.tokens >= 64
                     ? TokenLoad::kTma
                     : TokenLoad::kGather;
  if (p.token_load == TokenLoad::kTma) {
    encode<2>(p.tokens, stage.a.data, element,
              {{static_cast<cuuint64_t>(spec.k), static_cast<cuuint64_t>(a_rows)},
               {static_cast<cuuint64_t>(p.a_rows.stride * 16)},
               {static_cast<cuuint32_t>(chunk_k), static_cast<cuuint32_t>(traits.box)}},
              "a");
  } else if (a_rows * (p.a_rows.inner ? p.a_rows.outer : p.a_rows.stride) > 0xffffffffLL) {
    unsupported("a: rows beyond 64 GiB cannot be gathered; split the tokens over several calls");
  }
  const std::int64_t tasks = stage.rows.max_tiles * p.sub_tiles * p.row_tasks;
  const std::int64_t teams = device.sm_count * traits.per_sm / traits.pair;
  const std::int64_t group = ceil_div(teams, p.row_tasks);
  p.group_tiles = static_cast<std::int32_t>(group < 16 ? group : 16);
  traits.launch(p, static_cast<int>(tasks < teams ? tasks : teams) * traits.pair, stream);
}

}  // namespace

const GemmFamily& family_sm90() {
  static constexpr GemmFamily family{.supports = supports,
                                 .tile_rows = tile_rows,
                                 .tactics = tactics,
                                 .run = run,
                                 .boxes = true};
  return family;
}

}  // namespace moesaic::cuda
