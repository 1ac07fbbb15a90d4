// SPDX-License-Identifier: Apache-2.0
// Arbitrary configurations and arguments for Layer, forward, the stages, the grouped GEMM and the
// pieces around it: an Error, or a call that stays inside the tensors. The tensors' memory is real
// and poisoned around; their shapes, dtypes, strides and presence are the fuzzer's. Values inside
// are hostile, too: ids, counts, NaN.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "moesaic/moesaic.h"

namespace {

using namespace moesaic;

// Small numbers from the input; zeros when it ends.
class Source {
 public:
  Source(const std::uint8_t* data, std::size_t size) : data_(data), size_(size) {}
  std::uint8_t byte() { return at_ < size_ ? data_[at_++] : 0; }
  std::int64_t below(std::int64_t limit) { return byte() % limit; }
  template <typename E>
  E choice(int count) {
    return static_cast<E>(byte() % count);
  }
  bool rare() { return byte() >= 240; }
  // Mostly `usual`; sometimes near it, negative or enormous (only where nothing is allocated from
  // it).
  std::int64_t extent(std::int64_t usual) {
    if (!rare()) return usual;
    constexpr std::int64_t kOdd[] = {
        0, -1, 1, INT64_MIN, INT64_MAX, INT64_C(1) << 32, INT64_C(1) << 62};
    const std::int64_t i = below(9);
    return i < 7 ? kOdd[i] : usual + (i == 7 ? 1 : -1);
  }

 private:
  const std::uint8_t* data_;
  std::size_t size_;
  std::size_t at_ = 0;
};

// Owns the memory of every tensor of one run.
class Memory {
 public:
  explicit Memory(Source& source) : source_(source) {}
  // `shape` is what the call wants; now and then something else comes, in memory of the right size
  // for what is said, or no tensor at all.
  Tensor tensor(DType dtype, std::vector<std::int64_t> shape) {
    if (source_.rare()) return {};
    if (source_.rare()) dtype = source_.choice<DType>(9);
    for (std::int64_t& extent : shape) extent = source_.extent(extent);
    if (source_.rare() && shape.size() < Tensor::kMaxRank) shape.push_back(2);
    if (source_.rare() && shape.size() > 1) shape.pop_back();
    Tensor t = Tensor::contiguous(nullptr, dtype, shape);
    if (source_.rare()) {
      std::int64_t& stride = t.strides[static_cast<std::size_t>(source_.below(t.rank))];
      const std::int64_t change = source_.below(7) - 3;
      if (stride < INT64_MAX - 3) stride += change;
    }
    // Room for what shape and strides address; impossible ones get none.
    __int128 low = 0, high = 0;
    bool empty = false, bad = false;
    for (int i = 0; i < t.rank; ++i) {
      const std::int64_t extent = t.shape[static_cast<std::size_t>(i)],
                         stride = t.strides[static_cast<std::size_t>(i)];
      bad |= extent < 0;
      empty |= extent == 0;
      (stride < 0 ? low : high) += (static_cast<__int128>(extent) - 1) * stride;
    }
    constexpr std::int64_t kMaxBytes = 1 << 20;
    const __int128 span = std::min<__int128>(high - low + 1, 2 * kMaxBytes);  // four bytes each fit
    const __int128 bytes = span * static_cast<__int128>(size_of(dtype));
    if (bad || empty || bytes > kMaxBytes) {
      // A call that accepts an enormous view of no memory must crash here: that is a finding,
      // except for the library trusting the caller about how much memory there is. So none is
      // passed on.
      if (!bad && !empty) skip_ = true;
      return t;
    }
    blocks_.emplace_back(static_cast<std::size_t>(bytes) + 64);
    std::vector<std::uint8_t>& block = blocks_.back();
    const std::uint8_t seed = source_.byte();
    for (std::size_t i = 0; i < block.size(); ++i)
      block[i] = static_cast<std::uint8_t>(i * seed + (i >> 5));
    // The end of the block is the end of the tensor, up to alignment.
    const auto end = reinterpret_cast<std::uintptr_t>(block.data() + block.size()) -
                     static_cast<std::size_t>(bytes);
    const std::uintptr_t begin = end / 64 * 64;
    t.data = reinterpret_cast<void*>(
        begin - static_cast<std::uintptr_t>(static_cast<std::int64_t>(low) *
                                            static_cast<std::int64_t>(size_of(dtype))));
    return t;
  }
  bool skip() const { return skip_; }

