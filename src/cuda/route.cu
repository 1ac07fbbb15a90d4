// SPDX-License-Identifier: Apache-2.0
// Routing: one warp per token, or a block where experts are many. Every sum has a fixed tree, so a
// token's experts and weights do not depend on the batch.
//
// Where a score is a monotone function of the logit and nothing is added to it, the logits
// themselves are compared: a saturated sigmoid would make ties of numbers that differ.
#include <algorithm>

#include "cuda/choose_experts.h"
#include "cuda/device.h"
#include "cuda/element.h"
#include "cuda/overlap.h"
#include "cuda/stages.h"

namespace moesaic::cuda {
namespace {

enum class Score : std::uint8_t { kLogit, kSoftmax, kSigmoid, kSqrtSoftplus };
enum class Divisor : std::uint8_t { kPlain, kTiny, kFloor };  // sum; sum + 1e-20; max(sum, floor)

struct RouteParams {
  const void* logits = nullptr;
  DType logits_dtype = DType::kF32;
  std::int64_t logits_stride = 0;
  const void* bias = nullptr;
  DType bias_dtype = DType::kF32;
  const void* selection_bias = nullptr;
  DType selection_dtype = DType::kF32;
  std::int32_t* ids = nullptr;
  float* weights = nullptr;
  std::int64_t ids_stride = 0, weights_stride = 0;
  int experts = 0, top_k = 0;
  Score selection = Score::kLogit;  // what is compared, before the selection bias
  Score weight = Score::kLogit;
  bool renormalize = false, sparsemixer = false;
  Divisor divisor = Divisor::kPlain;
  int groups = 1, topk_groups = 1;
  int group_best = 1;  // a group's score: the sum of its best 1 or 2
  float scale = 1.0f, sum_floor = 0.0f, threshold = 0.0f;
};

__device__ __forceinline__ float sigmoid(float z) { return 1.0f / (1.0f + expf(-z)); }
__device__ __forceinline__ float softplus(float z) {
  return fmaxf(z, 0.0f) + log1pf(expf(-fabsf(z)));
}

struct SoftmaxSums {
  float top = 0.0f, sum = 1.0f;  // of exp(z - top) over all experts
};

// A call, not inlined: it would be unrolled for every expert of a lane, and compile for a minute.
__device__ __noinline__ float score(Score kind, float z, const SoftmaxSums& softmax) {
  switch (kind) {
    case Score::kSoftmax:
      return expf(z - softmax.top) / softmax.sum;
    case Score::kSigmoid:
      return sigmoid(z);
    case Score::kSqrtSoftplus:
      return sqrtf(softplus(z));
    default:
      return z;
  }
}

// Which groups stay: kept[g] in shared memory. A group's score is the sum of its best one or two.
__device__ __forceinline__ void choose_groups(const RouteParams& p, const float* choice,
                                              float* group_score, bool* kept) {
  const int lane = threadIdx.x, size = p.experts / p.groups;
  for (int g = lane; g < p.groups; g += 32) {
    float first = NAN, second = NAN;  // NaN ranks last, and a sum with it, too
    int i = g % size;                 // lanes begin at different members: no bank conflicts
    for (int n = 0; n < size; ++n) {
      const float c = choice[g * size + i];
      if (order_key(c) > order_key(first)) {
        second = first;
        first = c;
      } else if (order_key(c) > order_key(second)) {
        second = c;
      }
      if (++i == size) i = 0;
    }
    group_score[g] = p.group_best == 2 && size > 1 ? first + second : first;
  }
  __syncwarp();
  for (int g = lane; g < p.groups; g += 32) {
    const unsigned mine = order_key(group_score[g]);
    int better = 0;
    for (int h = 0; h < p.groups; ++h) {
      const unsigned other = order_key(group_score[h]);
      better += other > mine || (other == mine && h < g);
    }
    kept[g] = better < p.topk_groups;
  }
  __syncwarp();
}

// Phi-3.5's weight of the best expert that is left: a softmax over the experts near it. `chosen` is
// the pick of lane j for j < picks: those are masked out.
__device__ __forceinline__ float sparsemixer_weight(const RouteParams& p, const float* logits,
                                                    float top, int chosen, int picks) {
  float sum = 0.0f;
  for (int first = 0; first < p.experts; first += 32) {
    const int expert = first + static_cast<int>(threadIdx.x);
    bool out = expert >= p.experts;
    for (int j = 0; j < picks; ++j) out |= __shfl_sync(kAllLanes, chosen, j) == expert;
    if (!out) {
      const float z = logits[expert];
      if (!((top - z) / fmaxf(fabsf(z), top) > p.threshold)) sum += expf(z - top);
    }
  }
  return 1.0f / warp_sum(sum);
}

// What the warps found, put together in their order.
template <bool kOneWarp, typename F>
__device__ __forceinline__ float over_warps(float mine, F&& both) {
  if constexpr (kOneWarp) return mine;
  __shared__ float warps[kMostThreads / 32];
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = mine;
  __syncthreads();
  float all = warps[0];
  for (unsigned w = 1; w < blockDim.x / 32; ++w) all = both(all, warps[w]);
  return all;
}

// Up to 256 experts are one warp's, which then picks one after the other. A kernel this short takes
// the time in which its instructions come from memory: with 16 experts to a lane they were so many
// that 512 experts took 5 to 5.5 us, where a block takes 4; with 4 or 8, on the other hand, ranks
// and barriers took 0.5 longer than picks.
template <int kPerThread, bool kOneWarp>
__global__ void __launch_bounds__(kOneWarp ? 32 : kMostThreads, 1) route_tokens(RouteParams p) {
  begin_kernel();
  // Of several warps candidates [E]; z [E]; grouped only: choice [E], group scores [G], kept [G].
  extern __shared__ __align__(8) unsigned char shared[];
  Candidate* const candidates = reinterpret_cast<Candidate*>(shared);
  float* const at_hand = reinterpret_cast<float*>(candidates + (kOneWarp ? 0 : p.experts));
  float* const choices = at_hand + p.experts;
  const std::int64_t token = blockIdx.x;
  const int lane = threadIdx.x, threads = kOneWarp ? 32 : blockDim.x;
  const auto expert_of = [&](int i) { return i * threads + lane; };
  float z[kPerThread];
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    z[i] = -INFINITY;
    if (expert_of(i) < p.experts)
      z[i] = load_float(p.logits, p.logits_dtype, token * p.logits_stride + expert_of(i));
  }
  if (p.bias != nullptr) {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i)
      if (expert_of(i) < p.experts) z[i] += load_float(p.bias, p.bias_dtype, expert_of(i));
  }
  // Read again for the chosen ones: from memory that would be a second trip.
#pragma unroll
  for (int i = 0; i < kPerThread; ++i)
    if (expert_of(i) < p.experts) at_hand[expert_of(i)] = z[i];
  SoftmaxSums softmax;
  if (p.selection == Score::kSoftmax || (p.weight == Score::kSoftmax && !p.renormalize) ||
      p.divisor == Divisor::kFloor) {
    float top = -INFINITY, sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) top = fmaxf(top, z[i]);
    softmax.top = over_warps<kOneWarp>(warp_max(top), [](float a, float b) { return fmaxf(a, b); });
    if (softmax.top == -INFINITY) softmax.top = 0.0f;  // all -inf: -inf - -inf would be NaN
#pragma unroll
    for (int i = 0; i < kPerThread; ++i)
      if (expert_of(i) < p.experts) sum += expf(z[i] - softmax.top);
    softmax.sum = over_warps<kOneWarp>(warp_sum(sum), [](float a, float b) { return a + b; });
  }
  // Keys to choose by.
  unsigned key[kPerThread];
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    const int expert = expert_of(i);
    key[i] = 0;
    if (expert >= p.experts) continue;
    float choice = p.selection == Score::kLogit ? z[i] : score(p.selection, z[i], softmax);
    if (p.selection_bias != nullptr)
      choice += load_float(p.selection_bias, p.selection_dtype, expert);
    key[i] = order_key(choice);
    if (p.groups > 1) choices[expert] = choice;
  }
  if (p.groups > 1) {
    float* const group_score = choices + p.experts;
    bool* const kept = reinterpret_cast<bool*>(group_score + p.groups);
    __syncthreads();
    if (lane < 32) choose_groups(p, choices, group_score, kept);
    __syncthreads();
    const int size = p.experts / p.groups;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i)
      if (expert_of(i) < p.experts && !kept[expert_of(i) / size]) key[i] = 0;
  }
  int chosen = -1;  // lane j has pick j
  if constexpr (kOneWarp) {
    chosen = pick_experts(key, p.top_k);
    __syncwarp();  // what others have at hand
  } else {
    __shared__ int order[32];
    choose_experts(key, p.top_k, candidates, order);
    if (lane >= 32) return;
    if (lane < p.top_k) chosen = order[lane];
  }
  const float chosen_z = chosen >= 0 ? at_hand[chosen] : -INFINITY;
  float weight = 0.0f;
  if (p.sparsemixer) {
    for (int j = 0; j < p.top_k; ++j) {
      if (__shfl_sync(kAllLanes, chosen, j) < 0) break;
      const float w =
          sparsemixer_weight(p, at_hand, __shfl_sync(kAllLanes, chosen_z, j), chosen, j);
      if (lane == j) weight = w;
    }
  } else {
    if (p.weight == Score::kSoftmax && p.renormalize && p.divisor != Divisor::kFloor)
      softmax = {.top = warp_max(chosen_z), .sum = 1.0f};  // the sum over S divides below
    weight = chosen >= 0 ? score(p.weight, chosen_z, softmax) : 0.0f;
  }
  if (p.renormalize) {
    float sum = warp_sum(weight);
    if (p.divisor == Divisor::kTiny) sum += 1e-20f;
    if (p.divisor == Divisor::kFloor) sum = sum < p.sum_floor ? p.sum_floor : sum;
    weight = sum == 0.0f ? 0.0f : weight / sum;
  }
  if (lane < p.top_k) {
    p.ids[token * p.ids_stride + lane] = chosen;
    p.weights[token * p.weights_stride + lane] = chosen >= 0 ? weight * p.scale : 0.0f;
  }
}

