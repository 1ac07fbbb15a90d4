// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <string>

#include "check.h"
#include "cuda/sm90/host.h"
#include "cuda/weights.h"

namespace moesaic::cuda::sm90 {

bool aligned(const void* data, std::size_t bytes) {
  return reinterpret_cast<std::uintptr_t>(data) % bytes == 0;
}

namespace {

// --- views
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

// --- tensor maps
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

template <int kRank>
struct Extent {
  cuuint64_t size[kRank];
  cuuint64_t bytes[kRank - 1];  // strides but the innermost
  cuuint32_t box[kRank];
};
template <int kRank>
void encode(CUtensorMap& map, const void* data, Element element, const Extent<kRank>& extent,
            const char* what, CUtensorMapSwizzle swizzle = CU_TENSOR_MAP_SWIZZLE_128B) {
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

std::int64_t size_of(Element element) { return element == Element::kE4M3 ? 1 : 2; }

// --- the parts of a stage
OutType out_type(DType dtype) {
  return dtype == DType::kBF16  ? OutType::kBF16
         : dtype == DType::kF16 ? OutType::kF16
                                : OutType::kF32;
}

void set_output(Params& p, const Tensor& c, const GemmQuantizer& quantizer) {
  const int last = c.rank - 1;
  p.c = c.data;
  p.c_type = out_type(c.dtype);
  if (quantizer.granularity == ActScale::kTensorStatic) {
    const Tensor& scale = quantizer.static_scale;
    p.c_type = out_type(quantizer.round_to);
    p.quantizer = {.kind = Quantizes::kStatic,
                   .given = scale.as<const float>(),
                   .expert_stride = scale.shape[0] > 1 ? scale.strides[0] : 0};
  } else if (quantizer.granularity == ActScale::kGroup) {
    p.c_type = out_type(quantizer.round_to);
    p.quantizer = {.kind = Quantizes::kGroup,
                   .scale = quantizer.scale,
                   .row_stride = quantizer.scale_row_stride};
  }
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
  // Only there somebody sees a whole group (sm90/groups.h).
  if (p.quantizer.kind == Quantizes::kGroup && p.store != StorePath::kMatrix)
    unsupported("c: rows quantized in groups are written contiguous, from multiples of 8 bytes on");
}

void set_side(Params& p, const GemmStage& stage) {
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

// Consecutive rows come by TMA, but for the narrow tiles: a box would bring rows that nobody wants.
// (Boxes of eight spared the multiplying warps a fence, and lost 0.5% at decode.)
void set_tokens(Params& p, const GemmStage& stage, Element element, const TaskShape& task) {
  const Tensor& a = stage.a;
  const std::int64_t bytes = size_of(element), unit = 16 / bytes, k = stage.b->spec.k;
  check_rows(a);
  p.a_row = stage.a_row;
  p.top_k = stage.top_k;
  p.a = a.as<const char>();
  p.a_rows = row_layout(a, unit);
  p.k_bytes = k * bytes;
  p.k_chunks = static_cast<std::int32_t>(ceil_div(p.k_bytes, 128));
  const std::int64_t rows = a.rank == 3 ? a.shape[0] * a.shape[1] : a.shape[0];
  const bool consecutive =
      stage.a_row == RowOf::kPosition && p.a_rows.inner == 0 && p.a_rows.stride > 0;
  p.token_load = consecutive && task.box < task.tokens ? TokenLoad::kTma : TokenLoad::kGather;
  if (p.token_load == TokenLoad::kTma) {
    encode<2>(p.tokens, a.data, element,
              {{static_cast<cuuint64_t>(k), static_cast<cuuint64_t>(rows)},
               {static_cast<cuuint64_t>(p.a_rows.stride * 16)},
               {static_cast<cuuint32_t>(128 / bytes), static_cast<cuuint32_t>(task.box)}},
              "a");
  } else if (rows * (p.a_rows.inner ? p.a_rows.outer : p.a_rows.stride) > 0xffffffffLL) {
    unsupported("a: rows beyond 64 GiB cannot be gathered; split the tokens over several calls");
  }
}

// Whether weights may leave L2 as soon as they are read, so that x, of which an expert's tokens
// read a part each, stays (bf16 deepseek-v3-tp8, T = 1024: GEMM1 reads 1.94 instead of 2.02 GB).
// Tiles of up to 128 rows as a rule hold all rows of an expert. Where rows do not begin with a line
// of L2, each line is read for two chunks of K, and was gone before the second (fp8_block of
// gpt-oss, rows of 2880 bytes: 2% longer); so it was where much more is written than read again
// (GEMM2 of deepseek-v3-tp8, T = 1024: 384 instead of 363 us).
bool reads_weights_once(const Params& p, std::uint64_t row_bytes) {
  constexpr std::int64_t kFewBytes = 4 << 20;
  const std::int64_t written = p.rows.positions * p.columns * 2;
  return p.rows.tile_rows <= 128 && row_bytes % 128 == 0 && (p.activates || written <= kFewBytes);
}

}  // namespace

void check_rows(const Tensor& a) {
  const auto unit = static_cast<std::int64_t>(16 / size_of(a.dtype));
  if (!multiples(a, unit) || !aligned(a.data, 16)) {
    unsupported(
        "a: the wgmma kernels read rows that start at multiples of 16 bytes; pass a contiguous "
        "copy");
  }
}

void set_arguments(Params& p, const GemmStage& stage, Element element, const TaskShape& task) {
  const WeightSpec& spec = stage.b->spec;
  if (stage.rows.positions > 0xfffffff0LL || stage.rows.slot_count > 0x7fffffffLL) {
    unsupported(
        "positions: the wgmma kernels number rows with 32 bits; split the tokens over several "
        "calls");
  }
  p.rows = stage.rows;
  p.settled = stage.list_age == ListAge::kSettled;
  p.experts = static_cast<std::int32_t>(spec.experts);
  p.gated = stage.activation != nullptr && is_gated(stage.activation->kind);
  p.columns = p.gated ? spec.n / 2 : spec.n;
  p.sub_tiles = static_cast<std::int32_t>(ceil_div(stage.rows.tile_rows, task.tokens));
  // (Tiles of 16 rows are what dividing them evenly in units of 16 would give.)
  p.even_tiles = p.sub_tiles == 1 && stage.rows.tile_rows > 16 && stage.rows.tile_rows % 16 == 0;
  p.task_weight_rows = task.weight_rows;
  p.weight_tasks = static_cast<std::int32_t>(ceil_div(spec.n, task.weight_rows));
  p.run = task.run;
  p.weight_runs = static_cast<std::int32_t>(ceil_div(p.weight_tasks, p.run));
  p.c_row = stage.c_row;
  set_tokens(p, stage, element, task);
  if (stage.unlisted.any()) p.unlisted = stage.unlisted;
  set_side(p, stage);
  set_output(p, stage.c, stage.quantizer);
}

// Gate and up rows are brought together by the map: 8 rows of gate, 8 of up, and so on, whichever
// way the caller's N lies. So a thread's accumulators hold gate and up of the same column. Where
// rows of C leave directly, the 8 rows are every second (or, with gate and up interleaved or in an
// ungated product, every fourth) of a unit of 16 columns (32 rows): sm90/direct.h.
void set_weights(Params& p, const GemmStage& stage, const WeightBox& box) {
  const Tensor& w = weights_of(*stage.b).weight;
  const std::int64_t bytes = size_of(box.element), n = stage.b->spec.n;
  if (w.strides[2] != 1 || !multiples(w, 16 / bytes) || !aligned(w.data, 16)) {
    unsupported(
        "weight: the wgmma kernels read rows of K contiguous elements that start at multiples of "
        "16 bytes; pass a contiguous copy");
  }
  const auto row = static_cast<cuuint64_t>(w.strides[1] * bytes);
  const auto expert =
      static_cast<cuuint64_t>(w.shape[0] > 1 ? w.strides[0] * bytes : n * w.strides[1] * bytes);
  const auto k = static_cast<cuuint64_t>(box.row_k), experts = static_cast<cuuint64_t>(p.experts);
  const auto half = static_cast<cuuint64_t>(p.columns);
  const auto box_k = static_cast<cuuint32_t>(box.k),
             rows = static_cast<cuuint32_t>(box.weight_rows);
  Extent<5> extent;
  const bool direct = p.direct != Direct::kNo;
  if (direct && p.gated && !p.interleaved) {
    extent = {{k, 8, 2 * experts, half / 16, 2},
              {2 * row, half * row, 16 * row, row},
              {box_k, 8, 2, 4, 1}};
  } else if (direct) {
    extent = {{k, 8, 4, static_cast<cuuint64_t>(n) / 32, experts},
              {4 * row, row, 32 * row, expert},
              {box_k, 8, 2, 4, 1}};
  } else if (!p.gated) {
    extent = {{k, static_cast<cuuint64_t>(n), 1, 1, experts},
              {row, expert, expert, expert},
              {box_k, rows, 1, 1, 1}};
  } else if (p.interleaved) {
    extent = {{k, 8, 2, half / 8, experts},
              {2 * row, row, 16 * row, expert},
              {box_k, 8, 2, rows / 16, 1}};
  } else {
    extent = {{k, 8, 2, half / 8, experts},
              {row, half * row, 8 * row, expert},
              {box_k, 8, 2, rows / 16, 1}};
  }
  p.weights_once = reads_weights_once(p, row);
  encode(p.weights, w.data, box.element, extent, "weight", box.swizzle);
}

std::int64_t run_of(std::int64_t row_bytes, const TaskShape& task) {
  constexpr std::int64_t kRunBytes = 128 << 10;
  return std::min(kRunBytes / task.per_sm / (row_bytes * task.weight_rows), kLongestRun);
}
int fair_run(std::int64_t longest, std::int64_t tasks, std::int64_t least, const TaskShape& task,
             const DeviceTraits& device) {
  const std::int64_t fair = tasks * task.pair / (least * device.sm_count * task.per_sm);
  return static_cast<int>(std::max<std::int64_t>(std::min(fair, longest), 1));
}

std::string describe(const TaskShape& task) {
  return std::to_string(task.tokens) + " tokens x " + std::to_string(task.weight_rows) + " rows" +
         (task.run > 1 ? ", in runs of " + std::to_string(task.run) : "") +
         (task.pair == 2 ? ", CTA pairs" : "");
}

// Bytes of tokens that a group of tiles may have beyond what fills the machine; tiles that a warp
// can look over with the next one's begin.
constexpr std::int64_t kGroupTokens = 2 << 20, kMostGroupTiles = 31;

int grid_size(Params& p, const GemmStage& stage, const TaskShape& task, const DeviceTraits& device,
              std::int64_t least_dealt_bytes) {
  const std::int64_t tasks = p.rows.max_tiles * p.sub_tiles * p.weight_runs;
  const std::int64_t teams = device.sm_count * task.per_sm / task.pair;
  // A group that just fills the machine ends with nearly every wave, and at each end the loading
  // warps wait for the list: where K is short that took longer than the task. So a group is more,
  // as long as its tokens are few beside L2.
  const std::int64_t filling = std::min<std::int64_t>(ceil_div(teams, p.weight_runs), 16);
  const std::int64_t cheap = kGroupTokens / (p.rows.tile_rows * p.k_bytes);
  p.group_tiles = static_cast<std::int32_t>(std::max(filling, std::min(cheap, kMostGroupTiles)));
  p.spread = task.per_sm > 1 && tasks <= device.sm_count;
  // With fewer tasks than that a counter levels out less than asking it costs at a CTA's end. (And
  // a piece of a tile that has no rows would be dealt to somebody, and take him a stage.)
  constexpr std::int64_t kLeastDealt = 3;  // of a CTA
  const bool deals = !stage.unlisted.any() && p.sub_tiles == 1 && tasks >= kLeastDealt * teams &&
                     p.k_bytes * p.run >= least_dealt_bytes;
  p.next_task = deals ? stage.next_task : nullptr;
  return static_cast<int>(tasks < teams ? tasks : teams) * task.pair;
}

}  // namespace moesaic::cuda::sm90