 private:
  Source& source_;
  std::vector<std::vector<std::uint8_t>> blocks_;
  bool skip_ = false;
};

LayerConfig make_config(Source& s) {
  LayerConfig c;
  c.experts = s.rare() ? s.below(9) - 4 : 1 + s.below(6);
  c.hidden = s.rare() ? s.below(9) - 4 : 2 * (1 + s.below(33));
  c.intermediate = s.rare() ? s.below(9) - 4 : 2 * (1 + s.below(33));
  c.top_k = s.rare() ? s.extent(1) : 1 + s.below(3);
  c.max_tokens = s.rare() ? s.below(9) - 4 : s.below(9);
  if (s.rare()) c.local = {s.below(9) - 2, s.below(9) - 2};
  c.quant.scheme = s.choice<Scheme>(kNumSchemes + 1);
  if (s.rare()) c.quant.weight_scale = s.choice<WeightScale>(6);
  if (s.rare()) c.quant.act_scale = s.choice<ActScale>(6);
  c.quant.block_n = s.rare() ? s.extent(16) : 16;
  c.quant.block_k = s.rare() ? s.extent(16) : 16;
  c.quant.group_size = s.rare() ? s.extent(16) : 16;
  c.quant.zero_points = s.rare();
  c.activation.kind = s.choice<Activation>(kNumActivations);
  c.activation.order = s.choice<GateOrder>(2);
  c.activation.layout = s.choice<GateLayout>(2);
  c.routing.method = s.choice<RoutingMethod>(kNumRoutingMethods);
  c.routing.groups = static_cast<int>(s.rare() ? s.below(9) - 4 : 1);
  c.routing.topk_groups = static_cast<int>(s.rare() ? s.below(9) - 4 : 1);
  c.weight_on = s.choice<WeightOn>(2);
  const DType usual = c.quant.scheme == Scheme::kF32   ? DType::kF32
                      : c.quant.scheme == Scheme::kF16 ? DType::kF16
                                                       : DType::kBF16;
  c.input_dtype = s.rare() ? s.choice<DType>(9) : usual;
  c.output_dtype = s.rare() ? s.choice<DType>(9) : usual;
  c.workspace_cap = s.rare() ? static_cast<std::size_t>(s.byte()) * 64 : 0;
  return c;
}

// Weights roughly as the configuration wants them, from the scheme's own description of itself.
GemmWeights make_weights(const LayerConfig& c, std::int64_t n, std::int64_t k, Source& s, Memory& m,
                         std::int64_t experts = 1) {
  const Scheme scheme = c.quant.scheme;
  const bool four = scheme == Scheme::kInt4W4A16 || scheme == Scheme::kInt4W4A8Fp8 ||
                    scheme == Scheme::kInt4W4A8Int8 || scheme == Scheme::kMxfp4W4A16;
  const DType dtype = scheme == Scheme::kF32                                        ? DType::kF32
                      : scheme == Scheme::kF16                                      ? DType::kF16
                      : scheme == Scheme::kBF16                                     ? DType::kBF16
                      : four                                                        ? DType::kU8
                      : scheme >= Scheme::kFp8Tensor && scheme <= Scheme::kFp8W8A16 ? DType::kF8E4M3
                                                                                    : DType::kI8;
  GemmWeights w;
  w.weight = m.tensor(dtype, {experts, n, four ? k / 2 : k});
  if (scheme <= Scheme::kBF16) {
  } else if (scheme == Scheme::kMxfp4W4A16) {
    w.scale = m.tensor(DType::kU8, {experts, n, (k + 31) / 32});
  } else if (four) {
    w.scale = m.tensor(DType::kF32, {experts, n, (k + 15) / 16});
  } else if (scheme == Scheme::kFp8Block || scheme == Scheme::kInt8Block) {
    w.scale = m.tensor(DType::kF32, {experts, (n + 15) / 16, (k + 15) / 16});
  } else if (scheme == Scheme::kFp8Tensor) {
    w.scale = m.tensor(DType::kF32, {experts});
  } else {
    w.scale = m.tensor(DType::kF32, {experts, n});
  }
  if (c.quant.zero_points)
    w.zero_point = m.tensor(DType::kU8, {experts, four ? n / 2 : n, (k + 15) / 16});
  if (s.rare()) w.bias = m.tensor(DType::kF32, {experts, n});
  if (c.quant.act_scale == ActScale::kTensorStatic) w.input_scale = m.tensor(DType::kF32, {1});
  return w;
}

void fuzz_layer(Source& s) {
  const LayerConfig c = make_config(s);
  Layer layer(c);
  Memory m(s);
  const std::int64_t n1 = (is_gated(c.activation.kind) ? 2 : 1) * c.intermediate;
  const std::int64_t local = layer.config().local.count;
  for (std::int64_t e = 0; e < local; ++e) {
    const LayerWeights w{.fc1 = make_weights(c, n1, c.hidden, s, m),
                         .fc2 = make_weights(c, c.hidden, c.intermediate, s, m),
                         .activation = {}};
    if (m.skip()) return;
    layer.load_expert(s.extent(e), w);
  }
  const std::int64_t tokens = s.below(9);
  ForwardArgs a;
  a.hidden_states = m.tensor(c.input_dtype, {tokens, c.hidden});
  a.output = m.tensor(c.output_dtype, {tokens, c.hidden});
  const std::int64_t how = s.below(4);
  if (how == 0) a.router_logits = m.tensor(DType::kF32, {tokens, c.experts});
  if (how == 1)
    layer.set_router({.weight = m.tensor(DType::kBF16, {c.experts, c.hidden}),
                      .bias = {},
                      .selection_bias = {}});
  if (how >= 2) {
    a.topk_ids = m.tensor(how == 2 ? DType::kI32 : DType::kI64, {tokens, c.top_k});
    a.topk_weights = m.tensor(DType::kF32, {tokens, c.top_k});
  }
  if (s.rare()) a.tokens_per_expert = m.tensor(DType::kI32, {local});
  if (m.skip()) return;
  const WorkspaceBuffer workspace(
      layer.device(), layer.workspace_bytes(std::clamp<std::int64_t>(tokens, 0, c.max_tokens)));
  a.workspace = workspace.view();
  if (s.rare()) a.workspace.bytes = a.workspace.bytes / 2;
  layer.forward(a);
}

void fuzz_pieces(Source& s) {
  Memory m(s);
  const std::int64_t tokens = s.below(9), experts = 1 + s.below(9), k = 1 + s.below(4),
                     hidden = 1 + s.below(64);
  const WorkspaceBuffer workspace({}, 1 << 16);
  switch (s.below(5)) {
    case 0: {
      RouteArgs a;
      a.spec.method = s.choice<RoutingMethod>(kNumRoutingMethods);
      a.spec.groups = static_cast<int>(s.extent(1));
      a.logits = m.tensor(DType::kF32, {tokens, experts});
      a.topk_ids = m.tensor(DType::kI32, {tokens, k});
      a.topk_weights = m.tensor(DType::kF32, {tokens, k});
      a.workspace = workspace.view();
      if (!m.skip()) route(a);
      return;
    }
    case 1: {
      AlignArgs a;
      a.topk_ids = m.tensor(DType::kI32, {tokens, k});
      a.experts = s.rare() ? s.extent(experts) : experts;
      a.rows.block_rows = s.rare() ? s.extent(4) : 4;
      const std::int64_t capacity = align_capacity(tokens * k, experts, 4);
      a.rows.slots = m.tensor(DType::kI32, {capacity});
      a.rows.block_experts = m.tensor(DType::kI32, {(capacity + 3) / 4});
      a.rows.num_padded = m.tensor(DType::kI32, {1});
      if (s.rare()) a.expert_map = m.tensor(DType::kI32, {experts});
      if (s.rare()) a.slot_row = m.tensor(DType::kI32, {tokens * k});
      if (s.rare()) a.tokens_per_expert = m.tensor(DType::kI32, {experts});
      a.workspace = workspace.view();
      if (!m.skip()) align(a);
      return;
    }
    case 2: {
      QuantizeArgs a;
      a.input = m.tensor(DType::kBF16, {tokens, hidden});
      a.to = s.rare() ? s.choice<DType>(9) : s.below(2) ? DType::kI8 : DType::kF8E4M3;
      a.granularity = s.choice<ActScale>(5);
      a.group_size = s.rare() ? s.extent(16) : 16;
      a.output = m.tensor(a.to, {tokens, hidden});
      if (a.granularity == ActScale::kTensorStatic) a.static_scale = m.tensor(DType::kF32, {1});
      a.scale = m.tensor(DType::kF32,
                         {tokens, a.granularity == ActScale::kGroup ? (hidden + 15) / 16 : 1});
      a.workspace = workspace.view();
      if (!m.skip()) quantize(a);
      return;
    }
    case 3: {
      ActivateArgs a;
      a.spec.kind = s.choice<Activation>(kNumActivations);
      a.spec.order = s.choice<GateOrder>(2);
      a.spec.layout = s.choice<GateLayout>(2);
      const std::int64_t width = is_gated(a.spec.kind) ? 2 * hidden : hidden;
      a.input = m.tensor(s.choice<DType>(3), {tokens, width});
      if (s.below(2)) {
        a.parameters.alpha = m.tensor(DType::kF32, {experts});
        a.parameters.limit = m.tensor(DType::kF32, {experts});
        a.row_expert = m.tensor(DType::kI32, {tokens});
      }
      a.output = m.tensor(s.choice<DType>(3), {tokens, hidden});
      if (!m.skip()) activate(a);
      return;
    }
    default: {
      SumArgs a;
      a.input = m.tensor(DType::kF32, {tokens, k, hidden});
      if (s.rare()) a.slot_row = m.tensor(DType::kI32, {tokens, k});
      if (s.rare()) a.topk_ids = m.tensor(DType::kI32, {tokens, k});
      if (s.below(2)) a.topk_weights = m.tensor(DType::kF32, {tokens, k});
      a.output = m.tensor(DType::kBF16, {tokens, hidden});
      if (!m.skip()) sum_slots(a);
    }
  }
}

// Level 3 on weights in place, in either format. Lists hold anything.
void fuzz_grouped(Source& s) {
  LayerConfig c = make_config(s);
  Memory m(s);
  const std::int64_t experts = 1 + s.below(4), n = 2 * (1 + s.below(33)), k = 2 * (1 + s.below(33)),
                     tokens = s.below(9);
  GroupedGemmArgs a;
  a.quant = c.quant;
  a.top_k = s.rare() ? s.extent(1) : 1 + s.below(3);
  c.activation.kind = Activation::kIdentity;
  a.b = make_weights(c, n, k, s, m, experts);
  if (s.below(2) == 0) {
    const std::int64_t capacity = s.below(9);
    a.a = m.tensor(c.input_dtype, {experts, capacity, k});
    a.batched.num_tokens = m.tensor(DType::kI32, {experts});
    if (s.rare()) a.a_scale = m.tensor(DType::kF32, {experts, capacity, 1});
    a.c = m.tensor(DType::kF32, {experts, capacity, n});
  } else {
    constexpr std::int64_t kRows = 4;
    const std::int64_t slots = tokens * std::clamp<std::int64_t>(a.top_k, 1, 4);
    const std::int64_t capacity = align_capacity(slots, experts, kRows);
    a.sorted = {.slots = m.tensor(DType::kI32, {capacity}),
                .block_experts = m.tensor(DType::kI32, {(capacity + kRows - 1) / kRows}),
                .num_padded = m.tensor(DType::kI32, {1}),
                .block_rows = s.rare() ? s.extent(kRows) : kRows};
    a.a_order = s.choice<RowOrder>(2);
    a.c_order = s.choice<RowOrder>(2);
    a.a = m.tensor(c.input_dtype, {a.a_order == RowOrder::kSorted ? capacity : tokens, k});
    if (s.rare()) a.row_weights = m.tensor(DType::kF32, {slots});
    a.c = m.tensor(DType::kF32, {a.c_order == RowOrder::kSorted ? capacity : slots, n});
  }
  if (m.skip()) return;
  const WorkspaceBuffer workspace({}, grouped_gemm_workspace_bytes(a));
  a.workspace = workspace.view();
  if (s.rare()) a.workspace.bytes /= 2;
  grouped_gemm(a);
}

// Level 2 through a batched buffer, each call with its own idea of the shapes.
void fuzz_stages(Source& s) {
  LayerConfig c = make_config(s);
  Memory m(s);
  const std::int64_t experts = std::clamp<std::int64_t>(
                         c.local.count > 0 ? c.local.count : c.experts, 0, 8),
                     tokens = s.below(9), capacity = s.below(9);
  const WorkspaceBuffer workspace(
      {}, stage_workspace_bytes(c, {.tokens = tokens, .capacity = capacity}));
  const bool scaled = c.quant.scheme > Scheme::kBF16;
  PrepareArgs p;
  p.hidden_states = m.tensor(c.input_dtype, {tokens, c.hidden});
  p.topk_ids = m.tensor(DType::kI32, {tokens, c.top_k});
  p.topk_weights = m.tensor(DType::kF32, {tokens, c.top_k});
  if (s.rare()) p.expert_map = m.tensor(DType::kI32, {c.experts});
  p.rows = m.tensor(s.below(2) ? c.input_dtype : s.choice<DType>(9), {experts, capacity, c.hidden});
  if (scaled) p.row_scale = m.tensor(DType::kF32, {experts, capacity, 1});
  p.num_tokens = m.tensor(DType::kI32, {experts});
  if (s.below(2)) p.slot_row = m.tensor(DType::kI32, {tokens, c.top_k});
  if (s.rare()) p.status = m.tensor(DType::kI32, {1});
  p.workspace = workspace.view();
  FinalizeArgs f;
  f.expert_output = m.tensor(DType::kF32, {experts, capacity, c.hidden});
  f.topk_ids = p.topk_ids;
  f.topk_weights = p.topk_weights;
  if (s.below(2)) f.slot_row = m.tensor(DType::kI32, {tokens, c.top_k});
  f.output = m.tensor(c.output_dtype, {tokens, c.hidden});
  f.workspace = workspace.view();
  ExpertsArgs e;
  e.rows = p.rows;
  if (scaled) e.row_scale = p.row_scale;
  e.batched.num_tokens = m.tensor(DType::kI32, {experts});
  e.output = f.expert_output;
  e.expected_tokens = s.extent(tokens);
  e.workspace = workspace.view();
  const std::int64_t n1 = (is_gated(c.activation.kind) ? 2 : 1) * c.intermediate;
  const LayerWeights w{.fc1 = make_weights(c, n1, c.hidden, s, m, experts),
                       .fc2 = make_weights(c, c.hidden, c.intermediate, s, m, experts),
                       .activation = {}};
  if (m.skip()) return;
  const auto each = [](const auto& call) {
    try {
      call();
    } catch (const Error&) {
    }
  };
  each([&] { prepare(c, p); });
  each([&] { moesaic::experts(c, w, e); });
  each([&] { finalize(c, f); });
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const bool once = [] {
    set_num_threads(1);
    return true;
  }();
  static_cast<void>(once);
  Source source(data, size);
  try {
    switch (source.below(4)) {
      case 0:
        fuzz_layer(source);
        break;
      case 1:
        fuzz_pieces(source);
        break;
      case 2:
        fuzz_grouped(source);
        break;
      default:
        fuzz_stages(source);
    }
  } catch (const Error&) {
  }
  return 0;
}