// --- the host's side -----------------------------------------------------------------------------
RouteParams make_params(const RouteStage& s, const Tensor& logits) {
  const RoutingSpec& spec = s.spec;
  RouteParams p{.logits = logits.data,
                .logits_dtype = logits.dtype,
                .logits_stride = logits.strides[0],
                .ids = s.topk_ids.as<std::int32_t>(),
                .weights = s.topk_weights.as<float>(),
                .ids_stride = s.topk_ids.strides[0],
                .weights_stride = s.topk_weights.strides[0],
                .experts = static_cast<int>(logits.shape[1]),
                .top_k = static_cast<int>(s.topk_ids.shape[1]),
                .scale = spec.scale,
                .sum_floor = spec.sum_floor,
                .threshold = 2.0f * spec.jitter};
  if (s.router.bias.defined()) {
    p.bias = s.router.bias.data;
    p.bias_dtype = s.router.bias.dtype;
  }
  if (s.router.selection_bias.defined()) {
    p.selection_bias = s.router.selection_bias.data;
    p.selection_dtype = s.router.selection_bias.dtype;
  }
  switch (spec.method) {
    case RoutingMethod::kSoftmaxTopK:
      p.weight = Score::kSoftmax;
      break;
    case RoutingMethod::kRenormalize:
      p.weight = Score::kSoftmax;
      p.renormalize = true;
      break;
    case RoutingMethod::kDeepSeekV3:
      p.weight = Score::kSigmoid;
      p.renormalize = true;
      p.divisor = Divisor::kTiny;
      p.groups = spec.groups;
      p.group_best = 2;
      break;
    case RoutingMethod::kDeepSeekV2:
      p.weight = Score::kSoftmax;
      p.groups = spec.groups;
      break;
    case RoutingMethod::kTopK:
      break;
    case RoutingMethod::kSigmoidRenorm:
    case RoutingMethod::kMiniMax2:
      p.weight = Score::kSigmoid;
      p.renormalize = true;
      p.divisor = Divisor::kTiny;
      break;
    case RoutingMethod::kLlama4:
    case RoutingMethod::kSigmoid:
      p.weight = Score::kSigmoid;
      break;
    case RoutingMethod::kSqrtSoftplus:
      p.weight = Score::kSqrtSoftplus;
      p.renormalize = true;
      break;
    case RoutingMethod::kSparseMixer:
      p.sparsemixer = true;
      break;
    case RoutingMethod::kSoftmaxBias:
      p.weight = Score::kSoftmax;
      p.renormalize = true;
      p.divisor = Divisor::kFloor;
      break;
  }
  p.topk_groups = spec.topk_groups;
  if (spec.renormalize == Renormalize::kNever) p.renormalize = false;
  if (spec.renormalize == Renormalize::kAlways) p.renormalize = true;
  if (p.sparsemixer) p.renormalize = false;  // each weight is a softmax of its own
  // The score itself decides only where something is added to it, or to other scores of its group.
  if (p.topk_groups >= p.groups) p.groups = 1;
  if (p.selection_bias != nullptr || (p.groups > 1 && p.group_best == 2)) p.selection = p.weight;
  return p;
}

}  // namespace

void run_route(const RouteStage& stage, const DeviceTraits& device, cudaStream_t stream) {
  const std::int64_t tokens = stage.topk_ids.shape[0];
  if (tokens == 0) return;
  Tensor logits = stage.logits;
  if (!logits.defined()) {
    run_router(stage, device, stream);
    logits = stage.logits_scratch;
  }
  const RouteParams p = make_params(stage, logits);
  const auto experts = static_cast<std::size_t>(p.experts);
  std::size_t shared = experts * sizeof(float);
  if (p.groups > 1) {
    const auto groups = static_cast<std::size_t>(p.groups);
    shared += (experts + groups) * sizeof(float) + groups * sizeof(bool);
  }
  const auto go = [&](auto kernel, int warps) {
    launch("route", kernel,
           {.grid = dim3(static_cast<unsigned>(tokens)),
            .block = dim3(static_cast<unsigned>(32 * warps)),
            .shared_bytes = shared + (warps > 1 ? experts * sizeof(Candidate) : 0),
            .dependency = overlap(device)},
           stream, p);
  };
  if (p.experts <= 128) return go(route_tokens<4, true>, 1);
  if (p.experts <= 256) return go(route_tokens<8, true>, 1);
  constexpr int kOfWarp = 32 * kExpertsOfThread;
  go(route_tokens<kExpertsOfThread, false>, (p.experts + kOfWarp - 1) / kOfWarp);
}

}  // namespace moesaic::cuda
